package catalog_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/mtls/mtlstest"
	"nodeproxy.io/policy"
)

// filler gives every exported field a value that is not zero, whatever fields there are.
type filler struct {
	t     *testing.T
	count byte
}

func (f *filler) addr() netip.Addr {
	f.count++
	return netip.AddrFrom4([4]byte{10, 0, 0, f.count})
}

func (f *filler) fill(v reflect.Value) {
	switch v.Interface().(type) {
	case netip.Addr:
		v.Set(reflect.ValueOf(f.addr()))
		return
	case netip.AddrPort:
		v.Set(reflect.ValueOf(netip.AddrPortFrom(f.addr(), 80)))
		return
	case netip.Prefix:
		v.Set(reflect.ValueOf(netip.PrefixFrom(f.addr(), 32)))
		return
	case time.Time:
		v.Set(reflect.ValueOf(time.Unix(1700000000, 0)))
		return
	case *policy.Policy, *x509.Certificate, *tls.Certificate:
		return // the test's own business
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(3)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(3)
	case reflect.Float64:
		v.SetFloat(0.5)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		f.fill(v.Elem())
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		f.fill(v.Index(0))
	case reflect.Map:
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		f.fill(key)
		f.fill(value)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(key, value)
	case reflect.Struct:
		for field := range v.NumField() {
			if v.Type().Field(field).IsExported() {
				f.fill(v.Field(field))
			}
		}
	default:
		f.t.Fatalf("a %s in a snapshot: is it stored?", v.Type())
	}
}

func remembered(t *testing.T) *catalog.Remembered {
	t.Helper()
	var s catalog.Snapshot
	(&filler{t: t}).fill(reflect.ValueOf(&s).Elem())
	root := mtlstest.NewRoot(t)
	s.Roots = []*x509.Certificate{root.Cert, mtlstest.NewRoot(t).Cert}
	s.Leaves = map[string]*tls.Certificate{"x": root.Intermediate(t).Leaf(t, "spiffe://x/ns/default/dc/x/svc/x")}
	var err error
	s.Policy, err = policy.Compile(2, policy.Allow, policy.Identity{TrustDomain: "x"}, map[string]bool{"x": true}, []policy.Intention{
		{Source: "x", Destination: "x", Action: policy.Allow, JWT: true, Origin: "here"}, {Source: "*", Destination: "*"},
	})
	if err != nil {
		t.Fatal(err)
	}
	snap, err := catalog.New(s)
	if err != nil {
		t.Fatal(err)
	}
	return &catalog.Remembered{Snapshot: snap, Kind: "consul", Location: "here", Updated: time.Unix(1700000000, 0)}
}

func TestASnapshotIsDecodedAsItWasEncoded(t *testing.T) {
	want := remembered(t)
	text, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := catalog.Decode(text)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("decoded\n%+v\nand encoded was\n%+v", got.Snapshot, want.Snapshot)
	}
	x := want.Snapshot.Identity("x")
	if a, b := got.Snapshot.Policy.Decide(x, "x"), want.Snapshot.Policy.Decide(x, "x"); !reflect.DeepEqual(a, b) {
		t.Errorf("the policy decides %+v, and did %+v", a, b)
	}
}

func TestWhatIsNoSnapshotIsNotDecoded(t *testing.T) {
	text, err := remembered(t).Encode()
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range [][]byte{nil, []byte("nodeproxy snapshot 0\n"), append([]byte("nodeproxy snapshot 2\n"), text...)} {
		if _, err := catalog.Decode(other); !errors.Is(err, catalog.ErrOtherEncoding) {
			t.Errorf("%.30q is decoded: %v", other, err)
		}
	}
	for _, short := range []int{30, len(text) / 2, len(text) - 1} {
		if _, err := catalog.Decode(text[:short]); err == nil {
			t.Errorf("the first %d of %d bytes are decoded", short, len(text))
		}
	}
}
