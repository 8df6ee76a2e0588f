package kubernetes

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/policy"
)

// mesh is a snapshot with instances by "service at ip:port".
func mesh(t *testing.T, generation uint64, instances ...string) *catalog.Snapshot {
	t.Helper()
	services := make(map[string]*catalog.Service)
	for _, text := range instances {
		name, at, _ := strings.Cut(text, " at ")
		svc := services[name]
		if svc == nil {
			svc = &catalog.Service{Name: name}
			services[name] = svc
		}
		address := netip.MustParseAddrPort(at)
		svc.Instances = append(svc.Instances, &catalog.Instance{ID: text, Service: name, Address: address, Mesh: netip.AddrPortFrom(address.Addr(), 21500)})
	}
	snap, err := catalog.New(catalog.Snapshot{Generation: generation, Services: services, Policy: new(policy.Policy)})
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

// told is a source that says what a test gives it.
type told struct {
	catalog.Source
	snapshots chan *catalog.Snapshot
}

func (s told) Run(ctx context.Context, deliver func(*catalog.Snapshot)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case snap := <-s.snapshots:
			deliver(snap)
		}
	}
}

func testClusterIPs(t *testing.T, c *cluster) {
	source := told{snapshots: make(chan *catalog.Snapshot)}
	var mu sync.Mutex
	var got *catalog.Snapshot
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		err := c.Destinations(source).Run(ctx, func(snap *catalog.Snapshot) {
			mu.Lock()
			defer mu.Unlock()
			if got != nil && snap.Generation <= got.Generation {
				t.Errorf("generation %d follows %d", snap.Generation, got.Generation)
			}
			got = snap
		})
		if err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	leads := func(at, service string, problems ...string) {
		t.Helper()
		within(t, patience, fmt.Sprintf("%s leads to %q, with problems %q", at, service, problems), func() bool {
			mu.Lock()
			defer mu.Unlock()
			if got == nil {
				return false
			}
			to, _ := got.Resolve(netip.MustParseAddrPort(at))
			name := ""
			if to.Service != nil {
				name = to.Service.Name
			}
			var listed strings.Builder
			for _, p := range got.Problems {
				fmt.Fprintln(&listed, p.Text)
			}
			for _, p := range problems {
				if !strings.Contains(listed.String(), p) {
					return false
				}
			}
			return name == service && (len(problems) > 0 || !strings.Contains(listed.String(), at))
		})
	}
	web := c.service("shop", "web", "10.96.1.1", 80, 8080)
	c.service("elsewhere", "other", "10.96.1.2", 80, 8080)
	c.slice(web, "10.1.0.1", "10.1.0.2")
	source.snapshots <- mesh(t, 1, "web at 10.1.0.1:8080", "web at 10.1.0.2:8080", "cart at 10.1.0.3:8080")
	leads("10.96.1.1:80", "web")
	leads("10.96.1.1:81", "")
	leads("10.96.1.2:80", "") // of a namespace that is not meant: not listed
	c.slice(web, "10.1.0.1", "10.1.0.3")
	leads("10.96.1.1:80", "", "ClusterIP 10.96.1.1:80 of Service shop/web", `both "web" and "cart"`)
	c.slice(web, "10.1.0.2")
	leads("10.96.1.1:80", "web")
	source.snapshots <- mesh(t, 5, "web at 10.1.0.2:9090")
	source.snapshots <- mesh(t, 6, "web at 10.1.0.2:8080")
	leads("10.96.1.1:80", "web")
	cart := c.service("shop", "cart", "10.96.1.3", 80, 8080)
	c.slice(cart, "10.1.0.2", "10.1.0.9")
	leads("10.96.1.3:80", "", "10.1.0.9:8080 behind it is no instance of the mesh")
	c.do(c.core.Delete().Namespace("shop").Resource("services").Name("web"), nil)
	leads("10.96.1.1:80", "")
}

func (s *apiServer) service(namespace, name, ip string, port, target int32) *corev1.Service {
	s.t.Helper()
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.ServiceSpec{ClusterIP: ip, Ports: []corev1.ServicePort{
			{Name: "http", Port: port, TargetPort: intstr.FromInt32(target)}, {Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP},
		}},
	}
	s.do(s.core.Post().Namespace(namespace).Resource("services").Body(svc), svc)
	return svc
}

// slice says which ready addresses are behind a Service.
func (s *apiServer) slice(of *corev1.Service, ready ...string) {
	s.t.Helper()
	all := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: of.Namespace, Name: of.Name + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: of.Name}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: new("http"), Port: new(of.Spec.Ports[0].TargetPort.IntVal)}},
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{"10.1.0.99"}, Conditions: discoveryv1.EndpointConditions{Ready: new(false)}}},
	}
	for _, ip := range ready {
		all.Endpoints = append(all.Endpoints, discoveryv1.Endpoint{Addresses: []string{ip}, Conditions: discoveryv1.EndpointConditions{Ready: new(true)}})
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if s.discovery.Get().Namespace(of.Namespace).Resource("endpointslices").Name(all.Name).Do(ctx).Error() == nil {
		s.do(s.discovery.Put().Namespace(of.Namespace).Resource("endpointslices").Name(all.Name).Body(all), nil)
		return
	}
	s.do(s.discovery.Post().Namespace(of.Namespace).Resource("endpointslices").Body(all), nil)
}

// TestAClusterIPOutlastsWhatIsOnlyNew is about time, which a mapping is given.
func TestAClusterIPOutlastsWhatIsOnlyNew(t *testing.T) {
	at := netip.MustParseAddrPort("10.96.1.1:80")
	known, fresh := endpoint{netip.MustParseAddrPort("10.1.0.1:8080"), true}, endpoint{netip.MustParseAddrPort("10.1.0.2:8080"), true}
	snap := mesh(t, 1, "web at 10.1.0.1:8080", "cart at 10.1.0.3:8080")
	unknown := make(map[netip.AddrPort]time.Time)
	start := time.Now()
	stands := func(after time.Duration, heard bool, last string, behind ...endpoint) string {
		m := mapping{snap: snap, last: map[netip.AddrPort]string{at: last}, unknown: unknown, heard: heard, now: start.Add(after)}
		name, _, _ := m.stands(at, behind)
		return name
	}
	if got := stands(0, true, "", known, fresh); got != "" {
		t.Errorf("one that never stood for a service stands for %q, and not all behind it is in the mesh", got)
	}
	if got := stands(0, true, "web", known, fresh); got != "web" {
		t.Errorf("a new address behind it makes it %q", got)
	}
	if got := stands(unknownFor-1, true, "web", fresh); got != "web" {
		t.Errorf("all addresses are new, and it is %q", got)
	}
	if got := stands(unknownFor, true, "web", known, fresh); got != "" {
		t.Errorf("the address stays unknown, and it is %q", got)
	}
	if got := stands(time.Hour, false, "web", known, fresh); got != "web" {
		t.Errorf("the API server does not answer, and it is %q", got)
	}
	if got := stands(0, true, "web"); got != "web" {
		t.Errorf("nothing is behind it, and it is %q", got)
	}
	if got := stands(0, true, "gone"); got != "" {
		t.Errorf("its service is not in the mesh any more, and it is %q", got)
	}
	if got := stands(0, false, "web", endpoint{netip.MustParseAddrPort("10.1.0.3:8080"), true}, fresh); got != "" {
		t.Errorf("another service is behind it, and it is %q", got)
	}
}

func TestAClusterIPThatTheSourceKnowsIsTheSources(t *testing.T) {
	at := netip.MustParseAddrPort("10.96.1.1:80")
	snap := mesh(t, 1, "web at 10.1.0.1:8080", "cart at 10.1.0.3:8080")
	snap.Services["web"].Ports = []netip.AddrPort{at} // tagged "virtual"
	snap, err := catalog.New(*snap)
	if err != nil {
		t.Fatal(err)
	}
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"},
		Spec:       corev1.ServiceSpec{ClusterIPs: []string{"10.96.1.1"}, Ports: []corev1.ServicePort{{Port: 80}}},
	}
	for behind, problems := range map[string]int{"10.1.0.1:8080": 0, "10.1.0.3:8080": 1, "10.1.0.4:8080": 0} {
		m := mapping{snap: snap, next: make(map[netip.AddrPort]string), unknown: make(map[netip.AddrPort]time.Time),
			behind: map[backend][]endpoint{{"shop", "web", "", false}: {{netip.MustParseAddrPort(behind), true}}}}
		m.add(svc, true)
		if len(m.next) != 0 || len(m.problems) != problems {
			t.Errorf("with %s behind it: %v, problems %+v, want %d", behind, m.next, m.problems, problems)
		}
	}
}

// TestClusterIPsAreRestored with the rest of a snapshot, and hold until the API server tells.
func TestClusterIPsAreRestored(t *testing.T) {
	at := netip.MustParseAddrPort("10.96.1.1:80")
	want := map[netip.AddrPort]string{at: "web"}
	kept, err := withClusterIPs(mesh(t, 1, "web at 10.1.0.1:8080"), want, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	text, err := (&catalog.Remembered{Snapshot: kept}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := catalog.Decode(text)
	if err != nil {
		t.Fatal(err)
	}
	r := &restorable{&destinations{cluster: &Cluster{}}, restorer{}}
	if err := r.Restore(again.Snapshot, time.Now()); err != nil || !maps.Equal(r.last, want) {
		t.Fatalf("restored %v, %v", r.last, err)
	}
	for generation, snap := range []*catalog.Snapshot{again.Snapshot, mesh(t, 2, "web at 10.1.0.1:8080")} {
		r.source = snap
		r.deliver = func(snap *catalog.Snapshot) {
			if to, ok := snap.Resolve(at); !ok || to.Service.Name != "web" || len(to.Service.Ports) != 1 {
				t.Errorf("%d: %s leads to %+v", generation, at, to)
			}
		}
		r.tell()
	}
}

type restorer struct{}

func (restorer) Restore(*catalog.Snapshot, time.Time) error { return nil }
