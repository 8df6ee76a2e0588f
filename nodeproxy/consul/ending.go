package consul

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"
)

const (
	endingMeta = "nodeproxy-ending" // of a sidecar of ours whose workload is being stopped: its registration shows no checks
	endingText = "the workload is being stopped"

	// endingCheck begins the ID of the check that a sidecar of the operator's has from us meanwhile. Its own ID follows.
	endingCheck = "nodeproxy-ending:"
)

// saysEnding says whether that is why a check is critical.
func saysEnding(c *api.HealthCheck) bool { return c.Name == endingText || c.Output == endingText }

// onlyEnds says whether all that is wrong with an instance is that its workload is being stopped.
func onlyEnds(checks api.HealthChecks) bool {
	ends := false
	for _, c := range checks {
		if c.Status != api.HealthCritical {
			continue
		}
		if !saysEnding(c) {
			return false
		}
		ends = true
	}
	return ends
}

// endingChecks lists the checks that sidecars of the operator's are to have from us: by ID, the sidecar.
func (d *data) endingChecks() map[string]*api.AgentService {
	all := make(map[string]*api.AgentService)
	for _, s := range d.local {
		if s.Kind != api.ServiceKindConnectProxy || s.Proxy == nil || isOurs(s) {
			continue
		}
		if app := d.application(s); app != nil && d.ends(app.ID, s.ID) {
			all[endingCheck+s.ID] = s
		}
	}
	return all
}

// ends says whether the workloads of an instance are being stopped. At the start, when that is not known, it is as an earlier daemon
// has left the sidecar.
func (d *data) ends(app, sidecar string) bool {
	ends, known := d.served[app]
	if known || d.settled {
		return ends
	}
	if s := d.local[sidecar]; s != nil && wasEnding(s) {
		return true
	}
	for _, marked := range d.marked {
		if marked == sidecar {
			return true
		}
	}
	return false
}

// wereEnding says whether there are sidecars that stay as an earlier daemon has left them until it is known who is served.
func (d *data) wereEnding() bool {
	if d.settled {
		return false
	}
	for _, s := range d.local {
		if wasEnding(s) {
			return true
		}
	}
	return len(d.marked) > 0
}

func wasEnding(s *api.AgentService) bool { return isOurs(s) && s.Meta[endingMeta] != "" }

// ending is those of served that end.
func ending(served map[string]bool) map[string]bool {
	all := maps.Clone(served)
	maps.DeleteFunc(all, func(_ string, ends bool) bool { return !ends })
	return all
}

// endingChecksOf lists those among an agent's checks: by ID, that of the sidecar.
func endingChecksOf(all map[string]*api.AgentCheck) map[string]string {
	found := make(map[string]string)
	for id, c := range all {
		if c != nil && strings.HasPrefix(id, endingCheck) {
			found[id] = c.ServiceID
		}
	}
	return found
}

// mark gives sidecars of the operator's the checks that they are to have, and takes the others of ours away. It says whether it did.
func (r *run) mark(ctx context.Context, w *wanted) (changed bool, err error) {
	d := r.world.current()
	var errs []error
	for _, id := range slices.Sorted(maps.Keys(w.ending)) {
		if s := w.ending[id]; d.marked[id] == "" {
			changed = true
			errs = append(errs, ignoreGone(r.client.put(ctx, "/v1/agent/check/register", s.Proxy.DestinationServiceName, &api.AgentCheckRegistration{
				ID: id, Name: endingText, ServiceID: s.ID, AgentServiceCheck: api.AgentServiceCheck{TTL: lifetime.String(), Status: api.HealthCritical},
			})))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(d.marked)) {
		if w.ending[id] == nil {
			changed = true
			errs = append(errs, r.client.unmark(ctx, d.local[d.marked[id]], id))
		}
	}
	return changed, errors.Join(errs...)
}

// unmark takes such a check away from a sidecar, nil if that is not known.
func (c *client) unmark(ctx context.Context, sidecar *api.AgentService, id string) error {
	service := ""
	if sidecar != nil && sidecar.Proxy != nil {
		service = sidecar.Proxy.DestinationServiceName
	}
	return ignoreGone(c.put(ctx, "/v1/agent/check/deregister/"+escape(id), service, nil))
}

// ignoreGone is err, but nil where the agent does not know what was to be changed any more.
func ignoreGone(err error) error {
	if hasStatus(err, http.StatusNotFound) {
		return nil
	}
	return err
}
