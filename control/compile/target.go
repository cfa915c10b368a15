package compile

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/weft-mesh/weft/mesh"
)

// mostTargetRefs is how many targets a policy may have.
const mostTargetRefs = 16

// target resolves the targets of a policy: where it is enforced, and what is
// wrong with those of its targets where it is not.
func (w *World) target(ap AuthorizationPolicy) (enforcement, []string) {
	e := enforcement{Policy: mesh.Policy{Name: ap.Name, Scope: mesh.ScopeTarget}, by: "a waypoint", kind: WaypointAccepted, what: "request", waypoint: true}
	var problems, where []string
	for i, r := range ap.Targets {
		if i >= mostTargetRefs {
			problems = append(problems, fmt.Sprintf("spec.targetRefs has %d targets, and those beyond the %dth are not enforced: write another policy for them", len(ap.Targets), mostTargetRefs))
			break
		}
		targets, at, problem := w.resolveTarget(ap.Name.Namespace, r)
		if problem != "" {
			problems = append(problems, r.Path+" "+problem)
		}
		if at != "" {
			where = append(where, at)
		}
		e.Targets = append(e.Targets, targets...)
	}
	if len(e.Targets) == 0 && ap.Err != nil {
		// What it protects cannot be read: no less than all that it could be.
		e.Targets, where = w.allTargets(ap.Name.Namespace), []string{"everything behind waypoints in namespace " + ap.Name.Namespace}
	}
	e.nowhere = len(where) == 0
	e.where = cmp.Or(strings.Join(where, ", "), "its targets")
	return e, problems
}

// resolveTarget returns what one reference names, in the mesh's words and for
// people. The problem says why it is not, or not all, enforced.
func (w *World) resolveTarget(namespace string, r TargetRef) (targets []mesh.Target, where, problem string) {
	if why := w.settings.badTarget(namespace, r); why != "" {
		return nil, "", why
	}
	name := mesh.Name{Namespace: namespace, Name: r.Name}
	switch r.Kind {
	case KindService:
		s := w.settings.serviceName(namespace, r.Name)
		targets = []mesh.Target{{Service: s}}
		if w.serviceNamed(s) == nil {
			return targets, "", fmt.Sprintf("names service %s, which does not exist", name)
		}
		if _, bound := w.waypointOf(s); !bound {
			return targets, "", fmt.Sprintf("names service %s, which has no waypoint in front of it, so that nobody enforces the policy for it: label it istio.io/use-waypoint", name)
		}
		return targets, "service " + name.String(), ""
	case KindGateway:
		if w.waypoints[name] == nil {
			return []mesh.Target{{Waypoint: name}}, "", fmt.Sprintf("names Gateway %s, which is no waypoint", name)
		}
		return []mesh.Target{{Waypoint: name}}, "everything behind waypoint " + name.String(), ""
	case KindServiceEntry:
		e := w.entries[name]
		if e == nil || len(e.services) == 0 {
			return nil, "", fmt.Sprintf("names ServiceEntry %s, which does not exist or has no host", name)
		}
		bound := false
		for _, s := range e.services {
			targets = append(targets, mesh.Target{Service: s})
			_, ok := w.waypointOf(s)
			bound = bound || ok
		}
		if !bound {
			return targets, "", fmt.Sprintf("names ServiceEntry %s, which has no waypoint in front of it, so that nobody enforces the policy for it: label it istio.io/use-waypoint", name)
		}
		return targets, "ServiceEntry " + name.String(), ""
	default: // GatewayClass
		for _, wp := range w.waypointsOfClass(r.Name) {
			targets = append(targets, mesh.Target{Waypoint: wp})
		}
		if len(targets) == 0 {
			return nil, "", fmt.Sprintf("names GatewayClass %s, and no waypoint is of it", r.Name)
		}
		return targets, "everything behind waypoints of class " + r.Name, ""
	}
}

// allTargets returns every target that a policy of the namespace can have.
func (w *World) allTargets(namespace string) []mesh.Target {
	var out []mesh.Target
	root := namespace == w.settings.RootNamespace
	for _, s := range w.Services {
		if root || s.Name.Namespace == namespace {
			out = append(out, mesh.Target{Service: s.Name})
		}
	}
	for _, wp := range w.Waypoints {
		if root || wp.Name.Namespace == namespace {
			out = append(out, mesh.Target{Waypoint: wp.Name})
		}
	}
	return out
}
