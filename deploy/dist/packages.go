package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/goreleaser/nfpm/v2"
	_ "github.com/goreleaser/nfpm/v2/deb"
	"github.com/goreleaser/nfpm/v2/files"
	_ "github.com/goreleaser/nfpm/v2/rpm"
)

// packages writes the packages for one architecture.
func (r *release) packages(arch string) error {
	for _, format := range []string{"deb", "rpm"} {
		if err := r.pack(format, arch); err != nil {
			return fmt.Errorf("make the %s for %s: %w", format, arch, err)
		}
	}
	return nil
}

func (r *release) pack(format, arch string) error {
	scripts, err := r.scripts()
	if err != nil {
		return err
	}
	contents, err := r.contents(format, arch)
	if err != nil {
		return err
	}
	info := nfpm.WithDefaults(&nfpm.Info{
		Name: "nodeproxy", Arch: arch, Platform: "linux", Version: r.version, VersionSchema: "semver", Release: "1",
		Section: "net", Priority: "optional", Maintainer: "The nodeproxy authors <nodeproxy@localhost>", License: "Apache-2.0",
		Description: "Node proxy for Consul Connect\nOne daemon per node redirects the sockets of enrolled workloads to one mTLS proxy, which\nenforces Consul's intentions. Applications are not changed.",
		MTime:       r.time, DisableGlobbing: true,
		Overridables: nfpm.Overridables{
			Contents: contents, Scripts: scripts,
			RPM: nfpm.RPM{BuildHost: "localhost", Summary: "Node proxy for Consul Connect"},
		},
	})
	packager, err := nfpm.Get(format)
	if err != nil {
		return err
	}
	if err := nfpm.PrepareForPackager(info, format); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(r.out, packager.ConventionalFileName(info)))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := packager.Package(info, f); err != nil {
		return err
	}
	return f.Close()
}

// scripts puts the map ABI into the maintainer scripts.
func (r *release) scripts() (s nfpm.Scripts, err error) {
	for name, to := range map[string]*string{"preinstall": &s.PreInstall, "postinstall": &s.PostInstall, "preremove": &s.PreRemove, "postremove": &s.PostRemove} {
		text, err := os.ReadFile(filepath.Join(r.repo, "deploy/scripts", name+".sh"))
		if err != nil {
			return s, err
		}
		*to = filepath.Join(r.stage, name)
		if err := os.WriteFile(*to, []byte(strings.ReplaceAll(string(text), "@MAP_ABI@", strconv.Itoa(r.abi))), 0o755); err != nil {
			return s, err
		}
	}
	return s, nil
}

func (r *release) contents(format, arch string) (all files.Contents, err error) {
	add := func(typ string, mode fs.FileMode, from, to string) {
		all = append(all, &files.Content{Type: typ, Source: from, Destination: to, FileInfo: &files.ContentFileInfo{Mode: mode, Owner: "root", Group: "root", MTime: r.time}})
	}
	repo := func(path string) string { return filepath.Join(r.repo, path) }
	add("", 0o755, r.binary(arch), "/usr/bin/nodeproxy")
	add(files.TypeConfigNoReplace, 0o600, repo("deploy/nodeproxy.hcl"), "/etc/nodeproxy/nodeproxy.hcl")
	for _, dir := range []string{"/etc/nodeproxy", "/etc/nodeproxy/mesh.d", "/etc/nodeproxy/mesh.d/config", "/etc/nodeproxy/mesh.d/nodes"} {
		add(files.TypeDir, 0o700, "", dir)
	}
	for _, unit := range []string{"nodeproxy.service", "nodeproxy-boot.service"} {
		add("", 0o644, repo("deploy/"+unit), "/usr/lib/systemd/system/"+unit)
	}
	zsh := "/usr/share/zsh/vendor-completions/_nodeproxy"
	if format == "rpm" {
		zsh = "/usr/share/zsh/site-functions/_nodeproxy"
	}
	for shell, to := range map[string]string{"bash": "/usr/share/bash-completion/completions/nodeproxy", "zsh": zsh, "fish": "/usr/share/fish/vendor_completions.d/nodeproxy.fish"} {
		add("", 0o644, filepath.Join(r.stage, shell), to)
	}
	docs, err := filepath.Glob(repo("docs/*.*"))
	if err != nil {
		return nil, err
	}
	for _, doc := range append(docs, repo("README.md"), repo("CHANGELOG.md")) {
		add("", 0o644, doc, "/usr/share/doc/nodeproxy/"+filepath.Base(doc))
	}
	add("", 0o644, repo("LICENSE"), "/usr/share/doc/nodeproxy/copyright")
	pages, err := filepath.Glob(filepath.Join(r.stage, "man", "*.1"))
	if err != nil {
		return nil, err
	}
	for _, page := range pages {
		add("", 0o644, page, "/usr/share/man/man1/"+filepath.Base(page))
	}
	return all, nil
}
