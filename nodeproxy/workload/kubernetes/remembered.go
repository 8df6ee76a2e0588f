package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"nodeproxy.io/nodeproxy/workload"
)

// remembered is a pod that is claimed, as StateFile has it. Its UID is in the path of its cgroup, and is never another's.
type remembered struct {
	Namespace, Name string
	UID             types.UID
	Claims          []workload.Claim
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// remember writes down who is claimed.
func (c *Cluster) remember() {
	if c.cfg.StateFile == "" {
		return
	}
	all := []remembered{}
	for _, p := range c.workloads {
		if p.granted() {
			all = append(all, remembered{p.Namespace, p.Name, p.UID, p.claims})
		}
	}
	if err := replace(c.cfg.StateFile, all); err != nil {
		c.cfg.Log.Warn("a daemon that starts while the Kubernetes API server is away will not know the pods", "error", err)
	}
}

// replace writes a file whole, by rename.
func replace(path string, content any) error {
	text, err := json.MarshalIndent(content, "", "  ")
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o700)
	}
	if err == nil {
		err = os.WriteFile(path+".new", text, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	return err
}

// recall claims what an earlier daemon did, of pods whose cgroup is there and that may still be what they were. There need not be a
// process in it: the kubelet restarts containers without the API server.
func (c *Cluster) recall() {
	text, err := os.ReadFile(c.cfg.StateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var all []remembered
	if err == nil {
		err = json.Unmarshal(text, &all)
	}
	if err != nil {
		c.cfg.Log.Warn("what an earlier daemon knew of pods is not used: correct or remove the file", "error", fmt.Errorf("read %s: %w", c.cfg.StateFile, err))
		return
	}
	for _, r := range all {
		p := pod{Pod: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: r.Namespace, Name: r.Name, UID: r.UID}}, claims: r.Claims}
		allowed := !slices.ContainsFunc(r.Claims, func(claim workload.Claim) bool {
			return !slices.Contains(c.cfg.Namespaces[r.Namespace], claim.Service) || len(claim.Also) > 0
		})
		if allowed && slices.ContainsFunc(p.paths(), exists) {
			c.workloads = append(c.workloads, p)
		}
	}
}
