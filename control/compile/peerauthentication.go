package compile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	securityv1 "istio.io/api/security/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/weft-mesh/weft/mesh"
)

// A PeerAuthentication becomes DENY policies for peers without an identity,
// listed by the workloads they apply to. The names are those that users of
// Istio know from dumps; no Kubernetes object can have them, because of the
// underscore.
const (
	staticStrict    = "istio_converted_static_strict"
	convertedPrefix = "converted_peer_authentication_"
)

// strictness is whether a peer must have an identity.
type strictness uint8

const (
	inherit    strictness = iota // whatever the next wider level says
	permissive                   // plain text is served too
	strict
)

// A peerAuth is one PeerAuthentication, read.
type peerAuth struct {
	meta  Meta
	mode  strictness
	ports map[uint16]strictness // by port of the workload; never inherit
}

// peerAuths answers which policy makes a pod strict.
type peerAuths struct {
	strict    mesh.Name           // the policy that denies every peer without identity
	whole     *peerAuth           // for the whole mesh
	namespace map[string]peerAuth // for all of a namespace
	selecting map[string][]selectingPeerAuth
}

type selectingPeerAuth struct {
	peerAuth
	selector labels.Selector
}

// compilePeerAuthentications adds the converted policies, fills peers, and
// adds a status for each object.
func (w *World) compilePeerAuthentications(in []PeerAuthentication) {
	root := w.settings.RootNamespace
	w.peers = peerAuths{
		strict:    mesh.Name{Namespace: root, Name: staticStrict},
		namespace: map[string]peerAuth{},
		selecting: map[string][]selectingPeerAuth{},
	}
	// Always there, so that a switch to STRICT never waits for it.
	w.Policies = append(w.Policies, mesh.Policy{
		Name: w.peers.strict, Scope: mesh.ScopeSelector, Action: mesh.Deny,
		Groups: []mesh.Group{{Clauses: []mesh.Clause{noIdentity()}}},
	})
	oldest := slices.Clone(in)
	slices.SortFunc(oldest, func(a, b PeerAuthentication) int {
		return cmp.Or(a.Created.Compare(b.Created), a.Name.Compare(b.Name))
	})
	for _, pa := range oldest {
		read, condition := readPeerAuth(pa)
		if winner, ok := w.peers.add(root, read); !ok {
			condition = Condition{Type: ZtunnelAccepted, Reason: reasonConflicted,
				Message: fmt.Sprintf("not enforced: %s has the same scope, is older and wins. Delete one of the two.", winner)}
		}
		w.Statuses = append(w.Statuses, Status{
			Kind: KindPeerAuthentication, Name: pa.Name, Generation: pa.Generation,
			Conditions: []Condition{condition},
		})
	}
	for _, pas := range w.peers.selecting {
		for _, pa := range pas {
			if clauses := w.peers.portClauses(pa.peerAuth); clauses != nil {
				w.Policies = append(w.Policies, mesh.Policy{
					Name: convertedName(pa.meta.Name), Scope: mesh.ScopeSelector, Action: mesh.Deny,
					Groups: []mesh.Group{{Clauses: clauses}},
				})
			}
		}
	}
}

// add files pa by its scope. It reports false, and who was first, when the
// scope is taken. Selectors may overlap; the oldest that matches a pod wins.
func (p *peerAuths) add(root string, pa peerAuth) (mesh.Name, bool) {
	ns := pa.meta.Name.Namespace
	switch {
	case len(pa.meta.Selector) > 0:
		p.selecting[ns] = append(p.selecting[ns], selectingPeerAuth{pa, labels.SelectorFromSet(pa.meta.Selector)})
	case ns == root && p.whole != nil:
		return p.whole.meta.Name, false
	case ns == root:
		p.whole = &pa
	default:
		if first, ok := p.namespace[ns]; ok {
			return first.meta.Name, false
		}
		p.namespace[ns] = pa
	}
	return mesh.Name{}, true
}

// readPeerAuth reads what the object asks for, and says what becomes of it.
// What cannot be read is STRICT.
func readPeerAuth(pa PeerAuthentication) (peerAuth, Condition) {
	out := peerAuth{meta: pa.Meta, ports: map[uint16]strictness{}}
	var bad, notes []string
	if pa.Err != nil {
		bad = append(bad, pa.Err.Error())
	}
	mode := func(path string, m *securityv1.PeerAuthentication_MutualTLS) strictness {
		switch m.GetMode() {
		case securityv1.PeerAuthentication_MutualTLS_UNSET:
			return inherit
		case securityv1.PeerAuthentication_MutualTLS_PERMISSIVE:
			return permissive
		case securityv1.PeerAuthentication_MutualTLS_STRICT:
			return strict
		case securityv1.PeerAuthentication_MutualTLS_DISABLE:
			notes = append(notes, path+" is DISABLE, which ztunnel takes as PERMISSIVE: plain text is served, and mutual TLS too")
			return permissive
		}
		bad = append(bad, fmt.Sprintf("%s %d is not known", path, m.GetMode()))
		return strict
	}
	out.mode = mode("spec.mtls.mode", pa.Spec.GetMtls())
	levels := pa.Spec.GetPortLevelMtls()
	if len(levels) > 0 && len(pa.Selector) == 0 {
		bad = append(bad, "spec.portLevelMtls needs a spec.selector")
	}
	for _, port := range slices.Sorted(maps.Keys(levels)) {
		path := fmt.Sprintf("spec.portLevelMtls[%d]", port)
		if port == 0 || port > 65535 {
			bad = append(bad, path+" is not a port from 1 to 65535")
			continue
		}
		if m := mode(path, levels[port]); m != inherit {
			out.ports[uint16(port)] = m
		}
	}
	switch {
	case len(bad) > 0:
		out.mode, out.ports = strict, nil
		return out, invalid("the object is invalid, so STRICT is enforced where it applies: " + listed(bad))
	case len(notes) > 0:
		return out, Condition{Type: ZtunnelAccepted, Reason: reasonUnsupported, Message: "enforced by ztunnel, but not as written: " + strings.Join(notes, "; ")}
	}
	return out, Condition{Type: ZtunnelAccepted, OK: true, Reason: reasonAccepted, Message: "enforced by ztunnel"}
}

// policyFor returns the converted policy that a pod lists, if any. The
// narrowest level that says something wins: workload, namespace, mesh.
func (p *peerAuths) policyFor(namespace string, set labels.Set) (mesh.Name, bool) {
	for _, pa := range p.selecting[namespace] {
		if !pa.selector.Matches(set) {
			continue
		}
		if p.portClauses(pa.peerAuth) != nil {
			return convertedName(pa.meta.Name), true
		}
		return p.strict, p.modeOf(pa.peerAuth) == strict
	}
	return p.strict, p.inherited(namespace) == strict
}

// inherited returns what holds in a namespace for pods that nothing selects.
func (p *peerAuths) inherited(namespace string) strictness {
	if pa := p.namespace[namespace]; pa.mode != inherit {
		return pa.mode
	}
	if p.whole != nil && p.whole.mode != inherit {
		return p.whole.mode
	}
	return permissive
}

// modeOf returns what holds for the pods that pa selects, but for its ports.
func (p *peerAuths) modeOf(pa peerAuth) strictness {
	if pa.mode != inherit {
		return pa.mode
	}
	return p.inherited(pa.meta.Name.Namespace)
}

// portClauses returns the clauses of pa's own policy, or nil when its ports
// do not differ from the rest.
func (p *peerAuths) portClauses(pa peerAuth) []mesh.Clause {
	mode := p.modeOf(pa)
	var differ []uint16
	for _, port := range slices.Sorted(maps.Keys(pa.ports)) {
		if pa.ports[port] != mode {
			differ = append(differ, port)
		}
	}
	switch {
	case len(differ) == 0:
		return nil
	case mode == strict:
		return []mesh.Clause{noIdentity(), {Matches: []mesh.Match{{NotDestPorts: differ}}}}
	}
	return []mesh.Clause{noIdentity(), {Matches: []mesh.Match{{DestinationPorts: differ}}}}
}

// noIdentity holds for a peer that has shown no identity.
func noIdentity() mesh.Clause {
	return mesh.Clause{Matches: []mesh.Match{{NotPrincipals: []mesh.StringMatch{{Kind: mesh.MatchPresence}}}}}
}

func convertedName(pa mesh.Name) mesh.Name {
	return mesh.Name{Namespace: pa.Namespace, Name: convertedPrefix + pa.Name}
}
