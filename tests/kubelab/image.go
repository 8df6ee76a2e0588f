package kubelab

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
)

// Image writes an image of nothing but a static program, as a tar of an OCI layout, and returns its path.
func Image(dir, name, program string) (string, error) {
	text, err := os.ReadFile(program)
	if err != nil {
		return "", err
	}
	entry := "/" + filepath.Base(program)
	layer, err := tarOf(file{filepath.Base(program), text})
	if err != nil {
		return "", err
	}
	blobs := []file{{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)}}
	blob := func(kind string, content []byte) map[string]any {
		sum := fmt.Sprintf("%x", sha256.Sum256(content))
		blobs = append(blobs, file{"blobs/sha256/" + sum, content})
		return map[string]any{"mediaType": "application/vnd.oci.image." + kind, "digest": "sha256:" + sum, "size": len(content)}
	}
	layers := []any{blob("layer.v1.tar", layer)}
	config := blob("config.v1+json", marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "config": map[string]any{"Entrypoint": []string{entry}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	}))
	manifest := blob("manifest.v1+json", marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers,
	}))
	manifest["annotations"] = map[string]string{"io.containerd.image.name": "docker.io/library/" + name}
	index := marshal(map[string]any{"schemaVersion": 2, "manifests": []any{manifest}})
	image, err := tarOf(append(blobs, file{"index.json", index})...)
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, filepath.Base(program)+".tar")
	return path, os.WriteFile(path, image, 0o600)
}

type file struct {
	name    string
	content []byte
}

func tarOf(files ...file) ([]byte, error) {
	var out bytes.Buffer
	t := tar.NewWriter(&out)
	for _, f := range files {
		if err := t.WriteHeader(&tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.content))}); err != nil {
			return nil, err
		}
		if _, err := t.Write(f.content); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), t.Close()
}

func marshal(value any) []byte {
	text, err := json.Marshal(value)
	if err != nil {
		panic(err) // of maps and strings alone
	}
	return text
}
