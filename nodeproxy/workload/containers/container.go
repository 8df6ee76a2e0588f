package containers

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/redirect"
)

const (
	// prefix is in front of every key of ours.
	prefix = "nodeproxy.io/"

	// podLabel is at what a kubelet has the engine run: pods are for package kubernetes.
	podLabel = "io.kubernetes.pod.uid"

	maxExposed = 64
	idMark     = "\x00" // stands for a container's ID in a path
)

// container is one with labels of ours.
type container struct {
	claim     workload.Claim // its Cgroup is "" until it is known
	gone      bool           // the engine has it no more
	misplaced error          // why its cgroup is not known though it runs
}

func (c *container) granted() bool { return c.claim.Denied == "" && c.claim.Invalid == "" }

func (c *container) populated() bool {
	events, err := os.ReadFile(filepath.Join(c.claim.Cgroup, "cgroup.events"))
	return err == nil && strings.Contains(string(events), "populated 1")
}

// isLabelled says whether there are labels of ours at a container that is for us.
func isLabelled(labels map[string]string) bool {
	_, pods := labels[podLabel]
	return !pods && len(ours(labels)) > 0
}

func ours(all map[string]string) workload.Labels {
	labels := make(workload.Labels)
	for key, value := range all {
		if key, ours := strings.CutPrefix(key, prefix); ours {
			labels[key] = value
		}
	}
	return labels
}

// update notes what the engine says of a container.
func (e *Engine) update(id string, found *seen) {
	if !isLabelled(found.labels) {
		delete(e.containers, id)
		return
	}
	known := e.containers[id]
	if known == nil {
		known = new(container)
		e.containers[id] = known
	}
	cgroup := cmp.Or(found.cgroup, known.claim.Cgroup) // a stopped container starts there again
	known.claim, known.misplaced = e.judge(found), nil
	if found.pid > 0 {
		at, err := e.cgroupOf(found)
		switch {
		case err == nil:
			cgroup = at
			if found.cgroup == "" {
				e.places[found.parent] = strings.Replace(at, id, idMark, 1)
			}
		case !errors.Is(err, unix.ESRCH):
			known.misplaced = err
		}
	}
	if place := e.places[found.parent]; cgroup == "" && place != "" {
		cgroup = strings.Replace(place, idMark, id, 1)
	}
	known.claim.Cgroup = cgroup
}

// judge says what a container claims, but for its cgroup.
func (e *Engine) judge(found *seen) workload.Claim {
	claim := ours(found.labels).Claim(e.Name(), "")
	claim.Name = "container " + found.name
	if claim.Denied = e.refuses(claim); claim.Denied != "" {
		claim.Invalid = ""
		return claim
	}
	if found.host { // elsewhere all ports are guarded
		claim.Ports = append(claim.Ports, found.exposed...)
		slices.Sort(claim.Ports)
		claim.Ports = slices.Compact(claim.Ports)
		if len(claim.Ports) > maxExposed && claim.Invalid == "" {
			claim.Invalid = fmt.Sprintf("it exposes %d ports in the node's network namespace, at most %d can be guarded: expose fewer", len(claim.Ports), maxExposed)
		}
	}
	claim.Mapped = found.mapped
	return claim
}

// refuses says why a container may not be what it asks to be, or "".
func (e *Engine) refuses(claim workload.Claim) string {
	if claim.Mesh == workload.Disabled {
		return ""
	}
	for _, service := range append([]string{claim.Service}, claim.Also...) {
		if service != "" && !slices.Contains(e.cfg.Allow, service) {
			return fmt.Sprintf("it asks to be service %q, which containers may not be: if they may, add it to workloads.containers.allow in nodeproxy's configuration", service)
		}
	}
	return ""
}

// cgroupOf finds the cgroup of a container by its first process: the outermost that the container owns. What else may
// have got the process's number by now is in no such cgroup. It returns ESRCH if the process has ended.
func (e *Engine) cgroupOf(found *seen) (string, error) {
	pid := found.pid
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return "", fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(process)
	cgroup, err := redirect.ProcessCgroup(pid)
	if hasEnded(process) {
		return "", fmt.Errorf("look at process %d: %w", pid, unix.ESRCH)
	}
	if err != nil {
		return "", err
	}
	below, ok := strings.CutPrefix(cgroup, e.cfg.Mount+"/")
	if first, _, _ := strings.Cut(below, "/"); !ok || first == "user.slice" {
		return "", fmt.Errorf("its process %d is in cgroup %s, which is no place of this node's own engine: workloads.containers.socket must be that of an engine that runs as root", pid, cgroup)
	}
	dir := e.cfg.Mount
	for name := range strings.SplitSeq(below, "/") {
		if dir = filepath.Join(dir, name); found.owns(dir) {
			return dir, nil
		}
	}
	return "", fmt.Errorf("process %d, which the engine says is its first, is in cgroup %s, which is neither called after the container nor in its specification: see that nodeproxy and the engine are in one PID namespace, and that the engine makes a cgroup for each container", pid, cgroup)
}

// hasEnded asks in a way that takes no capability, as a signal would.
func hasEnded(pidfd int) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
	return err != nil || n > 0
}
