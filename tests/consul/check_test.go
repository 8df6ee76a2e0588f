package consul

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"

	"nodeproxy.io/nodeproxy/check"
)

// checks runs "nodeproxy check" on a node and returns its lines by name, those with the same name joined.
func (m *mesh) checks(node int, args ...string) map[string]string {
	m.t.Helper()
	m.must(m.Daemons[node].WriteConfig())
	out, _ := m.cli(node, append([]string{"check", "--json", "--config", m.Daemons[node].ConfigPath()}, args...)...) // it fails where a line has
	end := strings.LastIndex(out, "}")
	var answer struct{ Results []check.Result }
	if err := json.Unmarshal([]byte(out[:end+1]), &answer); err != nil {
		m.t.Fatalf("check says %s: %v", out, err)
	}
	lines := make(map[string]string)
	for _, r := range answer.Results {
		lines[r.Name] += fmt.Sprintf("%s: %s\n", r.Verdict, r.Text)
	}
	return lines
}

// says fails unless there is exactly one line of that name and it holds the texts.
func (m *mesh) says(lines map[string]string, name string, texts ...string) {
	m.t.Helper()
	line := lines[name]
	for _, text := range texts {
		if !strings.Contains(line, text) || strings.Count(line, "\n") != 1 {
			m.t.Errorf("check says of %s %q, want %q", name, line, text)
		}
	}
}

func (m *mesh) checkWith(node int, address, token string) map[string]string {
	m.t.Helper()
	m.must(os.WriteFile(m.tokenFile(node), []byte(token), 0o600))
	m.Daemons[node].Source = fmt.Sprintf("source \"consul\" {\n  address    = %q\n  token_file = %q\n}\n", address, m.tokenFile(node))
	if token == "" {
		m.Daemons[node].Source = fmt.Sprintf("source \"consul\" {\n  address = %q\n}\n", address)
	}
	return m.checks(node)
}

func TestCheckSaysWhatToDoAboutConsul(t *testing.T) {
	m := newMesh(t)
	m.place(0, "web")
	const agent, unknown = "127.0.0.1:8500", "3b1f6c0e-6d6c-4d0e-8f7e-2f3a4b5c6d7e"
	full, err := m.agents[0].NewToken(m.ctx(), "full", rules(t, "node-1", "web"))
	m.must(err)
	reader, err := m.agents[0].NewToken(m.ctx(), "reader", rules(t, "node-1"))
	m.must(err)

	lines := m.checkWith(0, agent, full)
	m.says(lines, "consul agent", "ok: Consul 1.", "node node-1")
	m.says(lines, "consul token", "ok: ")
	m.says(lines, "consul token for web", "ok: ")
	m.says(lines, "source", "ok: ")
	if lines["consul ACLs"] != "" {
		t.Errorf("check complains of what is well: %q", lines)
	}

	lines = m.checkWith(0, agent, reader)
	m.says(lines, "consul token", "ok: ")
	m.says(lines, "consul token for web", "failed: it lacks rights", `service "web" { policy = "write" }  service "web-sidecar-proxy" { policy = "write" }`)

	m.says(m.checkWith(0, "127.0.0.1:8599", full), "consul agent", "failed: ", "127.0.0.1:8599", "connection refused", "start it, or correct address")
	lines = m.checkWith(0, agent, unknown)
	m.says(lines, "consul token", "failed: the agent refuses the token in "+m.tokenFile(0), "ACL not found", "docs/consul.md")
	if lines["source"] != "" {
		t.Errorf("one problem has two lines: %q", lines)
	}

	old := NewFront(t, m.agents[0].Socket())
	old.Change = func(req *http.Request, answer *http.Response) {
		if req.URL.Path != "/v1/agent/self" {
			return
		}
		text, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Error(err)
		}
		text = bytes.ReplaceAll(text, []byte(`"Version": "1.19.2"`), []byte(`"Version": "1.14.11"`))
		text = bytes.ReplaceAll(text, []byte(`"Version":"1.19.2"`), []byte(`"Version":"1.14.11"`))
		answer.Body = io.NopCloser(bytes.NewReader(text))
		answer.Header.Set("Content-Length", strconv.Itoa(len(text)))
	}
	m.says(m.checkWith(0, "unix://"+old.Socket, full), "consul agent", "failed: ", "1.14.11", "1.16 or newer is needed", "upgrade it")
}

func TestCheckSaysThatACLsAreOff(t *testing.T) {
	m := newMeshWith(t, Config{HCL: noACLs})
	m.place(0, "web")
	lines := m.checkWith(0, "127.0.0.1:8500", "")
	m.says(lines, "consul ACLs", "warning: they are off", "acl { enabled = true")
}

func TestCheckNamesEverythingOfAServiceThatIsHTTPs(t *testing.T) {
	m := newMesh(t)
	m.place(0, "web")
	for _, entry := range []map[string]any{
		{"Kind": "service-defaults", "Name": "web", "Protocol": "http", "Expose": map[string]any{"Paths": []map[string]any{{"Path": "/health", "LocalPathPort": 8080, "ListenerPort": 21600, "Protocol": "http"}}}},
		{"Kind": "service-resolver", "Name": "web", "DefaultSubset": "v1", "Subsets": map[string]any{"v1": map[string]any{"Filter": "Service.Meta.version == 1"}, "v2": map[string]any{"Filter": "Service.Meta.version == 2"}}},
		{"Kind": "service-splitter", "Name": "web", "Splits": []map[string]any{{"Weight": 90, "ServiceSubset": "v1"}, {"Weight": 10, "ServiceSubset": "v2"}}},
		{"Kind": "service-router", "Name": "web", "Routes": []map[string]any{{"Match": map[string]any{"HTTP": map[string]any{"PathPrefix": "/v2"}}, "Destination": map[string]any{"ServiceSubset": "v2"}}}},
		{"Kind": "service-intentions", "Name": "web", "Sources": []map[string]any{{"Name": "api", "Permissions": []map[string]any{{"Action": "allow", "HTTP": map[string]any{"PathPrefix": "/"}}}}}},
	} {
		m.must(m.agents[0].Write(m.ctx(), entry))
	}
	token, err := m.agents[0].NewToken(m.ctx(), "full", rules(t, "node-1", "web"))
	m.must(err)
	m.checkWith(0, "127.0.0.1:8500", token)
	lines := m.checks(0, "--service", "web")["service web"]
	for _, what := range []string{"service-splitter", "service-router", "service-intentions", "Expose"} {
		if !strings.Contains(lines, what) {
			t.Errorf("check --service does not name %s:\n%s", what, lines)
		}
	}
}
