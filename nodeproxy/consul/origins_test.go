package consul

import (
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
)

func TestNothingIsDefinedBeforeEveryOriginHasSpoken(t *testing.T) {
	var told []catalog.Definitions
	o := newOrigins(2, func(defs catalog.Definitions) { told = append(told, defs) })
	ids := func() (all []string) {
		for _, def := range told[len(told)-1].All {
			all = append(all, def.Service+" "+def.ID)
		}
		return all
	}
	o.define(1, catalog.Definitions{All: []catalog.Definition{{ID: "web-1", Service: "web"}}})
	if len(told) != 0 {
		t.Fatalf("defined too early: %+v", told)
	}
	o.define(0, catalog.Definitions{All: []catalog.Definition{{ID: "db-1", Service: "db"}}, Err: errors.New("broken")})
	if want := []string{"db db-1", "web web-1"}; !slices.Equal(ids(), want) || told[0].Err == nil {
		t.Errorf("defined are %v, %v, want %v and the error", ids(), told[0].Err, want)
	}
	o.define(0, catalog.Definitions{All: []catalog.Definition{{ID: "web-1", Service: "other"}}})
	last := told[len(told)-1]
	if want := []string{"other web-1"}; !slices.Equal(ids(), want) || last.Err != nil || len(last.Problems) != 1 || !strings.Contains(last.Problems[0].Text, `"web-1"`) {
		t.Errorf("defined are %v, problems %+v, %v, want %v and a problem", ids(), last.Problems, last.Err, want)
	}
}

func TestADefinitionWithTheIDOfAnothersSidecarIsRefused(t *testing.T) {
	var last catalog.Definitions
	o := newOrigins(1, func(defs catalog.Definitions) { last = defs })
	o.define(0, catalog.Definitions{All: []catalog.Definition{
		{ID: "web-1-sidecar-proxy", Service: "squatter"}, {ID: "web-1", Service: "web"}, {ID: "db-sidecar-proxy", Service: "db"},
	}})
	if len(last.All) != 2 || last.All[0].ID != "web-1" || last.All[1].ID != "db-sidecar-proxy" {
		t.Errorf("defined are %+v", last.All)
	}
	if len(last.Problems) != 1 || last.Problems[0].Service != "squatter" || !strings.Contains(last.Problems[0].Text, `the sidecar of instance "web-1"`) {
		t.Errorf("the problems are %+v", last.Problems)
	}
}

func TestWhyDefinitionsAreNotAppliedIsLoggedOncePerChange(t *testing.T) {
	var log strings.Builder
	s, err := New(Config{Node: "node-1", NodeAddress: netip.MustParseAddr("10.0.0.1"), Servers: []string{"127.0.0.1:1"}, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	r := &run{Source: s}
	for _, told := range []struct {
		err  string
		says string // "": nothing
	}{
		{"", ""}, {"a.hcl:1", "a.hcl:1"}, {"a.hcl:1", ""}, {"a.hcl:1", ""}, {"a.hcl:2", "a.hcl:2"}, {"", "applied again"}, {"", ""}, {"a.hcl:2", "a.hcl:2"},
	} {
		log.Reset()
		var defs catalog.Definitions
		if told.err != "" {
			defs.Err = errors.New(told.err)
		}
		r.define(defs)
		if !strings.Contains(log.String(), told.says) || (told.says == "") != (log.Len() == 0) {
			t.Errorf("after %q the log has %q, want %q", told.err, log.String(), told.says)
		}
	}
}
