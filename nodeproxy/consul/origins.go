package consul

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"nodeproxy.io/nodeproxy/catalog"
)

// origins joins what several Definitions say of this node. Until each has spoken nothing is said: what it is about to define
// would be taken for gone.
type origins struct {
	deliver func(catalog.Definitions)

	mu   sync.Mutex
	said []*catalog.Definitions
}

func newOrigins(n int, deliver func(catalog.Definitions)) *origins {
	return &origins{deliver: deliver, said: make([]*catalog.Definitions, n)}
}

// define takes over what the ith says. Of two definitions with one ID that of the earlier origin holds. One with the ID of
// another's sidecar does not.
func (o *origins) define(i int, defs catalog.Definitions) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.said[i] = &defs
	var all catalog.Definitions
	for _, said := range o.said {
		if said == nil {
			return
		}
		for _, def := range said.All {
			if slices.ContainsFunc(all.All, func(other catalog.Definition) bool { return other.ID == def.ID }) {
				all.Problems = append(all.Problems, catalog.Problem{Service: def.Service, Kind: "refused",
					Text: fmt.Sprintf("instance %q of %q is defined twice on this node: rename it in services_dir", def.ID, def.Service)})
				continue
			}
			all.All = append(all.All, def)
		}
		all.Problems = append(all.Problems, said.Problems...)
		all.Err = errors.Join(all.Err, said.Err)
	}
	ids := make(map[string]bool)
	for _, def := range all.All {
		ids[def.ID] = true
	}
	all.All = slices.DeleteFunc(all.All, func(def catalog.Definition) bool {
		of, is := strings.CutSuffix(def.ID, sidecarSuffix)
		if !is || !ids[of] {
			return false
		}
		all.Problems = append(all.Problems, catalog.Problem{Service: def.Service, Kind: "refused",
			Text: fmt.Sprintf("instance %q of %q has the ID of the sidecar of instance %q: rename one of the two in services_dir", def.ID, def.Service, of)})
		return true
	})
	o.deliver(all)
}
