package catalog_test

import (
	"crypto/tls"
	"slices"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/catalog"
)

func TestTLSLimitsAreNeverWeakerThanAsked(t *testing.T) {
	ecdsa := []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}
	for _, c := range []struct {
		min, max string
		suites   []string
		want     catalog.TLSLimits
		ignored  string // a part of the one sentence; "" for none
	}{
		{"", "", nil, catalog.TLSLimits{}, ""},
		{"TLS_AUTO", "TLS_AUTO", nil, catalog.TLSLimits{}, ""},
		{"TLSv1_0", "TLSv1_3", nil, catalog.TLSLimits{Min: tls.VersionTLS12, Max: tls.VersionTLS13}, ""},
		{"TLSv1_3", "", nil, catalog.TLSLimits{Min: tls.VersionTLS13}, ""},
		{"", "TLSv1_1", nil, catalog.TLSLimits{Max: tls.VersionTLS12}, "TLSv1_1"},
		{"TLSv2", "", nil, catalog.TLSLimits{Min: tls.VersionTLS13}, "TLSv2"},
		{"", "", []string{"TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"}, catalog.TLSLimits{Suites: ecdsa}, ""},
		{"", "", []string{"TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "TLS_RSA_WITH_AES_128_CBC_SHA"}, catalog.TLSLimits{Suites: ecdsa}, "TLS_RSA_WITH_AES_128_CBC_SHA"},
		{"", "", []string{"TLS_RSA_WITH_AES_128_CBC_SHA"}, catalog.TLSLimits{Min: tls.VersionTLS13}, "1.3 is required"},
	} {
		got, ignored := catalog.ParseTLSLimits(c.min, c.max, c.suites)
		if got.Min != c.want.Min || got.Max != c.want.Max || !slices.Equal(got.Suites, c.want.Suites) {
			t.Errorf("%q to %q with %s: %+v", c.min, c.max, c.suites, got)
		}
		if text := strings.Join(ignored, "; "); (c.ignored == "") != (text == "") || !strings.Contains(text, c.ignored) {
			t.Errorf("%q to %q with %s: ignored %q", c.min, c.max, c.suites, text)
		}
	}
}
