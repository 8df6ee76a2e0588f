package nodeproxy

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

func TestDrainLetsConnectionsEnd(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.Drain = patience })
	client, server := m.pair()
	m.stop()
	m.kernel.serving.Wait()
	say(t, client, "last words")
	hear(t, server, "last words")
	select {
	case <-m.finished:
		t.Fatal("Run returned with a live connection")
	default:
	}
	client.Close()
	server.Close()
	if err := m.shutdown(); err != nil {
		t.Fatal(err)
	}
	if e := m.events.wait(t, "close", is(admin.EventClose, admin.Outbound)); e.Verdict != admin.Allowed || e.Reason != "" {
		t.Errorf("%+v", e)
	}
}

func TestADenyCutsWhileDraining(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.Drain = time.Hour })
	client, _ := m.pair()
	m.stop()
	m.kernel.serving.Wait()
	m.rule(policy.Deny)
	m.next.Generation++
	p, _ := policy.Compile(m.next.Generation, policy.Deny, policy.Identity{TrustDomain: trustDomain}, nil, m.rules)
	m.next.Policy = p
	snap, err := catalog.New(m.next)
	if err != nil {
		t.Fatal(err)
	}
	m.source.snapshots <- snap
	wantReset(t, client)
	m.shutdown()
}

func TestDrainDeadlineResets(t *testing.T) {
	m := newMesh(t, func(c *Config, _ *fakeKernel) { c.Limits.Drain = 100 * time.Millisecond })
	client, server := m.pair()
	half := m.dial(m.next.Services["api"].Instances[0].Mesh.String()) // a handshake in progress
	eventually(t, "the handshake is in the table", func() bool { return m.proxy.live.len() == 3 })
	if err := m.shutdown(); err != nil {
		t.Fatal(err)
	}
	wantReset(t, client)
	wantReset(t, server)
	wantReset(t, half)
	for _, direction := range []admin.Direction{admin.Outbound, admin.Inbound} {
		if e := m.events.wait(t, "close", is(admin.EventClose, direction)); e.Reason != catalog.ReasonDrain || e.Verdict != admin.Denied {
			t.Errorf("%+v", e)
		}
	}
}

func TestRunReportsWhoFailed(t *testing.T) {
	broken := errors.New("broken")
	m := newMesh(t, func(_ *Config, k *fakeKernel) { k.err = broken })
	if err := m.shutdown(); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	m = newMesh(t, func(c *Config, _ *fakeKernel) { c.Source.(*fakeSource).err = broken })
	if err := <-m.finished; !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	} else {
		m.finished <- err
	}
}

func TestApplyIsTriedAgain(t *testing.T) {
	var tries atomic.Int32
	m := newMesh(t, func(_ *Config, k *fakeKernel) {
		k.apply = func(*catalog.Snapshot) error {
			if tries.Add(1) == 1 {
				return errors.New("map is full")
			}
			return nil
		}
	})
	m.publish() // returns when it was applied
	if tries.Load() != 2 {
		t.Errorf("%d tries", tries.Load())
	}
}

func TestStatusShowsAPolicyOnceTheKernelHasEndedWhatItDenies(t *testing.T) {
	shown := make(chan admin.PolicyStatus, 4) // in the midst of each Revoke
	m := newMesh(t)
	m.kernel.revoke = func(snap *catalog.Snapshot) error {
		shown <- m.proxy.Status().Policy
		if snap.Generation == 2 && len(shown) == 1 {
			return errors.New("no memory")
		}
		return nil
	}
	m.def = policy.Allow
	m.publish()
	if before := <-shown; before != (admin.PolicyStatus{}) {
		t.Errorf("before a policy is in force %+v is shown", before)
	}
	first := admin.PolicyStatus{Generation: 1, Default: "allow"}
	m.def = policy.Deny
	m.publish()
	if now := m.proxy.Status(); now.Policy != first || now.Source.Generation != 2 {
		t.Errorf("while the kernel lets pass what policy 2 denies %+v of snapshot %d is shown", now.Policy, now.Source.Generation)
	}
	<-m.kernel.applied // again
	for range 2 {
		if before := <-shown; before != first {
			t.Errorf("before the kernel has ended what policy 2 denies %+v is shown", before)
		}
	}
	if now := m.proxy.Status().Policy; now != (admin.PolicyStatus{Generation: 2, Default: "deny"}) {
		t.Errorf("after it %+v is shown", now)
	}
}

func TestAnOlderSnapshotIsDropped(t *testing.T) {
	m := newMesh(t)
	m.publish()
	old := m.proxy.gate.current().snap
	m.publish()
	m.source.snapshots <- old
	eventually(t, "the old snapshot is taken", func() bool { return len(m.proxy.offers) == 0 })
	m.publish() // fails when the kernel is asked to apply anything before it
}
