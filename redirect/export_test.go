package redirect

import "time"

// ReapAll reaps entries of any age.
func (r *Redirect) ReapAll() error { return r.reapOlderThan(1 << 62 * time.Nanosecond) }

// LeaveBehind puts an entry into pending that no connection will ever remove.
func (r *Redirect) LeaveBehind(workload uint32) error {
	if err := r.obj.Workloads.Put(workload, outboundWorkload{Pending: 1}); err != nil {
		return err
	}
	return r.obj.Pending.Put(outboundTuple{Sport: 1}, outboundOrigin{Workload: workload})
}

// Account is how many entries of pending the kernel counts for a workload.
func (r *Redirect) Account(workload uint32) (int32, error) {
	var w outboundWorkload
	err := r.obj.Workloads.Lookup(workload, &w)
	return w.Pending, err
}
