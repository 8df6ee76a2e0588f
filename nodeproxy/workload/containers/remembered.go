package containers

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"nodeproxy.io/nodeproxy/workload"
)

// remember writes down what is claimed, by the containers' IDs.
func (e *Engine) remember() {
	if e.cfg.StateFile == "" {
		return
	}
	all := make(map[string]workload.Claim)
	for id, c := range e.containers {
		if c.granted() && c.claim.Cgroup != "" {
			all[id] = c.claim
		}
	}
	if err := workload.Remember(e.cfg.StateFile, all); err != nil {
		e.cfg.Log.Warn("a daemon that starts while the container engine is away will not know the containers", "error", err)
	}
}

// recall claims what an earlier daemon did, as far as containers may still be what they were: a cgroup has the container's ID in
// its path, and is never another's. It need not be there yet: after a boot the engine makes it again.
func (e *Engine) recall() {
	text, err := os.ReadFile(e.cfg.StateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var all map[string]workload.Claim
	if err == nil {
		err = json.Unmarshal(text, &all)
	}
	if err != nil {
		e.cfg.Log.Warn("what an earlier daemon knew of containers is not used: correct or remove the file", "error", fmt.Errorf("read %s: %w", e.cfg.StateFile, err))
		return
	}
	for id, claim := range all {
		if e.refuses(claim) == "" {
			e.containers[id] = &container{claim: claim}
		}
	}
}
