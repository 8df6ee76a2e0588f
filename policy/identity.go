package policy

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Identity is who a certificate says its holder is: the parts of a Connect SPIFFE ID of service form.
type Identity struct {
	TrustDomain string
	Partition   string // "" is the default partition, whose IDs have no /ap/ segment
	Namespace   string
	Datacenter  string
	Service     string
}

const (
	scheme = "spiffe://"

	maxURI         = 2048 // SPIFFE-ID, section 2.3
	maxTrustDomain = 255
	maxName        = 255

	defaultName = "default" // the namespace and the partition that need not be named
)

// ParseIdentity reads a Connect SPIFFE ID of service form:
//
//	spiffe://<trust domain>[/ap/<partition>]/ns/<namespace>/dc/<datacenter>/svc/<service>
//
// Path segments may be percent-encoded. Everything else is an error: a query, fragment, user or port, an empty, missing
// or additional segment, a trust domain that is not in lower case, a name that is a wildcard or cannot be printed. The
// error does not repeat more of uri than its beginning: it comes from a stranger.
func ParseIdentity(uri string) (Identity, error) {
	id, err := parseIdentity(uri)
	if err != nil {
		return Identity{}, fmt.Errorf("parse SPIFFE ID %.100q: %w", uri, err)
	}
	return id, nil
}

func parseIdentity(uri string) (Identity, error) {
	if len(uri) > maxURI {
		return Identity{}, fmt.Errorf("longer than %d bytes", maxURI)
	}
	rest, ok := strings.CutPrefix(uri, scheme)
	if !ok {
		return Identity{}, errors.New(`scheme is not "spiffe"`)
	}
	segments := strings.Split(rest, "/")
	id := Identity{TrustDomain: segments[0]}
	if err := checkTrustDomain(id.TrustDomain); err != nil {
		return Identity{}, err
	}
	segments = segments[1:]
	if len(segments) == 8 {
		if err := named(segments, "ap", &id.Partition); err != nil {
			return Identity{}, err
		}
		if id.Partition == defaultName {
			id.Partition = ""
		}
		segments = segments[2:]
	}
	if len(segments) != 6 {
		return Identity{}, errors.New("path is not [/ap/<partition>]/ns/<namespace>/dc/<datacenter>/svc/<service>")
	}
	if err := errors.Join(
		named(segments[0:], "ns", &id.Namespace),
		named(segments[2:], "dc", &id.Datacenter),
		named(segments[4:], "svc", &id.Service),
	); err != nil {
		return Identity{}, err
	}
	return id, nil
}

func checkTrustDomain(td string) error {
	if td == "" || len(td) > maxTrustDomain {
		return fmt.Errorf("trust domain is empty or longer than %d bytes", maxTrustDomain)
	}
	for _, c := range []byte(td) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '.' && c != '-' && c != '_' {
			return fmt.Errorf("trust domain holds %q: only a-z, 0-9, '.', '-' and '_' may be in it", c)
		}
	}
	return nil
}

// named reads the pair <key>/<value> at the start of segments into value.
func named(segments []string, key string, value *string) error {
	if segments[0] != key {
		return fmt.Errorf("segment %q is not %q", segments[0], key)
	}
	for _, c := range []byte(segments[1]) {
		if c <= ' ' || c >= utf8.RuneSelf || c == '?' || c == '#' {
			return fmt.Errorf("%s holds an unencoded %q", key, c)
		}
	}
	name, err := url.PathUnescape(segments[1])
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	if err := checkName(name); err != nil {
		return fmt.Errorf("%s %w", key, err)
	}
	*value = name
	return nil
}

func checkName(name string) error {
	switch {
	case name == "" || len(name) > maxName:
		return fmt.Errorf("is empty or longer than %d bytes", maxName)
	case name == "." || name == "..":
		return errors.New("is a relative path segment")
	case strings.Contains(name, Wildcard):
		return fmt.Errorf("%q holds a wildcard", name)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }):
		return fmt.Errorf("%q cannot be printed", name)
	}
	return nil
}

// String is the SPIFFE ID in its canonical form; ParseIdentity(id.String()) is id again.
func (id Identity) String() string { return scheme + id.TrustDomain + id.path(url.PathEscape) }

// URL is the SPIFFE ID as a certificate holds it.
func (id Identity) URL() *url.URL {
	return &url.URL{
		Scheme:  "spiffe",
		Host:    id.TrustDomain,
		Path:    id.path(func(s string) string { return s }),
		RawPath: id.path(url.PathEscape),
	}
}

func (id Identity) path(escape func(string) string) string {
	partition := ""
	if !isDefault(id.Partition) {
		partition = "/ap/" + escape(id.Partition)
	}
	return partition + "/ns/" + escape(orDefault(id.Namespace)) + "/dc/" + escape(id.Datacenter) + "/svc/" + escape(id.Service)
}

func isDefault(name string) bool { return name == "" || name == defaultName }

func orDefault(name string) string {
	if name == "" {
		return defaultName
	}
	return name
}
