package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"nodeproxy.io/nodeproxy/workload"
)

// Access is what a program of the node needs to learn, without a daemon, whether a pod is to be in the mesh.
type Access struct {
	Kubeconfig string              `json:"kubeconfig"` // of who may get pods and namespaces
	StateFile  string              `json:"pods"`       // what the last daemon has claimed
	Namespaces map[string][]string `json:"namespaces"` // the services that pods of each may be
}

// Meshed says whether a pod is to be in the mesh. While the API server does not answer, what the last daemon knew counts; an error
// is that it knew nothing.
func (a Access) Meshed(ctx context.Context, namespace, name, uid string) (bool, error) {
	if !mayBe(a.Namespaces, namespace, uid) {
		return false, nil
	}
	meshed, err := a.ask(ctx, namespace, name, types.UID(uid))
	if err != nil && a.remembered(types.UID(uid)) {
		return true, nil
	}
	return meshed, err
}

func (a Access) ask(ctx context.Context, namespace, name string, uid types.UID) (bool, error) {
	access, err := clientcmd.BuildConfigFromFlags("", a.Kubeconfig)
	if err != nil {
		return false, fmt.Errorf("find the Kubernetes API server by %s: %w", a.Kubeconfig, err)
	}
	client, err := newClient(access, "/api", corev1.SchemeGroupVersion)
	if err != nil {
		return false, err
	}
	p, in := new(corev1.Pod), new(corev1.Namespace)
	err = client.Get().Namespace(namespace).Resource("pods").Name(name).Do(ctx).Into(p)
	if err == nil && p.UID != uid {
		err = errors.New("there is another one of that name")
	}
	if err == nil {
		err = client.Get().Resource("namespaces").Name(namespace).Do(ctx).Into(in)
	}
	if err != nil {
		return false, fmt.Errorf("ask the Kubernetes API server for pod %s/%s: %w", namespace, name, err)
	}
	found, asks := judge(p, in, a.Namespaces)
	return asks && found.guarded(), nil
}

// remembered says whether the last daemon had the pod in the mesh.
func (a Access) remembered(uid types.UID) bool {
	text, err := os.ReadFile(a.StateFile)
	if err != nil {
		return false
	}
	var all []remembered
	return json.Unmarshal(text, &all) == nil && slices.ContainsFunc(all, func(r remembered) bool {
		return r.UID == uid && slices.ContainsFunc(r.Claims, func(c workload.Claim) bool { return c.Mesh == workload.Enabled })
	})
}

const (
	tokenLife = 24 * time.Hour // of which the API server may grant less
	tokenWait = 10 * time.Second
)

// KeepAccess keeps a kubeconfig of a service account of the daemon's namespace at a path until ctx ends. Its token is bound to this node, and
// to no pod: it is good for as long as it lasts after the daemon has ended.
func (c *Cluster) KeepAccess(ctx context.Context, account, path string) {
	var last error
	for {
		wait, err := c.writeAccess(ctx, account, path)
		if err != nil {
			wait = tokenWait
		}
		if err != nil && last == nil && ctx.Err() == nil {
			c.cfg.Log.Warn("while no daemon runs, pods of the mesh's namespaces will not start: who asks whether they are labelled has no token", "error", err)
		}
		last = err
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// writeAccess returns when the token is to be replaced.
func (c *Cluster) writeAccess(ctx context.Context, account, path string) (time.Duration, error) {
	token := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		ExpirationSeconds: new(int64(tokenLife / time.Second)),
		BoundObjectRef:    &authenticationv1.BoundObjectReference{Kind: "Node", APIVersion: "v1", Name: c.cfg.Node},
	}}
	err := c.coreAPI.Post().Namespace(c.cfg.DaemonSet.Namespace).Resource("serviceaccounts").Name(account).SubResource("token").Body(token).Do(ctx).Into(token)
	if err != nil {
		return 0, fmt.Errorf("request a token of service account %s/%s: %w", c.cfg.DaemonSet.Namespace, account, err)
	}
	text, err := kubeconfig(c.server, token.Status.Token)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o755)
	}
	if err == nil {
		err = os.WriteFile(path+".new", text, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	return max(time.Until(token.Status.ExpirationTimestamp.Time)/2, tokenWait), err
}

func kubeconfig(access *rest.Config, token string) ([]byte, error) {
	access = rest.CopyConfig(access)
	if err := rest.LoadTLSFiles(access); err != nil {
		return nil, err
	}
	const name = "nodeproxy"
	config := clientcmdapi.NewConfig()
	config.Clusters[name] = &clientcmdapi.Cluster{Server: access.Host, CertificateAuthorityData: access.CAData, InsecureSkipTLSVerify: access.Insecure, TLSServerName: access.ServerName}
	config.AuthInfos[name] = &clientcmdapi.AuthInfo{Token: token}
	config.Contexts[name] = &clientcmdapi.Context{Cluster: name, AuthInfo: name}
	config.CurrentContext = name
	return clientcmd.Write(*config)
}
