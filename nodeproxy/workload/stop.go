package workload

import (
	"errors"
	"net"
	"sync"
)

// stop refuses what comes from now on.
func (m *Manager) stop() error {
	for _, s := range m.sockets.open {
		s.close(m)
	}
	err := m.redirect.Rest()
	if m.cfg.Keep != nil {
		err = errors.Join(err, m.cfg.Keep(nil, nil)) // or what waits there would wait until the last connection has ended
	}
	m.leaveDNS(lastQueries, answersStop)
	return errors.Join(err, m.redirect.Stop(), m.closeListeners(outbound, inbound))
}

func wait(all ...*sync.WaitGroup) {
	for _, wg := range all {
		wg.Wait()
	}
}

// outbound and inbound are the listeners of a namespace.
func outbound(s *space) []*net.TCPListener { return s.Outbound }
func inbound(s *space) []*net.TCPListener  { return s.Inbound }

func (m *Manager) closeListeners(which ...func(*space) []*net.TCPListener) (err error) {
	for _, s := range m.namespaces {
		for _, of := range which {
			for _, ln := range of(s) {
				err = errors.Join(err, ignoreClosed(ln.Close()))
			}
		}
	}
	return err
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
