package kubernetes

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"nodeproxy.io/nodeproxy/workload"
)

// gate is the condition of which a pod's readinessGates may make its readiness depend.
const gate corev1.PodConditionType = prefix + "protected"

// KeepGates keeps the condition of the pods of this node that ask for it, until ctx ends: it is true while the pod is protected, of which
// state tells. It takes the right to patch the status of pods; Problem says that it is not there.
func (c *Cluster) KeepGates(ctx context.Context, state func() []workload.WorkloadState) {
	changed := c.subscribe()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		if c.hasSynced() {
			err := c.setGates(ctx, state)
			c.mu.Lock()
			c.gates = err
			c.mu.Unlock()
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tick.C:
		}
	}
}

// setGates returns the first of what went wrong.
func (c *Cluster) setGates(ctx context.Context, state func() []workload.WorkloadState) (failed error) {
	var gated []*corev1.Pod
	for _, p := range list[corev1.Pod](c.pods) {
		asks := slices.ContainsFunc(p.Spec.ReadinessGates, func(g corev1.PodReadinessGate) bool { return g.ConditionType == gate })
		if asks && p.DeletionTimestamp == nil && !(pod{Pod: p}).finished() {
			gated = append(gated, p)
		}
	}
	if len(gated) == 0 {
		return nil
	}
	now := state()
	for _, p := range gated {
		failed = cmp.Or(failed, c.setGate(ctx, p, c.protection(p, now)))
	}
	return failed
}

// protection is the condition as it is to be.
func (c *Cluster) protection(p *corev1.Pod, all []workload.WorkloadState) corev1.PodCondition {
	is := func(status corev1.ConditionStatus, reason, message string) corev1.PodCondition {
		return corev1.PodCondition{Type: gate, Status: status, Reason: reason, Message: message}
	}
	found, labelled := c.judge(p)
	switch {
	case !labelled:
		return is(corev1.ConditionFalse, "NotLabelled", "neither the pod nor its namespace has the label nodeproxy.io/mesh=enabled")
	case !found.granted():
		return is(corev1.ConditionFalse, "Refused", cmp.Or(found.claim.Denied, found.claim.Invalid))
	case !found.guarded():
		return is(corev1.ConditionFalse, "Observed", "it is only watched: mesh=observe")
	}
	protected := false
	for _, w := range all {
		switch {
		case w.Workload.Provider != providerName || w.Workload.Name != found.claim.Name:
		case w.State == "protected":
			protected = true
		case w.State != "empty": // it may be in another cgroup
			return is(corev1.ConditionFalse, "NotProtected", cmp.Or(w.Detail, w.State))
		}
	}
	if !protected {
		return is(corev1.ConditionFalse, "NotProtected", "no process of it has been seen yet")
	}
	return is(corev1.ConditionTrue, "Protected", "")
}

func (c *Cluster) setGate(ctx context.Context, p *corev1.Pod, want corev1.PodCondition) error {
	want.LastTransitionTime = metav1.Now()
	for _, is := range p.Status.Conditions {
		if is.Type == gate && is.Status == want.Status {
			want.LastTransitionTime = is.LastTransitionTime
			if is.Reason == want.Reason && is.Message == want.Message {
				return nil
			}
		}
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": p.UID}, // and not another one that has its name by now
		"status":   map[string]any{"conditions": []corev1.PodCondition{want}},
	})
	if err != nil {
		return err
	}
	err = c.coreAPI.Patch(types.StrategicMergePatchType).Namespace(p.Namespace).Resource("pods").Name(p.Name).SubResource("status").Body(patch).Do(ctx).Error()
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("set the condition %s, for which the readiness gate of pod %s/%s waits: %w: see that nodeproxy may patch pods/status (the component deploy/kubernetes/readiness)", gate, p.Namespace, p.Name, err)
	}
	return nil
}
