package workload

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"nodeproxy.io/nodeproxy/dns"
	"nodeproxy.io/redirect"
)

// dnsSocket is a namespace's DNS side: the sockets, or why there are none.
type dnsSocket struct {
	sockets *redirect.DNS
	err     error
}

// openDNS listens for name queries in every open namespace that has no listener for them yet, and serves them. A port that
// another process holds is tried again each time.
func (m *Manager) openDNS() {
	if m.cfg.DNS == nil {
		return
	}
	for inode, s := range m.namespaces {
		if s.dns.sockets != nil {
			continue
		}
		sockets, err := s.OpenDNS()
		changed := *s // the data path reads the other one
		changed.dns = dnsSocket{sockets, err}
		m.namespaces[inode] = &changed
		if err != nil {
			m.warn(fmt.Sprint("network namespace ", inode), "names of the mesh are not answered", err)
			continue
		}
		m.forgetWarnings(fmt.Sprint("network namespace ", inode))
		var packets []dns.Packets
		for _, p := range sockets.Packets {
			packets = append(packets, p)
		}
		m.begin(func() {
			m.serving.Go(func() {
				m.cfg.DNS.Serve(sockets, packets, sockets.Streams)
				if err := sockets.Close(); err != nil {
					m.log.Error("close the sockets of name queries", "netns", inode, "error", err)
				}
			})
		})
	}
}

// steerDNS steers the name queries of the enrolled workloads. Where that is impossible the workload is protected all the same.
func (m *Manager) steerDNS() {
	if m.cfg.DNS == nil {
		return
	}
	for _, e := range m.workloads {
		if !e.enrolled || e.steered == e.cgroup {
			continue
		}
		if e.Mesh != Enabled || e.declinesDNS() {
			if err := m.redirect.LeaveDNS(e.cgroup); err != nil {
				m.log.Error("name queries of a workload that declines them, or is only observed, are still answered", "cgroup", e.Cgroup, "error", err)
			}
			continue
		}
		if e.noDNS = m.redirect.SteerDNS(e.Cgroup); e.noDNS != nil {
			m.warn(e.Cgroup, "names of the mesh are not answered", e.noDNS, "service", e.Service)
			continue
		}
		e.steered = e.cgroup
	}
}

func (e *entry) declinesDNS() bool { return e.claim.DNS != nil && !*e.claim.DNS }

// How long the last queries are read, where nobody follows, and how long there is to answer what was read.
const (
	lastQueries    = 100 * time.Millisecond
	answersStop    = time.Second      // longer than most take, and no stop is noticed
	answersRestart = 2 * time.Second  // as live connections
	answersBeside  = 10 * time.Second // the next daemon: twice what a name server has, for connections with one query after the other
)

// leaveDNS reads no name queries after reading has passed, and answers those that it has read until answering has. Close waits for
// the last answer.
func (m *Manager) leaveDNS(reading, answering time.Duration) {
	if m.cfg.DNS != nil {
		now := time.Now()
		m.cfg.DNS.Leave(now.Add(reading), now.Add(answering))
	}
}

// dnsState says whether e's name queries are answered: "on", "off" with the reason, or "" where DNS is not enabled.
func (m *Manager) dnsState(e *entry) string {
	if m.cfg.DNS == nil || e.Mesh != Enabled {
		return ""
	}
	if e.declinesDNS() {
		return "off: its label dns is \"disabled\""
	}
	var why []string
	if e.noDNS != nil {
		why = append(why, e.noDNS.Error())
	}
	if !e.enrolled {
		why = append(why, "the workload is not enrolled")
	}
	for _, inode := range e.inodes {
		if s := m.namespaces[inode]; s != nil && s.dns.err != nil {
			why = append(why, s.dns.err.Error())
		}
	}
	if len(why) == 0 {
		return "on"
	}
	slices.Sort(why)
	return "off: " + strings.Join(slices.Compact(why), "; ")
}
