package containers

import (
	"context"
	"maps"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	containertypes "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"

	"nodeproxy.io/nodeproxy/workload"
)

// docker is an engine that speaks Docker's API.
type docker struct{ *client.Client }

// Docker is the API of Docker, and of podman.
func Docker(cfg Config) (runtime, error) {
	transport := &http.Transport{ResponseHeaderTimeout: 2 * answers} // for the stream of events, which nothing else bounds
	c, err := client.New(client.WithHTTPClient(&http.Client{Transport: transport, CheckRedirect: client.CheckRedirect}), client.WithHost("unix://"+cfg.Socket), client.WithScheme("http"))
	return docker{c}, err
}

func (d docker) ping(ctx context.Context) error {
	_, err := d.Ping(ctx, client.PingOptions{})
	return err
}

func (d docker) follow(ctx context.Context) (<-chan string, <-chan error) {
	told := d.Events(ctx, client.EventsListOptions{Filters: make(client.Filters).
		Add("type", string(events.ContainerEventType), string(events.NetworkEventType)).
		Add("event", "create", "start", "die", "destroy", "remove", "rename", "connect", "disconnect")}) // podman says remove
	changed := make(chan string)
	go func() {
		for {
			select {
			case m := <-told.Messages:
				id := m.Actor.ID
				if m.Type == events.NetworkEventType {
					id = m.Actor.Attributes["container"]
				}
				if id == "" {
					continue
				}
				select {
				case changed <- id:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return changed, told.Err
}

func (d docker) labelled(ctx context.Context) (ids []string, err error) {
	all, err := d.ContainerList(ctx, client.ContainerListOptions{All: true})
	for _, s := range all.Items {
		if isLabelled(s.Labels) {
			ids = append(ids, s.ID)
		}
	}
	return ids, err
}

func (d docker) look(ctx context.Context, id string) (*seen, error) {
	all, err := d.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	found := all.Container
	switch {
	case errdefs.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, err
	case found.Config == nil || found.State == nil || found.HostConfig == nil:
		return new(seen), nil
	}
	s := &seen{
		name: strings.TrimPrefix(found.Name, "/"), labels: found.Config.Labels,
		owns:   func(dir string) bool { return strings.Contains(filepath.Base(dir), found.ID) },
		parent: found.HostConfig.CgroupParent,
		host:   found.HostConfig.NetworkMode.IsHost(), exposed: exposed(found.Config.ExposedPorts),
	}
	if found.State.Running {
		s.pid = found.State.Pid
	}
	if found.NetworkSettings != nil {
		s.mapped = published(found.NetworkSettings)
	}
	return s, nil
}

func exposed(ports network.PortSet) (all []uint16) {
	for port := range ports {
		if port.Proto() == network.TCP {
			all = append(all, port.Num())
		}
	}
	return all
}

// published lists the ports of the node that lead to a container.
func published(s *containertypes.NetworkSettings) (all []workload.Mapping) {
	var own4, own6 netip.Addr
	for _, name := range slices.Sorted(maps.Keys(s.Networks)) {
		if at := s.Networks[name]; at != nil {
			own4, own6 = firstValid(own4, at.IPAddress), firstValid(own6, at.GlobalIPv6Address)
		}
	}
	for port, bindings := range s.Ports {
		for _, b := range bindings {
			number, err := strconv.ParseUint(b.HostPort, 10, 16)
			if err != nil || number == 0 || port.Proto() != network.TCP {
				continue
			}
			for _, node := range hostAddresses(b.HostIP) {
				to := firstValid(own4, own6)
				if node.Is6() {
					to = firstValid(own6, own4) // without an address of that family there is a proxy in between
				}
				if to.IsValid() {
					all = append(all, workload.Mapping{Node: netip.AddrPortFrom(node, uint16(number)), To: netip.AddrPortFrom(to, port.Num())})
				}
			}
		}
	}
	slices.SortFunc(all, func(a, b workload.Mapping) int { return a.Node.Compare(b.Node) })
	return slices.Compact(all)
}

// hostAddresses are those at which a port is published. Podman says nothing of one that is on all.
func hostAddresses(ip netip.Addr) []netip.Addr {
	if !ip.IsValid() {
		return []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	}
	return []netip.Addr{ip.Unmap()}
}

func firstValid(a, b netip.Addr) netip.Addr {
	if a.IsValid() {
		return a
	}
	return b
}
