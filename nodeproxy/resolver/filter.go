package resolver

import (
	"fmt"

	"github.com/hashicorp/go-bexpr"

	"nodeproxy.io/nodeproxy/catalog"
)

// maxFilter bounds a filter's text.
const maxFilter = 8 << 10

// Filter is which instances a subset is. The zero value is all.
type Filter struct{ expression *bexpr.Evaluator }

// entry is an instance as filters see it: what Consul's answers about health have, as far as it is known here.
type entry struct {
	Node struct {
		Node       string
		Datacenter string
	}
	Service struct {
		ID      string
		Service string
		Address string
		Port    int
		Tags    []string
		Meta    map[string]string
	}
}

// ParseFilter reads an expression in Consul's filter language over Service.ID, Service, Address, Port, Tags and Meta, and
// Node.Node and Datacenter. Any other selector is an error.
func ParseFilter(text string) (Filter, error) {
	if text == "" {
		return Filter{}, nil
	}
	if len(text) > maxFilter {
		return Filter{}, fmt.Errorf("it is longer than %d bytes", maxFilter)
	}
	expression, err := bexpr.CreateEvaluator(text)
	if err != nil {
		return Filter{}, err
	}
	f := Filter{expression}
	_, err = f.evaluate(&catalog.Instance{}, "")
	return f, err
}

// Matches says whether inst, of the snapshot's datacenter, is in the subset.
func (f Filter) Matches(inst *catalog.Instance, datacenter string) bool {
	matches, err := f.evaluate(inst, datacenter)
	return err == nil && matches
}

func (f Filter) evaluate(inst *catalog.Instance, datacenter string) (bool, error) {
	if f.expression == nil {
		return true, nil
	}
	var e entry
	e.Node.Node, e.Node.Datacenter = inst.Node, datacenter
	e.Service.ID, e.Service.Service, e.Service.Tags, e.Service.Meta = inst.ID, inst.Service, inst.Tags, inst.Meta
	if inst.Address.IsValid() {
		e.Service.Address, e.Service.Port = inst.Address.Addr().String(), int(inst.Address.Port())
	}
	if e.Service.Meta == nil {
		e.Service.Meta = map[string]string{}
	}
	return f.expression.Evaluate(e)
}
