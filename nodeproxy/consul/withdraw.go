package consul

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/hashicorp/consul/api"
)

// Withdraw removes all registrations that a daemon made with the agent of cfg, or in the catalog, and says which.
func Withdraw(ctx context.Context, cfg Config) (removed []string, err error) {
	c, err := newClient(&cfg)
	if err != nil {
		return nil, fmt.Errorf("withdraw registrations: %w", err)
	}
	defer c.close()
	if cfg.agentless() {
		return withdrawNode(ctx, c, cfg.catalogNode())
	}
	local, checks := make(map[string]*api.AgentService), make(map[string]*api.AgentCheck)
	for path, into := range map[string]any{"/v1/agent/services": &local, "/v1/agent/checks": &checks} {
		got, err := c.request(ctx, question{path: path})
		if err == nil {
			err = decode(got, into)
		}
		if err != nil {
			return nil, fmt.Errorf("withdraw registrations: %w", err)
		}
	}
	var errs []error
	marked := endingChecksOf(checks)
	for _, id := range slices.Sorted(maps.Keys(marked)) {
		if err := c.unmark(ctx, local[marked[id]], id); err != nil {
			errs = append(errs, fmt.Errorf("withdraw check %q: %w", id, err))
			continue
		}
		removed = append(removed, "check "+id)
	}
	for _, id := range slices.Sorted(maps.Keys(local)) {
		s := local[id]
		isProxy := s.Kind == api.ServiceKindConnectProxy && s.Proxy != nil
		if isOurs(s) && (isProxy || id == proxyService) {
			service := ""
			if isProxy {
				service = s.Proxy.DestinationServiceName
			}
			if err := c.withdraw(ctx, service, id); err != nil {
				errs = append(errs, fmt.Errorf("withdraw registration %q: %w", id, err))
				continue
			}
			removed = append(removed, "registration "+id)
		}
	}
	return removed, errors.Join(errs...)
}
