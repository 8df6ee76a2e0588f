package kubernetes

import (
	"context"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/workload"
)

// Definitions are the pods of this node as instances of their services, for a Consul without an agent that would know them.
type Definitions struct{ cluster *Cluster }

// Definitions of c's pods.
func (c *Cluster) Definitions() Definitions { return Definitions{c} }

// Run delivers them once the API server has told of all pods, and again whenever they change, until ctx ends.
func (d Definitions) Run(ctx context.Context, deliver func(catalog.Definitions)) {
	changed := d.cluster.subscribe()
	tick := time.NewTicker(changesLast) // until all is read
	defer tick.Stop()
	var told *catalog.Definitions
	for {
		if d.cluster.hasSynced() {
			tick.Stop()
			if now := d.current(); told == nil || !reflect.DeepEqual(*told, now) {
				told = &now
				deliver(now)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tick.C:
		}
	}
}

func (d Definitions) current() catalog.Definitions {
	var all catalog.Definitions
	pods := list[corev1.Pod](d.cluster.pods)
	slices.SortFunc(pods, func(a, b *corev1.Pod) int {
		return strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name)
	})
	for _, p := range pods {
		found, ok := d.cluster.judge(p)
		if !ok || !found.granted() || found.claim.Mesh != workload.Enabled || found.finished() {
			continue
		}
		address, err := netip.ParseAddr(p.Status.PodIP)
		if err != nil {
			continue // it has none yet
		}
		def, err := found.definition(address)
		if err == nil && slices.ContainsFunc(all.All, func(other catalog.Definition) bool { return other.ID == def.ID }) {
			err = fmt.Errorf("%s is registered as %q, as a pod of another namespace is: give it another name", found, def.ID)
		}
		if err != nil {
			all.Problems = append(all.Problems, catalog.Problem{Service: found.claim.Service, Kind: "refused", Text: err.Error()})
			continue
		}
		all.All = append(all.All, def)
	}
	return all
}

// What consul-k8s calls the same things: pods that come from there keep their annotations.
const (
	consulPort = "consul.hashicorp.com/connect-service-port"
	consulTags = "consul.hashicorp.com/service-tags"
	consulMeta = "consul.hashicorp.com/service-meta-"
)

func (p pod) definition(address netip.Addr) (catalog.Definition, error) {
	def := catalog.Definition{
		ID: p.Name + "-" + p.claim.Service, Service: p.claim.Service, Address: address,
		Meta:   map[string]string{"pod-name": p.Name, "k8s-namespace": p.Namespace},
		Checks: []catalog.CheckResult{p.ready()},
	}
	var err error
	if def.Port, err = p.port(); err != nil {
		return def, err
	}
	tags, own := p.labels["tags"]
	if !own {
		tags = p.Annotations[consulTags]
	}
	for tag := range strings.SplitSeq(tags, ",") {
		if tag = strings.TrimSpace(tag); tag != "" {
			def.Tags = append(def.Tags, tag)
		}
	}
	for key, value := range p.Annotations {
		if key, ok := strings.CutPrefix(key, consulMeta); ok {
			def.Meta[key] = value
		}
	}
	for key, value := range p.labels {
		if key, ok := strings.CutPrefix(key, metaKey); ok {
			def.Meta[key] = value
		}
	}
	return def, nil
}

// port is where the application listens: the one that is written at the pod, by number or name, or the first declared one.
// 0: it only calls others.
func (p pod) port() (uint16, error) {
	text, own := p.labels["port"]
	if !own {
		text, _, _ = strings.Cut(p.Annotations[consulPort], ",") // of several, one registers the service of the account
	}
	containers := running(p.Pod)
	if text == "" {
		for _, c := range containers {
			for _, port := range c.Ports {
				if port.Protocol == corev1.ProtocolTCP || port.Protocol == "" {
					return uint16(port.ContainerPort), nil
				}
			}
		}
		return 0, nil
	}
	for _, c := range containers {
		if port := portOf(c, intstr.Parse(strings.TrimSpace(text))); port != 0 {
			return port, nil
		}
	}
	return 0, fmt.Errorf("%s has port %q, which is neither a port nor the name of one of its containers': correct the annotation %sport", p, text, prefix)
}

// ready is the pod's readiness as a check.
func (p pod) ready() catalog.CheckResult {
	check := catalog.CheckResult{Name: "Kubernetes readiness", Output: p.String() + " is not ready"}
	if p.DeletionTimestamp != nil {
		check.Output = p.String() + " is being deleted"
		return check
	}
	for _, c := range p.Status.Conditions {
		switch {
		case c.Type != corev1.PodReady:
		case c.Status == corev1.ConditionTrue:
			check.Passing, check.Output = true, p.String()+" is ready"
		case c.Message != "":
			check.Output += ": " + c.Message
		}
	}
	return check
}
