// Package cni is nodeproxy as a chained CNI plugin: it holds the start of a pod that is to be in the mesh until the node's daemon
// protects it. It changes nothing in a network namespace.
//
// It ends within its deadlines whatever the daemon does. A pod of a namespace for which the configuration has no services is let through without
// asking anybody.
package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"nodeproxy.io/nodeproxy/admin"
)

const (
	pluginName = "nodeproxy" // of the program, and the type of its entry

	protectedWithin = 30 * time.Second // of a daemon that answers
	absentFor       = 5 * time.Second  // a restart takes less
	askFor          = 2 * time.Second  // one question
	askEvery        = 50 * time.Millisecond
)

// Mesh says, without a daemon, whether a pod is to be in the mesh. An error is that it is not known.
type Mesh func(ctx context.Context, access json.RawMessage, namespace, pod, uid string) (bool, error)

// Entry is what a network configuration has of this plugin.
type Entry struct {
	Socket   string          `json:"socket"` // the daemon's admin socket
	FailOpen bool            `json:"failOpen,omitempty"`
	Mesh     []string        `json:"mesh"`   // the namespaces of which pods may be in the mesh
	Access   json.RawMessage `json:"access"` // for Mesh
}

// Called says whether this process was started as a CNI plugin.
func Called(args []string, getenv func(string) string) bool {
	return len(args) == 1 && getenv("CNI_COMMAND") != ""
}

// Main does what the runtime asks for, by the protocol of CNI, and returns the exit status.
func Main(about string, mesh Mesh) int {
	p := plugin{mesh, os.Stdout, protectedWithin, absentFor}
	nothing := func(*skel.CmdArgs) error { return nil }
	err := skel.PluginMainFuncsWithError(skel.CNIFuncs{
		Add: p.add, Check: p.check, Del: p.del,
		GC:     nothing, // there is nothing of it to collect
		Status: nothing, // pods that are not in the mesh start without a daemon
	}, version.All, about)
	if err == nil {
		return 0
	}
	_ = err.Print() // nobody is left to tell
	return 1
}

type plugin struct {
	mesh   Mesh
	out    io.Writer
	within time.Duration // which a daemon that answers has to protect a pod
	absent time.Duration // which a daemon has to be there
}

// configuration is what the runtime gives the plugin on its standard input.
type configuration struct {
	types.PluginConf
	Entry
}

// podArgs are what runtimes of Kubernetes say of the pod, by CNI_ARGS.
type podArgs struct {
	types.CommonArgs
	//revive:disable-next-line:var-naming // the names are the runtimes'
	K8S_POD_NAMESPACE, K8S_POD_NAME, K8S_POD_UID types.UnmarshallableString
}

// request is one for a pod that may be in the mesh.
type request struct {
	*configuration
	admin.Sandbox
	network *os.File // nil: it is gone
}

// read is nil if the pod cannot be in the mesh.
func read(args *skel.CmdArgs) (*configuration, *request, error) {
	conf := new(configuration)
	if err := json.Unmarshal(args.StdinData, conf); err != nil {
		return nil, nil, fmt.Errorf("read the network configuration: %w", err)
	}
	if err := version.ParsePrevResult(&conf.PluginConf); err != nil {
		return nil, nil, fmt.Errorf("read the result of the plugin before: %w", err)
	}
	var of podArgs
	if err := types.LoadArgs(args.Args, &of); err != nil {
		return nil, nil, fmt.Errorf("read CNI_ARGS: %w", err)
	}
	r := &request{configuration: conf, Sandbox: admin.Sandbox{Namespace: string(of.K8S_POD_NAMESPACE), Pod: string(of.K8S_POD_NAME), UID: string(of.K8S_POD_UID)}}
	for _, namespace := range conf.Mesh {
		if namespace != r.Namespace {
			continue
		}
		if r.UID == "" {
			return conf, nil, errors.New("the runtime does not say the pod's UID (K8S_POD_UID of CNI_ARGS): use containerd 1.6 or later")
		}
		if network, err := os.Open(args.Netns); err == nil {
			r.network = network
			r.Network = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), network.Fd()) // the daemon may have no such path
		}
		return conf, r, nil
	}
	return conf, nil, nil
}

func (p *plugin) add(args *skel.CmdArgs) error {
	conf, r, err := read(args)
	if err == nil && conf.PrevResult == nil {
		err = errors.New("there is no result of a plugin before it: it must not be the first of its list")
	}
	if err != nil {
		return err
	}
	if r != nil {
		if err := p.protect(r); err != nil {
			return err
		}
	}
	result, err := conf.PrevResult.GetAsVersion(conf.CNIVersion)
	if err != nil {
		return err
	}
	return result.PrintTo(p.out)
}

func (p *plugin) check(args *skel.CmdArgs) error {
	_, r, err := read(args)
	if err != nil || r == nil {
		return err
	}
	return (&plugin{p.mesh, p.out, 0, 0}).protect(r)
}

// del tells the daemon that listens there. It needs none: what it keeps goes with the daemon.
func (p *plugin) del(args *skel.CmdArgs) error {
	_, r, err := read(args)
	if err != nil || r == nil || r.network == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), askFor)
	defer cancel()
	_ = admin.NewClient(r.Socket).StopSandbox(ctx, r.Sandbox)
	return nil
}

// protect returns when the pod may start.
func (p *plugin) protect(r *request) error {
	if r.network == nil {
		return types.NewError(types.ErrInvalidNetNS, "open the network namespace", "it is not there")
	}
	daemon := admin.NewClient(r.Socket)
	began, meshed := time.Now(), false
	for {
		state, err := ask(daemon, r.Sandbox)
		var why error
		limit := p.within
		switch {
		case err == nil && (!state.Meshed || state.NotYet == ""):
			return nil
		case err == nil:
			why = fmt.Errorf("nodeproxy does not protect it yet: %s", state.NotYet)
		case r.FailOpen:
			return nil
		default:
			limit = p.absent
			if !meshed {
				if meshed, why = p.asks(r); why == nil && !meshed {
					return nil
				}
			}
			why = refusal(err, why)
		}
		if time.Since(began) < limit {
			time.Sleep(askEvery)
			continue
		}
		if r.FailOpen {
			return nil
		}
		return types.NewError(types.ErrTryAgainLater, fmt.Sprintf("pod %s/%s does not start: %v", r.Namespace, r.Pod, why),
			"it is tried again by itself; on_failure = \"open\" would start it unprotected, the label nodeproxy.io/mesh=disabled outside the mesh")
	}
}

func ask(daemon *admin.Client, s admin.Sandbox) (*admin.SandboxState, error) {
	ctx, cancel := context.WithTimeout(context.Background(), askFor)
	defer cancel()
	return daemon.StartSandbox(ctx, s)
}

// asks says whether the pod is to be in the mesh, where no daemon does.
func (p *plugin) asks(r *request) (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), askFor)
	defer cancel()
	return p.mesh(ctx, r.Access, r.Namespace, r.Pod, r.UID)
}

func refusal(daemon, mesh error) error {
	if mesh != nil {
		return fmt.Errorf("whether it is to be in the mesh is not known, because no nodeproxy runs on this node and the API server does not say: see that the pod of DaemonSet nodeproxy on this node runs (%w; %w)", daemon, mesh)
	}
	return fmt.Errorf("it is to be in the mesh, and no nodeproxy runs on this node: see that the pod of DaemonSet nodeproxy on this node runs (%w)", daemon)
}
