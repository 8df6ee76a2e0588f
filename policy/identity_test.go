package policy

import (
	"net/url"
	"strings"
	"testing"
)

const td = "11111111-2222-3333-4444-555555555555.consul"

func TestParseIdentity(t *testing.T) {
	for uri, want := range map[string]Identity{
		"spiffe://" + td + "/ns/default/dc/dc1/svc/web":               {TrustDomain: td, Namespace: "default", Datacenter: "dc1", Service: "web"},
		"spiffe://" + td + "/ap/bizdev/ns/default/dc/dc1/svc/web":     {TrustDomain: td, Partition: "bizdev", Namespace: "default", Datacenter: "dc1", Service: "web"},
		"spiffe://" + td + "/ap/default/ns/default/dc/dc1/svc/web":    {TrustDomain: td, Namespace: "default", Datacenter: "dc1", Service: "web"},
		"spiffe://" + td + "/ns/foo%2Fbar/dc/bar%2Fbaz/svc/baz%2Fqux": {TrustDomain: td, Namespace: "foo/bar", Datacenter: "bar/baz", Service: "baz/qux"},
		"spiffe://1.2-3_x/ns/a/dc/b/svc/c.d":                          {TrustDomain: "1.2-3_x", Namespace: "a", Datacenter: "b", Service: "c.d"},
	} {
		got, err := ParseIdentity(uri)
		if err != nil || got != want {
			t.Errorf("ParseIdentity(%q) = %+v, %v; want %+v", uri, got, err, want)
		}
	}
}

func TestParseIdentityRefuses(t *testing.T) {
	good := "spiffe://" + td + "/ns/default/dc/dc1/svc/web"
	for what, uri := range map[string]string{
		"nothing":              "",
		"another scheme":       strings.Replace(good, "spiffe", "https", 1),
		"a scheme in capitals": strings.Replace(good, "spiffe", "SPIFFE", 1),
		"a query":              good + "?a=b",
		"an empty query":       good + "?",
		"a fragment":           good + "#a",
		"an empty fragment":    good + "#",
		"a user":               "spiffe://root@" + td + "/ns/default/dc/dc1/svc/web",
		"a port":               "spiffe://" + td + ":1/ns/default/dc/dc1/svc/web",
		"no trust domain":      "spiffe:///ns/default/dc/dc1/svc/web",
		"capitals in trust":    "spiffe://A.consul/ns/default/dc/dc1/svc/web",
		"an empty segment":     "spiffe://" + td + "/ns//dc/dc1/svc/web",
		"an empty service":     "spiffe://" + td + "/ns/default/dc/dc1/svc/",
		"a trailing slash":     good + "/",
		"a segment too many":   good + "/x",
		"segments swapped":     "spiffe://" + td + "/dc/dc1/ns/default/svc/web",
		"a missing datacenter": "spiffe://" + td + "/ns/default/svc/web",
		"an empty partition":   "spiffe://" + td + "/ap//ns/default/dc/dc1/svc/web",
		"a mesh gateway":       "spiffe://" + td + "/gateway/mesh/dc/dc1",
		"an agent":             "spiffe://" + td + "/agent/client/dc/dc1/id/x",
		"a bad escape":         good + "%zz",
		"a NUL":                good + "%00",
		"a newline":            good + "%0A",
		"invalid UTF-8":        good + "%ff",
		"a raw space":          good + " x",
		"raw UTF-8":            good + "ü",
		"a wildcard":           "spiffe://" + td + "/ns/default/dc/dc1/svc/*",
		"an encoded wildcard":  "spiffe://" + td + "/ns/default/dc/dc1/svc/%2A",
		"a relative segment":   "spiffe://" + td + "/ns/default/dc/dc1/svc/..",
		"a long name":          good + strings.Repeat("w", 256),
		"a long ID":            good + strings.Repeat("%77", 700),
	} {
		if id, err := ParseIdentity(uri); err == nil {
			t.Errorf("%s: ParseIdentity(%q) = %+v, want an error", what, uri, id)
		}
	}
}

func TestIdentityURLIsWhatTheStringSays(t *testing.T) {
	id := Identity{TrustDomain: td, Partition: "p/q", Namespace: "default", Datacenter: "dc 1", Service: "we%b"}
	if got := id.URL().String(); got != id.String() {
		t.Errorf("URL() = %s, String() = %s", got, id)
	}
	if back, err := ParseIdentity(id.URL().String()); err != nil || back != id {
		t.Errorf("ParseIdentity(URL()) = %+v, %v; want %+v", back, err, id)
	}
}

func FuzzIdentity(f *testing.F) {
	f.Add("spiffe://" + td + "/ns/default/dc/dc1/svc/web")
	f.Add("spiffe://" + td + "/ap/a%2Fb/ns/%64efault/dc/dc1/svc/w%20eb")
	f.Add("spiffe://" + td + "/gateway/mesh/dc/dc1")
	f.Fuzz(func(t *testing.T, uri string) {
		id, err := ParseIdentity(uri)
		if err != nil {
			return
		}
		if back, err := ParseIdentity(id.String()); err != nil || back != id {
			t.Fatalf("ParseIdentity(%q) = %+v, %v; want %+v", id.String(), back, err, id)
		}
		parsed, err := url.Parse(id.String())
		if err != nil || parsed.Host != id.TrustDomain || parsed.Path != id.URL().Path || parsed.String() != id.String() {
			t.Fatalf("net/url reads %q as %#v, %v", id.String(), parsed, err)
		}
	})
}
