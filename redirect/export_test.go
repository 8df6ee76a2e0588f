package redirect

import "time"

// HandshakeTime is the age up to which Reap leaves entries alone.
const HandshakeTime = time.Duration(outboundConstantHANDSHAKE_SECONDS) * time.Second

// ReapAt reaps as Reap does when the monotonic clock shows now.
func (r *Redirect) ReapAt(now time.Duration) error { return r.reapAt(now) }

// LeaveBehind puts an entry into pending that was made when the monotonic clock showed made, in whole seconds, and that no
// connection will ever remove.
func (r *Redirect) LeaveBehind(workload uint32, made time.Duration) error {
	if err := r.obj.Workloads.Put(workload, outboundWorkload{Pending: 1}); err != nil {
		return err
	}
	return r.obj.Pending.Put(outboundTuple{Sport: 1}, outboundOrigin{Workload: workload, Seconds: uint32(made / time.Second)})
}

// Account is how many entries of pending the kernel counts for a workload.
func (r *Redirect) Account(workload uint32) (int32, error) {
	var w outboundWorkload
	err := r.obj.Workloads.Lookup(workload, &w)
	return w.Pending, err
}

// Charge has the kernel count so many entries of direct and granted for a workload.
func (r *Redirect) Charge(workload uint32, announced, granted int32) error {
	var w outboundWorkload
	if err := r.obj.Workloads.Lookup(workload, &w); err != nil {
		return err
	}
	w.Direct, w.Granted = announced, granted
	return r.obj.Workloads.Put(workload, w)
}

// Announced is how many entries of direct the kernel counts for a workload.
func (r *Redirect) Announced(workload uint32) (int32, error) {
	var w outboundWorkload
	err := r.obj.Workloads.Lookup(workload, &w)
	return w.Direct, err
}
