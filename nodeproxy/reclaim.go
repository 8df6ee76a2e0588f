package nodeproxy

import (
	"context"
	"log/slog"
	"runtime/metrics"
	"time"
)

// The bounds of giving memory back.
const (
	reclaimLook  = 3 * time.Second
	reclaimQuiet = 16 << 20 // with no more than so many bytes allocated between two looks it is quiet
	reclaimWorth = 4 << 20  // so many bytes allocated since the last time are worth a collection
)

// reclaimer decides when the memory that a burst left behind is given back to the system: when it is over. The runtime would
// keep as much as is in use for the next one, and the stacks that handshakes needed until its next collections.
type reclaimer struct{ last, done uint64 }

// due is asked at every look with how many bytes were ever allocated.
func (r *reclaimer) due(allocated uint64) bool {
	quiet := allocated-r.last <= reclaimQuiet
	r.last = allocated
	if !quiet || allocated-r.done < reclaimWorth {
		return false
	}
	r.done = allocated
	return true
}

// reclaim gives memory back until ctx ends. freed is how many bytes were ever freed at once, without a collection.
func reclaim(ctx context.Context, log *slog.Logger, freed func() uint64) {
	allocated := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	var r reclaimer
	for tick := time.NewTicker(reclaimLook); ; {
		select {
		case <-tick.C:
			if metrics.Read(allocated); r.due(allocated[0].Value.Uint64() + freed()) {
				if err := GiveBack(); err != nil {
					log.Warn("memory that is not used is not given back", "error", err)
				}
			}
		case <-ctx.Done():
			tick.Stop()
			return
		}
	}
}
