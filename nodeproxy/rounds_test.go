package nodeproxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
)

func TestInstancesAndThenTheirClientsTakeTurns(t *testing.T) {
	r := rounds{free: 1}
	first, err := r.take(t.Context(), "flooded", netip.MustParseAddr("10.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	waiting := 0
	came := make(chan string)
	finish := make(chan struct{})
	wait := func(ctx context.Context, instance, client string) {
		t.Helper()
		go func() {
			done, err := r.take(ctx, instance, netip.MustParseAddr(client))
			defer done()
			if err != nil {
				client = "none"
			}
			came <- instance + " " + client
			<-finish
		}()
		waiting++
		eventually(t, "it waits", func() bool { return r.waiting() == waiting })
	}
	leaving, leave := context.WithCancelCause(t.Context())
	for range 3 {
		wait(t.Context(), "flooded", "10.0.0.1")
	}
	wait(leaving, "flooded", "10.0.0.3")
	wait(t.Context(), "flooded", "10.0.0.2")
	wait(t.Context(), "spared", "10.0.0.1")
	wait(t.Context(), "spared", "10.0.0.1")
	leave(errors.New("cut off"))
	if got := <-came; got != "flooded none" {
		t.Errorf("who waits no more got %q", got)
	}
	finish <- struct{}{}
	first()
	first() // it ends once
	var order []string
	for range waiting - 1 {
		order = append(order, <-came)
		select {
		case early := <-came:
			t.Fatalf("%s has a turn while another has it", early)
		default:
		}
		finish <- struct{}{}
	}
	want := []string{
		"flooded 10.0.0.1", "spared 10.0.0.1", "flooded 10.0.0.2", "spared 10.0.0.1", "flooded 10.0.0.1", "flooded 10.0.0.1",
	}
	if !slices.Equal(order, want) {
		t.Errorf("turns came as %q, want %q", order, want)
	}
	eventually(t, "the last turn has ended", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.free == 1 && len(r.instances.members) == 0
	})
}

// waiting counts who waits.
func (r *rounds) waiting() (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, clients := range r.instances.members {
		for _, line := range clients.value.members {
			n += line.value.Len()
		}
	}
	return n
}

func TestWhoWaitsForATurnInVainIsRefusedForCapacity(t *testing.T) {
	r := rounds{}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(fmt.Errorf("late"))
	done, err := r.take(ctx, "api-1", netip.MustParseAddr("10.0.0.1"))
	done()
	if catalog.ReasonOf(err, "") != catalog.ReasonCapacity || r.waiting() != 0 || r.free != 0 {
		t.Errorf("got %v, and %d wait, %d are free", err, r.waiting(), r.free)
	}
}
