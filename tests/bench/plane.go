package main

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"

	"nodeproxy.io/tests/consul"
	"nodeproxy.io/tests/meshlab"
)

// plane holds a mesh of a size for a daemon to read.
type plane interface {
	// define writes all of it. The places are those of the node's own workloads, in the order of their services.
	define(ctx context.Context, s size, places []string) error
	// intend replaces the intentions of a destination.
	intend(ctx context.Context, destination string, sources []meshlab.Source) error
	// count limits the connections of a service, so that the proxy carries all of them.
	count(ctx context.Context, service string) error
}

// someConnections is more than there are.
const someConnections = 1000

// files is the file source's directory.
type files struct{ *meshlab.Mesh }

const (
	sidecarPort = 21000 // of endpoints on other nodes
	ofMesh      = "*"
)

func (f files) define(_ context.Context, s size, places []string) error {
	for i, place := range places {
		name := serviceName(i)
		if err := f.Define(0, name, meshlab.Service(name, name+"-1", place, servicePort, "")); err != nil {
			return err
		}
	}
	nodes := make(map[int]*strings.Builder)
	for _, e := range s.remote() {
		if nodes[e.node] == nil {
			nodes[e.node] = &strings.Builder{}
		}
		fmt.Fprintf(nodes[e.node], "service {\n  name    = %q\n  id      = %q\n  address = %q\n  port    = %d\n  connect {\n    sidecar_service {\n      port = %d\n    }\n  }\n}\n",
			e.service, e.id, e.address, servicePort, sidecarPort)
	}
	for node, definitions := range nodes {
		if err := f.DefineAt(nodeName(node), "services", definitions.String()); err != nil {
			return err
		}
	}
	return intendAll(s, func(name string, sources []meshlab.Source) error { return f.Intentions(name, sources...) })
}

func (f files) intend(_ context.Context, destination string, sources []meshlab.Source) error {
	return f.Intentions(destination, sources...)
}

func (f files) count(_ context.Context, service string) error {
	return f.ConfigEntry("defaults-"+service, fmt.Sprintf("Kind = \"service-defaults\"\nName = %q\nMaxInboundConnections = %d\n", service, someConnections))
}

func intendAll(s size, write func(destination string, sources []meshlab.Source) error) error {
	for i := range s.Services {
		if err := write(serviceName(i), s.sources(i, true)); err != nil {
			return err
		}
	}
	return nil
}

// agent is a Consul agent and server of the node.
type agent struct{ *consul.Agent }

// unlimited lets the agent sign 250 certificates at once, which it does at 50 a second otherwise.
const unlimited = "log_level = \"ERR\"\nconnect {\n  enabled = true\n  ca_config {\n    csr_max_per_second = 10000\n  }\n}\n"

func newAgent(ctx context.Context, m *meshlab.Mesh) (*agent, error) {
	node := m.Nodes[0]
	cgroup, err := node.Cgroup.Child("consul")
	if err != nil {
		return nil, err
	}
	a, err := consul.Start(ctx, m.Lab, consul.Config{Node: node.Name, Namespace: node.Namespace, Cgroup: cgroup, Address: node.IPv4.String(), HCL: unlimited})
	return &agent{a}, err
}

const (
	registrars = 4   // at once
	inOne      = 128 // operations of a transaction, Consul's limit
)

// define registers the node's own services at the agent, without sidecars, and the others in the catalog with theirs.
func (a *agent) define(ctx context.Context, s size, places []string) error {
	for i, place := range places {
		name := serviceName(i)
		if err := a.Register(ctx, map[string]any{"Name": name, "ID": name + "-1", "Address": place, "Port": servicePort}); err != nil {
			return err
		}
	}
	if err := a.catalog(ctx, s.remote()); err != nil {
		return err
	}
	if err := a.intend(ctx, ofMesh, []meshlab.Source{meshlab.Deny(ofMesh)}); err != nil {
		return err
	}
	return intendAll(s, func(name string, sources []meshlab.Source) error { return a.intend(ctx, name, sources) })
}

func (a *agent) catalog(ctx context.Context, all []endpoint) error {
	var nodes, services []any
	for i, e := range all {
		node := nodeName(e.node)
		if i%perNode == 0 {
			nodes = append(nodes, object{"Node": object{"Verb": "set", "Node": object{"Node": node, "Address": nodeAddress(e.node).String()}}})
		}
		for _, service := range []object{
			{"ID": e.id, "Service": e.service, "Address": e.address.String(), "Port": servicePort},
			{"ID": e.id + "-sidecar-proxy", "Service": e.service + "-sidecar-proxy", "Kind": "connect-proxy", "Address": e.address.String(), "Port": sidecarPort,
				"Proxy": object{"DestinationServiceName": e.service, "DestinationServiceID": e.id}},
		} {
			services = append(services, object{"Service": object{"Verb": "set", "Node": node, "Service": service}})
		}
	}
	if err := a.transact(ctx, nodes); err != nil {
		return err
	}
	return a.transact(ctx, services)
}

// transact does operations that do not depend on each other.
func (a *agent) transact(ctx context.Context, operations []any) error {
	var work sync.WaitGroup
	errs := make(chan error, registrars)
	for i := range registrars {
		work.Go(func() {
			for first := i * inOne; first < len(operations); first += registrars * inOne {
				if err := a.Do(ctx, http.MethodPut, "/v1/txn", operations[first:min(first+inOne, len(operations))], nil); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	work.Wait()
	close(errs)
	return <-errs // nil when there is none
}

func (a *agent) intend(ctx context.Context, destination string, sources []meshlab.Source) error {
	actions := make(map[string]string)
	for _, s := range sources {
		actions[s.Name] = s.Action
	}
	return a.Intentions(ctx, destination, actions)
}

func (a *agent) count(ctx context.Context, service string) error {
	return a.Write(ctx, object{"Kind": "service-defaults", "Name": service, "MaxInboundConnections": someConnections})
}
