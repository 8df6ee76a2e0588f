package kubernetes

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// deepest is how far below the root of cgroup2 a kubelet's cgroups are looked for: one that runs in a container has them there.
const deepest = 5

// cgroups finds those of pods below mount. A kubelet keeps them in directories that are called after its cgroup driver. It is
// not for concurrent use.
type cgroups struct {
	mount  string
	roots  []string
	looked time.Time
}

// of returns where a pod's cgroup is, or while there is none where it may come to be, one for each kubelet that there is a
// directory of. nil: there is no such directory.
func (g *cgroups) of(p *corev1.Pod) []string {
	if path := g.existing(p); path != "" {
		return []string{path}
	}
	if time.Since(g.looked) > lookEvery {
		g.look()
		if path := g.existing(p); path != "" {
			return []string{path}
		}
	}
	var paths []string
	for _, root := range g.roots {
		paths = append(paths, podCgroup(root, string(p.UID), p.Status.QOSClass))
	}
	return paths
}

func (g *cgroups) existing(p *corev1.Pod) string {
	for _, root := range g.roots {
		for _, class := range []corev1.PodQOSClass{corev1.PodQOSGuaranteed, corev1.PodQOSBurstable, corev1.PodQOSBestEffort} {
			path := podCgroup(root, string(p.UID), class)
			if _, err := os.Stat(path); err == nil {
				return path
			}
		}
	}
	return ""
}

// podCgroup is where a kubelet makes the cgroup of a pod (pkg/kubelet/cm in Kubernetes).
func podCgroup(root, uid string, class corev1.PodQOSClass) string {
	qos := strings.ToLower(string(class))
	base, systemd := strings.CutSuffix(filepath.Base(root), ".slice")
	switch {
	case !systemd && class == corev1.PodQOSGuaranteed:
		return filepath.Join(root, "pod"+uid)
	case !systemd:
		return filepath.Join(root, qos, "pod"+uid)
	}
	if class != corev1.PodQOSGuaranteed {
		base += "-" + qos
		root = filepath.Join(root, base+".slice")
	}
	return filepath.Join(root, base+"-pod"+strings.ReplaceAll(uid, "-", "_")+".slice")
}

// look finds the directories of kubelets. Those in pods or users' sessions are not the node's.
func (g *cgroups) look() {
	g.roots, g.looked = nil, time.Now()
	_ = filepath.WalkDir(g.mount, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil // it is gone, and looked for again
		}
		name := d.Name()
		switch {
		case name == "kubepods", name == "kubepods.slice", strings.HasSuffix(name, "-kubepods.slice"):
			if isRoots(path) {
				g.roots = append(g.roots, path)
			}
			return fs.SkipDir
		case name == "user.slice", strings.Count(strings.TrimPrefix(path, g.mount), "/") >= deepest:
			return fs.SkipDir
		}
		return nil
	})
}

func isRoots(dir string) bool {
	var st unix.Stat_t
	return unix.Stat(dir, &st) == nil && st.Uid == 0
}

// populated says whether there is a process in any of the cgroups or below.
func (g *cgroups) populated(paths []string) bool {
	for _, path := range paths {
		events, err := os.ReadFile(filepath.Join(path, "cgroup.events"))
		if err == nil && strings.Contains(string(events), "populated 1") {
			return true
		}
	}
	return false
}
