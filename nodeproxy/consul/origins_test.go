package consul

import (
	"errors"
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
