package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/nodeproxy/cni"
	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/nodeproxy/workload/kubernetes"
)

// pluginAccount is the service account of the plugin, in the daemon's namespace.
const pluginAccount = "nodeproxy-cni"

// runPlugin is what the program does that a container runtime has started. It returns the exit status.
func runPlugin() int {
	return cni.Main("nodeproxy "+version, func(ctx context.Context, access json.RawMessage, namespace, pod, uid string) (bool, error) {
		var a kubernetes.Access
		if err := json.Unmarshal(access, &a); err != nil {
			return false, fmt.Errorf("read the network configuration: %w", err)
		}
		return a.Meshed(ctx, namespace, pod, uid)
	})
}

func pluginState(stateDir string) string { return filepath.Join(stateDir, "cni.json") }

// podsFile is where the claimed pods are kept.
func podsFile(cfg *config.Config) string { return filepath.Join(cfg.State.Dir, "pods.json") }

// pluginAccess is how the plugin asks the API server: as whoever the configuration names, else by what the daemon keeps beside its
// socket, in memory.
func pluginAccess(cfg *config.Config) string {
	if cfg.Pods.Kubeconfig != "" {
		return cfg.Pods.Kubeconfig
	}
	return filepath.Join(filepath.Dir(cfg.Admin.Socket), "cni.kubeconfig")
}

// newInstaller is nil where pods are not held.
func newInstaller(cfg *config.Config, d *node) (*cni.Installer, error) {
	if cfg.Pods == nil || cfg.Pods.CNI == nil {
		return nil, nil
	}
	access, err := json.Marshal(kubernetes.Access{Kubeconfig: pluginAccess(cfg), StateFile: podsFile(cfg), Namespaces: cfg.Pods.Namespaces})
	return &cni.Installer{
		ConfDir: cfg.Pods.CNI.ConfDir, BinDir: cfg.Pods.CNI.BinDir, StateFile: pluginState(cfg.State.Dir), Log: d.log,
		Entry: cni.Entry{Socket: cfg.Admin.Socket, FailOpen: cfg.FailOpen, Mesh: slices.Sorted(maps.Keys(cfg.Pods.Namespaces)), Access: access},
	}, err
}

// keepPlugin installs the plugin, or removes it where it is not wanted any more, until ctx ends.
func (d *node) keepPlugin(ctx context.Context, cfg *config.Config) error {
	if d.plugin == nil {
		return d.removePlugin(cfg)
	}
	var access sync.WaitGroup
	if cfg.Pods.Kubeconfig == "" {
		access.Go(func() { d.pods.KeepAccess(ctx, pluginAccount, pluginAccess(cfg)) })
	}
	d.plugin.Keep(ctx)
	access.Wait()
	return nil
}

func (d *node) removePlugin(cfg *config.Config) error {
	removed, err := cni.Remove(pluginState(cfg.State.Dir))
	if len(removed) > 0 {
		d.log.Info("the CNI plugin is removed", "what", removed)
	}
	return err
}

// StartSandbox implements admin.Backend.
func (d *node) StartSandbox(s admin.Sandbox) admin.SandboxState {
	if d.pods == nil {
		return admin.SandboxState{}
	}
	cgroup, meshed, err := d.pods.Starting(s.Namespace, s.Pod, s.UID)
	if meshed && err == nil {
		var network *os.File
		if network, err = os.Open(s.Network); err == nil {
			err = d.manager.Start(cgroup, network)
		}
	}
	state := admin.SandboxState{Meshed: meshed}
	if err != nil {
		state.NotYet = err.Error()
	}
	return state
}

// StopSandbox implements admin.Backend.
func (d *node) StopSandbox(s admin.Sandbox) error {
	network, err := os.Open(s.Network)
	if errors.Is(err, os.ErrNotExist) {
		return nil // it is gone
	}
	if err != nil {
		return err
	}
	return d.manager.Stop(network)
}
