package kube

import (
	"context"
	"encoding/json"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"

	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/mesh"
)

// fieldManager owns the fields that are written here.
const fieldManager = "weft-control"

// A statusShape says how the status of a kind is written.
type statusShape int

const (
	shapeNone         statusShape = iota // it has none
	shapeConditions                      // status.conditions
	shapeGateway                         // status.conditions, addresses and listeners
	shapeServiceEntry                    // status.conditions, and addresses of hosts
	shapeParents                         // status.parents, shared with other controllers
	shapeAncestors                       // status.ancestors, the same
)

// A StatusWriter writes what compile says of each object into its status. Run
// it under leader election.
type StatusWriter struct {
	Dynamic dynamic.Interface
	Watcher *Watcher
	Log     *slog.Logger
	Now     func() time.Time // for transition times; nil is time.Now

	// swept are the services whose condition was taken back, in the version
	// that still had it: it may be somebody else's.
	swept map[string]string
}

// Run writes statuses until ctx ends.
func (s *StatusWriter) Run(ctx context.Context) error {
	s.swept = map[string]string{}
	for {
		all, _, changed := s.Watcher.statuses.latest()
		pass, cancel := context.WithCancel(ctx)
		stop := make(chan struct{})
		go func() { // a newer set ends the retries of this one
			defer close(stop)
			select {
			case <-changed:
			case <-pass.Done():
			}
			cancel()
		}()
		if all != nil {
			_ = run.Retry(pass, run.Backoff{Min: 200 * time.Millisecond, Max: time.Minute}, func(ctx context.Context) error { return s.writeAll(ctx, all) })
		}
		select {
		case <-ctx.Done():
		case <-changed:
		}
		cancel()
		<-stop
		if ctx.Err() != nil {
			return nil
		}
	}
}

// A write is one status to apply.
type write struct {
	kind      string
	resource  schema.GroupVersionResource
	name      mesh.Name
	status    map[string]any
	exclusive string // the version of the object that it was made for; "" is any
}

// writeAll writes every status that the object does not have yet, and returns
// an error when one of them should be tried again.
func (s *StatusWriter) writeAll(ctx context.Context, all []compile.Status) error {
	var failed error
	for _, w := range s.due(all) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := s.apply(ctx, w); err != nil && ctx.Err() == nil {
			if failed == nil && !apierrors.IsConflict(err) {
				s.Log.Error("cannot write a status; what it is about is in force all the same", "kind", w.kind, "namespace", w.name.Namespace,
					"name", w.name.Name, "error", err, "do", remedy(err))
			}
			failed = err
		}
	}
	return failed
}

// due compares what the objects have with what they should.
func (s *StatusWriter) due(all []compile.Status) []write {
	now := time.Now
	if s.Now != nil {
		now = s.Now
	}
	want := map[statusKey]compile.Status{}
	for _, st := range all {
		want[statusKey{st.Kind, st.Name}] = st
	}
	var out []write
	for _, o := range s.Watcher.optional {
		_, resource, ok := o.current()
		if !ok || o.shape == shapeNone {
			continue
		}
		for _, u := range o.objects() {
			name := mesh.Name{Namespace: u.GetNamespace(), Name: u.GetName()}
			st, judged := want[statusKey{o.name, name}]
			status, exclusive, differ := o.shape.merge(u, st, judged, now())
			if !differ {
				continue
			}
			w := write{kind: o.name, resource: resource, name: name, status: status}
			if exclusive {
				w.exclusive = u.GetResourceVersion()
			}
			out = append(out, w)
		}
	}
	slices.SortStableFunc(out, func(a, b write) int { return a.name.Compare(b.name) })
	return append(out, s.services(want, now())...)
}

// apply applies one status, unless the object is gone.
func (s *StatusWriter) apply(ctx context.Context, w write) error {
	meta := map[string]any{"name": w.name.Name}
	if w.name.Namespace != "" {
		meta["namespace"] = w.name.Namespace
	}
	if w.exclusive != "" {
		meta["resourceVersion"] = w.exclusive
	}
	patch := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": w.resource.GroupVersion().String(), "kind": w.kind, "metadata": meta, "status": w.status,
	}}
	_, err := s.Dynamic.Resource(w.resource).Namespace(w.name.Namespace).
		ApplyStatus(ctx, w.name.Name, patch, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	if apierrors.IsNotFound(err) {
		return nil // deleted meanwhile
	}
	return err
}

// merge returns the status that the object should have, whether others write
// to the same list, and whether it has another. What compile has not judged
// keeps what it has, except for our entries in lists that we share.
func (shape statusShape) merge(u *unstructured.Unstructured, st compile.Status, judged bool, now time.Time) (status map[string]any, exclusive, differ bool) {
	switch shape {
	case shapeParents, shapeAncestors:
		field, ref := "parents", "parentRef"
		if shape == shapeAncestors {
			field, ref = "ancestors", "ancestorRef"
		}
		entries, differ := mergeEntries(u, field, ref, st, now)
		return map[string]any{field: entries}, true, differ
	case shapeGateway:
		if judged {
			status, differ := mergeGateway(u, st, now)
			return status, false, differ
		}
	case shapeConditions, shapeServiceEntry:
		if judged {
			conditions, differ := mergeConditions(u, st, now)
			status := map[string]any{"conditions": conditions}
			if shape == shapeServiceEntry {
				have, _, _ := unstructured.NestedSlice(u.Object, "status", "addresses")
				given := []any{}
				for _, a := range st.HostAddresses {
					given = append(given, map[string]any{"host": string(a.Host), "value": a.Address.String()})
				}
				status["addresses"], differ = given, differ || !sameSet(have, given)
			}
			if u.GroupVersionKind().Group != "gateway.networking.k8s.io" {
				status["observedGeneration"] = st.Generation
			}
			return status, false, differ
		}
	}
	return nil, false, false
}

// services returns the conditions of services that are to be written: those
// that compile says, and none where there is one of ours that it does not.
func (s *StatusWriter) services(want map[statusKey]compile.Status, now time.Time) []write {
	var out []write
	for _, svc := range list[*corev1.Service](s.Watcher.services) {
		name := mesh.Name{Namespace: svc.Namespace, Name: svc.Name}
		st := want[statusKey{compile.KindService, name}]
		var have []any
		for _, c := range svc.Status.Conditions {
			if c.Type == compile.WaypointBound {
				m, err := plain(c)
				if err != nil {
					continue
				}
				have = append(have, m)
			}
		}
		next := conditions(have, st.Conditions, svc.Generation, now)
		if reflect.DeepEqual(normal(have), normal(next)) {
			continue
		}
		if len(next) == 0 {
			if s.swept[name.String()] == svc.ResourceVersion {
				continue
			}
			s.swept[name.String()] = svc.ResourceVersion
		}
		out = append(out, write{kind: "Service", resource: corev1.SchemeGroupVersion.WithResource("services"), name: name, status: map[string]any{"conditions": next}})
	}
	slices.SortFunc(out, func(a, b write) int { return a.name.Compare(b.name) })
	return out
}

// conditions returns the conditions to write where there are those of have. A
// time of transition is kept while the condition's status does not change.
func conditions(have []any, want []compile.Condition, generation int64, now time.Time) []any {
	old := map[string]map[string]any{}
	for _, h := range have {
		if c, ok := h.(map[string]any); ok {
			typ, _ := c["type"].(string)
			old[typ] = c
		}
	}
	out := []any{}
	for _, c := range want {
		next := map[string]any{
			"type": c.Type, "status": "False", "reason": c.Reason, "message": c.Message,
			"observedGeneration": generation,
			"lastTransitionTime": now.UTC().Format(time.RFC3339),
		}
		if c.OK {
			next["status"] = "True"
		}
		was := old[c.Type]
		if at, ok := was["lastTransitionTime"].(string); ok && was["status"] == next["status"] {
			next["lastTransitionTime"] = at
		}
		out = append(out, next)
	}
	return out
}

// ours reports whether the conditions of a type are written here.
func ours(typ string) bool {
	return slices.Contains([]string{compile.ZtunnelAccepted, compile.WaypointAccepted, compile.Accepted, compile.ResolvedRefs, compile.Programmed, compile.PartiallyInvalid, compile.WaypointBound}, typ)
}

// mergeConditions returns the object's conditions with ours put in, and
// whether that changes anything. Conditions of other types are kept: the list
// is one field, and has one owner.
func mergeConditions(obj *unstructured.Unstructured, st compile.Status, now time.Time) (out []any, differ bool) {
	all, _, _ := unstructured.NestedSlice(obj.Object, "status", "conditions")
	var have []any
	for _, h := range all {
		c, _ := h.(map[string]any)
		if typ, _ := c["type"].(string); ours(typ) {
			have = append(have, h)
			continue
		}
		out = append(out, h)
	}
	next := conditions(have, st.Conditions, st.Generation, now)
	return append(out, next...), !sameSet(have, next)
}

// mergeEntries returns the entries of a list in the object's status with those
// of this controller put in, and whether that changes them. The entries of
// other controllers are kept.
func mergeEntries(obj *unstructured.Unstructured, field, ref string, st compile.Status, now time.Time) (out []any, differ bool) {
	all, _, _ := unstructured.NestedSlice(obj.Object, "status", field)
	var have []any
	out = []any{}
	for _, h := range all {
		if e, ok := h.(map[string]any); ok && e["controllerName"] == compile.ControllerName {
			have = append(have, e)
			continue
		}
		out = append(out, h)
	}
	next := []any{}
	for _, p := range st.Parents {
		parent, err := plain(p.Parent)
		if err != nil {
			continue // it is a struct of texts and numbers
		}
		var were []any
		for _, h := range have {
			if e := h.(map[string]any); reflect.DeepEqual(normal(e[ref]), normal(parent)) {
				were, _, _ = unstructured.NestedSlice(e, "conditions")
			}
		}
		next = append(next, map[string]any{
			ref: parent, "controllerName": compile.ControllerName,
			"conditions": conditions(were, p.Conditions, st.Generation, now),
		})
	}
	return append(out, next...), !sameSet(have, next)
}

// mergeGateway returns the status of a Gateway, and whether it has another.
func mergeGateway(obj *unstructured.Unstructured, st compile.Status, now time.Time) (status map[string]any, differ bool) {
	all, differ := mergeConditions(obj, st, now)
	addresses := []any{}
	for _, a := range st.Addresses {
		typ := "IPAddress"
		if _, err := netip.ParseAddr(a); err != nil {
			typ = "Hostname"
		}
		addresses = append(addresses, map[string]any{"type": typ, "value": a})
	}
	haveAddresses, _, _ := unstructured.NestedSlice(obj.Object, "status", "addresses")
	haveListeners, _, _ := unstructured.NestedSlice(obj.Object, "status", "listeners")
	listeners := []any{}
	for _, l := range st.Listeners {
		var were []any
		for _, h := range haveListeners {
			if e, ok := h.(map[string]any); ok && e["name"] == l.Name {
				were, _, _ = unstructured.NestedSlice(e, "conditions")
			}
		}
		listeners = append(listeners, map[string]any{
			"name": l.Name, "attachedRoutes": int64(l.AttachedRoutes), "supportedKinds": []any{},
			"conditions": conditions(were, l.Conditions, st.Generation, now),
		})
	}
	differ = differ || !sameSet(haveAddresses, addresses) || !sameSet(haveListeners, listeners)
	return map[string]any{"conditions": all, "addresses": addresses, "listeners": listeners}, differ
}

// plain returns v as its JSON reads.
func plain(v any) (map[string]any, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	out := map[string]any{}
	return out, json.Unmarshal(b, &out)
}

// normal returns v as its JSON reads, so that numbers of all types compare.
func normal(v any) any {
	b, err := json.Marshal(v)
	if err != nil {
		return nil
	}
	var out any
	if json.Unmarshal(b, &out) != nil {
		return nil
	}
	if l, ok := out.([]any); ok && len(l) == 0 {
		return nil
	}
	return out
}

// sameSet reports whether two lists hold the same, in any order.
func sameSet(a, b []any) bool {
	texts := func(list []any) []string {
		set := map[string]bool{}
		for _, x := range list {
			if t, err := json.Marshal(normal(x)); err == nil {
				set[string(t)] = true
			}
		}
		return slices.Sorted(maps.Keys(set))
	}
	return len(a) == len(b) && slices.Equal(texts(a), texts(b))
}
