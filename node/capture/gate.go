package capture

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"github.com/weft-mesh/weft/bpf"
)

// slots are the packet programs and their places in the map of programs.
func slots() map[string]bpf.CaptureSlot {
	return map[string]bpf.CaptureSlot{
		bpf.CaptureProgInbound:   bpf.CaptureSlotSLOT_INBOUND,
		bpf.CaptureProgGuardPod:  bpf.CaptureSlotSLOT_GUARD_POD,
		bpf.CaptureProgGuardHost: bpf.CaptureSlotSLOT_GUARD_HOST,
		bpf.CaptureProgGuardLo:   bpf.CaptureSlotSLOT_GUARD_LO,
		bpf.CaptureProgOutbound:  bpf.CaptureSlotSLOT_OUTBOUND,
	}
}

// What a packet program returns, as in the kernel's pkt_cls.h.
const (
	actUnspec = -1
	actShot   = 2
)

// cb is where struct __sk_buff has its field cb.
const cb = 48

// newGate loads the program that is attached to one hook of one pod: it notes
// whose pod it is and goes on in the node's program of the slot. Packets stop
// where there is none, but on lo, where nothing is kept in.
//
// It is written here and not in C for its size: what a pod needs in the kernel
// is a page of it.
func (c *Capture) newGate(id uint32, slot bpf.CaptureSlot) (*ebpf.Program, error) {
	otherwise := int32(actShot)
	if slot == bpf.CaptureSlotSLOT_GUARD_LO || slot == bpf.CaptureSlotSLOT_OUTBOUND {
		otherwise = actUnspec
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:    "weft_gate",
		Type:    ebpf.SchedCLS,
		License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm32(asm.R2, int32(id)),
			asm.StoreMem(asm.R1, cb, asm.R2, asm.Word),
			asm.LoadMapPtr(asm.R2, c.maps[bpf.CaptureMapPrograms].FD()),
			asm.Mov.Imm(asm.R3, int32(slot)),
			asm.FnTailCall.Call(),
			asm.Mov.Imm(asm.R0, otherwise),
			asm.Return(),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("load a gate into the kernel: %w", err)
	}
	return prog, nil
}

// lookupMaps are the maps that mesh_lookup uses.
func lookupMaps() []string {
	return []string{bpf.LookupMapListeners, bpf.LookupMapRenewals, bpf.LookupMapStats}
}

// newLookup loads mesh_lookup for one pod.
func (c *Capture) newLookup(id uint32, w place) (*ebpf.Program, error) {
	e, err := w.entry()
	if err != nil {
		return nil, err
	}
	var dns uint32
	if w.dns {
		dns = 1
	}
	spec := c.lookup.Copy()
	for name, value := range map[string]any{
		bpf.LookupVarPodId:  id,
		bpf.LookupVarPodDns: dns,
		bpf.LookupVarPodIp4: e.Ip4,
		bpf.LookupVarPodIp6: e.Ip6,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set constant %s: %w", name, err)
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, c.with(lookupMaps()...))
	if err != nil {
		return nil, fmt.Errorf("load %s into the kernel: %w", bpf.LookupProgMeshLookup, err)
	}
	defer coll.Close()
	return coll.DetachProgram(bpf.LookupProgMeshLookup), nil
}

// load loads the programs of the pod, by the name of what they go on to.
func (p *Pod) load() (err error) {
	if p.c.features.SkLookup {
		if p.programs[bpf.LookupProgMeshLookup], err = p.c.newLookup(p.id, p.place); err != nil {
			return err
		}
	}
	for name, slot := range slots() {
		if p.programs[name], err = p.c.newGate(p.id, slot); err != nil {
			return err
		}
	}
	return nil
}
