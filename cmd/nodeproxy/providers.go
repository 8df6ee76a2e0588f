package main

import (
	"log/slog"
	"path/filepath"

	"nodeproxy.io/nodeproxy/config"
	"nodeproxy.io/nodeproxy/workload"
	"nodeproxy.io/nodeproxy/workload/containers"
	"nodeproxy.io/nodeproxy/workload/kubernetes"
	"nodeproxy.io/nodeproxy/workload/registered"
	"nodeproxy.io/redirect"
)

// labelProviders lists the enabled ones, in order of precedence.
func labelProviders(cfg *config.Config, log *slog.Logger, pods *kubernetes.Cluster, finder *registered.Finder) (providers []workload.Provider, err error) {
	mount, err := redirect.CgroupMount()
	if err != nil {
		return nil, err
	}
	if cfg.Systemd {
		providers = append(providers, workload.NewSystemd(mount, log))
	}
	if cfg.Xattr {
		providers = append(providers, workload.NewXattr(mount, log))
	}
	if pods != nil {
		providers = append(providers, pods)
	}
	if cfg.Containers != nil {
		providers = append(providers, newEngine(cfg, mount, log))
	}
	if finder != nil {
		providers = append(providers, finder)
	}
	return providers, nil
}

// newFinder is nil where what is registered is no workload.
func newFinder(cfg *config.Config, log *slog.Logger) (*registered.Finder, error) {
	if !cfg.Registered {
		return nil, nil
	}
	mount, err := redirect.CgroupMount()
	if err != nil {
		return nil, err
	}
	return registered.New(registered.Config{Mount: mount, Log: log}), nil
}

func newEngine(cfg *config.Config, mount string, log *slog.Logger) *containers.Engine {
	api := containers.Docker
	if cfg.Containers.Engine == "containerd" {
		api = containers.Containerd
	}
	return containers.New(containers.Config{
		API: api, Socket: cfg.Containers.Socket, Allow: cfg.Containers.Allow, Mount: mount, Log: log,
		StateFile: filepath.Join(cfg.State.Dir, "containers.json"),
	})
}

// newCluster is nil where pods are no workloads.
func newCluster(cfg *config.Config, log *slog.Logger) (*kubernetes.Cluster, error) {
	if cfg.Pods == nil {
		return nil, nil
	}
	mount, err := redirect.CgroupMount()
	if err != nil {
		return nil, err
	}
	return kubernetes.New(kubernetes.Config{
		Node: cfg.Pods.Node, Kubeconfig: cfg.Pods.Kubeconfig, Namespaces: cfg.Pods.Namespaces, Mount: mount, Log: log,
		StateFile: podsFile(cfg), DaemonSet: kubernetes.DaemonSet{Namespace: cfg.Pods.DaemonSetNamespace, Name: cfg.Pods.DaemonSet},
	})
}
