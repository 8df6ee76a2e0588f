package file

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/hclfile"
)

// Local is a directory with the service definitions of one node, for a source that takes all else from elsewhere. It runs
// their checks.
type Local struct {
	dir     string
	checker *checker
}

// NewLocal is of the directory dir; "" defines nothing. dial is Config.DialContext.
func NewLocal(dir string, dial func(ctx context.Context, instanceID, network, address string) (net.Conn, error), log *slog.Logger) *Local {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Local{dir: dir, checker: newChecker(dial, log)}
}

// lookLocal is how often the directory is looked at.
const lookLocal = time.Second

// Run delivers what the directory defines, and again whenever that or the result of a check has changed, until ctx ends. The
// directory is applied whole or not at all.
func (l *Local) Run(ctx context.Context, deliver func(catalog.Definitions)) {
	ctx, cancel := context.WithCancel(ctx)
	defer l.checker.wait()
	defer cancel()
	look := time.NewTicker(lookLocal)
	defer look.Stop()
	var defined []*instance
	var problems []catalog.Problem
	var last *catalog.Definitions
	seen := ""
	var err error
	for {
		if now := fingerprint(l.dir); now != seen {
			var next *mesh
			if next, err = readLocal(l.dir); err == nil {
				defined, problems, seen = next.instances, next.problems, now
				l.checker.set(ctx, defined)
			}
		}
		now := &catalog.Definitions{Problems: problems, Err: err}
		for _, inst := range defined {
			now.All = append(now.All, l.definition(inst))
		}
		if last == nil || !reflect.DeepEqual(last.All, now.All) || !reflect.DeepEqual(last.Problems, now.Problems) || text(last.Err) != text(now.Err) {
			last = now
			deliver(*now)
		}
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		case <-l.checker.results:
		}
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// readLocal reads the definitions that dir holds itself.
func readLocal(dir string) (*mesh, error) {
	if dir == "" {
		return &mesh{}, nil
	}
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("read services_dir: %w: create it, or correct the source block", err)
	}
	r := newReader(dir, "")
	r.files(dir, func(own *reader, f *hclfile.File) { own.readDefinitions("", f) })
	if err := hclfile.Join(r.errs...); err != nil {
		return nil, err
	}
	slices.SortFunc(r.mesh.instances, func(a, b *instance) int { return cmp.Compare(a.id, b.id) })
	return r.mesh, nil
}

func (l *Local) definition(inst *instance) catalog.Definition {
	return catalog.Definition{
		ID: inst.id, Service: inst.service, Address: inst.address, Port: inst.port, Socket: inst.socket, Native: inst.native,
		Mesh: netip.AddrPortFrom(inst.meshAddress, inst.meshPort), Delivery: inst.delivery,
		Tags: slices.Clone(inst.tags), Meta: maps.Clone(inst.meta), Checks: l.checker.outcome(inst),
	}
}
