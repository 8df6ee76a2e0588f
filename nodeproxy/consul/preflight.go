package consul

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"google.golang.org/grpc/connectivity"
)

// Finding is the answer to one question of Preflight.
type Finding struct {
	Name    string
	Failed  bool // it does not work; Text says what to do
	Warning bool // it works; Text says at what risk
	Text    string
}

// preflightTimeout is how long the agent may take for one question.
const preflightTimeout = 5 * time.Second

// Preflight asks the agent for what a daemon with cfg would need to serve these services: an agent that is there and new
// enough, and a token that it knows and that has the rights. It changes nothing. Where the first finding has failed there
// are no more.
func Preflight(ctx context.Context, cfg Config, services []string) []Finding {
	client, err := newClient(&cfg)
	if err != nil {
		return []Finding{{Name: "consul", Failed: true, Text: err.Error()}}
	}
	defer client.close()
	p := preflight{cfg: &cfg, ask: func(q question) (*answer, error) {
		ctx, cancel := context.WithTimeoutCause(ctx, preflightTimeout, fmt.Errorf("no answer within %s", preflightTimeout))
		defer cancel()
		return client.request(ctx, q)
	}}
	a, err := p.ask(question{path: selfPath})
	if err != nil {
		return []Finding{p.unanswered(err)}
	}
	found, err := parseAgent(a, &cfg)
	if err != nil {
		return []Finding{{Name: p.name(), Failed: true, Text: err.Error()}}
	}
	findings := []Finding{{Name: p.name(), Text: fmt.Sprintf("Consul %s, node %s, datacenter %s", found.version, found.node, found.datacenter)}}
	if cfg.agentless() {
		findings = append(findings, p.signing(ctx, client, found))
	}
	if !found.acls {
		return append(findings, Finding{Name: "consul ACLs", Warning: true,
			Text: "they are off: whoever reaches an agent gets a certificate of any service, and can change intentions; enable them in the agents' configuration, acl { enabled = true  default_policy = \"deny\" }"})
	}
	own := right{"node", "read", found.node}
	if cfg.agentless() {
		own = right{"node", "write", cfg.catalogNode()}
	}
	findings = append(findings, p.rights("consul token", "", right{"agent", "read", found.node}, own, right{"service", "write", proxyService}))
	for _, service := range services {
		findings = append(findings, p.rights("consul token for "+service, service, right{"service", "write", service}, right{"service", "write", service + sidecarSuffix}))
	}
	return findings
}

type preflight struct {
	cfg *Config
	ask func(question) (*answer, error)
}

// name is what findings about who is asked are called.
func (p *preflight) name() string {
	if p.cfg.agentless() {
		return "consul servers"
	}
	return "consul agent"
}

// signing says whether the port is reached where certificates are signed.
func (p *preflight) signing(ctx context.Context, c *client, server *agent) Finding {
	fail := func(err error) Finding {
		return Finding{Name: "consul certificates", Failed: true, Text: fmt.Sprintf("reach the servers' gRPC port: %v", err)}
	}
	base, _ := c.base()
	conn, at, err := c.dialGRPC(base, server)
	if err != nil {
		return fail(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, preflightTimeout)
	defer cancel()
	conn.Connect()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		if state == connectivity.TransientFailure || !conn.WaitForStateChange(ctx, state) {
			return fail(fmt.Errorf("%s does not answer: open it to this node, see ports.grpc and ports.grpc_tls of the servers", at))
		}
	}
	return Finding{Name: "consul certificates", Text: "signed by the server at " + at}
}

// unanswered says what to do where nobody says who it is.
func (p *preflight) unanswered(err error) Finding {
	who, where := "the agent", p.cfg.location()
	if p.cfg.agentless() {
		who = "a server"
	}
	_, answered := errors.AsType[*statusError](err)
	switch {
	case !answered:
		return Finding{Name: p.name(), Failed: true, Text: fmt.Sprintf("ask %s at %s: %v: start it, or correct address in the source block", who, where, err)}
	case p.cfg.AuthMethod != "":
		return Finding{Name: "consul token", Failed: true, Text: fmt.Sprintf("ask %s at %s: %v: correct auth_method or bearer_token_file, or the method's binding rules: see docs/consul.md for what the token needs", who, where, err)}
	case !hasStatus(err, http.StatusForbidden):
		return Finding{Name: p.name(), Failed: true, Text: fmt.Sprintf("ask %s at %s: %v: is that Consul? see its log", who, where, err)}
	case p.cfg.TokenFile == "":
		return Finding{Name: "consul token", Failed: true, Text: fmt.Sprintf("%s wants a token (%v): set token_file in the source block", who, err)}
	}
	return Finding{Name: "consul token", Failed: true,
		Text: fmt.Sprintf("%s refuses the token in %s (%v): write one into it that exists and has the rules in docs/consul.md", who, p.cfg.TokenFile, err)}
}

// right is one thing that a token may or may not do.
type right struct{ Resource, Access, Segment string }

func (r right) rule() string {
	return fmt.Sprintf("%s %q { policy = %q }", r.Resource, r.Segment, r.Access)
}

// rights asks whether the token for a service, or the general one, has what is needed. The agent's own question for
// certificates would not tell: it shows those that it has to everybody.
func (p *preflight) rights(name, service string, needed ...right) Finding {
	a, err := p.ask(question{method: http.MethodPost, path: "/v1/internal/acl/authorize", service: service, body: needed})
	var has []struct{ Allow bool }
	if err == nil {
		err = decode(a, &has)
	}
	if err != nil || len(has) != len(needed) {
		return Finding{Name: name, Failed: true, Text: fmt.Sprintf("ask the agent what the token may do: %v", explain(err))}
	}
	var missing, held []string
	for i, r := range needed {
		held = append(held, r.rule())
		if !has[i].Allow {
			missing = append(missing, r.rule())
		}
	}
	if len(missing) == 0 {
		return Finding{Name: name, Text: "has " + strings.Join(held, ", ")}
	}
	where := "the one in token_file"
	if p.cfg.AuthMethod != "" {
		where = fmt.Sprintf("those that auth method %q gives", p.cfg.AuthMethod)
	}
	if service != "" && p.cfg.TokenDir != "" {
		where = "that service's in token_dir, or of the one in token_file"
	}
	return Finding{Name: name, Failed: true, Text: fmt.Sprintf("it lacks rights: add to the rules of %s: %s", where, strings.Join(missing, "  "))}
}
