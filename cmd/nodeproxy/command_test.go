package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/catalog"
	"nodeproxy.io/nodeproxy/check"
	"nodeproxy.io/redirect"
)

// result is what a command line led to.
type result struct {
	status         int
	stdout, stderr string
}

// invoke runs a command line without a process. Variables are "NAME=value".
func invoke(t *testing.T, terminal bool, variables []string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var stdout, stderr bytes.Buffer
	e := &env{stdout: &stdout, stderr: &stderr, terminal: terminal, getenv: func(name string) string {
		for _, v := range variables {
			if value, ok := strings.CutPrefix(v, name+"="); ok {
				return value
			}
		}
		return ""
	}}
	status := execute(ctx, e, args)
	return result{status, stdout.String(), stderr.String()}
}

// backend answers from its fields.
type backend struct {
	status      admin.Status
	health      admin.Health
	explanation admin.Explanation
	live        []admin.Connection
	requests    []admin.EnrollRequest
	err         error
}

func (b *backend) Applications() []admin.Application              { return []admin.Application{} }
func (b *backend) Status() admin.Status                           { return b.status }
func (b *backend) Health() admin.Health                           { return b.health }
func (b *backend) Explain(_, _ string) (admin.Explanation, error) { return b.explanation, b.err }
func (b *backend) StartSandbox(admin.Sandbox) admin.SandboxState  { return admin.SandboxState{} }
func (b *backend) StopSandbox(admin.Sandbox) error                { return nil }
func (b *backend) Connections() []admin.Connection                { return b.live }
func (b *backend) Enroll(_ context.Context, r admin.EnrollRequest) error {
	b.requests = append(b.requests, r)
	return b.err
}
func (b *backend) Unenroll(ctx context.Context, r admin.EnrollRequest) error { return b.Enroll(ctx, r) }

// serve answers on a socket until the test ends.
func serve(t *testing.T, b *backend) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "admin.sock")
	srv, err := admin.Listen(admin.ServerConfig{Socket: socket, Backend: b, Hub: admin.NewHub(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return socket
}

func wantStatus(t *testing.T, r result, status int) {
	t.Helper()
	if r.status != status {
		t.Errorf("exit status %d, want %d; stdout %q, stderr %q", r.status, status, r.stdout, r.stderr)
	}
}

func wantText(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("no %q in\n%s", part, text)
		}
	}
}

func TestWrongUsageExitsWithTwoAndPointsToHelp(t *testing.T) {
	for _, args := range [][]string{
		{"stauts"}, {"status", "--colour"}, {"status", "web"}, {"explain", "web"}, {"enroll"}, {"enroll", "/x"},
		{"enroll", "/x", "--service", "web", "--mode", "lax"}, {"trace", "--verdict", "maybe"}, {"ca", "destroy"}, {"run", "x"},
	} {
		r := invoke(t, false, nil, args...)
		wantStatus(t, r, exitUsage)
		wantText(t, r.stderr, "nodeproxy: ", "-h\"")
		if r.stdout != "" {
			t.Errorf("%v: stdout %q, want nothing", args, r.stdout)
		}
	}
	wantText(t, invoke(t, false, nil, "stauts").stderr, "did you mean status?")
}

func TestEveryCommandHasHelpWithAnExample(t *testing.T) {
	var visit func(path []string, cmd *cobra.Command)
	visit = func(path []string, cmd *cobra.Command) {
		r := invoke(t, false, nil, append(path, "-h")...)
		wantStatus(t, r, exitDone)
		wantText(t, r.stdout, "Examples:", "nodeproxy ")
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() && sub.Name() != "help" {
				visit(append(path[:len(path):len(path)], sub.Name()), sub)
			}
		}
	}
	visit(nil, newRoot(&env{}))
}

func TestEveryCommandOfTheTableExistsAndListingsHaveJSON(t *testing.T) {
	root := newRoot(&env{})
	for name, listing := range map[string]bool{
		"run": false, "demo": false, "check": true, "status": true, "trace": true, "explain": true,
		"enroll": false, "unenroll": false, "cleanup": true, "version": true, "reload": false,
	} {
		cmd, _, err := root.Find([]string{name})
		if err != nil || cmd.Name() != name {
			t.Errorf("no command %s", name)
			continue
		}
		if listing && cmd.Flags().Lookup("json") == nil {
			t.Errorf("%s has no --json", name)
		}
	}
}

func TestMissingDaemonFailsWithAHint(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "none.sock")
	for _, args := range [][]string{{"status"}, {"trace"}, {"explain", "a", "b"}, {"enroll", "/x", "--service", "s"}, {"unenroll", "/x"}} {
		r := invoke(t, false, nil, append(args, "--socket", socket)...)
		wantStatus(t, r, exitFailed)
		wantText(t, r.stderr, socket, "is it running?")
		if strings.Contains(r.stderr, "-h") {
			t.Errorf("%v: a failure is told as wrong usage: %s", args, r.stderr)
		}
	}
}

func exampleStatus() admin.Status {
	now := time.Now()
	return admin.Status{
		Version: "1.2.3", MapABI: 1, Node: "node-1", Started: now.Add(-time.Hour),
		Source: admin.SourceStatus{Kind: "file", Location: "/etc/mesh.d", Generation: 7, Updated: now.Add(-3 * time.Second)},
		Policy: admin.PolicyStatus{Generation: 7, Default: "deny", Intentions: 12},
		Workloads: []admin.Workload{
			{Service: "web", Cgroup: "/sys/fs/cgroup/demo/web", Provider: "config", Mode: "strict", State: "protected", Processes: 3, Instances: []string{"web-1"}},
			{Service: "web", Cgroup: "/sys/fs/cgroup/kubepods/pod1", Name: "pod shop/web-1", State: "protected"},
			{Service: "batch", Cgroup: "/sys/fs/cgroup/demo/batch", State: "waiting", Detail: "no certificate yet"},
			{Service: "idle", Cgroup: "/sys/fs/cgroup/demo/idle", State: "empty", Detail: "no process"},
		},
		Refused: []admin.Refused{{Cgroup: "/c/x", Service: "bank", Provider: "enroll", Why: "not allowed here"},
			{Cgroup: "/c/y", Name: "pod shop/web-2", Service: "bank", Provider: "kubernetes", Why: "it is none"}},
		Services: []admin.Service{{Name: "web", Virtual: []string{"240.0.0.9"}, Instances: []admin.Instance{{ID: "web-1", Node: "node-1", Local: true, Address: "10.0.0.5:80", Mesh: "10.0.0.5:21500", Healthy: true}}}},
		Certificates: []admin.Certificate{
			{Service: "web", Identity: "spiffe://td/svc/web", NotAfter: now.Add(71*time.Hour + time.Minute)},
			{Service: "old", NotAfter: now.Add(-time.Hour)},
		},
		Kernel:   admin.Kernel{Pins: "/sys/fs/bpf/nodeproxy/node-1/v1", Links: 7, Heartbeat: now, Maps: []admin.KernelMap{{Name: "rules", Entries: 5, Max: 100}}},
		Problems: []admin.Problem{{Service: "web", Kind: "l7-ignored", Text: "service-router web is ignored"}},
	}
}

func TestStatusShowsWhatAnOperatorLooksFor(t *testing.T) {
	socket := serve(t, &backend{status: exampleStatus()})
	r := invoke(t, false, nil, "status", "--socket", socket)
	wantStatus(t, r, exitDone)
	wantText(t, r.stdout, "node-1", "1.2.3", "/etc/mesh.d", "generation 7", "3s ago", "default deny", "12 intentions",
		"7 links pinned at /sys/fs/bpf/nodeproxy/node-1/v1", "240.0.0.9", "10.0.0.5:21500", "in 71h", "expired 1h0m ago", "rules",
		"workload /sys/fs/cgroup/demo/batch (batch) is waiting: no certificate yet", "/c/x may not be bank (enroll): not allowed here",
		"pod shop/web-1", "claim refused: pod shop/web-2 may not be bank (kubernetes): it is none",
		"service-router web is ignored")
	if strings.Contains(r.stdout, "idle) is empty") {
		t.Error("an empty workload is no problem")
	}
	if strings.Contains(r.stdout, "\x1b") {
		t.Error("colours without a terminal")
	}
}

func TestStatusSaysWhatIsUnusual(t *testing.T) {
	status := exampleStatus()
	status.Kernel.Counters = map[string]uint64{admin.CounterUnprotectedUDP: 12, admin.CounterEventsLost: 3}
	status.DNS = &admin.Queries{Answered: 5, Forwarded: 6, Failed: 7}
	status.Workloads[0].DNS = "off: another process has port 15053"
	status.Stopping, status.Policy.Intentions, status.Kernel.Heartbeat = true, 1, time.Time{}
	socket := serve(t, &backend{status: status})
	r := invoke(t, false, nil, "status", "--socket", socket)
	wantText(t, r.stdout, "stopping: new connections are refused", "heartbeat stopped", "1 intention,", "12 datagrams", "3 verdicts were lost",
		"5 queries answered, 6 forwarded, 7 failed", "name queries of workload /sys/fs/cgroup/demo/web (web) are not answered: another process has port 15053")
}

func TestStatusColumnsAlign(t *testing.T) {
	socket := serve(t, &backend{status: exampleStatus()})
	r := invoke(t, false, nil, "status", "--socket", socket)
	column := -1
	for line := range strings.Lines(r.stdout) {
		for _, word := range []string{"STATE", "protected", "waiting ", "empty "} {
			if i := strings.Index(line, word); i > 0 && strings.HasPrefix(line, "  ") && !strings.Contains(line, ":") {
				if column >= 0 && i != column {
					t.Errorf("%q is at %d, want %d in\n%s", word, i, column, r.stdout)
				}
				column = i
			}
		}
	}
	if column < 0 {
		t.Errorf("no column of states in\n%s", r.stdout)
	}
}

func TestStatusAsJSONIsTheWireType(t *testing.T) {
	want := exampleStatus()
	socket := serve(t, &backend{status: want})
	r := invoke(t, true, nil, "status", "--json", "--socket", socket)
	wantStatus(t, r, exitDone)
	var got admin.Status
	if err := json.Unmarshal([]byte(r.stdout), &got); err != nil {
		t.Fatal(err)
	}
	if got.Node != want.Node || len(got.Workloads) != 4 || got.Kernel.Links != 7 {
		t.Errorf("status = %+v, want %+v", got, want)
	}
}

func TestColoursAreForTerminalsThatWantThem(t *testing.T) {
	socket := serve(t, &backend{status: exampleStatus()})
	if r := invoke(t, true, nil, "status", "--socket", socket); !strings.Contains(r.stdout, "\x1b[31m") {
		t.Error("no red on a terminal")
	}
	if r := invoke(t, true, []string{"NO_COLOR=1"}, "status", "--socket", socket); strings.Contains(r.stdout, "\x1b") {
		t.Error("colours in spite of NO_COLOR")
	}
}

func TestTraceShowsOneLinePerEvent(t *testing.T) {
	b := &backend{live: []admin.Connection{{
		Event: admin.EventOpen, Time: time.Now(), ID: 1, Direction: admin.Outbound, Path: admin.PathMTLS, Verdict: admin.Allowed,
		Source:      admin.Endpoint{Service: "web", Address: "10.1.0.2:41234", PID: 42, Comm: "curl"},
		Destination: admin.Endpoint{Service: "api", Address: "240.0.0.2:80", Peer: "10.2.0.2:21500"},
		Intention:   "web => api (allow), intentions.hcl:3",
	}}}
	socket := serve(t, b)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var out firstWrite
	out.done = cancel // as Ctrl-C after the first line
	status := execute(ctx, &env{stdout: &out, stderr: &out, getenv: func(string) string { return "" }}, []string{"trace", "--socket", socket})
	if status != exitDone {
		t.Errorf("exit status %d after Ctrl-C, want 0; output %s", status, out.String())
	}
	wantText(t, out.String(), "web → api", "10.1.0.2:41234 → 240.0.0.2:80 (10.2.0.2:21500)", "mtls", "allowed",
		"web => api (allow), intentions.hcl:3", "pid 42 curl")
	if n := strings.Count(out.String(), "\n"); n != 1 {
		t.Errorf("%d lines, want 1:\n%s", n, out.String())
	}
}

// firstWrite is a stdout that calls done once it was written to.
type firstWrite struct {
	bytes.Buffer
	done func()
}

func (w *firstWrite) Write(p []byte) (int, error) {
	defer w.done()
	return w.Buffer.Write(p)
}

func TestTraceLineOfADenialSaysWhy(t *testing.T) {
	c := &admin.Connection{Event: admin.EventDenied, Verdict: admin.Denied, Reason: catalog.ReasonIntention, Source: admin.Endpoint{Service: "batch"}, Destination: admin.Endpoint{Service: "api"}}
	wantText(t, traceLine(false, c), "batch → api", "denied", "intention: "+catalog.ReasonIntention.Sentence())
	c.Detail = "the peer said no"
	wantText(t, traceLine(false, c), "intention: the peer said no")
}

func TestTraceLineOfACloseHasBytesAndDuration(t *testing.T) {
	c := &admin.Connection{Event: admin.EventClose, Verdict: admin.Allowed, Sent: 2048, Received: 3 << 20, Duration: 1500 * time.Millisecond}
	wantText(t, traceLine(false, c), "sent 2.0 KiB, received 3.0 MiB in 1.5s")
}

func TestTraceSaysWhatItLost(t *testing.T) {
	wantText(t, traceLine(false, &admin.Connection{Event: admin.EventDropped, Dropped: 12}), "12 events")
}

func TestNamesThatOthersChoseCannotDriveTheTerminal(t *testing.T) {
	evil := "a\x1b[2J\nb\u202e"
	c := &admin.Connection{Event: admin.EventDenied, Verdict: admin.Denied, Reason: catalog.ReasonPeerIdentity, Detail: evil, Intention: evil,
		Source: admin.Endpoint{Service: evil, Address: evil, PID: 1, Comm: evil}, Destination: admin.Endpoint{Service: evil, Peer: evil, Identity: evil}}
	if line := traceLine(false, c); strings.ContainsAny(line, "\x1b\n\u202e") {
		t.Errorf("line = %q", line)
	}
	socket := serve(t, &backend{status: admin.Status{Workloads: []admin.Workload{{Service: evil, State: "waiting", Detail: evil}}}, explanation: admin.Explanation{Why: evil}})
	for _, args := range [][]string{{"status"}, {"explain", "a", "b"}} {
		if r := invoke(t, false, nil, append(args, "--socket", socket)...); strings.ContainsAny(r.stdout, "\x1b\u202e") {
			t.Errorf("%v: stdout = %q", args, r.stdout)
		}
	}
}

func TestExplainSaysWhichIntentionDecidesAndWhatIsMissing(t *testing.T) {
	x := admin.Explanation{Source: "web", Destination: "api", Why: "no intention matches", Considered: []string{"* => api (deny), a.hcl:1"},
		Instances: []admin.Instance{{ID: "api-1", Node: "node-2", Address: "10.2.0.2:80"}}, Missing: []string{"no certificate: wait"}}
	socket := serve(t, &backend{explanation: x})
	r := invoke(t, false, nil, "explain", "web", "api", "--socket", socket)
	wantStatus(t, r, exitDone)
	wantText(t, r.stdout, "web → api is denied: no intention matches", "* => api (deny), a.hcl:1", "api-1 on node-2", "unhealthy", "no certificate: wait")
	r = invoke(t, false, nil, "explain", "web", "api", "--json", "--socket", socket)
	var got admin.Explanation
	if err := json.Unmarshal([]byte(r.stdout), &got); err != nil || got.Why != x.Why {
		t.Errorf("JSON = %s (%v)", r.stdout, err)
	}
}

func TestEnrollAndUnenrollNameTheCgroupInFull(t *testing.T) {
	mount, err := redirect.CgroupMount()
	if err != nil {
		t.Skip(err)
	}
	b := &backend{}
	socket := serve(t, b)
	wantStatus(t, invoke(t, false, nil, "enroll", "demo/web", "--service", "web", "--service", "web-admin", "--mode", "permissive", "--socket", socket), exitDone)
	wantStatus(t, invoke(t, false, nil, "unenroll", "/sys/fs/cgroup/demo/../web/", "--socket", socket), exitDone)
	want := []admin.EnrollRequest{{Cgroup: mount + "/demo/web", Service: "web", Also: []string{"web-admin"}, Mode: "permissive"}, {Cgroup: "/sys/fs/cgroup/web"}}
	if !reflect.DeepEqual(b.requests, want) {
		t.Errorf("requests = %+v, want %+v", b.requests, want)
	}
}

func TestRefusedEnrolmentFailsInTheDaemonsWords(t *testing.T) {
	socket := serve(t, &backend{err: fmt.Errorf("the daemon itself runs in it: %w", admin.ErrRefused)})
	r := invoke(t, false, nil, "enroll", "/x", "--service", "web", "--socket", socket)
	wantStatus(t, r, exitFailed)
	wantText(t, r.stderr, "the daemon itself runs in it")
}

func TestRunAndCARefuseABrokenConfigurationWithFileAndLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.hcl")
	if err := os.WriteFile(path, []byte("\n\ncolour = true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"run"}, {"ca", "rotate"}} {
		r := invoke(t, false, nil, append(args, "--config", path)...)
		wantStatus(t, r, exitFailed)
		wantText(t, r.stderr, path+":3: unknown key \"colour\"")
	}
}

func TestCheckFailsOnABrokenConfigurationAndSaysWhere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.hcl")
	if err := os.WriteFile(path, []byte("colour = true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := invoke(t, false, nil, "check", "--config", path, "--json")
	wantStatus(t, r, exitFailed)
	var got struct{ Results []check.Result }
	if err := json.Unmarshal([]byte(r.stdout), &got); err != nil {
		t.Fatal(err)
	}
	for _, one := range got.Results {
		if one.Name == "configuration" && one.Verdict == check.Failed && strings.Contains(one.Text, path+":1") {
			return
		}
	}
	t.Errorf("results = %+v, want a failed configuration", got.Results)
}

func TestCheckWithoutADaemonFailsForWorkloadsOnly(t *testing.T) {
	r := invoke(t, false, nil, "check", "--workloads", "--socket", filepath.Join(t.TempDir(), "none.sock"))
	wantStatus(t, r, exitFailed)
	wantText(t, r.stdout, "failed   workloads", "is it running?")
}

func TestCleanupWhereNothingIsSaysSo(t *testing.T) {
	pins := filepath.Join(t.TempDir(), "pins")
	r := invoke(t, false, nil, "cleanup", "--pins", pins)
	wantStatus(t, r, exitDone)
	wantText(t, r.stdout, "nothing to remove at "+pins)
	wantText(t, invoke(t, false, nil, "cleanup", "--pins", pins, "--json").stdout, `"removed": []`)
}

func TestVersionNamesTheMapABI(t *testing.T) {
	wantText(t, invoke(t, false, nil, "version").stdout, "map ABI "+fmt.Sprint(redirect.MapABI))
	var got map[string]any
	if err := json.Unmarshal([]byte(invoke(t, false, nil, "version", "--json").stdout), &got); err != nil || got["map_abi"] != float64(redirect.MapABI) {
		t.Errorf("version = %v (%v)", got, err)
	}
}

// closedPipe is a stdout nobody reads.
type closedPipe struct{}

func (closedPipe) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestTraceEndsWhenNobodyReadsIt(t *testing.T) {
	socket := serve(t, &backend{live: []admin.Connection{{Event: admin.EventOpen, ID: 1}}})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	execute(ctx, &env{stdout: closedPipe{}, stderr: &bytes.Buffer{}, getenv: func(string) string { return "" }}, []string{"trace", "--socket", socket})
	if ctx.Err() != nil {
		t.Error("the trace went on")
	}
}
