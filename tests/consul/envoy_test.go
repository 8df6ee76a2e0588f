package consul

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"nodeproxy.io/tests/netlab"
)

// envoy runs Envoy in a workload as the registered sidecar of an instance, configured by the agent of its node. Envoys in
// one namespace need different admin ports.
func (m *mesh) envoy(w *netlab.Workload, instance string, adminPort int) *netlab.Process {
	m.t.Helper()
	return m.startEnvoy(w, instance, adminPort, "-sidecar-for", instance)
}

// gateway registers a gateway of some kind in a workload of its own, called service, and runs Envoy as it. It is reached at
// gatewayPort, and from other datacenters at wanPort.
func (m *mesh) gateway(node int, kind, service string) *netlab.Workload {
	m.t.Helper()
	w, err := m.Nodes[node].Workload(service)
	m.must(err)
	at := func(port int) map[string]any { return map[string]any{"Address": w.IPv4.String(), "Port": port} }
	m.must(m.agents[node].Register(m.ctx(), map[string]any{
		"Kind": kind + "-gateway", "Name": service, "ID": service + "-1", "Address": w.IPv4.String(), "Port": gatewayPort,
		"TaggedAddresses": map[string]any{"lan": at(gatewayPort), "wan": at(wanPort)},
		"Proxy":           map[string]any{"Config": map[string]any{"envoy_mesh_gateway_bind_tagged_addresses": true}},
	}))
	m.startEnvoy(w, service, 19000, "-gateway", kind, "-service", service, "-proxy-id", service+"-1")
	return w
}

const (
	gatewayPort = 8443
	wanPort     = 8444
)

func (m *mesh) startEnvoy(w *netlab.Workload, name string, adminPort int, as ...string) *netlab.Process {
	m.t.Helper()
	binary, err := Envoy()
	m.must(err)
	consul, err := Binary()
	m.must(err)
	agent := m.agents[slices.Index(m.Nodes[:], w.Node)]
	args := append([]string{"connect", "envoy", "-bootstrap", "-ignore-envoy-compatibility",
		"-grpc-addr", "unix://" + agent.GRPCSocket(), "-admin-bind", fmt.Sprintf("127.0.0.1:%d", adminPort)}, as...)
	path := filepath.Join(w.Node.Dir, "envoy-"+name+".json")
	file, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	m.must(err)
	defer file.Close()
	_, err = m.Run(m.ctx(), netlab.Command{Path: consul, Args: args, Env: consulEnv(agent), Stdout: file})
	m.must(err)
	return m.startClient(w, binary, "-c", path, "--disable-hot-restart", "--concurrency", "1", "-l", "warning")
}

// consulEnv is the environment of a program that asks an agent.
func consulEnv(a *Agent) []string {
	return []string{"CONSUL_HTTP_ADDR=unix://" + a.Socket(), "CONSUL_HTTP_TOKEN=" + Management}
}
