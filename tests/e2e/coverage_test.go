package e2e

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"nodeproxy.io/nodeproxy/admin"
	"nodeproxy.io/tests/netlab"
)

// hook is the pin of a hook of a workload's cgroup, for detach.
func hook(m *mesh, w *netlab.Workload, name string) string {
	m.t.Helper()
	id, err := w.Cgroup.ID()
	m.must(err)
	return fmt.Sprintf("cgroups/%d/%s", id, name)
}

// forbidAttaching lets nobody attach to the cgroups below cgroup: a program of somebody else's claims it all.
func (m *mesh) forbidAttaching(cgroup *netlab.Cgroup, kind ebpf.ProgramType, at ebpf.AttachType) (allow func()) {
	m.t.Helper()
	prog := m.passing(kind, at)
	target, err := os.Open(cgroup.Path())
	m.must(err)
	m.must(link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(target.Fd()), Program: prog, Attach: at}))
	return func() {
		m.t.Helper()
		m.must(link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(target.Fd()), Program: prog, Attach: at}))
		target.Close()
		prog.Close()
	}
}

// passing is a program that changes nothing.
func (m *mesh) passing(kind ebpf.ProgramType, at ebpf.AttachType) *ebpf.Program {
	m.t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: kind, AttachType: at, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	m.must(err)
	return prog
}

func TestWhatSomebodyDetachesIsRepairedAndCounted(t *testing.T) {
	m, web, _ := pair(t)
	m.reaches(web, m.vip("api"))
	if n := m.metric(0, "nodeproxy_repairs_total"); n != 0 {
		t.Fatalf("%v repairs of what nobody touched", n)
	}
	for i, name := range []string{"connect4", "sockops"} {
		m.detach(0, hook(m, web, name))
		m.eventually(name+" is attached again", func() error {
			if n := m.metric(0, "nodeproxy_repairs_total"); n != float64(i+1) {
				return fmt.Errorf("%v repairs", n)
			}
			return nil
		})
		m.reaches(web, m.vip("api"))
	}
	m.settle(0)
}

func TestWhatCannotBeRepairedIsAnUnprotectedWorkload(t *testing.T) {
	m, web, _ := pair(t)
	allow := m.forbidAttaching(m.Nodes[0].Cgroup, ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect)
	m.detach(0, hook(m, web, "connect4"))
	status, err := m.Daemons[0].Await(m.ctx(), func(s *admin.Status) error {
		if len(s.Workloads) != 1 || s.Workloads[0].State != "unprotected" {
			return fmt.Errorf("the workloads are %+v", s.Workloads)
		}
		return nil
	})
	m.must(err)
	if detail := status.Workloads[0].Detail; !strings.Contains(detail, "connect4 was detached") || !strings.Contains(detail, "cannot be repaired") {
		t.Errorf("the reason: %s", detail)
	}
	if n := m.metric(0, "nodeproxy_unprotected_workloads"); n != 1 {
		t.Errorf("%v unprotected workloads", n)
	}
	out, err := m.Lab.Run(m.ctx(), netlab.Command{Path: programs.nodeproxy, Args: []string{"status", "--socket", m.Daemons[0].Socket()}})
	m.must(err)
	if !strings.Contains(out, "1 workload unprotected") {
		t.Errorf("status says %s", out)
	}
	allow()
	m.settle(0)
	m.comesToReach(web, m.vip("api"))
	if n := m.metric(0, "nodeproxy_unprotected_workloads"); n != 0 {
		t.Errorf("%v unprotected workloads after the repair", n)
	}
}

func TestAWorkloadWhoseRulesFindNoRoomIsNotEnrolledAndTheOthersGoOn(t *testing.T) {
	m := newMesh(t)
	web := m.place(0, "web")
	m.place(1, "api")
	m.allow("api", "web")
	cart, err := m.Nodes[0].Workload("cart")
	m.must(err)
	m.serve(cart, ":8080")
	m.define(0, "cart", port, cart.IPv4)
	m.start()
	m.baselines[0] = nil
	live := m.stream(web, m.vip("api"))
	pins, err := filepath.Glob(filepath.Join(m.Daemons[0].Pins, m.Nodes[0].Name, "v*", "maps", "rules"))
	m.must(err)
	rules, err := ebpf.LoadPinnedMap(pins[0], nil)
	m.must(err)
	defer rules.Close()
	keys, values := make([][32]byte, rules.MaxEntries()), make([][12]byte, rules.MaxEntries())
	for i := range keys {
		binary.NativeEndian.PutUint64(keys[i][:], uint64(i)+1<<40) // namespaces that there are not
	}
	fill := func() { _, _ = rules.BatchUpdate(keys, values, nil) } // an audit takes them out
	fill()
	m.must(m.Daemons[0].Admin().Enroll(m.ctx(), admin.EnrollRequest{Cgroup: cart.Cgroup.Path(), Service: "cart"}))
	state := func(want, detail string, meanwhile func()) {
		t.Helper()
		m.eventually("cart is "+want, func() error {
			status, err := m.Daemons[0].Admin().Status(m.ctx())
			if err != nil {
				return err // it is taking out what is not nodeproxy's
			}
			for _, w := range status.Workloads {
				if w.Service == "web" && w.State != "protected" {
					t.Errorf("meanwhile web is %+v", w)
				}
				if w.Service == "cart" && w.State == want && strings.Contains(w.Detail, detail) && (w.ID != 0) == (want == "protected") {
					return nil
				}
			}
			meanwhile()
			return fmt.Errorf("%w: %+v", errNotYet, status.Workloads)
		})
	}
	state("unprotected", "not enrolled, because its ports cannot be guarded: write to rules", fill)
	m.reaches(web, m.vip("api"))
	m.goesOn("a connection of web's", live)
	state("protected", "", func() { _, _ = rules.BatchDelete(keys, nil) })
	m.getsNothing(m.stranger(0), "-timeout", "3s", at(cart.IPv4, port))
	m.goesOn("a connection of web's", live)
	live.Kill()
}
