package e2e

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/tests/netlab"
)

// TestARootRotationWithOneNodePausedFailsNoConnection gives node 2 a copy of the mesh directory that it does not see change,
// as a node whose watcher hangs.
func TestARootRotationWithOneNodePausedFailsNoConnection(t *testing.T) {
	onEveryPath(t, testARootRotationWithOneNodePaused)
}

func testARootRotationWithOneNodePaused(t *testing.T, m *mesh, _ admin.Path) {
	a, b := m.place(0, "a"), m.place(1, "b")
	m.allow("a", "b")
	m.allow("b", "a")
	m.start() // both write what is theirs into state.json
	m.stop(1)
	shared, copied := m.MeshD, filepath.Join(m.Dir(), "mesh-of-node-2")
	_, err := m.Lab.Run(m.ctx(), netlab.Command{Path: "cp", Args: []string{"-a", shared, copied}})
	m.must(err)
	m.Daemons[1].MeshD = copied
	m.restart(1)

	traffic := m.traffic(map[*netlab.Workload]string{a: m.vip("b"), b: m.vip("a")})
	before := m.generation(0)
	out, err := m.Lab.Run(m.ctx(), netlab.Command{Path: programs.nodeproxy, Args: []string{"ca", "rotate", "--config", m.Daemons[0].ConfigPath()}})
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	m.awaitSnapshot(0, before) // with leaves of the new root
	if n := roots(t, shared); n < 2 {
		t.Errorf("root.pem of node 1 holds %d certificates after a rotation", n)
	}
	traffic.passes(50) // node 1 has new leaves, node 2 knows the old root alone

	before = m.generation(1)
	text, err := os.ReadFile(filepath.Join(shared, "ca", "key.pem"))
	m.must(err)
	m.must(os.WriteFile(filepath.Join(m.Dir(), "key"), text, 0o600))
	m.must(os.Rename(filepath.Join(m.Dir(), "key"), filepath.Join(copied, "ca", "key.pem")))
	text, err = os.ReadFile(filepath.Join(shared, "ca", "root.pem"))
	m.must(err)
	m.must(os.WriteFile(filepath.Join(m.Dir(), "root"), text, 0o600))
	m.must(os.Rename(filepath.Join(m.Dir(), "root"), filepath.Join(copied, "ca", "root.pem")))
	m.awaitSnapshot(1, before)
	traffic.passes(50) // both have new leaves
	traffic.stop()
}

// roots counts the certificates of a mesh directory's root.pem.
func roots(t *testing.T, dir string) (n int) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "ca", "root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			t.Fatal(err)
		}
		n++
	}
	return n
}

// generation is that of the snapshot that a node has in force.
func (m *mesh) generation(node int) uint64 {
	m.t.Helper()
	status, err := m.Daemons[node].Admin().Status(m.ctx())
	m.must(err)
	return status.Source.Generation
}

// awaitSnapshot waits until a node has a snapshot in force that is newer than before, and no error.
func (m *mesh) awaitSnapshot(node int, before uint64) {
	m.t.Helper()
	_, err := m.Daemons[node].Await(m.ctx(), func(s *admin.Status) error {
		if s.Source.Error != "" || s.Source.Generation <= before {
			return fmt.Errorf("snapshot %d is in force, %q", s.Source.Generation, s.Source.Error)
		}
		return nil
	})
	m.must(err)
}

// traffic is clients that connect again and again and may never fail.
type traffic struct {
	m     *mesh
	done  chan struct{}
	ended chan struct{}
	ok    chan struct{} // one for each success
	n     int
}

// traffic starts a client for every workload, which calls the address.
func (m *mesh) traffic(clients map[*netlab.Workload]string) *traffic {
	tr := &traffic{m: m, done: make(chan struct{}), ended: make(chan struct{}), ok: make(chan struct{}, 1<<16), n: len(clients)}
	for w, to := range clients {
		go func() {
			defer func() { tr.ended <- struct{}{} }()
			for {
				select {
				case <-tr.done:
					return
				default:
				}
				p, err := w.Start(m.app("dial", to, "peer"))
				if err == nil {
					err = p.Wait(m.t.Context())
				}
				if err != nil || !strings.Contains(p.Output(), "accept=") {
					m.t.Errorf("a connection from %s to %s failed: %v", w.Name, to, err)
					if p != nil {
						m.t.Log(p.Output())
					}
					return
				}
				tr.ok <- struct{}{}
			}
		}()
	}
	return tr
}

// passes waits for n more successes.
func (tr *traffic) passes(n int) {
	tr.m.t.Helper()
	for len(tr.ok) > 0 {
		<-tr.ok
	}
	for deadline := time.After(patience); n > 0; n-- {
		select {
		case <-tr.ok:
		case <-deadline:
			tr.m.t.Fatalf("%d connections were not made within %s", n, patience)
		}
	}
}

func (tr *traffic) stop() {
	close(tr.done)
	for range tr.n {
		<-tr.ended
	}
}

// TestLeavesThatAreRenewedUnderTrafficFailNoConnection gives the mesh a root that expires soon, and so leaves that live as
// long as it does, renewed after 60 to 90 % of that. Node 2 has a copy of the directory and sees nothing change.
func TestLeavesThatAreRenewedUnderTrafficFailNoConnection(t *testing.T) {
	m := newMesh(t)
	a, b := m.place(0, "a"), m.place(1, "b")
	m.allow("a", "b")
	m.allow("b", "a")
	m.start()
	m.stop(0)
	m.stop(1)
	shared, copied := m.MeshD, filepath.Join(m.Dir(), "mesh-of-node-2")
	domain := mtlstest.Read(t, filepath.Join(shared, "ca")).Cert.URIs
	root := mtlstest.NewRoot(t, func(c *x509.Certificate) { c.URIs, c.NotAfter = domain, time.Now().Add(80*time.Second) })
	root.Write(t, filepath.Join(shared, "ca"))
	_, err := m.Lab.Run(m.ctx(), netlab.Command{Path: "cp", Args: []string{"-a", shared, copied}})
	m.must(err)
	m.Daemons[1].MeshD = copied
	m.restart(0)
	m.restart(1)

	before := []admin.Certificate{m.certificate(0, "a"), m.certificate(1, "b")}
	for _, cert := range before {
		if !cert.NotAfter.Equal(root.Cert.NotAfter) {
			t.Errorf("the leaf of %s lives until %s and its root until %s", cert.Service, cert.NotAfter, root.Cert.NotAfter)
		}
	}
	long := m.stream(a, m.vip("b"))
	defer long.Kill()
	traffic := m.traffic(map[*netlab.Workload]string{a: m.vip("b"), b: m.vip("a")})
	for node, old := range before {
		for traffic.passes(1); m.certificate(node, old.Service).Serial == old.Serial && !t.Failed(); traffic.passes(1) {
			if time.Now().After(root.Cert.NotAfter) {
				t.Fatalf("the leaf of %s is not renewed, and its root has expired", old.Service)
			}
		}
	}
	traffic.passes(20)
	traffic.stop()
	m.goesOn("a connection older than the certificates", long)
	for node, old := range before {
		renewed := m.certificate(node, old.Service)
		shown, _, _ := m.meet(map[int]*netlab.Workload{0: b, 1: a}[node], m.mesh(node, old.Service), nil)
		if shown == nil || fmt.Sprintf("%X", shown.SerialNumber) == old.Serial || !shown.NotBefore.After(old.NotBefore) {
			t.Errorf("%s: status shows %+v, its peers see %+v", old.Service, renewed, shown)
		}
	}
}

// certificate is what a node's status shows of a service's leaf.
func (m *mesh) certificate(node int, service string) admin.Certificate {
	m.t.Helper()
	status, err := m.Daemons[node].Admin().Status(m.ctx())
	m.must(err)
	for _, cert := range status.Certificates {
		if cert.Service == service && cert.Serial != "" {
			return cert
		}
	}
	m.t.Fatalf("node %d has no certificate of %s: %+v", node+1, service, status.Certificates)
	return admin.Certificate{}
}
