package admin

import (
	"bytes"
	"fmt"
	"net/http"
	"runtime/pprof"
	"strconv"
	"time"
)

const maxProfile = 60 // seconds

// profile answers with a profile of the daemon in the format of pprof: for kind=cpu of the next seconds, one at a time; else
// what runtime/pprof has under that name now.
func (s *Server) profile(w http.ResponseWriter, r *http.Request) error {
	asked, err := query(r, "kind", "seconds")
	if err != nil {
		return err
	}
	kind := asked["kind"]
	if kind == "cpu" {
		return profileCPU(w, r, asked["seconds"])
	}
	found := pprof.Lookup(kind)
	if found == nil || asked["seconds"] != "" {
		return badRequest("parameter kind is %q: it must be cpu, with seconds, or heap, allocs or goroutine, without", kind)
	}
	var body bytes.Buffer
	if err := found.WriteTo(&body, 0); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	_, _ = w.Write(body.Bytes()) // the client is gone when this fails
	return nil
}

func profileCPU(w http.ResponseWriter, r *http.Request, seconds string) error {
	n, err := strconv.Atoi(seconds)
	if err != nil || n < 1 || n > maxProfile {
		return badRequest("parameter seconds is %q: it must be a number from 1 to %d", seconds, maxProfile)
	}
	wait := time.Duration(n) * time.Second
	answer := http.NewResponseController(w)
	_ = answer.SetWriteDeadline(time.Now().Add(wait + writeTimeout))
	var body bytes.Buffer // which a goroutine of the profiler writes meanwhile
	if err := pprof.StartCPUProfile(&body); err != nil {
		return Classify(fmt.Errorf("take a profile: %w: try again when the other one is done", err), ErrRefused)
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	_ = answer.Flush() // the client knows that it has begun
	select {
	case <-time.After(wait):
	case <-r.Context().Done(): // the client is gone, or the daemon ends
	}
	pprof.StopCPUProfile()
	_, _ = w.Write(body.Bytes())
	return nil
}
