package kubernetes

import (
	"errors"
	"fmt"
	"os"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"nodeproxy.io/nodeproxy/workload"
)

// Starting says of a pod whose network namespace has been made whether it is to be in the mesh, and where its cgroup is, which is
// made if the kubelet has not. With an error that is not known yet: it is asked again.
func (c *Cluster) Starting(namespace, name, uid string) (cgroup string, meshed bool, err error) {
	if !mayBe(c.cfg.Namespaces, namespace, uid) {
		return "", false, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if object, known, _ := c.pods.GetByKey(namespace + "/" + name); known {
		p, ok := object.(*corev1.Pod)
		if !ok || p.UID != types.UID(uid) {
			return "", true, fmt.Errorf("the API server has told of another pod %s/%s, not of this one yet", namespace, name)
		}
		if found, asks := c.judge(p); !asks || !found.guarded() {
			return "", false, nil
		}
	} else if c.placed[types.UID(uid)] == nil {
		return "", true, errors.Join(errors.New("the API server has not told of it yet"), c.unheard())
	}
	if !c.starting[types.UID(uid)] {
		c.starting[types.UID(uid)] = true
		c.changedNow()
	}
	switch paths := c.placed[types.UID(uid)]; len(paths) {
	case 0:
		return "", true, errors.New("its cgroup is not known yet")
	case 1:
		return paths[0], true, nil
	default:
		return "", true, fmt.Errorf("its cgroup may be any of %s: several kubelets run here", strings.Join(paths, ", "))
	}
}

// mayBe says whether any label could have a pod enrolled. Static pods, whose UID is no UUID, cannot be workloads.
func mayBe(namespaces map[string][]string, namespace, uid string) bool {
	return len(namespaces[namespace]) > 0 && strings.Contains(uid, "-")
}

// guarded says whether a pod is to be in the mesh, and not only watched.
func (p pod) guarded() bool { return p.granted() && p.claim.Mesh == workload.Enabled }

// await makes the cgroup of a pod that starts: on a node with hierarchies of version 1 the kubelet does not make it on cgroup2, and the
// runtime does so later.
func (c *Cluster) await(p pod, paths []string) {
	c.mu.Lock()
	starts := c.starting[p.UID] && p.guarded()
	c.mu.Unlock()
	if !starts || len(paths) != 1 {
		return
	}
	if err := os.MkdirAll(paths[0], 0o755); err != nil {
		c.cfg.Log.Warn("make the cgroup of a pod that starts", "pod", p.String(), "error", err)
	}
}

// locate notes where the cgroups of all workloads are, and forgets who has started and is gone.
func (c *Cluster) locate() {
	c.placed = make(map[types.UID][]string)
	starting := make(map[types.UID]bool)
	for _, p := range c.workloads {
		if len(p.claims) > 0 && p.claims[0].Mesh == workload.Enabled && p.granted() {
			c.placed[p.UID] = p.paths()
		}
	}
	for _, p := range list[corev1.Pod](c.pods) {
		if c.starting[p.UID] {
			starting[p.UID] = true
		}
	}
	c.starting = starting
}
