package catalog

import (
	"crypto/tls"
	"fmt"
	"slices"
)

// TLS is what the mesh asks of TLS connections, in each direction.
type TLS struct{ Incoming, Outgoing TLSLimits }

// TLSLimits narrow what nodeproxy speaks by itself: TLS 1.2 and 1.3. The zero value narrows nothing.
type TLSLimits struct {
	Min, Max uint16   // 0: no limit
	Suites   []uint16 // of TLS 1.2; nil: all that nodeproxy has
}

// Allows says whether version may be spoken.
func (l TLSLimits) Allows(version uint16) bool { return l.Max == 0 || version <= l.Max }

// CipherSuites are those of TLS 1.2 that nodeproxy has; those of 1.3 are all fit.
func CipherSuites() []uint16 {
	return []uint16{
		tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
		tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
		tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
		tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
		tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
		tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
	}
}

var tlsVersions = map[string]uint16{
	"": 0, "TLS_AUTO": 0, "TLSv1_0": tls.VersionTLS12, "TLSv1_1": tls.VersionTLS12, "TLSv1_2": tls.VersionTLS12, "TLSv1_3": tls.VersionTLS13,
}

// ParseTLSLimits reads one direction of a mesh config entry's TLS. What it cannot do is never made weaker than asked; each
// such thing is a sentence in ignored.
func ParseTLSLimits(minimum, maximum string, suites []string) (limits TLSLimits, ignored []string) {
	var known bool
	if limits.Min, known = tlsVersions[minimum]; !known {
		limits.Min = tls.VersionTLS13
		ignored = append(ignored, fmt.Sprintf("TLSMinVersion %q is not known: 1.3 is required", minimum))
	}
	if limits.Max, known = tlsVersions[maximum]; !known {
		ignored = append(ignored, fmt.Sprintf("TLSMaxVersion %q is not known: it limits nothing", maximum))
	}
	if maximum == "TLSv1_0" || maximum == "TLSv1_1" {
		ignored = append(ignored, fmt.Sprintf("TLSMaxVersion %s is older than what nodeproxy speaks: 1.2 is used", maximum))
	}
	if len(suites) == 0 {
		return limits, ignored
	}
	for _, suite := range CipherSuites() {
		if slices.Contains(suites, tls.CipherSuiteName(suite)) {
			limits.Suites = append(limits.Suites, suite)
		}
	}
	for _, name := range suites {
		if !slices.ContainsFunc(CipherSuites(), func(s uint16) bool { return tls.CipherSuiteName(s) == name }) {
			ignored = append(ignored, fmt.Sprintf("cipher suite %q is not one of nodeproxy's for TLS 1.2: it is not used", name))
		}
	}
	if limits.Suites == nil {
		limits.Min = tls.VersionTLS13
		ignored = append(ignored, "no cipher suite is left for TLS 1.2, so 1.3 is required")
	}
	return limits, ignored
}
