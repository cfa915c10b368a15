package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"

	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/internal/run"
)

// fieldManager owns the fields that are written here.
const fieldManager = "weft-control"

// A StatusWriter writes what compile says of each policy into its status. Run
// it under leader election.
type StatusWriter struct {
	Dynamic dynamic.Interface
	Watcher *Watcher
	Log     *slog.Logger
	Now     func() time.Time // for transition times; nil is time.Now
}

// Run writes statuses until ctx ends.
func (s *StatusWriter) Run(ctx context.Context) error {
	for {
		all, changed := s.Watcher.statuses.latest()
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
		_ = run.Retry(pass, run.Backoff{Min: time.Second, Max: time.Minute}, func(ctx context.Context) error { return s.writeAll(ctx, all) })
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

// writeAll writes every status that the object does not have yet, and returns
// an error when one of them should be tried again.
func (s *StatusWriter) writeAll(ctx context.Context, all []compile.Status) error {
	var failed error
	for _, st := range all {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := s.write(ctx, st); err != nil && ctx.Err() == nil {
			if failed == nil {
				s.Log.Error("cannot write a status; the policy is enforced all the same", "kind", st.Kind, "namespace", st.Name.Namespace,
					"name", st.Name.Name, "error", err, "do", remedy(err))
			}
			failed = err
		}
	}
	return failed
}

// write applies one status, unless the object has it or is gone.
func (s *StatusWriter) write(ctx context.Context, st compile.Status) error {
	inf, resource, err := s.Watcher.kind(st.Kind)
	if err != nil {
		return err
	}
	obj, ok := get[*unstructured.Unstructured](inf.informer, st.Name.String())
	if !ok {
		return nil
	}
	now := time.Now
	if s.Now != nil {
		now = s.Now
	}
	conditions, differ := mergeConditions(obj, st, now())
	if !differ {
		return nil
	}
	patch := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": resource.GroupVersion().String(),
		"kind":       st.Kind,
		"metadata":   map[string]any{"name": st.Name.Name, "namespace": st.Name.Namespace},
		"status":     map[string]any{"conditions": conditions, "observedGeneration": st.Generation},
	}}
	_, err = s.Dynamic.Resource(resource).Namespace(st.Name.Namespace).
		ApplyStatus(ctx, st.Name.Name, patch, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	if apierrors.IsNotFound(err) {
		return nil // deleted meanwhile
	}
	return err
}

// kind returns the informer of a kind that has a status.
func (w *Watcher) kind(kind string) (*optionalInformer, schema.GroupVersionResource, error) {
	switch kind {
	case compile.KindAuthorizationPolicy:
		return w.policies, authorizationPolicies, nil
	case compile.KindPeerAuthentication:
		return w.peers, peerAuthentications, nil
	}
	return nil, schema.GroupVersionResource{}, errors.New("no status is written for kind " + kind)
}

// mergeConditions returns the object's conditions with ours put in, and
// whether that changes anything. Conditions of other types are kept: the list
// is one field, and has one owner. A time of transition is kept while the
// condition's status does not change.
func mergeConditions(obj *unstructured.Unstructured, st compile.Status, now time.Time) (out []any, differ bool) {
	have, _, _ := unstructured.NestedSlice(obj.Object, "status", "conditions")
	ours := map[string]bool{compile.ZtunnelAccepted: true, compile.WaypointAccepted: true}
	old := map[string]map[string]any{}
	for _, h := range have {
		c, _ := h.(map[string]any)
		typ, _ := c["type"].(string)
		if ours[typ] {
			old[typ] = c
			continue
		}
		out = append(out, h)
	}
	differ = len(old) != len(st.Conditions)
	for _, c := range st.Conditions {
		next := map[string]any{
			"type": c.Type, "status": "False", "reason": c.Reason, "message": c.Message,
			"observedGeneration": st.Generation,
			"lastTransitionTime": now.UTC().Format(time.RFC3339),
		}
		if c.OK {
			next["status"] = "True"
		}
		was := old[c.Type]
		if at, ok := was["lastTransitionTime"].(string); ok && was["status"] == next["status"] {
			next["lastTransitionTime"] = at
		}
		for _, k := range []string{"status", "reason", "message"} {
			differ = differ || was[k] != next[k]
		}
		differ = differ || fmt.Sprint(was["observedGeneration"]) != fmt.Sprint(st.Generation)
		out = append(out, next)
	}
	return out, differ
}
