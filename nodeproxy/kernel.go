package nodeproxy

import (
	"context"
	"net"
	"net/netip"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/workload"
)

// Kernel is what the proxy asks of the node it runs on. *workload.Manager implements it; tests use a fake, so they need
// no root. Errors that carry a reason are *catalog.Refusal.
type Kernel interface {
	// Run keeps workloads enrolled and listened for, calling h, until ctx ends. It then closes the listeners, waits for
	// all calls of h to return, and leaves what is pinned in place: nothing new connects until a daemon runs again.
	Run(ctx context.Context, h workload.Handler) error

	// Revoke ends what the kernel lets pass without the proxy and snap's policy denies: first the right to connect, then the
	// connections that are there. It is called once snap's policy is in force, before Apply, and also after Run has
	// returned, while connections drain. Nothing that snap denies is granted afterwards.
	Revoke(snap *catalog.Snapshot) error

	// Direct says why connections of source to a destination on this node pass the proxy; "" when they do not.
	Direct(source string, to catalog.Destination) (why string)

	// Apply brings steering in line with snap: what is removed first, then what is added. It is called after the
	// snapshot's certificates and policy are in force. On error the kernel keeps what could be applied and Apply may be
	// called again.
	Apply(ctx context.Context, snap *catalog.Snapshot) error

	// Origin says where conn, accepted from ns's outbound listener, was going. Refusals: unknown-origin, unknown-workload.
	Origin(ns *workload.Namespace, conn *net.TCPConn) (*workload.Origin, error)

	// Probed says whether conn, accepted from an inbound listener, is a health check of the node's prober.
	Probed(conn *net.TCPConn) bool

	// Served says which local instance is reached by the mesh address at in ns. Refusals: unknown-service, unknown-workload.
	Served(ns *workload.Namespace, at netip.AddrPort) (*workload.Served, error)

	// Owns says whether ip is an address of this node, or of a namespace in which workloads of it are.
	Owns(ip netip.Addr) bool

	// Dial connects to the mesh address to from inside ns.
	Dial(ctx context.Context, ns *workload.Namespace, to netip.AddrPort) (*net.TCPConn, error)

	// Deliver connects to the application behind s, inside the workload only, and lets it see client as its peer.
	// The connection is a *net.TCPConn or a *net.UnixConn. Refusals: not-the-workloads, delivery-failed.
	Deliver(ctx context.Context, s *workload.Served, client netip.AddrPort) (net.Conn, error)

	// Applications says of each local instance that a workload serves whether it would be delivered to now.
	Applications() []workload.Application

	// State is what status shows of workloads, refused claims and pins.
	State() workload.State
}
