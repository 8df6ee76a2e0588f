package redirect

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Reap removes what connections left in the maps that were never accepted nor seen to close, as when another program took
// our sockops callbacks away. Call it every now and then; what it removes is older than any handshake can be.
func (r *Redirect) Reap() error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return fmt.Errorf("read monotonic clock: %w", err)
	}
	return r.reapAt(time.Duration(now.Nano()))
}

// reapAt is Reap when the monotonic clock shows now.
func (r *Redirect) reapAt(now time.Duration) error {
	limit := now - time.Duration(outboundConstantHANDSHAKE_SECONDS)*time.Second
	pending, err := collect(r.obj.Pending, func(o outboundOrigin) (uint32, bool) {
		return o.Workload, time.Duration(o.Seconds)*time.Second < limit
	})
	if err != nil {
		return fmt.Errorf("reap pending: %w", err)
	}
	direct, err := collect(r.obj.Direct, func(d outboundDirect) (uint32, bool) {
		return d.Workload, time.Duration(d.Time) < limit
	})
	if err != nil {
		return fmt.Errorf("reap direct: %w", err)
	}
	return errors.Join(
		r.drop(r.obj.Pending, pending, func(w *outboundWorkload) { w.Pending-- }),
		r.drop(r.obj.Direct, direct, func(w *outboundWorkload) { w.Direct-- }),
	)
}

// collect lists the entries that old says are, with their workloads.
func collect[V any](m *ebpf.Map, old func(V) (workload uint32, is bool)) (map[outboundTuple]uint32, error) {
	found := make(map[outboundTuple]uint32)
	var key outboundTuple
	var value V
	it := m.Iterate()
	for it.Next(&key, &value) {
		if workload, is := old(value); is {
			found[key] = workload
		}
	}
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return nil, err
	}
	return found, nil // an iteration that changes cut short goes on next time
}

// drop removes entries and takes them off their workloads' accounts.
func (r *Redirect) drop(m *ebpf.Map, entries map[outboundTuple]uint32, takeOff func(*outboundWorkload)) error {
	for key, id := range entries {
		if m.Delete(key) != nil {
			continue // a program was faster
		}
		var w outboundWorkload
		if r.obj.Workloads.Lookup(id, &w) != nil {
			continue // un-enrolled
		}
		takeOff(&w)
		if err := r.obj.Workloads.Update(id, w, ebpf.UpdateExist); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("count entries of workload %d: %w", id, err)
		}
	}
	return nil
}
