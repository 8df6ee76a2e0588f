package consul

import (
	"reflect"
	"testing"

	"github.com/hashicorp/consul/api"
)

// The outputs are those of Consul 1.19.2's agent (agent/checks/check.go, agent/checks/grpc.go).
func TestWhereACheckConnectsIsReadFromItsOutput(t *testing.T) {
	for _, c := range []struct {
		kind, output string
		want         uint16
	}{
		{"tcp", "TCP connect 10.0.0.5:8080: Success", 8080},
		{"tcp", "TCP+TLS connect [fd00::5]:8443: Success", 8443},
		{"tcp", "dial tcp 10.0.0.5:8080: connect: connection refused", 8080},
		{"tcp", "dial tcp [fd00::5]:8080: i/o timeout", 8080},
		{"http", "HTTP GET http://10.0.0.5:9090/health: 200 OK Output: dial tcp 10.9.9.9:5432: refused", 9090},
		{"http", "HTTP GET http://api.local/health: 503 Service Unavailable Output: ", 80},
		{"http", "HTTP HEAD https://10.0.0.5/health: 200 OK Output: ", 443},
		{"http", `Get "http://10.0.0.5:9090/health": dial tcp 10.0.0.5:9090: connect: connection refused`, 9090},
		{"http", `Get "http://10.0.0.5:9090/": context deadline exceeded (Client.Timeout exceeded while awaiting headers)`, 9090},
		{"grpc", "gRPC check 10.0.0.5:9091/health: success", 9091},
		{"grpc", "gRPC check 10.0.0.5:9091: success", 9091},
		{"grpc", `rpc error: code = Unavailable desc = connection error: desc = "transport: Error while dialing: dial tcp 10.0.0.5:9091: connect: connection refused"`, 9091},
		{"grpc", "rpc error: code = DeadlineExceeded desc = context deadline exceeded", 0},
		{"h2ping", "Failed to dial to 10.0.0.5:9092: refused", 9092},
		{"h2ping", "HTTP2 ping was successful", 0},
		{"script", "dial tcp 10.0.0.5:8080: refused", 0}, // a program's own words
		{"tcp", "", 0},
		{"tcp", "TCP connect 10.0.0.5:99999: Success", 0},
		{"tcp", "TCP connect nonsense: Success", 0},
	} {
		if got := checkedPort(c.kind, c.output); got != c.want {
			t.Errorf("%s %q: port %d, want %d", c.kind, c.output, got, c.want)
		}
	}
}

func TestAPortThatACheckConnectedToIsNotForgotten(t *testing.T) {
	check := func(output string) map[string]*api.AgentCheck {
		return map[string]*api.AgentCheck{
			"a": {CheckID: "a", ServiceID: "web-1", Type: "h2ping", Output: output},
			"b": {CheckID: "b", ServiceID: "web-1", Type: "ttl", Output: "TCP connect 10.0.0.5:1: Success"},
			"c": {CheckID: "c", Type: "tcp", Output: "TCP connect 10.0.0.5:2: Success"}, // the node's
		}
	}
	seen := probesOf(check("Failed to dial to 10.0.0.5:9092: refused"), nil)
	seen = probesOf(check("HTTP2 ping was successful"), seen)
	if want := (map[string]probes{"web-1": {"a": {9092}}}); !reflect.DeepEqual(seen, want) {
		t.Errorf("%v, want %v", seen, want)
	}
	if gone := probesOf(nil, seen); len(gone) != 0 {
		t.Errorf("after the checks are gone: %v", gone)
	}
}
