package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"nodeproxy.io/tests/consul"
	"nodeproxy.io/tests/netlab"
)

// peer is another mTLS proxy, run as a pair in the place of the two daemons: one beside the client, one beside the server.
type peer struct {
	name   string
	find   func() (string, error) // its program
	beside string                 // not a peer but a reference: the path of nodeproxy's that is compared with it
	plain  bool                   // it does no TLS
	// pair says how its two proxies are started. Files go to p.dir.
	pair func(p *pairing) (near, far netlab.Command, err error)
}

// pairing is what a pair of proxies is told.
type pairing struct {
	program     string
	dir         string         // for configurations
	credentials *credentials   // the same for all peers but Consul, which brings its own
	near        netip.AddrPort // where the client dials
	far         netip.AddrPort // where the proxies meet, with TLS 1.3 and a certificate each
	to          netip.AddrPort // the server
	consul      string         // address of an agent's API
}

// peers lists them as Debian, the Go module proxy and PyPI have them, with their own defaults but for what makes them comparable:
// TLS 1.3, AES-GCM, EC P-256, client certificates, room for 10,000 connections, and no time limit on idle ones.
func peers() []peer {
	return []peer{
		{name: "HAProxy", find: debian("haproxy"), pair: haproxy},
		{name: "nginx stream", find: debian("nginx"), pair: nginx},
		{name: "stunnel", find: debian("stunnel4"), pair: stunnel},
		{name: "consul connect proxy", find: consul.Binary, pair: consulProxy},
		{name: "Envoy", find: consul.Envoy, pair: envoy},
	}
}

// references are pairs that show what bounds a path of nodeproxy's: what two proxies cost that do no TLS, and what a handshake costs
// where nothing is resumed. They are not among the peers.
func references() []peer {
	return []peer{
		{name: "HAProxy, plaintext", beside: tunnels, plain: true, find: debian("haproxy"), pair: plainHAProxy},
		{name: "Envoy, whole handshakes", beside: mtls, find: consul.Envoy, pair: envoyWithoutSessions},
	}
}

func debian(program string) func() (string, error) {
	return func() (string, error) {
		path, err := exec.LookPath(program)
		if err != nil {
			return "", fmt.Errorf("find a peer: %w: run \"make bench\", which installs them", err)
		}
		return path, nil
	}
}

const (
	nearPorts = 9100 // of the pairs, one after the other; below the ports that connections get
	farPorts  = 9200
)

// startPeers starts each pair, peers and references, beside the client and the server of plain TCP, and returns the paths through
// them. That they do mTLS is proved before.
func (l *lab) startPeers(ctx context.Context, client, server *netlab.Workload) ([]*path, error) {
	dir := filepath.Join(l.Dir(), "peers")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	keys, err := newCredentials(dir)
	if err != nil {
		return nil, err
	}
	agent := netip.AddrPortFrom(l.Nodes[0].IPv4, 8500)
	if _, err := consul.Start(ctx, l.Lab, consul.Config{Node: "peers", Namespace: l.Nodes[0].Namespace, Address: agent.Addr().String(), Open: true}); err != nil {
		return nil, err
	}
	var paths []*path
	for i, peer := range append(peers(), references()...) {
		p := &pairing{
			dir: filepath.Join(dir, strings.NewReplacer(" ", "-", ",", "").Replace(peer.name)), credentials: keys, consul: agent.String(),
			near: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(nearPorts+i)),
			far:  netip.AddrPortFrom(server.IPv4, uint16(farPorts+i)),
			to:   netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), servicePort),
		}
		way := &path{name: peer.name, baseline: plainFar, peer: peer.beside == "", beside: peer.beside, lab: l, client: client, to: p.near}
		if way.proxies, err = l.startPeer(ctx, &peer, p, client, server); err == nil {
			err = carries(ctx, client.Namespace, p.near)
		}
		if err == nil && !peer.plain {
			err = provesMTLS(ctx, client.Namespace, p.far)
		}
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", peer.name, err)
		}
		paths = append(paths, way)
	}
	return paths, nil
}

func (l *lab) startPeer(ctx context.Context, peer *peer, p *pairing, client, server *netlab.Workload) (all proxies, err error) {
	if p.program, err = peer.find(); err != nil {
		return nil, err
	}
	if err := os.Mkdir(p.dir, 0o755); err != nil {
		return nil, err
	}
	near, far, err := peer.pair(p)
	if err != nil {
		return nil, err
	}
	for _, side := range []struct {
		command netlab.Command
		place   *netlab.Workload
		listens netip.AddrPort
	}{{far, server, p.far}, {near, client, p.near}} {
		c := side.command
		c.Path, c.Dir, c.Namespace = p.program, p.dir, side.place.Namespace
		if c.Cgroup, err = side.place.Cgroup.Child(filepath.Base(p.dir)); err != nil {
			return nil, err
		}
		process, err := l.Start(c)
		if err != nil {
			return nil, err
		}
		err = eventually(ctx, func() error {
			conn, err := c.Namespace.Dial(ctx, "tcp", side.listens.String())
			if err != nil {
				return fmt.Errorf("%w; its output:\n%s", err, process.Output())
			}
			return conn.Close()
		})
		if err != nil {
			return nil, err
		}
		all = append(proxies{c.Cgroup.Path()}, all...) // the client's first
	}
	return all, nil
}

// carries waits until a message comes back through the proxies.
func carries(ctx context.Context, ns *netlab.Namespace, near netip.AddrPort) error {
	return eventually(ctx, func() error {
		conn, err := ns.Dial(ctx, "tcp", near.String())
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		m := message{echo}
		if _, err := conn.Write(m[:]); err != nil {
			return err
		}
		_, err = io.ReadFull(conn, m[:])
		return err
	})
}

// provesMTLS asserts that far speaks TLS 1.3 with AES-GCM and a P-256 certificate, and serves nobody without one.
func provesMTLS(ctx context.Context, ns *netlab.Namespace, far netip.AddrPort) error {
	raw, err := ns.Dial(ctx, "tcp", far.String())
	if err != nil {
		return err
	}
	defer raw.Close()
	if err := raw.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}) // it is looked at, not trusted
	if err := conn.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("speak TLS 1.3 to %s: %w", far, err)
	}
	state := conn.ConnectionState()
	if suite := tls.CipherSuiteName(state.CipherSuite); !strings.Contains(suite, "_AES_") {
		return fmt.Errorf("speak TLS 1.3 to %s: it chose %s", far, suite)
	}
	if key, ok := state.PeerCertificates[0].PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		return fmt.Errorf("speak TLS 1.3 to %s: its key is no EC P-256 but a %T", far, state.PeerCertificates[0].PublicKey)
	}
	m := message{echo}
	_, err = conn.Write(m[:])
	if err == nil {
		_, err = io.ReadFull(conn, m[:])
	}
	if alert := new(net.OpError); !errors.As(err, &alert) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("speak TLS to %s without a certificate: it must be refused, and is not: %w", far, err)
	}
	return nil
}

// eventually repeats check until it returns nil or ctx ends.
func eventually(ctx context.Context, check func() error) error {
	for tick := time.NewTicker(20 * time.Millisecond); ; {
		err := check()
		if err == nil {
			tick.Stop()
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			tick.Stop()
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}
