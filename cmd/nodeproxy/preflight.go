package main

import (
	"context"
	"slices"

	"nodeproxy.io/nodeproxy/check"
	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/nodeproxy/consul"
)

// preflight asks the Consul agent, if the source is one, about what the configured workloads need.
func preflight(ctx context.Context, cfg *config.Config) []check.Result {
	if cfg.Consul == nil {
		return nil
	}
	var services []string
	for _, c := range cfg.Cgroups {
		services = append(append(services, c.Service), c.Also...)
	}
	slices.Sort(services)
	var results []check.Result
	for _, f := range consul.Preflight(ctx, consulConfig(cfg), slices.Compact(services)) {
		r := check.Result{Name: f.Name, Verdict: check.OK, Text: f.Text}
		switch {
		case f.Failed:
			r.Verdict = check.Failed
		case f.Warning:
			r.Verdict = check.Warning
		}
		results = append(results, r)
	}
	return results
}
