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
	binary, err := Envoy()
	m.must(err)
	consul, err := Binary()
	m.must(err)
	agent := m.agents[slices.Index(m.Nodes[:], w.Node)]
	args := []string{"connect", "envoy", "-bootstrap", "-sidecar-for", instance, "-ignore-envoy-compatibility",
		"-grpc-addr", "unix://" + agent.GRPCSocket(), "-admin-bind", fmt.Sprintf("127.0.0.1:%d", adminPort)}
	path := filepath.Join(w.Node.Dir, "envoy-"+instance+".json")
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
