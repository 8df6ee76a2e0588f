package workload

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func TestLabelsBecomeAClaim(t *testing.T) {
	permissive, noDNS := Permissive, false
	want := Claim{
		Cgroup: "/c/web", Service: "web", Provider: "xattr", Mode: &permissive, Mesh: Observe, Proxied: true, DNS: &noDNS, Ports: []uint16{8080, 9090},
		Exclude: Exclusions{
			InboundPorts: []uint16{22}, OutboundPorts: []uint16{3306, 5432},
			OutboundNetworks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/64")},
		},
	}
	got := Labels{
		"mesh": "observe", "service": "web", "ports": "8080, 9090,8080", "mode": "permissive", "same-node": "mtls",
		"exclude-inbound-ports": "22", "exclude-outbound-ports": "3306,5432", "exclude-outbound-cidrs": "10.0.0.0/8,fd00::/64",
		"dns": "disabled", "l7": "ignore",
	}.Claim("xattr", "/c/web")
	if got.Invalid != "" || !got.agrees(want) || got.Cgroup != want.Cgroup || got.Provider != want.Provider {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if several := (Labels{"service": "web, web-admin"}).Claim("xattr", "/c/web"); !several.agrees(Claim{Service: "web", Also: []string{"web-admin"}}) || several.agrees(Claim{Service: "web"}) {
		t.Errorf("two services: %+v", several)
	}
	if plain := (Labels{"service": "web"}).Claim("xattr", "/c/web"); !plain.agrees(Claim{Service: "web"}) || plain.Mesh != Enabled {
		t.Errorf("a service alone: %+v", plain)
	}
}

func TestBadLabelsSayWhatIsWrongWithThem(t *testing.T) {
	var many []string
	for port := range maxListed + 1 {
		many = append(many, fmt.Sprint(port+1))
	}
	for _, c := range []struct{ key, value, part string }{
		{"mesh", "on", "must be enabled or observe or disabled"},
		{"mesh", "", "must be enabled"},
		{"service", "", "name of the service"},
		{"service", "a/b", "name of the service"},
		{"service", "*", "name of the service"},
		{"service", "web,", "name of the service"},
		{"service", "web, web", `"web" is in it twice`},
		{"service", "s" + strings.Join(many, ",s"), "lists 65, at most 64"},
		{"ports", "", "ports between 1 and 65535"},
		{"ports", "0", "ports between 1 and 65535"},
		{"ports", "65536", "ports between 1 and 65535"},
		{"ports", "80-90", "ports between 1 and 65535"},
		{"ports", "80,,81", "ports between 1 and 65535"},
		{"ports", strings.Join(many, ","), "lists 65, at most 64"},
		{"mode", "Strict", "must be strict or permissive"},
		{"same-node", "fast", "must be mtls or direct"},
		{"dns", "yes", "must be enabled or disabled"},
		{"l7", "honour", "must be ignore"},
		{"exclude-inbound-ports", "http", "ports between"},
		{"exclude-outbound-ports", "-1", "ports between"},
		{"exclude-outbound-cidrs", "10.0.0.1/8", "must be networks"},
		{"exclude-outbound-cidrs", "10.0.0.1", "must be networks"},
		{"exclude-outbound-cidrs", "::ffff:10.0.0.0/104", "must be networks"},
		{"Service", "web", `label "Service" is unknown`},
		{"tunnel", "x", "the keys are dns exclude-inbound-ports"},
	} {
		labels := Labels{"service": "web"}
		labels[c.key] = c.value
		got := labels.Claim("xattr", "/c/web")
		if !strings.Contains(got.Invalid, c.part) || !strings.Contains(got.Invalid, c.key) {
			t.Errorf("%s = %q: %q, want %q in it", c.key, c.value, got.Invalid, c.part)
		}
	}
	if two := (Labels{"mode": "x", "mesh": "y"}).Claim("xattr", "/c"); !strings.Contains(two.Invalid, "mode") || !strings.Contains(two.Invalid, "mesh") {
		t.Errorf("two bad labels: %q", two.Invalid)
	}
}
