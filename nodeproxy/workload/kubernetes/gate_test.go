package kubernetes

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"nodeproxy.io/nodeproxy/workload"
)

func gated(p *corev1.Pod) {
	p.Spec.ReadinessGates = append(p.Spec.ReadinessGates, corev1.PodReadinessGate{ConditionType: gate})
}

func testGates(t *testing.T, c *cluster) {
	waits := c.pod("shop", "gated", "web", labelled("mesh=enabled"), gated)
	ungated := c.pod("shop", "ungated", "web", labelled("mesh=enabled"))
	watched := c.pod("shop", "watched", "web", labelled("mesh=observe"), gated)
	refused := c.pod("shop", "pretender", "other", labelled("mesh=enabled"), gated)
	plain := c.pod("shop", "plain", "web", gated)

	var state atomic.Pointer[[]workload.WorkloadState]
	is := func(states ...string) {
		var all []workload.WorkloadState
		for _, s := range states {
			all = append(all, workload.WorkloadState{State: s, Workload: &workload.Workload{Name: "pod shop/gated", Provider: providerName}})
		}
		state.Store(&all)
	}
	is()
	ctx, stop := context.WithCancel(t.Context())
	var keeping sync.WaitGroup
	keeping.Go(func() { c.KeepGates(ctx, func() []workload.WorkloadState { return *state.Load() }) })
	defer keeping.Wait()
	defer stop()

	within(t, patience, "it is said that the right lacks", func() bool {
		err := c.Problem()
		return err != nil && strings.Contains(err.Error(), "deploy/kubernetes/readiness")
	})
	c.role("gates", `{"apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"]}`)
	c.gate(t, waits, corev1.ConditionFalse, "no process of it")
	within(t, patience, "the right is there", func() bool { return c.Problem() == nil })
	is("empty", "protected")
	c.gate(t, waits, corev1.ConditionTrue, "")
	is("unprotected", "protected")
	c.gate(t, waits, corev1.ConditionFalse, "unprotected")
	is("protected")
	c.gate(t, waits, corev1.ConditionTrue, "")
	c.gate(t, watched, corev1.ConditionFalse, "mesh=observe")
	c.gate(t, refused, corev1.ConditionFalse, "service account")
	c.gate(t, plain, corev1.ConditionFalse, "mesh=enabled")
	c.do(c.core.Get().Namespace("shop").Resource("pods").Name(ungated.Name), ungated)
	for _, condition := range ungated.Status.Conditions {
		if condition.Type == gate {
			t.Errorf("a pod that does not ask for the condition has it: %v", condition)
		}
	}
	for _, p := range []*corev1.Pod{waits, ungated, watched, refused, plain} {
		c.remove(p)
	}
}

// gate asserts what the API server tells of a pod's condition.
func (c *cluster) gate(t *testing.T, p *corev1.Pod, want corev1.ConditionStatus, why string) {
	t.Helper()
	within(t, patience, "pod "+p.Name+" is protected: "+string(want), func() bool {
		c.do(c.core.Get().Namespace(p.Namespace).Resource("pods").Name(p.Name), p)
		for _, condition := range p.Status.Conditions {
			if condition.Type == gate {
				return condition.Status == want && strings.Contains(condition.Message, why)
			}
		}
		return false
	})
}
