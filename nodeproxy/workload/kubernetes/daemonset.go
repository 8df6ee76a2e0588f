package kubernetes

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/rest"
)

// DaemonSet names the one of which this process is a pod.
type DaemonSet struct{ Namespace, Name string }

// daemonSets is the API server's name of what ownDaemonSet follows.
const daemonSets = "daemonsets"

// ownDaemonSet is what the API server says of it.
type ownDaemonSet struct {
	DaemonSet
	client *rest.RESTClient
	told   *objects // it alone, or nothing
}

func (c *Cluster) followDaemonSet(access *rest.Config) error {
	if c.cfg.DaemonSet.Name == "" {
		return nil
	}
	client, err := newClient(access, "/apis", appsv1.SchemeGroupVersion)
	if err != nil {
		return err
	}
	which := fields.OneTermEqualSelector("metadata.name", c.cfg.DaemonSet.Name)
	c.own = &ownDaemonSet{c.cfg.DaemonSet, client, c.objects(client, daemonSets, c.cfg.DaemonSet.Namespace, new(appsv1.DaemonSet), which)}
	return nil
}

// FollowDaemonSet has Removed know what the API server tells until ctx ends, which is later than Run does: a daemon that has handed
// over is the one that knows, where the next one may not ask any more.
func (c *Cluster) FollowDaemonSet(ctx context.Context) {
	if c.own != nil {
		c.own.told.follow(ctx)
	}
}

// Removed says whether the DaemonSet of this process is gone or being deleted, or the namespace around it. What it was told before
// holds where the API server does not say any more: who removes all at once removes the right to ask too. An error is that
// nobody has told; it is false where there is no DaemonSet.
func (c *Cluster) Removed(ctx context.Context) (bool, error) {
	if c.own == nil {
		return false, nil
	}
	if object, known, _ := c.namespaces.GetByKey(c.own.Namespace); known {
		if namespace, ok := object.(*corev1.Namespace); ok && namespace.DeletionTimestamp != nil {
			return true, nil
		}
	}
	now := new(appsv1.DaemonSet)
	err := c.own.client.Get().Namespace(c.own.Namespace).Resource(daemonSets).Name(c.own.Name).Do(ctx).Into(now)
	switch {
	case err == nil:
		return now.DeletionTimestamp != nil, nil
	case apierrors.IsNotFound(err), c.own.gone():
		return true, nil
	}
	return false, fmt.Errorf("read DaemonSet %s/%s: %w", c.own.Namespace, c.own.Name, err)
}

// unfollowed is why a removal of the DaemonSet may not be seen.
func (c *Cluster) unfollowed() error {
	err := c.faults[daemonSets]
	if err == nil {
		return nil
	}
	return fmt.Errorf("follow DaemonSet %s/%s: %w: what is pinned may stay when it is removed; see that nodeproxy may get, list and watch it: it is tried again by itself", c.own.Namespace, c.own.Name, err)
}

// gone says whether the API server has told that it is.
func (d *ownDaemonSet) gone() bool {
	if !d.told.read.Load() {
		return false
	}
	for _, known := range list[appsv1.DaemonSet](d.told) {
		return known.DeletionTimestamp != nil
	}
	return true
}
