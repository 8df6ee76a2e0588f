package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"

	"nodeproxy.io/nodeproxy/admin"
)

// daemon is the admin API with answers of its own.
type daemon struct {
	admin.Backend
	meshed  bool
	asked   atomic.Int64
	ready   int64 // after so many questions
	stopped atomic.Int64
}

func (d *daemon) StartSandbox(s admin.Sandbox) admin.SandboxState {
	if d.asked.Add(1) < d.ready {
		return admin.SandboxState{Meshed: d.meshed, NotYet: s.Pod + " has no certificate"}
	}
	return admin.SandboxState{Meshed: d.meshed}
}

func (d *daemon) StopSandbox(admin.Sandbox) error {
	d.stopped.Add(1)
	return nil
}

// runtime is one that calls the plugin for a pod.
type runtime struct {
	t     *testing.T
	entry Entry
	mesh  Mesh
	out   bytes.Buffer
}

func newRuntime(t *testing.T, meshed bool, unknown error) *runtime {
	socket := filepath.Join(t.TempDir(), "admin.sock")
	return &runtime{t: t, entry: Entry{Socket: socket, Mesh: []string{"shop"}}, mesh: func(context.Context, json.RawMessage, string, string, string) (bool, error) {
		return meshed, unknown
	}}
}

func (r *runtime) serve(d *daemon) {
	r.t.Helper()
	server, err := admin.Listen(admin.ServerConfig{Socket: r.entry.Socket, Backend: d, Hub: admin.NewHub(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(ctx) })
	r.t.Cleanup(func() { stop(); serving.Wait() })
}

func (r *runtime) plugin() *plugin {
	return &plugin{r.mesh, &r.out, 2 * time.Second, 200 * time.Millisecond}
}

func (r *runtime) args(namespace string) *skel.CmdArgs {
	entry, err := json.Marshal(r.entry)
	if err != nil {
		r.t.Fatal(err)
	}
	conf := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "pods", "type": "nodeproxy", "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/24"}]}, %s`, entry[1:])
	return &skel.CmdArgs{Netns: "/proc/self/ns/net", StdinData: []byte(conf), Args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=" + namespace + ";K8S_POD_NAME=web-1;K8S_POD_UID=a-b"}
}

func (r *runtime) starts(namespace string) {
	r.t.Helper()
	if err := r.plugin().add(r.args(namespace)); err != nil {
		r.t.Errorf("a pod of %s does not start: %v", namespace, err)
	} else if !strings.Contains(r.out.String(), "10.0.0.2/24") {
		r.t.Errorf("the result of the plugin before is not passed on: %s", r.out.String())
	}
}

func (r *runtime) held(want string) {
	r.t.Helper()
	if err := r.plugin().add(r.args("shop")); err == nil || !strings.Contains(err.Error(), want) {
		r.t.Errorf("it says %v, want %q", err, want)
	}
}

func TestAPodIsHeldUntilItIsProtected(t *testing.T) {
	r, d := newRuntime(t, true, nil), &daemon{meshed: true, ready: 4}
	r.serve(d)
	r.starts("shop")
	if n := d.asked.Load(); n != 4 {
		t.Errorf("the daemon was asked %d times", n)
	}
	d.ready = 1 << 40
	r.held("pod shop/web-1 does not start: nodeproxy does not protect it yet: web-1 has no certificate")
	if err := r.plugin().check(r.args("shop")); err == nil {
		t.Error("CHECK says that it is protected")
	}
	d.ready = 0
	if err := r.plugin().check(r.args("shop")); err != nil {
		t.Errorf("CHECK says %v", err)
	}
	r.entry.FailOpen, d.ready = true, 1<<40
	r.starts("shop")
}

func TestWithoutADaemonPodsStartUnlessTheyAreToBeInTheMesh(t *testing.T) {
	newRuntime(t, false, nil).starts("shop")
	newRuntime(t, true, nil).starts("kube-system") // its pods can be nothing
	newRuntime(t, true, nil).held("it is to be in the mesh, and no nodeproxy runs on this node: see that")
	newRuntime(t, false, errors.New("no route")).held("no route")
	newRuntime(t, false, errors.New("no route")).starts("kube-system")
	open := newRuntime(t, true, nil)
	open.entry.FailOpen = true
	open.starts("shop")
}

func TestWhoIsNotToBeInTheMeshIsNotHeld(t *testing.T) {
	r := newRuntime(t, true, errors.New("nobody is asked where a daemon answers"))
	r.serve(&daemon{ready: 1 << 40})
	r.starts("shop")
}

func TestTheEndOfAPodIsToldAndNeverFails(t *testing.T) {
	r, d := newRuntime(t, true, nil), &daemon{}
	if err := r.plugin().del(r.args("shop")); err != nil {
		t.Errorf("without a daemon: %v", err)
	}
	r.serve(d)
	gone := r.args("shop")
	gone.Netns = ""
	for _, args := range []*skel.CmdArgs{r.args("shop"), gone, {StdinData: []byte("{"), Netns: "/proc/self/ns/net"}} {
		if err := r.plugin().del(args); err != nil {
			t.Error(err)
		}
	}
	if n := d.stopped.Load(); n != 1 {
		t.Errorf("it was told %d times, want once", n)
	}
}

func TestThePluginWantsToBeChained(t *testing.T) {
	r := newRuntime(t, false, nil)
	args := r.args("shop")
	args.StdinData = []byte(`{"cniVersion": "1.0.0", "name": "pods", "type": "nodeproxy", "mesh": []}`)
	if err := r.plugin().add(args); err == nil || !strings.Contains(err.Error(), "must not be the first") {
		t.Errorf("it says %v", err)
	}
}
