package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// retry is when an API server that does not answer is asked again: all nodes do.
var retry = wait.Backoff{Duration: 200 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 10, Cap: 10 * time.Second}

// objects are those of one kind that the API server has, as far as it has told. Whoever changes them tells the Cluster.
type objects struct {
	cache.Store
	name      string
	lister    cache.ListerWithContext
	reflector *cache.Reflector
	read      atomic.Bool // all were, once
	changed   func()
}

// follow keeps the objects of one kind, once the Cluster runs, and has it wait for them.
func (c *Cluster) follow(client cache.Getter, name string, of runtime.Object, which fields.Selector) *objects {
	o := c.objects(client, name, metav1.NamespaceAll, of, which)
	c.kinds = append(c.kinds, o)
	return o
}

func (c *Cluster) objects(client cache.Getter, name, namespace string, of runtime.Object, which fields.Selector) *objects {
	all := cache.NewListWatchFromClient(client, name, namespace, which)
	o := &objects{Store: cache.NewStore(cache.MetaNamespaceKeyFunc), name: name, lister: all, changed: c.tell}
	noted := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			list, err := all.ListWithContext(ctx, options)
			return list, c.note(ctx, name, err)
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			events, err := all.WatchWithContext(ctx, options)
			return events, c.note(ctx, name, err)
		},
	}
	o.reflector = cache.NewReflectorWithOptions(noted, of, o, cache.ReflectorOptions{
		Name: name, Backoff: &retry,
		Logger: new(logr.Discard()),
	})
	return o
}

// follow runs until ctx ends.
func (o *objects) follow(ctx context.Context) {
	o.reflector.RunWithContext(logr.NewContext(ctx, logr.Discard())) // what is wrong is said by Problem
}

// Add implements cache.ReflectorStore, as the next three do.
func (o *objects) Add(object any) error {
	defer o.changed()
	return o.Store.Add(slim(object))
}

// Update replaces an object.
func (o *objects) Update(object any) error {
	defer o.changed()
	return o.Store.Update(slim(object))
}

// Delete forgets an object.
func (o *objects) Delete(object any) error {
	defer o.changed()
	return o.Store.Delete(object)
}

// Replace takes all that there are.
func (o *objects) Replace(all []any, version string) error {
	defer o.changed()
	defer o.read.Store(true)
	for i := range all {
		all[i] = slim(all[i])
	}
	return o.Store.Replace(all, version)
}

// slim takes from an object what nobody here reads.
func slim(object any) any {
	if meta, ok := object.(metav1.Object); ok {
		meta.SetManagedFields(nil)
	}
	return object
}

// list returns what a store has.
func list[T any](store *objects) []*T {
	var all []*T
	for _, object := range store.List() {
		if t, ok := object.(*T); ok {
			all = append(all, t)
		}
	}
	return all
}

// failing is a transport whose timeouts are errors like any other: a watch that times out is tried ten times and is an empty one then,
// without an error (rest.Request.Watch), so that nobody would hear of a server that hangs.
type failing struct{ http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (f failing) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := f.RoundTripper.RoundTrip(req)
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() && req.Context().Err() == nil {
		err = errors.New(err.Error())
	}
	return resp, err
}

// newClient knows the few types that are needed, where the usual client has all there are.
func newClient(access *rest.Config, path string, version schema.GroupVersion) (*rest.RESTClient, error) {
	scheme := runtime.NewScheme()
	if err := errors.Join(appsv1.AddToScheme(scheme), authenticationv1.AddToScheme(scheme), corev1.AddToScheme(scheme), discoveryv1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	access = rest.CopyConfig(access)
	access.APIPath, access.GroupVersion, access.UserAgent = path, &version, "nodeproxy"
	access.ContentType, access.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
	access.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	access.Wrap(func(inner http.RoundTripper) http.RoundTripper { return failing{inner} })
	client, err := rest.RESTClientFor(access)
	if err != nil {
		return nil, fmt.Errorf("find the Kubernetes API server: %w", err)
	}
	return client, nil
}
