package workload

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Applications says of each local instance that a workload serves whether it would be delivered to now. It connects to none.
func (m *Manager) Applications() []Application {
	v := m.view.Load()
	var all []Application
	for _, s := range v.served {
		if len(s.Workloads) == 0 {
			continue
		}
		a := Application{Service: s.Service, Instance: s.Instance, Cgroup: s.Workloads[0].Cgroup}
		if a.Target = s.instance.DeliverySocket; a.Target != "" {
			a.Err = findSocket(s)
		} else if listeners, err := s.listeners(); err != nil {
			a.Err = err
		} else if target, w, err := pickTarget(v, s, netip.AddrPort{}, listeners); err != nil {
			a.Err = err
		} else {
			a.Target, a.Cgroup = target.String(), w.Cgroup
		}
		all = append(all, a)
	}
	slices.SortFunc(all, func(a, b Application) int { return cmp.Compare(a.Instance, b.Instance) })
	return all
}

// findSocket looks for the unix socket of s. Whose it is is only known when it is connected to.
func findSocket(s *served) error {
	err := errors.New("the workload has no process")
	for _, w := range s.Workloads {
		pid, errPID := anyProcess(w.Cgroup)
		if errPID != nil {
			continue
		}
		if err = statSocket(pid, s.instance.DeliverySocket); err == nil {
			return nil
		}
	}
	return fmt.Errorf("deliver to instance %s at %s: %w; is the application up?", s.Instance, s.instance.DeliverySocket, err)
}

func statSocket(pid, path string) error {
	fd, err := openInRoot(pid, path)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return errors.New("it is no socket")
	}
	return nil
}
