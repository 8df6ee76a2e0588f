package containers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/tests/enginelab"
	"nodeproxy.io/tests/netlab"
)

const patience = 60 * time.Second

// labelled is a provider that follows a real engine.
type labelled struct {
	*enginelab.Engine
	t        *testing.T
	provider *Engine
	stop     func()
	claims   chan []workload.Claim
	last     []workload.Claim
}

// bootEngine starts an engine with an image "app", whose program sleeps.
func bootEngine(t *testing.T) *labelled {
	t.Helper()
	netlab.Require(t)
	if testing.Short() {
		t.Skip("slow: runs a container engine")
	}
	netlab.Lacks(t, enginelab.Missing()...)
	nodes, err := netlab.NewTwoNodes()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := nodes.Close(); err != nil {
			t.Error(err)
		}
		if leaks := nodes.Leaks(); len(leaks) > 0 {
			t.Errorf("left behind: %v", leaks)
		}
	})
	l := &labelled{t: t, claims: make(chan []workload.Claim, 1<<12)}
	l.Engine, err = enginelab.New(nodes.Lab, nodes.Nodes[0])
	l.must(err)
	l.must(l.Start(l.ctx()))
	l.must(l.Import(l.ctx(), "app", buildApp(t, nodes.Dir())))
	return l
}

// buildApp builds the test application, static, into a directory.
func buildApp(t *testing.T, dir string) string {
	t.Helper()
	program := filepath.Join(dir, "app")
	build := exec.Command("go", "build", "-o", program, "nodeproxy.io/tests/e2e/app")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

func (l *labelled) ctx() context.Context {
	ctx, cancel := context.WithTimeoutCause(l.t.Context(), patience, fmt.Errorf("not within %s", patience))
	l.t.Cleanup(cancel)
	return ctx
}

func (l *labelled) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// follow runs the provider until stop, or the end of the test.
func (l *labelled) follow(allow ...string) {
	l.t.Helper()
	mount, err := netlab.Cgroup2()
	l.must(err)
	l.provider = New(Config{API: Docker, Socket: l.Socket, Allow: allow, Mount: mount, StateFile: filepath.Join(filepath.Dir(l.Socket), "containers.json"), Log: slog.New(slog.DiscardHandler)})
	l.run()
}

func (l *labelled) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.provider.Run(ctx, func(c []workload.Claim) { l.claims <- c }) }()
	l.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			l.t.Error(err)
		}
	})
	l.t.Cleanup(l.stop)
}

// container runs a container that listens on port 80 and returns its ID.
func (l *labelled) container(name string, args ...string) string {
	l.t.Helper()
	id, err := l.Run(l.ctx(), append(append([]string{"--name", name}, args...), "app", "/app", "serve", ":80")...)
	l.must(err)
	return id
}

func (l *labelled) docker(args ...string) {
	l.t.Helper()
	_, err := l.Docker(l.ctx(), args...)
	l.must(err)
}

// await waits until exactly these are claimed, as "name=service@cgroup's ID" or "name!why", sorted.
func (l *labelled) await(want ...string) {
	l.t.Helper()
	slices.Sort(want)
	for deadline := time.After(patience); ; {
		select {
		case l.last = <-l.claims:
		case <-deadline:
			l.t.Fatalf("claimed %q, want %q; problem: %v", l.told(), want, l.provider.Problem())
		}
		if slices.Equal(l.told(), want) {
			return
		}
	}
}

func (l *labelled) told() (all []string) {
	for _, c := range l.last {
		text := strings.TrimPrefix(c.Name, "container ")
		if why := c.Denied + c.Invalid; why != "" {
			text += "!" + why
		} else {
			text += "=" + c.Service + "@" + filepath.Base(c.Cgroup)
		}
		all = append(all, text)
	}
	slices.Sort(all)
	return all
}

func (l *labelled) awaitProblem(ok func(error) bool) {
	l.t.Helper()
	for deadline := time.Now().Add(patience); !ok(l.provider.Problem()); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			l.t.Fatalf("the provider says %v", l.provider.Problem())
		}
	}
}

const web = "--label=nodeproxy.io/service=web"

func TestContainersOfARealEngineAreClaimed(t *testing.T) {
	l := bootEngine(t)
	l.container("plain")
	early := l.container("early", web)
	l.follow("web", "web-admin")
	l.await("early=web@" + early)

	late := l.container("late", "--label=nodeproxy.io/service=web,web-admin", "--label=nodeproxy.io/mesh=observe", "--publish=8080:80")
	l.await("early=web@"+early, "late=web@"+late)
	for _, c := range l.last {
		if pids, err := os.ReadFile(filepath.Join(c.Cgroup, "cgroup.procs")); err != nil || len(pids) == 0 {
			t.Errorf("nothing runs in %s: %q, %v", c.Cgroup, pids, err)
		}
		if c.Name == "container late" && (!slices.Equal(c.Also, []string{"web-admin"}) || c.Mesh != workload.Observe || len(c.Mapped) != 2 || c.Mapped[0].Node.String() != "0.0.0.0:8080" || c.Mapped[0].To.Port() != 80) {
			t.Errorf("claimed %+v", c)
		}
	}
	l.docker("rename", "early", "first")
	l.await("first=web@"+early, "late=web@"+late)
	l.docker("rm", "--force", "late")
	l.await("first=web@" + early)

	l.docker("stop", "--time=0", "first") // it is awaited where it was
	marker := l.container("marker", web)
	l.await("first=web@"+early, "marker=web@"+marker)
	if _, err := os.Stat(l.Cgroup(early)); err == nil {
		t.Error("a stopped container has a cgroup, so this shows nothing")
	}
	l.docker("create", "--name", "new", web, "app", "/app", "serve", ":80")
	id, err := l.Docker(l.ctx(), "inspect", "--format", "{{.Id}}", "new")
	l.must(err)
	l.await("first=web@"+early, "marker=web@"+marker, "new=web@"+id) // before it has run once
	l.docker("rm", "--force", "new", "first", "marker")
	l.await()
}

func TestAContainerIsOnlyWhatTheConfigurationAllows(t *testing.T) {
	l := bootEngine(t)
	l.follow("web")
	l.container("thief", "--label=nodeproxy.io/service=bank")
	l.container("second", "--label=nodeproxy.io/service=web,bank")
	l.container("typo", web, "--label=nodeproxy.io/mode=lax")
	l.container("pod", web, "--label=io.kubernetes.pod.uid=1")
	host := l.container("host", web, "--network=host", "--expose=7000", "--expose=53/udp", "--label=nodeproxy.io/ports=9000")
	why := `!it asks to be service "bank", which containers may not be: if they may, add it to workloads.containers.allow in nodeproxy's configuration`
	l.await("thief"+why, "second"+why, `typo!label mode is "lax": it must be strict or permissive`, "host=web@"+host)
	for _, c := range l.last {
		if c.Name == "container host" && !slices.Equal(c.Ports, []uint16{7000, 9000}) {
			t.Errorf("ports %v of a container in the node's namespace are guarded", c.Ports)
		}
	}
}

func TestClaimsOutliveTheEngine(t *testing.T) {
	l := bootEngine(t)
	l.follow("web")
	first := l.container("first", web)
	l.await("first=web@" + first)

	l.must(l.Stop(l.ctx()))
	l.awaitProblem(func(err error) bool {
		return err != nil && strings.Contains(err.Error(), l.Socket) && strings.Contains(err.Error(), "see that the engine runs")
	})
	if len(l.claims) > 0 {
		t.Errorf("claimed without an engine: %v", <-l.claims)
	}
	l.must(l.Start(l.ctx()))
	l.awaitProblem(func(err error) bool { return err == nil })
	second := l.container("second", web)
	l.await("first=web@"+first, "second=web@"+second)

	// A daemon that starts while the engine is away knows the containers, as far as they may still be what they were.
	l.docker("stop", "--time=0", "second")
	l.must(l.Stop(l.ctx()))
	l.awaitProblem(func(err error) bool { return err != nil })
	l.stop()
	l.follow("other")
	l.awaitProblem(func(err error) bool { return err != nil })
	l.stop()
	if len(l.claims) > 0 {
		t.Errorf("claimed what is not allowed any more: %v", <-l.claims)
	}
	l.follow("web")
	l.await("first=web@"+first, "second=web@"+second)
	l.must(l.Start(l.ctx()))
	l.awaitProblem(func(err error) bool { return err == nil })

	l.must(l.Freeze())
	l.awaitProblem(func(err error) bool { return err != nil && strings.Contains(err.Error(), "it has not answered") })
	l.must(l.Thaw())
	l.docker("rm", "--force", "second")
	l.await("first=web@" + first)
}

func TestChurnOfContainersIsFollowedToTheEnd(t *testing.T) {
	l := bootEngine(t)
	l.follow("web")
	for i := range 5 {
		name := fmt.Sprintf("job-%d", i)
		l.container(name, web)
		l.container(name + "-plain")
		l.docker("rm", "--force", name, name+"-plain")
	}
	last := l.container("last", web)
	l.await("last=web@" + last)
}

func TestAMissingEngineIsAProblemAndNoClaim(t *testing.T) {
	l := &labelled{t: t, claims: make(chan []workload.Claim, 1)}
	l.provider = New(Config{API: Docker, Socket: filepath.Join(t.TempDir(), "none.sock"), Log: slog.New(slog.DiscardHandler)})
	l.run()
	l.awaitProblem(func(err error) bool {
		return err != nil && strings.Contains(err.Error(), "workloads.containers.socket")
	})
	if err := l.provider.Check(t.Context()); err == nil || len(l.claims) > 0 {
		t.Errorf("%v, %d claims", err, len(l.claims))
	}
}

// A real engine cannot be made to name the process of another, which is what happens when a number is used again.
func TestAProcessThatIsNotTheContainersIsNeverTaken(t *testing.T) {
	lab := netlab.ForTest(t)
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	mine, err := lab.Cgroup().Child("docker-" + id + ".scope")
	theirs, errTheirs := lab.Cgroup().Child("other")
	if err := errors.Join(err, errTheirs); err != nil {
		t.Fatal(err)
	}
	start := func(in *netlab.Cgroup) *netlab.Process {
		p, err := lab.Start(netlab.Command{Path: "sleep", Args: []string{"infinity"}, Cgroup: in})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	stranger, own := start(theirs), start(mine)
	pid := stranger.PID()
	l := &labelled{t: t, claims: make(chan []workload.Claim, 1<<10)}
	socket := filepath.Join(lab.Dir(), "engine.sock")
	ln, err := net.Listen("unix", socket)
	l.must(err)
	answer := make(chan int, 1)
	answer <- pid
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		w.Header().Set("Content-Type", "application/json")
		switch {
		case strings.HasSuffix(r.URL.Path, "/events"):
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		case strings.HasSuffix(r.URL.Path, "/containers/json"):
			fmt.Fprintf(w, `[{"Id": %q, "Labels": {"nodeproxy.io/service": "web"}}]`, id)
		case strings.HasSuffix(r.URL.Path, id+"/json"):
			pid := <-answer
			answer <- pid
			fmt.Fprintf(w, `{"Id": %q, "Name": "/web", "State": {"Running": true, "Pid": %d}, "HostConfig": {}, "Config": {"Labels": {"nodeproxy.io/service": "web"}}}`, id, pid)
		}
	})}
	go server.Serve(ln)
	t.Cleanup(func() { server.Close() })
	mount, err := netlab.Cgroup2()
	l.must(err)
	l.provider = New(Config{API: Docker, Socket: socket, Allow: []string{"web"}, Mount: mount, Log: slog.New(slog.DiscardHandler)})
	l.run()
	l.await()
	l.awaitProblem(func(err error) bool { return err != nil && strings.Contains(err.Error(), theirs.Path()) })
	<-answer
	answer <- own.PID()
	l.await("web=web@" + filepath.Base(mine.Path()))
	l.awaitProblem(func(err error) bool { return err == nil })
}
