package consul

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

// identities traces a node's outbound connections. What it returns waits for the end of the one of a caller's address.
func (m *mesh) identities(node int) func(source string) admin.Connection {
	m.t.Helper()
	trace, err := m.Daemons[node].Admin().OpenTrace(m.t.Context(), admin.Filter{})
	m.must(err)
	var mu sync.Mutex
	seen, more := make(map[string]admin.Connection), make(chan struct{})
	var reading sync.WaitGroup
	reading.Go(func() {
		for {
			e, err := trace.Next()
			if err != nil {
				return
			}
			if e.Dropped > 0 {
				m.t.Errorf("%d events of the trace are lost", e.Dropped)
			}
			if e.Direction != admin.Outbound || e.Event != admin.EventClose {
				continue
			}
			mu.Lock()
			seen[e.Source.Address] = e
			close(more)
			more = make(chan struct{})
			mu.Unlock()
		}
	})
	m.t.Cleanup(func() {
		trace.Close()
		reading.Wait()
	})
	return func(source string) admin.Connection {
		for ctx := m.ctx(); ; {
			mu.Lock()
			e, known := seen[source]
			next := more
			mu.Unlock()
			if known {
				return e
			}
			select {
			case <-next:
			case <-ctx.Done():
				m.t.Errorf("the connection of %s is not told of", source)
				return e
			}
		}
	}
}

// from is the caller's address, by what it says.
func from(out string) string {
	_, line, _ := strings.Cut(out, "connected local=")
	source, _, _ := strings.Cut(line, " ")
	return source
}

func TestAVirtualIPThatMovesIsNeverTheWrongServices(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	const first, second = 8081, 8082
	m.instance(1, "first", "first-1", first, nil)
	w, err := m.Nodes[1].Workload("second")
	m.must(err)
	m.Daemons[1].Enroll(w, "second")
	m.serve(w, fmt.Sprintf(":%d", second))
	// An entry of the service's own would keep its virtual IP.
	m.must(m.agents[0].Intentions(m.ctx(), "*", map[string]string{"web": "allow"}))
	m.start([]string{"web"}, []string{"first", "second"})
	vip := m.vip(0, "first")
	m.eventually("web reaches first", web, vip, at(first))
	told := m.identities(0)

	const loops, calls = 4, 50
	outs := make([][]string, loops)
	moved := make(chan struct{})
	var load, begun sync.WaitGroup
	begun.Add(loops)
	for i := range outs {
		load.Go(func() {
			call := func() {
				p, err := web.Start(netlab.Command{Path: programs.app, Args: []string{"dial", vip, "peer"}})
				if err == nil {
					err = p.Wait(m.ctx())
				}
				if err != nil {
					t.Error(err)
					return
				}
				outs[i] = append(outs[i], p.Output())
			}
			for range calls {
				call()
			}
			begun.Done()
			for ctx := m.ctx(); ctx.Err() == nil; { // until it has moved, and some more
				call()
				select {
				case <-moved:
					for range calls {
						call()
					}
					return
				default:
				}
			}
		})
	}
	begun.Wait()
	m.must(m.agents[1].Deregister(m.ctx(), "first-1"))
	m.await("first and its sidecar are gone, with which its virtual IP is free", func() error {
		var all map[string][]string
		if err := m.agents[0].Do(m.ctx(), http.MethodGet, "/v1/catalog/services", nil, &all); err != nil {
			return err
		}
		for name := range all {
			if strings.HasPrefix(name, "first") {
				return fmt.Errorf("%s is there", name)
			}
		}
		return nil
	})
	m.must(m.agents[1].Register(m.ctx(), Service("second", "second-1", w.IPv4.String(), second)))
	ip, err := m.Daemons[0].Virtual(m.ctx(), "second")
	m.must(err)
	if netip.AddrPortFrom(ip, 80).String() != vip {
		t.Errorf("the virtual IP did not move: first had %s, second has %s", vip, ip)
	}
	m.eventually("web reaches second", web, vip, at(second))
	close(moved)
	load.Wait()

	counts := make(map[string]int)
	for i, all := range outs {
		past := false
		for _, out := range all {
			var with admin.Endpoint
			if at(first)(out) || at(second)(out) {
				with = told(from(out)).Destination
			}
			switch {
			case at(first)(out) && past:
				t.Errorf("loop %d: first answers after second", i)
			case at(first)(out) && (!strings.HasSuffix(with.Identity, "/svc/first") || with.Service != "first"),
				at(second)(out) && (!strings.HasSuffix(with.Identity, "/svc/second") || with.Service != "second"):
				t.Errorf("loop %d: %s was told of as %+v", i, out, with)
			case at(first)(out):
				counts["first"]++
			case at(second)(out):
				counts["second"]++
				past = true
			default:
				counts["refused"]++
			}
		}
	}
	t.Logf("answered or refused: %v", counts)
	if counts["first"] < loops*calls || counts["second"] < loops*calls {
		t.Errorf("each should have answered at least %d calls", loops*calls)
	}
}

func TestOnlyTheMeshIsOpenWhereTheMeshEntrySaysSo(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	m.place(1, "api")
	outside, err := m.Nodes[1].Workload("outside")
	m.must(err)
	m.serve(outside, ":7000", ":53")
	m.serve(web, ":7001")
	m.must(m.agents[0].Intentions(m.ctx(), "api", map[string]string{"web": "allow"}))
	m.start([]string{"web"}, []string{"api"})
	vip, far := m.vip(0, "api"), netip.AddrPortFrom(outside.IPv4, 7000).String()
	m.eventually("web reaches what is outside", web, far, reached)

	entry := map[string]any{"Kind": "mesh", "TransparentProxy": map[string]any{"MeshDestinationsOnly": true},
		"TLS": map[string]any{"Incoming": map[string]any{"TLSMinVersion": "TLSv1_3"}, "Outgoing": map[string]any{"TLSMaxVersion": "TLSv1_2"}}}
	m.must(m.agents[0].Write(m.ctx(), entry))
	m.eventually("what is outside is refused", web, far, func(out string) bool { return strings.Contains(out, "ECONNREFUSED") })
	for _, open := range []string{"127.0.0.1:7001", netip.AddrPortFrom(web.IPv4, 7001).String(), netip.AddrPortFrom(outside.IPv4, 53).String()} {
		if out := m.dial(web, open, "peer"); !reached(out) {
			t.Errorf("%s is refused: %s", open, out)
		}
	}
	if text := m.metrics(0); !strings.Contains(text, `reason="outside-mesh"`) {
		t.Errorf("the refusal is not counted:\n%s", text)
	}
	m.eventually("TLS 1.2 at most does not reach 1.3 at least", web, vip, func(out string) bool { return !reached(out) })
	delete(entry["TLS"].(map[string]any), "Outgoing")
	m.must(m.agents[0].Write(m.ctx(), entry))
	m.eventually("TLS 1.3 does", web, vip, reached)

	delete(entry, "TransparentProxy")
	m.must(m.agents[0].Write(m.ctx(), entry))
	m.eventually("what is outside is open again", web, far, reached)
}
