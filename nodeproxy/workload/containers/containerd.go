package containers

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/task"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"nodeproxy.io/nodeproxy/workload"
)

// nameLabel is what nerdctl calls a container.
const nameLabel = "nerdctl/name"

// containerd is a containerd without an engine above it. The IDs of its containers are "namespace/ID".
type containerd struct {
	*grpc.ClientConn
	mount string
}

// Containerd is containerd's own API.
func Containerd(cfg Config) (runtime, error) {
	conn, err := grpc.NewClient("unix://"+cfg.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	return containerd{conn, cfg.Mount}, err
}

func (c containerd) ping(ctx context.Context) error {
	_, err := c.namespaces(ctx)
	return err
}

func (c containerd) namespaces(ctx context.Context) (names []string, err error) {
	all, err := namespacesapi.NewNamespacesClient(c).List(ctx, &namespacesapi.ListNamespacesRequest{})
	for _, n := range all.GetNamespaces() {
		names = append(names, n.Name)
	}
	return names, err
}

// in has questions be about a namespace.
func in(ctx context.Context, namespace string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "containerd-namespace", namespace)
}

// topics are those of what changes a claim. The first field of each message is the container's ID.
var topics = []string{"/containers/create", "/containers/update", "/containers/delete", "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"}

func (c containerd) follow(ctx context.Context) (<-chan string, <-chan error) {
	changed, ended := make(chan string), make(chan error, 1)
	stream, err := eventsapi.NewEventsClient(c).Subscribe(ctx, &eventsapi.SubscribeRequest{})
	if err != nil {
		ended <- err
		return changed, ended
	}
	go func() {
		for {
			e, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			id, err := containerOf(e)
			if err != nil {
				ended <- err
				return
			}
			if id == "" {
				continue
			}
			select {
			case changed <- id:
			case <-ctx.Done():
				return
			}
		}
	}()
	return changed, ended
}

// containerOf is which container an event tells of, "" if it changes no claim.
func containerOf(e *types.Envelope) (string, error) {
	if !slices.Contains(topics, e.Topic) {
		return "", nil
	}
	message := e.Event.GetValue()
	number, kind, n := protowire.ConsumeTag(message)
	if n < 0 || number != 1 || kind != protowire.BytesType {
		return "", fmt.Errorf("its event %s does not say of which container", e.Topic)
	}
	id, n := protowire.ConsumeBytes(message[n:])
	if n < 0 {
		return "", fmt.Errorf("its event %s does not say of which container", e.Topic)
	}
	return e.Namespace + "/" + string(id), nil
}

func (c containerd) labelled(ctx context.Context) (ids []string, err error) {
	namespaces, err := c.namespaces(ctx)
	if err != nil {
		return nil, err
	}
	for _, namespace := range namespaces {
		all, err := containersapi.NewContainersClient(c).List(in(ctx, namespace), &containersapi.ListContainersRequest{})
		if err != nil {
			return nil, err
		}
		for _, found := range all.Containers {
			if isLabelled(found.Labels) {
				ids = append(ids, namespace+"/"+found.ID)
			}
		}
	}
	return ids, nil
}

func (c containerd) look(ctx context.Context, id string) (*seen, error) {
	namespace, own, _ := strings.Cut(id, "/")
	ctx = in(ctx, namespace)
	answer, err := containersapi.NewContainersClient(c).Get(ctx, &containersapi.GetContainerRequest{ID: own})
	switch {
	case status.Code(err) == codes.NotFound:
		return nil, nil
	case err != nil:
		return nil, err
	case !isLabelled(answer.Container.Labels):
		return new(seen), nil
	}
	s := &seen{name: id, labels: answer.Container.Labels}
	if name := s.labels[nameLabel]; name != "" {
		s.name = name
	}
	var spec specification
	if err := json.Unmarshal(answer.Container.Spec.GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("read the specification of container %s: %w", id, err)
	}
	s.cgroup = spec.cgroup(c.mount)
	s.owns = func(dir string) bool { return dir == s.cgroup }
	s.host = !slices.ContainsFunc(spec.Linux.Namespaces, func(n specifiedNamespace) bool { return n.Type == "network" })
	running, err := tasksapi.NewTasksClient(c).Get(ctx, &tasksapi.GetRequest{ContainerID: own})
	switch {
	case status.Code(err) == codes.NotFound:
	case err != nil:
		return nil, err
	case running.Process.Status != task.Status_STOPPED:
		s.pid = int(running.Process.Pid)
	}
	return s, nil
}

// specification is what matters here of the OCI runtime specification, in which a container's engine says how it is to be run.
type specification struct {
	Linux struct {
		CgroupsPath string               `json:"cgroupsPath"`
		Namespaces  []specifiedNamespace `json:"namespaces"`
	} `json:"linux"`
}

type specifiedNamespace struct {
	Type string `json:"type"`
}

// cgroup is where runc makes it, "" if that is not said: at a path, or for systemd "slice:prefix:name".
func (s specification) cgroup(mount string) string {
	parts := strings.Split(s.Linux.CgroupsPath, ":")
	switch {
	case filepath.IsAbs(s.Linux.CgroupsPath):
		return filepath.Join(mount, s.Linux.CgroupsPath)
	case len(parts) == 3:
		return filepath.Join(mount, workload.SlicePath(cmp.Or(parts[0], "system.slice")), parts[1]+"-"+parts[2]+".scope")
	}
	return ""
}
