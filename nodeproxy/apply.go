package nodeproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"maps"
	"sync"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls"
	"nodeproxy.io/policy"
)

// retryApply is how long after a failure the kernel is asked again to apply the same snapshot.
const retryApply = time.Second

// lingering is how long the certificate of a service that no workload here runs as any more is used: connections to and of a
// workload that was just un-enrolled are still accepted.
const lingering = 3 * time.Second

// formerLeaf is a certificate that the snapshot in force has no more. When it lingers longer, because there is no newer
// snapshot, nobody uses it: its service is not served.
type formerLeaf struct {
	*tls.Certificate
	until time.Time
}

// formerLeaves are the certificates of last that next has not, as long as they linger.
func formerLeaves(last *state, next *catalog.Snapshot) map[string]formerLeaf {
	former := make(map[string]formerLeaf)
	if last == nil {
		return former
	}
	maps.Copy(former, last.former)
	for name, leaf := range last.snap.Leaves {
		former[name] = formerLeaf{leaf, time.Now().Add(lingering)}
	}
	maps.DeleteFunc(former, func(name string, leaf formerLeaf) bool {
		return next.Leaves[name] != nil || time.Now().After(leaf.until)
	})
	return former
}

// offer leaves snap for the loop in the place of an older one that it has not taken yet. The source calls it, one call
// at a time.
func (p *Proxy) offer(snap *catalog.Snapshot) {
	for {
		select {
		case p.offers <- snap:
			return
		default:
		}
		select {
		case <-p.offers:
		default:
		}
	}
}

// applyAll applies snapshots until ctx ends. kernelCtx ends earlier: policy is in force while connections drain, steering
// is not changed any more.
func (p *Proxy) applyAll(ctx, kernelCtx context.Context) {
	retry := time.NewTimer(0)
	retry.Stop()
	defer retry.Stop()
	for {
		fresh := false
		select {
		case <-ctx.Done():
			return
		case snap := <-p.offers:
			if fresh = p.putInForce(snap); !fresh {
				continue
			}
		case <-retry.C:
		}
		current := p.gate.current()
		if current == nil {
			continue
		}
		retry.Stop()
		err := p.endDenied(current, fresh)
		if kernelCtx.Err() == nil {
			err = errors.Join(err, p.cfg.Kernel.Apply(kernelCtx, current.snap))
		}
		p.setApplying(err)
		if err != nil {
			p.cfg.Log.Error("apply the snapshot to the kernel: it is tried again", "generation", current.snap.Generation, "error", err)
			retry.Reset(retryApply)
		}
	}
}

// endDenied ends what the state in force denies: through the proxy, if the state is fresh, and within the node. Neither waits for
// the other, for there may be much to end.
func (p *Proxy) endDenied(now *state, fresh bool) error {
	var carried sync.WaitGroup
	if fresh {
		p.direct.recheck(&p.gate) // first: what Revoke ends is told with the verdict
		carried.Go(func() {
			p.recheck()
			p.tunnels.retire(now)
			p.balancer.prune(now.snap)
		})
	}
	err := p.cfg.Kernel.Revoke(now.snap)
	carried.Wait()
	if err == nil {
		p.setRevoked(now.snap.Policy)
	}
	return err
}

// putInForce makes snap decide: certificates and policy with one swap; endDenied follows. Steering comes after it, so that
// nothing is steered to us before we have its certificate. It returns false when it dropped snap.
func (p *Proxy) putInForce(snap *catalog.Snapshot) bool {
	current := p.gate.current()
	if current != nil && snap.Generation <= current.snap.Generation {
		p.cfg.Log.Error("drop a snapshot that is not newer than the one in force", "generation", snap.Generation, "in force", current.snap.Generation)
		return false
	}
	next := &state{snap: snap, former: formerLeaves(current, snap)}
	certificates := maps.Clone(snap.Leaves)
	for name, leaf := range next.former {
		certificates[name] = leaf.Certificate
	}
	next.credentials = mtls.New(snap, certificates)
	if current != nil {
		next.trust = current.trust
		if !next.credentials.SameTerms(current.credentials) {
			next.trust++
		}
	}
	p.gate.swap(next)
	return true
}

// Snapshot is what is in force, nil before there is one.
func (p *Proxy) Snapshot() *catalog.Snapshot {
	if now := p.gate.current(); now != nil {
		return now.snap
	}
	return nil
}

// recheck evaluates the intention of every live connection again, also of one that is still dialling, and resets what
// the policy in force denies. Direct ones are ended by Kernel.Revoke.
func (p *Proxy) recheck() {
	var denied []*connection
	for _, c := range p.live.all() {
		source, service, known := c.pair()
		if !known {
			continue // it will be evaluated by the policy in force, or a newer one
		}
		v := p.gate.decide(source, service)
		if v.Allowed {
			c.record(v)
			continue
		}
		c.condemn(denial(source, service, v), &v)
		denied = append(denied, c)
	}
	for _, c := range denied {
		c.cutOff()
	}
}

func (p *Proxy) setRevoked(policy *policy.Policy) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.revoked = policy
}

func (p *Proxy) setApplying(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.applying = err
}
