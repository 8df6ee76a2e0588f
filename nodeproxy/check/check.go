// Package check is the preflight: it asks the host, the configuration, the source and the running daemon whether the mesh
// would work here, and says for each question that it does, or what to do.
package check

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/redirect"
)

// Verdict is the answer to one question.
type Verdict string

const (
	OK      Verdict = "ok"
	Warning Verdict = "warning" // it works, with the loss that Text names
	Failed  Verdict = "failed"  // it does not work; Text says what to do
)

// Result is one line.
type Result struct {
	Name    string  `json:"name"`
	Verdict Verdict `json:"verdict"`
	Text    string  `json:"text"`
}

func ok(name, format string, args ...any) Result {
	return Result{name, OK, fmt.Sprintf(format, args...)}
}

func warning(name, format string, args ...any) Result {
	return Result{name, Warning, fmt.Sprintf(format, args...)}
}

func failed(name, format string, args ...any) Result {
	return Result{name, Failed, fmt.Sprintf(format, args...)}
}

// Worst is the gravest verdict among results, OK for none.
func Worst(results []Result) Verdict {
	for _, v := range []Verdict{Failed, Warning} {
		if slices.ContainsFunc(results, func(r Result) bool { return r.Verdict == v }) {
			return v
		}
	}
	return OK
}

// Kernel turns the kernel's features, from redirect.Probe, into lines.
func Kernel(features []redirect.Feature) []Result {
	var results []Result
	for _, f := range features {
		name := "kernel " + strings.TrimPrefix(f.Name, "kernel ")
		switch {
		case f.Err == nil:
			results = append(results, ok(name, "available"))
		case errors.Is(f.Err, fs.ErrPermission): // the others would only say the same in other words
			return []Result{failed("kernel", "ask for its features: %s: run as root", f.Err)}
		case f.Optional:
			results = append(results, warning(name, "%s: %s", f.Err, f.Costs))
		default:
			results = append(results, failed(name, "%s; %s: run on a kernel that has it", f.Err, f.Costs))
		}
	}
	return results
}

// Configuration reads the configuration at path; it is nil when the result is not OK.
func Configuration(path string) (*config.Config, Result) {
	cfg, err := config.Load(path)
	if err != nil {
		return nil, failed("configuration", "%s", err)
	}
	return cfg, ok("configuration", "%s: node %s, %d cgroup(s) configured", path, cfg.Node.Name, len(cfg.Cgroups))
}

// Source reads the source once, with load, and reports what it says. The snapshot is nil when it has none.
func Source(ctx context.Context, load func(context.Context) (*catalog.Snapshot, error)) (*catalog.Snapshot, []Result) {
	snap, err := load(ctx)
	if err != nil {
		return nil, []Result{failed("source", "%s", err)}
	}
	results := []Result{ok("source", "services %d, instances on this node %d", len(snap.Services), len(snap.LocalInstances()))}
	var troubled []string
	for _, p := range snap.Problems {
		if p.Service == "" {
			results = append(results, warning("source: "+p.Kind, "%s", p.Text))
			continue
		}
		troubled = append(troubled, p.Service)
	}
	slices.Sort(troubled)
	if troubled = slices.Compact(troubled); len(troubled) > 0 {
		results = append(results, warning("source", "something of the configuration of %s is ignored or refused: --service NAME says what", shorten(troubled)))
	}
	return snap, results
}

// Service reports what of the service's configuration is ignored, and which connections to it would be denied or fail
// whatever its health, which a preflight does not know.
func Service(snap *catalog.Snapshot, name string) []Result {
	label := "service " + name
	var results []Result
	for _, p := range snap.Problems {
		if p.Service == name && p.Kind != "l7-ignored" {
			results = append(results, warning(label, "%s: %s", p.Kind, p.Text))
		}
	}
	svc := snap.Services[name]
	if svc == nil {
		return append(results, failed(label, "the source has no such service: it knows %s", known(snap)))
	}
	for _, what := range svc.IgnoredL7 {
		results = append(results, warning(label, "%s is ignored: it is HTTP-level, and this proxy carries bytes", what))
	}
	results = append(results, instances(label, svc)...)
	results = append(results, chain(label, svc, snap.RouteOf("", catalog.Destination{Service: svc}))...)
	if len(svc.Virtual) == 0 {
		results = append(results, warning(label, "it has no virtual IP: callers reach it by the addresses of its instances only"))
	}
	if len(results) == 0 {
		results = append(results, ok(label, "%d instance(s), nothing is ignored", len(svc.Instances)))
	}
	return results
}

func instances(label string, svc *catalog.Service) []Result {
	var results []Result
	dialable := 0
	for _, inst := range svc.Instances {
		switch {
		case !inst.Mesh.IsValid():
			results = append(results, warning(label, "instance %s on %s speaks no mTLS: connections to it are denied", inst.ID, inst.Node))
		default:
			dialable++
		}
	}
	if dialable == 0 && svc.Chain == nil {
		results = append(results, failed(label, "no instance can be connected to: connections are denied with %q", catalog.ReasonNoInstance))
	}
	return results
}

// chain reports where calls to svc go by route: those of callers that configure nothing of their own.
func chain(label string, svc *catalog.Service, route *catalog.Route) []Result {
	if svc.Chain == nil {
		return nil
	}
	var results []Result
	inUse := route.Preferred()
	for _, t := range route.Targets {
		switch {
		case t.Unreachable != "":
			results = append(results, warning(label, "target %s is never used: %s", t, t.Unreachable))
		case t == inUse && t.Usable():
			results = append(results, ok(label, "calls go to target %s, %d instance(s)", t, len(t.Instances)))
		default:
			results = append(results, ok(label, "target %s is not used now, %d instance(s)", t, len(t.Instances)))
		}
	}
	if !inUse.Usable() {
		results = append(results, failed(label, "no target can be connected to: connections are denied with %q", catalog.ReasonNoInstance))
	}
	return results
}

func known(snap *catalog.Snapshot) string {
	if len(snap.Services) == 0 {
		return "none"
	}
	names := make([]string, 0, len(snap.Services))
	for name := range snap.Services {
		names = append(names, name)
	}
	slices.Sort(names)
	return shorten(names)
}

// shorten names no more than twenty.
func shorten(names []string) string {
	if more := len(names) - 20; more > 0 {
		names = append(slices.Clip(names[:20]), fmt.Sprintf("%d more", more))
	}
	return strings.Join(names, ", ")
}

// Workloads reports each workload as the running daemon sees it.
func Workloads(status *admin.Status) []Result {
	var results []Result
	for _, w := range status.Workloads {
		name := fmt.Sprintf("workload %s (%s)", filepath.Base(w.Cgroup), w.Services())
		switch {
		case w.State == "protected" && w.Detail == "":
			results = append(results, ok(name, "protected, %s, %d process(es) in %d network namespace(s)", w.Mode, w.Processes, len(w.Namespaces)))
		case w.Unprotected():
			results = append(results, failed(name, "%s: %s", w.State, w.Detail))
		default:
			results = append(results, warning(name, "%s: %s", w.State, w.Detail))
		}
		switch why, off := strings.CutPrefix(w.DNS, "off: "); {
		case off:
			results = append(results, warning("dns "+filepath.Base(w.Cgroup)+" ("+w.Services()+")", "off, name queries pass as they are: %s", why))
		case w.DNS != "":
			results = append(results, ok("dns "+filepath.Base(w.Cgroup)+" ("+w.Services()+")", "%s", w.DNS))
		}
	}
	for _, r := range status.Refused {
		results = append(results, failed("claim "+r.Cgroup, "may not be %s (%s): %s", r.Services(), r.Provider, r.Why))
	}
	if len(results) == 0 {
		results = append(results, warning("workloads", "none is enrolled: name one in the configuration, or with \"nodeproxy enroll\""))
	}
	return results
}
