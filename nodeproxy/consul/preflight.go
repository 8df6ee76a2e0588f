package consul

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
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
// enough, a token that it knows, and a certificate for each service, which has the servers issue it unless the agent has
// one already. It registers nothing. After a finding that has failed there are no more, but for those of other services.
func Preflight(ctx context.Context, cfg Config, services []string) []Finding {
	client, err := newClient(&cfg)
	if err != nil {
		return []Finding{{Name: "consul", Failed: true, Text: err.Error()}}
	}
	defer client.close()
	ask := func(q question) (*answer, error) {
		ctx, cancel := context.WithTimeoutCause(ctx, preflightTimeout, fmt.Errorf("no answer within %s", preflightTimeout))
		defer cancel()
		return client.request(ctx, q)
	}
	a, err := ask(question{path: selfPath})
	if err != nil {
		return []Finding{unanswered(&cfg, err)}
	}
	found, err := parseAgent(a, &cfg)
	if err != nil {
		return []Finding{{Name: "consul agent", Failed: true, Text: err.Error()}}
	}
	findings := []Finding{{Name: "consul agent", Text: fmt.Sprintf("Consul %s, node %s, datacenter %s", found.version, found.node, found.datacenter)}}
	if !found.acls {
		findings = append(findings, Finding{Name: "consul ACLs", Warning: true,
			Text: "they are off: whoever reaches an agent gets a certificate of any service, and can change intentions; enable them in the agents' configuration, acl { enabled = true  default_policy = \"deny\" }"})
	}
	for _, service := range services {
		findings = append(findings, certificate(service, &cfg, ask))
	}
	return findings
}

// unanswered says what to do where the agent does not say who it is.
func unanswered(cfg *Config, err error) Finding {
	switch {
	case !hasStatus(err, http.StatusForbidden):
		if _, answered := errors.AsType[*statusError](err); answered {
			return Finding{Name: "consul agent", Failed: true, Text: fmt.Sprintf("ask the agent at %s: %v: is that Consul? see its log", cfg.Address, err)}
		}
		return Finding{Name: "consul agent", Failed: true, Text: fmt.Sprintf("ask the agent at %s: %v: start it, or correct address in the source block", cfg.Address, err)}
	case cfg.TokenFile == "":
		return Finding{Name: "consul token", Failed: true, Text: fmt.Sprintf("the agent wants a token (%v): set token_file in the source block", err)}
	}
	return Finding{Name: "consul token", Failed: true,
		Text: fmt.Sprintf("the agent refuses the token in %s (%v): write one into it that exists and has the rules in docs/consul.md", cfg.TokenFile, err)}
}

// certificate asks for the certificate of a service.
func certificate(service string, cfg *Config, ask func(question) (*answer, error)) Finding {
	f := Finding{Name: "certificate of " + service}
	_, err := ask(question{path: leafPath(service), service: service})
	switch {
	case err == nil:
		f.Text = "the agent issues it"
	case hasStatus(err, http.StatusForbidden):
		f.Failed = true
		f.Text = fmt.Sprintf("the token may not be %s (%v): add service %q { policy = \"write\" } to its rules, or put a token of that service into token_dir", service, err, service)
		if cfg.TokenDir != "" {
			f.Text = fmt.Sprintf("the token may not be %s (%v): add service %q { policy = \"write\" } to the rules of the one in %s", service, err, service, cfg.TokenDir)
		}
	default:
		f.Failed = true
		f.Text = fmt.Sprintf("ask the agent for it: %v: see the logs of the agent and its servers", err)
	}
	return f
}
