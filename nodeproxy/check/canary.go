package check

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/redirect"
)

// Canaries makes connections on behalf of every workload of status that is, or should be, protected, in each of its network namespaces, and
// reports what became of them:
//
//   - as the workload, to an address that the daemon redirects and that belongs to no service. It went the way into the mesh
//     if the daemon's own trace names the process and the workload.
//   - by the daemon, which looks whether the workload listens where its instances are delivered to.
//   - as a stranger, in plaintext to the workload's strict ports: they must refuse it, and the trace must say why.
//   - as a stranger without a certificate, to the mTLS address of its instances, which must show the service's certificate.
//
// No application is connected to, unless its port is open to strangers. The processes that connect end before Canaries
// returns.
func Canaries(ctx context.Context, status *admin.Status, client *admin.Client) []Result {
	if status.Stopping {
		return []Result{failed("canaries", "not tried: the daemon is stopping, and new connections are refused: start it again")}
	}
	applications, err := client.Applications(ctx)
	if err != nil {
		return []Result{failed("canaries", "ask where instances are delivered to: %s", err)}
	}
	of := make([][]Result, len(status.Workloads))
	services := make(map[string][]int) // the workloads to try, of each
	for i := range status.Workloads {
		if w := &status.Workloads[i]; isTried(w) {
			services[w.Service] = append(services[w.Service], i)
		}
	}
	var tries errgroup.Group
	tries.SetLimit(atOnce)
	for _, workloads := range services {
		tries.Go(func() error {
			for _, i := range workloads {
				if w := &status.Workloads[i]; ctx.Err() == nil {
					c := canary{status: status, client: client, workload: w, name: fmt.Sprintf("canary %s (%s)", filepath.Base(w.Cgroup), w.Services())}
					of[i] = append(c.run(ctx), c.applications(applications)...)
				}
			}
			return nil
		})
	}
	_ = tries.Wait() // what fails is a Result
	return slices.Concat(of...)
}

// atOnce bounds the services whose workloads are tried at the same time: most of a failure is waiting for what does not come.
// Those of one service wait for each other: the trace of a refused stranger does not tell them apart.
const atOnce = 8

// isTried says whether connections of w must go into the mesh. What of an unprotected workload does not work is then told
// beside the daemon's own reason, and whether or not its audit has been there already.
func isTried(w *admin.Workload) bool {
	return w.Processes > 0 && (w.State == "protected" || w.State == "unprotected" && w.Mesh == "enabled")
}

// canary tries one workload.
type canary struct {
	status   *admin.Status
	client   *admin.Client
	workload *admin.Workload
	name     string
	events   <-chan admin.Connection
	passed   []admin.Connection // of events, that nobody awaited when they came
	where    string             // names the network namespace when there are several
}

func (c *canary) run(ctx context.Context) []Result {
	ctx, cancel := context.WithCancel(ctx)
	trace, err := c.client.OpenTrace(ctx, c.traced())
	if err != nil {
		cancel()
		return []Result{failed(c.name, "%s", err)}
	}
	events, done := make(chan admin.Connection, 256), make(chan struct{})
	go func() {
		defer close(done)
		for e, err := trace.Next(); err == nil; e, err = trace.Next() {
			if !c.concerns(&e) {
				continue
			}
			select {
			case events <- e:
			case <-ctx.Done():
			}
		}
	}()
	defer func() { cancel(); trace.Close(); <-done }()
	c.events = events
	var inner []string
	for _, other := range c.status.Workloads {
		if strings.HasPrefix(other.Cgroup, c.workload.Cgroup+"/") {
			inner = append(inner, other.Cgroup)
		}
	}
	all, err := places(c.workload.Cgroup, inner)
	if err != nil {
		return []Result{failed(c.name, "look for its processes: %s", err)}
	}
	var results []Result
	for _, p := range all {
		if len(all) > 1 {
			c.where = fmt.Sprintf(" in network namespace %d", p.inode)
		}
		results = append(results, c.outbound(ctx, p)...)
		results = append(results, c.inbound(ctx, p)...)
		_ = p.netns.Close()
	}
	return results
}

// traced is whose connections are asked for. What is plaintext at a further service's port is told of as that service's.
func (c *canary) traced() admin.Filter {
	if len(c.workload.Also) > 0 {
		return admin.Filter{}
	}
	return admin.Filter{Service: c.workload.Service}
}

// concerns says whether e may be of a canary's connection.
func (c *canary) concerns(e *admin.Connection) bool {
	if e.Direction == admin.Inbound {
		return e.Reason == catalog.ReasonPlaintext
	}
	at, err := netip.ParseAddrPort(e.Destination.Address)
	return err == nil && slices.Contains(c.status.Canaries, at.Addr().String())
}

// eventTimeout bounds the wait for the trace to tell of a connection that has been made.
const eventTimeout = 2 * time.Second

// await returns the event that match accepts, nil when there is none. Events of two connections may come in another order
// than the connections were made.
func (c *canary) await(ctx context.Context, match func(*admin.Connection) bool) *admin.Connection {
	if i := slices.IndexFunc(c.passed, func(e admin.Connection) bool { return match(&e) }); i >= 0 {
		return &c.passed[i]
	}
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	for {
		select {
		case e := <-c.events:
			if match(&e) {
				return &e
			}
			c.passed = append(c.passed, e)
		case <-ctx.Done():
			return nil
		}
	}
}

// repair is what to do about a hook that is gone.
const repair = "restart the daemon, which attaches what is missing"

// outbound tries the way into the mesh, by every kind of socket. The connections have ports of their own to be told apart.
func (c *canary) outbound(ctx context.Context, p place) []Result {
	var errands []errand
	for _, text := range c.status.Canaries {
		ip, err := netip.ParseAddr(text)
		if err != nil {
			continue // a newer daemon's
		}
		kinds := []errandKind{through}
		if ip.Is4() {
			kinds = append(kinds, mapped)
		}
		for _, kind := range kinds {
			errands = append(errands, errand{kind, netip.AddrPortFrom(ip, uint16(len(errands)+1))})
		}
	}
	if len(errands) == 0 {
		return []Result{warning(c.name, "outbound%s: not tried: the daemon names no canary address: it has no virtual IPs to give, or is of an older version", c.where)}
	}
	pid, outcomes, err := p.run(ctx, errands)
	if err != nil {
		return []Result{failed(c.name, "outbound%s: %s", c.where, err)}
	}
	for _, o := range outcomes {
		if o.Skipped {
			continue
		}
		e := c.await(ctx, func(e *admin.Connection) bool {
			return e.Direction == admin.Outbound && e.Source.PID == uint32(pid) && e.Destination.Address == o.To.String()
		})
		if wrong := c.judgeOutbound(o, e); wrong != "" {
			return []Result{failed(c.name, "outbound%s: a connection to %s %s", c.where, o.To, wrong)}
		}
	}
	return []Result{ok(c.name, "outbound%s: redirected to the proxy, and known there as %s", c.where, c.workload.Service)}
}

// judgeOutbound says what is wrong with a connection to a canary address, and what to do, or "". e is what the daemon tells
// of it, nil for nothing.
func (c *canary) judgeOutbound(o outcome, e *admin.Connection) string {
	switch {
	case e != nil && e.ID == 0:
		return fmt.Sprintf("was refused by the kernel (%s: %s): try again in some seconds, then look at the daemon's log", e.Reason, e.Reason.Sentence())
	case e != nil && e.Source.Workload != c.workload.Cgroup:
		return fmt.Sprintf("was taken for one of %s: a workload inside another is enrolled; look at \"nodeproxy status\"", e.Source.Workload)
	case e != nil && o.Peer.IsValid() && o.Peer != o.To:
		return fmt.Sprintf("shows %s as its peer: a getpeername hook is not attached to %s: %s", o.Peer, c.workload.Cgroup, repair)
	case e != nil:
		return ""
	case o.Refused:
		return "was refused, and the daemon tells of nothing: it hangs or has ended; look at its log, then restart it"
	case o.Connected && o.Closed:
		return fmt.Sprintf("came to the proxy without its origin: a sockops hook is not attached to %s: %s", c.workload.Cgroup, repair)
	case o.Connected:
		return "was accepted and then nothing happened: the daemon hangs, or another program answers; look at the daemon's log, then restart it"
	}
	return fmt.Sprintf("was not redirected (%s): a connect hook is not attached to %s: %s", o.Error, c.workload.Cgroup, repair)
}

// inbound tries the workload's ports as a stranger: a process in its network namespace and in the root of cgroup2, which is
// no workload's.
func (c *canary) inbound(ctx context.Context, p place) []Result {
	var err error
	if p.cgroup, err = redirect.CgroupMount(); err != nil {
		return []Result{failed(c.name, "%s", err)}
	}
	var errands []errand
	for _, inst := range c.instances() {
		at, _ := netip.ParseAddrPort(inst.Address)
		mesh, _ := netip.ParseAddrPort(inst.Mesh)
		if at.IsValid() && c.workload.Mode == "strict" {
			errands = append(errands, errand{plaintext, at})
		}
		if mesh.IsValid() {
			errands = append(errands, errand{handshake, mesh})
		}
	}
	if len(errands) == 0 {
		return nil
	}
	_, outcomes, err := p.run(ctx, errands)
	if err != nil {
		return []Result{failed(c.name, "inbound%s: %s", c.where, err)}
	}
	var results []Result
	for _, o := range outcomes {
		switch {
		case o.Skipped: // served from another network namespace
		case o.Kind == handshake:
			results = append(results, c.judgeHandshake(o))
		default:
			results = append(results, c.judgePlaintext(o, c.await(ctx, func(e *admin.Connection) bool {
				return e.Direction == admin.Inbound && e.Reason == catalog.ReasonPlaintext && e.Destination.Address == o.To.String()
			})))
		}
	}
	return results
}

// applications says whether the workload listens where the daemon would deliver.
func (c *canary) applications(all []admin.Application) []Result {
	var results []Result
	for _, a := range all {
		switch {
		case a.Workload != c.workload.Cgroup:
		case a.Error != "":
			results = append(results, failed(c.name, "application: %s", a.Error))
		default:
			results = append(results, ok(c.name, "application: it listens at %s, where instance %s is delivered to", a.Target, a.Instance))
		}
	}
	return results
}

// instances lists those that the workload serves.
func (c *canary) instances() []admin.Instance {
	var all []admin.Instance
	for _, svc := range c.status.Services {
		for _, inst := range svc.Instances {
			if inst.Local && slices.Contains(c.workload.Instances, inst.ID) {
				all = append(all, inst)
			}
		}
	}
	return all
}

// serviceAt is the service of this node that speaks mTLS at an address.
func (c *canary) serviceAt(mesh netip.AddrPort) string {
	for _, svc := range c.status.Services {
		if slices.ContainsFunc(svc.Instances, func(inst admin.Instance) bool { return inst.Local && inst.Mesh == mesh.String() }) {
			return svc.Name
		}
	}
	return c.workload.Service
}

// judgePlaintext says what became of a stranger's plaintext to a strict port. e is what the daemon tells of it.
func (c *canary) judgePlaintext(o outcome, e *admin.Connection) Result {
	switch {
	case e != nil && e.Verdict == admin.Denied && !o.Connected:
		return ok(c.name, "plaintext to %s is refused", o.To)
	case e != nil && e.Verdict == admin.Allowed:
		return warning(c.name, "plaintext to %s is let in: inbound.plaintext_from has that network, or the service is permissive by its definition", o.To)
	case o.Connected:
		return failed(c.name, "plaintext of a stranger gets into %s: nothing guards its network namespace: %s", o.To, repair)
	case o.Refused:
		return failed(c.name, "plaintext to %s is refused, but the daemon does not tell of it: nothing listens there and nothing guards it: %s", o.To, repair)
	}
	return failed(c.name, "plaintext to %s: %s: a firewall in the network namespace may drop it", o.To, o.Error)
}

func (c *canary) judgeHandshake(o outcome) Result {
	var want admin.Certificate
	service := c.serviceAt(o.To)
	if i := slices.IndexFunc(c.status.Certificates, func(cert admin.Certificate) bool { return cert.Service == service }); i >= 0 {
		want = c.status.Certificates[i]
	}
	switch {
	case o.Refused:
		return failed(c.name, "mTLS at %s is refused: nothing steers the port to the proxy: %s", o.To, repair)
	case o.Error != "":
		return failed(c.name, "mTLS at %s: %s: look at %q with \"nodeproxy trace\", and at its certificate in \"nodeproxy status\"", o.To, o.Error, service)
	case o.Identity != want.Identity:
		return failed(c.name, "mTLS at %s shows the certificate of %q instead of %q: another program answers there: move it, or %s", o.To, o.Identity, want.Identity, repair)
	case o.Alert == "":
		return failed(c.name, "mTLS at %s takes clients without a certificate: another program answers there: move it, or %s", o.To, repair)
	}
	return ok(c.name, "mTLS at %s shows %s, valid until %s, and wants a certificate", o.To, o.Identity, o.NotAfter.Local().Format(time.DateTime))
}
