package ztunnel

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/authz"
	"github.com/weft-mesh/weft/mesh/view"
)

// The ports of the listeners inside each pod. Nothing that comes from outside
// may be sent on to them: it would come back here for ever, or as somebody
// else.
const (
	outboundPort = 15001
	inboundPort  = 15006
	dnsPort      = 15053
)

func ourPort(p uint16) bool {
	return p == outboundPort || p == inboundPort || p == hbone.Port || p == dnsPort
}

// The verdicts on an inbound connection. The zero verdict lets nothing in.
type verdict uint8

const (
	denied     verdict = iota // by policy, or because a policy is not known
	notOurs                   // the target is not this pod's
	unresolved                // denied for now: something that decides has not arrived
	admitted
)

// admission is the decision on an inbound connection.
type admission struct {
	verdict verdict
	reason  string
	dryRun  []mesh.Name // policies that would have denied, were they enforced
	// workload is the pod as the View knows it; nil if it does not.
	workload *mesh.Workload
}

// admit decides whether a connection with facts f may reach pod p. It reads
// one View and touches no socket. addrs are the addresses of the pod.
func admit(v *view.View, p handoff.Pod, id mesh.Identity, f authz.Facts) admission {
	return admitUnless(nil, v, p, id, f)
}

// guards reports whether a policy is one that the control service has made so
// that nobody goes around a waypoint: no object of the user's has such a name.
func guards(n mesh.Name) bool { return strings.HasPrefix(n.Name, "weft_waypoint_") }

// admitUnless is admit without the policies that are left out; nil leaves none.
func admitUnless(leftOut func(mesh.Name) bool, v *view.View, p handoff.Pod, id mesh.Identity, f authz.Facts) admission {
	if err := ownTarget(p.Addresses, f.Destination); err != nil {
		return admission{verdict: notOurs, reason: err.Error()}
	}
	w := ownWorkload(v, p, id)
	ps, missing := v.PoliciesFor(w)
	if leftOut != nil {
		ps = slices.DeleteFunc(slices.Clone(ps), func(p *mesh.Policy) bool { return leftOut(p.Name) })
		missing = slices.DeleteFunc(missing, leftOut)
	}
	d := authz.Decide(ps, missing, f)
	a := admission{verdict: denied, reason: d.Reason, dryRun: d.DryRun, workload: w}
	switch {
	case d.Allowed && w != nil:
		a.verdict = admitted
	case w == nil || len(missing) > 0:
		a.verdict = unresolved
	}
	return a
}

// ownTarget reports, as an error, why dst is not an address and a port of the
// pod that may be reached from outside.
func ownTarget(addrs []netip.Addr, dst netip.AddrPort) error {
	if !slices.Contains(addrs, dst.Addr()) {
		return fmt.Errorf("target %v is not an address of this pod", dst)
	}
	if dst.Port() == 0 || ourPort(dst.Port()) {
		return fmt.Errorf("port %d is not one of the pod's application", dst.Port())
	}
	return nil
}

// ownWorkload returns what v says of pod p, or nil. The name alone is not
// enough: a pod of a StatefulSet has the name of the one before it, and the
// policies of that one may differ. So an address and the identity must agree.
func ownWorkload(v *view.View, p handoff.Pod, id mesh.Identity) *mesh.Workload {
	w := v.ByName(mesh.Name{Namespace: p.Namespace, Name: p.Name})
	if w == nil || w.Identity != id {
		return nil
	}
	for _, a := range w.Addresses {
		if slices.Contains(p.Addresses, a.Unmap()) {
			return w
		}
	}
	return nil
}
