package registered

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/redirect"
)

// sight is what is seen of the node at one moment. What nobody asks for is not looked at.
type sight struct {
	mount  string
	listed bool
	spaces map[uint64]int // a process of each network namespace, by inode
	looked map[uint64]*redirect.Look
	paths  map[uint64]string // of cgroups, by ID
}

func newSight(mount string) *sight {
	return &sight{mount: mount, spaces: make(map[uint64]int), looked: make(map[uint64]*redirect.Look), paths: make(map[uint64]string)}
}

// place is where an instance is.
type place struct {
	cgroup string
	space  uint64
	mapped []workload.Mapping
}

// refusal is that somebody is where the instance should be, who may not be it.
type refusal struct{ cgroup, why string }

func (r refusal) Error() string { return r.why }

// allocation is in the ID of what Nomad registers.
var allocation = regexp.MustCompile(`^_nomad-task-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-`)

// find returns where an instance is. Who listens at its address is it if the network namespace belongs to the node's own user namespace,
// and the cgroup is root's and no pod's, container's or user's, of which others decide. An allocation of Nomad is found by the cgroup
// that is called after it, and its port may be led into it from the node's.
func (s *sight) find(i *instance) (place, error) {
	if !i.Address.IsValid() {
		return place{}, errors.New("it is registered without an address and port")
	}
	if found := allocation.FindStringSubmatch(i.ID); found != nil {
		return s.findAllocation(i, found[1])
	}
	if look := s.lookedAt(i.space); look != nil {
		if at, err := s.listener(look, i.Address); at.cgroup != "" || err != nil {
			return at, err
		}
	}
	s.listSpaces()
	var found place
	var refused error
	for _, inode := range slices.Sorted(maps.Keys(s.spaces)) {
		look := s.lookedAt(inode)
		if look == nil || !look.Has(i.Address.Addr()) {
			continue
		}
		at, err := s.listener(look, i.Address)
		switch {
		case err != nil:
			refused = err
		case at.cgroup != "" && found.cgroup != "" && at.cgroup != found.cgroup:
			return place{}, refusal{at.cgroup, fmt.Sprintf("processes of several cgroups listen at %s, in more than one network namespace: stop one of them", i.Address)}
		case at.cgroup != "":
			found = at
		}
	}
	switch {
	case found.cgroup != "":
		return found, nil
	case refused != nil:
		return place{}, refused
	}
	return place{}, fmt.Errorf("nothing listens at %s on this node", i.Address)
}

// listener returns whose cgroup listens at an address, nothing if none does.
func (s *sight) listener(look *redirect.Look, at netip.AddrPort) (found place, err error) {
	for _, l := range look.Listeners {
		if !l.Listens(at) {
			continue
		}
		cgroup := s.cgroup(l)
		switch {
		case look.Foreign:
			return place{}, refusal{cgroup, fmt.Sprintf("who listens at %s is in a network namespace of another user namespace than the node's, whose maker can give it any address: start it outside", at)}
		case found.cgroup != "" && found.cgroup != cgroup:
			return place{}, refusal{cgroup, fmt.Sprintf("processes of several cgroups listen at %s: stop one of them", at)}
		}
		if why := s.refuses(cgroup); why != "" {
			return place{}, refusal{cgroup, fmt.Sprintf("who listens at %s is in cgroup %s: %s", at, cgroup, why)}
		}
		found = place{cgroup: cgroup, space: look.Inode}
	}
	return found, nil
}

// cgroup is that of a socket's maker, "" if it is gone.
func (s *sight) cgroup(l redirect.Socket) string {
	path, known := s.paths[l.Cgroup]
	if !known {
		path, _ = redirect.CgroupPath(l.Cgroup)
		s.paths[l.Cgroup] = path
	}
	return path
}

// Containers are known by the names of their cgroups: those of engines have the ID. So are those who listen for them.
var (
	containers = regexp.MustCompile(`[0-9a-f]{64}`)
	engines    = []string{"docker.service", "containerd.service", "crio.service"}
)

// refuses says why what is in a cgroup may not be found by its socket, or "".
func (s *sight) refuses(cgroup string) string {
	below, ok := strings.CutPrefix(cgroup, s.mount+"/")
	if !ok {
		return "that is not one of the node's: start it in a cgroup of its own"
	}
	dir := s.mount
	for name := range strings.SplitSeq(below, "/") {
		dir = filepath.Join(dir, name)
		var st unix.Stat_t
		switch err := unix.Stat(dir, &st); {
		case err != nil:
			return "it is gone"
		case name == "user.slice":
			return "that is a user's: start it as a service of the system"
		case strings.Contains(name, "kubepods"):
			return "that is a pod's, which may be only what workloads.kubernetes says: label the pod"
		case containers.MatchString(name):
			return "that is a container's, which may be only what workloads.containers says: label the container"
		case slices.Contains(engines, name):
			return "that is a container engine, which listens for its containers: label the container"
		case strings.HasSuffix(name, ".socket"):
			return "that is a socket of systemd's, which starts a service: label that, by a section [X-NodeProxy]"
		case st.Uid != 0:
			return fmt.Sprintf("%s is not root's: whoever owns it could put any process there", dir)
		}
	}
	return ""
}

// listSpaces lists the network namespaces of all processes.
func (s *sight) listSpaces() {
	if s.listed {
		return
	}
	s.listed = true
	processes, _ := os.ReadDir("/proc")
	for _, p := range processes {
		if pid, err := strconv.Atoi(p.Name()); err == nil {
			s.note(pid)
		}
	}
}

// note returns the network namespace of a process, 0 if it has ended.
func (s *sight) note(pid int) uint64 {
	var st unix.Stat_t
	if unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st) != nil {
		return 0
	}
	if s.spaces[st.Ino] == 0 {
		s.spaces[st.Ino] = pid
	}
	return st.Ino
}

// lookedAt looks into a network namespace once. nil: it is gone.
func (s *sight) lookedAt(inode uint64) *redirect.Look {
	if inode == 0 {
		return nil
	}
	look, done := s.looked[inode]
	if done {
		return look
	}
	if s.spaces[inode] == 0 {
		s.listSpaces()
	}
	if pid := s.spaces[inode]; pid != 0 {
		look, _ = redirect.LookInto(pid)
	}
	if look != nil && look.Inode != inode {
		look = nil // the process has moved
	}
	s.looked[inode] = look
	return look
}

// findAllocation finds the task of an allocation that listens for an instance.
func (s *sight) findAllocation(i *instance, id string) (place, error) {
	dirs := s.called(id)
	if len(dirs) == 0 {
		return place{}, fmt.Errorf("no cgroup is called after allocation %s: it runs on another node, or with a driver that calls them otherwise", id)
	}
	type listening struct {
		place
		port uint16
		look *redirect.Look
	}
	var all []listening
	for _, dir := range dirs {
		if why := s.refuses(dir); why != "" {
			return place{}, refusal{dir, fmt.Sprintf("allocation %s is in cgroup %s: %s", id, dir, why)}
		}
		for _, inode := range s.spacesOf(dir) {
			look := s.lookedAt(inode)
			if look == nil {
				continue
			}
			for _, l := range look.Listeners {
				if below := s.cgroup(l); below != dir && !strings.HasPrefix(below, dir+"/") {
					continue
				}
				if look.Foreign {
					return place{}, refusal{dir, fmt.Sprintf("allocation %s is in a network namespace of another user namespace than the node's, whose maker can give it any address", id)}
				}
				if !l.Local.Addr().IsLoopback() {
					all = append(all, listening{place{cgroup: dir, space: inode}, l.Local.Port(), look})
				}
			}
		}
	}
	wanted, err := wantedPort(i.Registered)
	if err != nil {
		return place{}, err
	}
	var ports []uint16
	for _, l := range all {
		own := l.look.Has(i.Address.Addr())
		if l.port == wanted || wanted == 0 && own && l.port == i.Address.Port() {
			return l.led(i.Address, l.look, l.port), nil
		}
		if !own && !slices.Contains(ports, l.port) {
			ports = append(ports, l.port)
		}
	}
	switch {
	case wanted != 0:
		return place{}, fmt.Errorf("no task of allocation %s listens on port %d, which its meta nodeproxy-port says", id, wanted)
	case len(ports) > 1:
		slices.Sort(ports)
		return place{}, fmt.Errorf("tasks of allocation %s listen on ports %v: say in its meta nodeproxy-port which is the service's", id, ports)
	}
	for _, l := range all {
		if slices.Contains(ports, l.port) {
			return l.led(i.Address, l.look, l.port), nil
		}
	}
	return place{}, fmt.Errorf("no task of allocation %s listens", id)
}

// wantedPort is the application's own as the instance's meta says, 0 if it does not.
func wantedPort(r catalog.Registered) (uint16, error) {
	text := r.Meta[catalog.MetaMesh+"-"+portKey]
	if text == "" {
		return 0, nil
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return 0, fmt.Errorf("its meta nodeproxy-port is %q: it must be a port", text)
	}
	return uint16(port), nil
}

// led is p, with where the node leads an address to if that is not the namespace's own.
func (p place) led(address netip.AddrPort, look *redirect.Look, port uint16) place {
	if look.Has(address.Addr()) {
		return p
	}
	for _, ip := range look.Addresses {
		if !ip.IsLoopback() && !ip.IsLinkLocalUnicast() && ip.Is4() == address.Addr().Is4() {
			p.mapped = []workload.Mapping{{Node: address, To: netip.AddrPortFrom(ip, port)}}
			return p
		}
	}
	return p
}

// called lists the outermost cgroups with a word in their names.
func (s *sight) called(word string) (dirs []string) {
	_ = filepath.WalkDir(s.mount, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && path != s.mount && strings.Contains(d.Name(), word) {
			dirs = append(dirs, path)
			return fs.SkipDir
		}
		return nil // what is gone is looked for again
	})
	return dirs
}

// spacesOf lists the network namespaces of the processes in a cgroup and below.
func (s *sight) spacesOf(dir string) (inodes []uint64) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		processes, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		for text := range strings.FieldsSeq(string(processes)) {
			if pid, err := strconv.Atoi(text); err == nil {
				if inode := s.note(pid); inode != 0 && !slices.Contains(inodes, inode) {
					inodes = append(inodes, inode)
				}
			}
		}
		return nil
	})
	return inodes
}
