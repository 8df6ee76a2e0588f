package workload

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"nodeproxy.io/nodeproxy/catalog"
)

// maxListed bounds each list of ports or networks in a label: they take entries of the kernel's maps.
const maxListed = 64

// Labels are what was written at a workload, by key without the source's prefix: "service", "exclude-inbound-ports".
type Labels map[string]string

// labels are the keys, the same at every source, with what each does to a claim.
var labels = map[string]func(c *Claim, value string) error{
	"mesh":                   func(c *Claim, v string) error { return choose(&c.Mesh, v, Enabled, Observe, Disabled) },
	"service":                labelService,
	"ports":                  func(c *Claim, v string) error { return listPorts(&c.Ports, v) },
	"mode":                   labelMode,
	"same-node":              labelSameNode,
	"exclude-inbound-ports":  func(c *Claim, v string) error { return listPorts(&c.Exclude.InboundPorts, v) },
	"exclude-outbound-ports": func(c *Claim, v string) error { return listPorts(&c.Exclude.OutboundPorts, v) },
	"exclude-outbound-cidrs": func(c *Claim, v string) error { return listNetworks(&c.Exclude.OutboundNetworks, v) },
	"dns":                    labelDNS,
	"l7":                     labelL7,
}

// Claim turns labels into what provider claims of a cgroup. What is wrong with them is in the claim, which is then refused.
func (l Labels) Claim(provider, cgroup string) Claim {
	c := Claim{Provider: provider, Cgroup: cgroup}
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(l)) {
		set, known := labels[key]
		if !known {
			errs = append(errs, fmt.Errorf("label %q is unknown: the keys are %s", key, strings.Join(slices.Sorted(maps.Keys(labels)), " ")))
			continue
		}
		if err := set(&c, l[key]); err != nil {
			errs = append(errs, fmt.Errorf("label %s is %q: %w", key, l[key], err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		c.Invalid = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	return c
}

func labelService(c *Claim, value string) error {
	names := strings.Split(value, ",")
	for i, name := range names {
		if names[i] = strings.TrimSpace(name); !catalog.IsServiceName(names[i]) {
			return errors.New("set it to the name of the service that the workload is, and those of further ones that others reach in it after commas")
		}
	}
	if len(names) > maxListed {
		return fmt.Errorf("it lists %d, at most %d are allowed", len(names), maxListed)
	}
	if twice := repeated(names); twice != "" {
		return fmt.Errorf("%q is in it twice: name it once", twice)
	}
	c.Service, c.Also = names[0], names[1:]
	return nil
}

func labelMode(c *Claim, value string) error {
	var mode Mode
	if err := choose(&mode, value, Strict, Permissive); err != nil {
		return err
	}
	c.Mode = &mode
	return nil
}

func labelDNS(c *Claim, value string) error {
	if value != "enabled" && value != "disabled" {
		return errors.New("it must be enabled or disabled")
	}
	enabled := value == "enabled"
	c.DNS = &enabled
	return nil
}

func labelSameNode(c *Claim, value string) error {
	switch value {
	case "mtls":
		c.Proxied = true
	case "direct":
	default:
		return errors.New("it must be mtls or direct")
	}
	return nil
}

func choose[T fmt.Stringer](to *T, value string, allowed ...T) error {
	var names []string
	for _, t := range allowed {
		if t.String() == value {
			*to = t
			return nil
		}
		names = append(names, t.String())
	}
	return fmt.Errorf("it must be %s", strings.Join(names, " or "))
}

// labelL7 accepts that HTTP-level configuration is not honoured.
func labelL7(_ *Claim, value string) error {
	if value != "ignore" {
		return errors.New("it must be ignore")
	}
	return nil
}

func listPorts(to *[]uint16, value string) error {
	return list(to, value, `ports between 1 and 65535, as "80,443"`, func(s string) (uint16, bool) {
		n, err := strconv.ParseUint(s, 10, 16)
		return uint16(n), err == nil && n > 0
	})
}

func listNetworks(to *[]netip.Prefix, value string) error {
	return list(to, value, `networks, as "10.0.0.0/8,fd00::/64"`, func(s string) (netip.Prefix, bool) {
		network, err := netip.ParsePrefix(s)
		return network, err == nil && network == network.Masked() && !network.Addr().Is4In6()
	})
}

func list[T comparable](to *[]T, value, want string, parse func(string) (T, bool)) error {
	var all []T
	for text := range strings.SplitSeq(value, ",") {
		item, ok := parse(strings.TrimSpace(text))
		if !ok {
			return fmt.Errorf("it must be %s", want)
		}
		if !slices.Contains(all, item) {
			all = append(all, item)
		}
	}
	if len(all) > maxListed {
		return fmt.Errorf("it lists %d, at most %d are allowed", len(all), maxListed)
	}
	*to = all
	return nil
}
