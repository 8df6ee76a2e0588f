package main

import (
	"context"
	"log/slog"
	"slices"

	"nodeproxy.io/nodeproxy/check"
	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/nodeproxy/consul"
)

// podsPreflight asks the Kubernetes API server, if pods are workloads.
func podsPreflight(ctx context.Context, cfg *config.Config) []check.Result {
	if cfg.Pods == nil {
		return nil
	}
	const name = "kubernetes"
	cluster, err := newCluster(cfg, slog.New(slog.DiscardHandler))
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, readTimeout)
		defer cancel()
		err = cluster.Check(ctx)
	}
	if err != nil {
		return []check.Result{{Name: name, Verdict: check.Failed, Text: err.Error()}}
	}
	return []check.Result{{Name: name, Verdict: check.OK, Text: "the API server tells of the pods of node " + cfg.Pods.Node}}
}

// enginePreflight asks the container engine, if containers are workloads.
func enginePreflight(ctx context.Context, cfg *config.Config) []check.Result {
	if cfg.Containers == nil {
		return nil
	}
	const name = "containers"
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	if err := newEngine(cfg, "", slog.New(slog.DiscardHandler)).Check(ctx); err != nil {
		return []check.Result{{Name: name, Verdict: check.Failed, Text: err.Error()}}
	}
	return []check.Result{{Name: name, Verdict: check.OK, Text: "the engine at " + cfg.Containers.Socket + " tells of its containers"}}
}

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
