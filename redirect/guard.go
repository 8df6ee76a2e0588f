package redirect

import (
	"errors"
	"fmt"
	"math"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// loadGuard loads the program that decides about what arrives in any namespace, and has those of all namespaces call it.
func (r *Redirect) loadGuard() error {
	spec, err := loadInbound()
	if err != nil {
		return fmt.Errorf("read built-in BPF object: %w", err)
	}
	home, err := netnsCookie()
	if err != nil {
		return fmt.Errorf("read the cookie of the own network namespace: %w", err)
	}
	if err := spec.Variables["home"].Set(home); err != nil {
		return fmt.Errorf("prepare the guard: %w", err)
	}
	shared := &r.obj
	var obj inboundPrograms
	err = spec.LoadAndAssign(&obj, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{
		"ns_ready": shared.NsReady, "listeners": shared.Listeners, "rules": shared.Rules, "direct": shared.Direct, "granted": shared.Granted, "pending": shared.Pending, "workloads": shared.Workloads,
		"grants": shared.Grants, "closes": shared.Closes, "heartbeat": shared.Heartbeat, "plaintext_from": shared.PlaintextFrom, "events": shared.Events, "stats": shared.Stats,
		"guard": shared.Guard, "places": shared.Places,
	}})
	if err != nil {
		return fmt.Errorf("load the guard of network namespaces: %w", err)
	}
	r.guard = obj.Lookup
	return r.putGuard()
}

func (r *Redirect) putGuard() error {
	if err := r.obj.Guard.Put(uint32(0), r.guard); err != nil {
		return fmt.Errorf("put the guard of network namespaces in place: %w", err)
	}
	return nil
}

// netnsCookie is that of the network namespace in which the thread is.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(fd)
	return unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
}

// Offsets in struct bpf_sk_lookup (linux/bpf.h).
const ingressIfindex = 64

// newEntry loads the program of one namespace, which notes in which it runs and calls the guard (struct place in bpf/maps.h). It is
// made of instructions, since to load an object for each takes as long as all else of an enrolment. Nothing that arrives passes
// without the guard; a socket that sock_diag looks for does.
func newEntry(cookie uint64, places, guard *ebpf.Map) (*ebpf.Program, error) {
	if cookie > math.MaxUint32 {
		return nil, errors.New("guard a network namespace: the machine has had over 2^32 of them: restart it")
	}
	return loadEntry(append(asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, ingressIfindex, asm.Word),
		asm.Mov.Imm(asm.R0, skPass),
		asm.JEq.Imm(asm.R2, 0, "end"), // no packet: sock_diag(7)
	}, callGuard(cookie, places, guard)...))
}

func loadEntry(code asm.Instructions) (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{Name: "entry", Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "Dual BSD/GPL", Instructions: code})
}

// callGuard notes in which namespace it runs, and goes on with the guard.
func callGuard(cookie uint64, places, guard *ebpf.Map) asm.Instructions {
	const ctx, place, low, high = asm.R6, asm.R0, asm.R7, asm.R8
	return asm.Instructions{
		asm.Mov.Reg(ctx, asm.R1),
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.LoadMapPtr(asm.R1, places.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(place, 0, "drop"),
		asm.Mov.Reg(low, ctx),
		asm.Sub.Reg(low, place),
		asm.RSh.Imm(low, int32(outboundConstantPLACE_ALIGNED)),
		asm.LSh.Imm(low, int32(outboundConstantPLACE_BITS)),
		asm.Mov.Reg(high, low),
		asm.Or.Imm(low, int32(cookie&math.MaxUint16)),
		asm.StoreMem(place, 0, low, asm.DWord),
		asm.Or.Imm(high, int32(cookie>>outboundConstantPLACE_BITS)),
		asm.StoreMem(place, 8, high, asm.DWord),
		asm.Mov.Reg(asm.R1, ctx),
		asm.LoadMapPtr(asm.R2, guard.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(), // returns only if there is no guard
		asm.Mov.Imm(asm.R0, skDrop).WithSymbol("drop"),
		asm.Return().WithSymbol("end"),
	}
}

// What a program of sk_lookup returns (linux/bpf.h).
const (
	skDrop = 0
	skPass = 1
)
