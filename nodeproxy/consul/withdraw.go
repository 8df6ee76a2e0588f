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
	got, err := c.request(ctx, question{path: "/v1/agent/services"})
	local := make(map[string]*api.AgentService)
	if err == nil {
		err = decode(got, &local)
	}
	if err != nil {
		return nil, fmt.Errorf("withdraw registrations: %w", err)
	}
	var errs []error
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
