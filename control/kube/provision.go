package kube

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/tools/cache"

	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/control/provision"
	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/mesh"
)

// waypointClass is the GatewayClass that is made for users.
const waypointClass = "weft-waypoint"

// managedBy selects the objects that are made for Gateways.
const managedBy = "gateway.istio.io/managed=istio.io-mesh-controller"

// A Provisioner runs the proxies that Gateways ask for: it applies the objects
// that run them, repairs those that are changed, and takes back those that are
// no longer wanted. An object of the name that belongs to somebody else is left
// alone. It also makes the GatewayClass weft-waypoint. Run it under leader
// election.
type Provisioner struct {
	Dynamic dynamic.Interface
	Watcher *Watcher
	Log     *slog.Logger
}

// An applied is what was applied last, and what the API server made of it.
type applied struct {
	want       [sha256.Size]byte
	generation int64
	version    string
}

// A provisioning is one Run of a Provisioner.
type provisioning struct {
	*Provisioner
	informers map[schema.GroupVersionResource]cache.SharedIndexInformer
	done      map[string]applied // by resource and name
}

// Run provisions until ctx ends.
func (p *Provisioner) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-p.Watcher.Synced():
	}
	r := &provisioning{Provisioner: p, informers: map[schema.GroupVersionResource]cache.SharedIndexInformer{}, done: map[string]applied{}}
	wake := make(chan struct{}, 1)
	var tasks []run.Task
	for _, gvr := range provision.Kinds() {
		inf := dynamicinformer.NewFilteredDynamicInformer(p.Dynamic, gvr, "", 0, cache.Indexers{}, func(o *metav1.ListOptions) { o.LabelSelector = managedBy }).Informer()
		_ = inf.SetTransform(strip) // these fail only once the informer has started
		_ = inf.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
			p.Watcher.outage.report("watching the "+gvr.Resource+" of waypoints", err)
		})
		_, _ = inf.AddEventHandler(signalling(wake))
		r.informers[gvr] = inf
		tasks = append(tasks, runInformer(inf))
	}
	return run.All(ctx, append(tasks, func(ctx context.Context) error { return r.loop(ctx, wake) })...)
}

// signalling wakes whoever provisions when an object is changed by others.
func signalling(wake chan<- struct{}) cache.ResourceEventHandlerFuncs {
	signal := func() {
		select {
		case wake <- struct{}{}:
		default:
		}
	}
	return cache.ResourceEventHandlerFuncs{
		UpdateFunc: func(before, after any) {
			if !sameButVersion(before, after) {
				signal()
			}
		},
		DeleteFunc: func(any) { signal() },
	}
}

// classEvery is how often the GatewayClass is looked for: that its kind has
// been installed is announced by nobody.
const classEvery = 2 * time.Second

func (r *provisioning) loop(ctx context.Context, wake <-chan struct{}) error {
	for _, inf := range r.informers {
		if !cache.WaitForCacheSync(ctx.Done(), inf.HasSynced) {
			return nil
		}
	}
	tick := time.NewTicker(classEvery)
	defer tick.Stop()
	wait := classEvery / 4
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		_, objects, changed := r.Watcher.statuses.latest()
		if err := r.pass(ctx, objects); err == nil {
			wait = classEvery / 4
		} else if ctx.Err() == nil {
			r.Watcher.outage.report("running waypoints", err)
			retry.Reset(wait)
			wait = min(2*wait, time.Minute)
		}
	idle:
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
				break idle
			case <-wake:
				break idle
			case <-retry.C:
				break idle
			case <-tick.C:
				r.class(ctx)
			}
		}
	}
}

// pass makes the cluster have what is wanted. It goes on after a failure, and
// returns all of them.
func (r *provisioning) pass(ctx context.Context, objects []*unstructured.Unstructured) error {
	var errs []error
	want := map[string]bool{}
	followed := map[string]bool{} // Gateways, by the UID
	broken := map[mesh.Name]fault{}
	for _, o := range objects {
		followed[owner(o)] = true
		gvr, err := r.resource(o)
		if err == nil {
			want[key(gvr, o)] = true
			err = r.apply(ctx, gvr, o)
		}
		errs = append(errs, err)
		name := mesh.Name{Namespace: o.GetNamespace(), Name: o.GetName()} // also the Gateway's
		if f, ok := faultOf(err); ok && broken[name] == (fault{}) {
			broken[name] = f
		}
	}
	if ctx.Err() == nil && r.Watcher.faults.set(broken) {
		r.Watcher.queue.addWorld() // for the statuses
	}
	for _, gvr := range provision.Kinds() {
		for _, o := range list[*unstructured.Unstructured](r.informers[gvr]) {
			if !want[key(gvr, o)] && followed[owner(o)] {
				errs = append(errs, r.remove(ctx, gvr, o))
			}
		}
	}
	return errors.Join(errs...)
}

// resource returns the resource of o's kind.
func (r *provisioning) resource(o *unstructured.Unstructured) (schema.GroupVersionResource, error) {
	gvk := o.GroupVersionKind()
	plural := strings.ToLower(gvk.Kind) + "s" // true of all that are made here
	for _, gvr := range provision.Kinds() {
		if gvr.Resource == plural && gvr.Group == gvk.Group {
			return gvr, nil
		}
	}
	return schema.GroupVersionResource{}, fmt.Errorf("nothing of kind %v is made for Gateways", gvk)
}

func key(gvr schema.GroupVersionResource, o *unstructured.Unstructured) string {
	return gvr.Resource + "/" + o.GetNamespace() + "/" + o.GetName()
}

// apply applies o, unless it is there as it was applied last.
func (r *provisioning) apply(ctx context.Context, gvr schema.GroupVersionResource, o *unstructured.Unstructured) error {
	b, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("encode %s: %w", key(gvr, o), err)
	}
	want := sha256.Sum256(b)
	live, there := get[*unstructured.Unstructured](r.informers[gvr], o.GetNamespace()+"/"+o.GetName())
	if last, ok := r.done[key(gvr, o)]; ok && there && last.want == want && last.holds(live) && owner(live) == owner(o) && covers(live.GetLabels(), o.GetLabels()) {
		return nil
	}
	client := r.Dynamic.Resource(gvr).Namespace(o.GetNamespace())
	if !there {
		// Of the labelled ones we would know.
		if live, err = client.Get(ctx, o.GetName(), metav1.GetOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("read %s: %w", key(gvr, o), err)
		}
		there = err == nil
	}
	if there && owner(live) != owner(o) {
		return fmt.Errorf("%s is there and does not belong to the Gateway of that name: %w", key(gvr, o), errTaken)
	}
	got, err := client.Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	if err != nil {
		return fmt.Errorf("apply %s: %w", key(gvr, o), err)
	}
	if !there {
		r.Log.Info("made for a Gateway", "object", key(gvr, o))
	}
	r.done[key(gvr, o)] = applied{want: want, generation: got.GetGeneration(), version: got.GetResourceVersion()}
	return nil
}

// holds reports whether nobody has changed live since it was applied. Kinds
// without a generation change for no other reason.
func (a applied) holds(live *unstructured.Unstructured) bool {
	if a.generation != 0 {
		return live.GetGeneration() == a.generation
	}
	return live.GetResourceVersion() == a.version
}

// covers reports whether have has everything of want.
func covers(have, want map[string]string) bool {
	for k, v := range want {
		if have[k] != v {
			return false
		}
	}
	return true
}

// owner returns the UID of the Gateway that o belongs to, or "".
func owner(o *unstructured.Unstructured) string {
	c := metav1.GetControllerOf(o)
	if c == nil || c.Kind != compile.KindGateway {
		return ""
	}
	return string(c.UID)
}

// remove deletes what a Gateway no longer asks for. It is not called for
// Gateways that are gone, whose objects Kubernetes collects, nor for those that
// are not understood at the moment: what runs for them goes on.
func (r *provisioning) remove(ctx context.Context, gvr schema.GroupVersionResource, o *unstructured.Unstructured) error {
	if o.GetDeletionTimestamp() != nil {
		return nil
	}
	version := o.GetResourceVersion()
	err := r.Dynamic.Resource(gvr).Namespace(o.GetNamespace()).Delete(ctx, o.GetName(), metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &version}})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete %s: %w", key(gvr, o), err)
	}
	delete(r.done, key(gvr, o))
	r.Log.Info("took back what a Gateway no longer asks for", "object", key(gvr, o))
	return nil
}

// class makes the GatewayClass, where the kind is installed and it is not there.
func (r *provisioning) class(ctx context.Context) {
	i := slices.IndexFunc(r.Watcher.optional, func(o *optionalInformer) bool { return o.name == compile.KindGatewayClass })
	inf, gvr, ok := r.Watcher.optional[i].current()
	if !ok || !inf.HasSynced() {
		return
	}
	if _, there := get[*unstructured.Unstructured](inf, waypointClass); there {
		return
	}
	class := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": gvr.GroupVersion().String(), "kind": compile.KindGatewayClass,
		"metadata": map[string]any{"name": waypointClass, "labels": map[string]any{labelManagedBy: managedByWeft}},
		"spec":     map[string]any{"controllerName": compile.ControllerName, "description": "a proxy of Weft in front of services"},
	}}
	_, err := r.Dynamic.Resource(gvr).Create(ctx, class, metav1.CreateOptions{FieldManager: fieldManager})
	switch {
	case err == nil:
		r.Log.Info("made the GatewayClass", "name", waypointClass)
	case !apierrors.IsAlreadyExists(err):
		r.Watcher.outage.report("making the GatewayClass", err)
	}
}

// provisioned returns the objects that run the proxies of Gateways, and edits
// the statuses of those Gateways that cannot be provisioned as they are.
func provisioned(s provision.Settings, w *compile.World) []*unstructured.Unstructured {
	var out []*unstructured.Unstructured
	for _, m := range w.Managed {
		objects, err := provision.Waypoint(s, m)
		var all []*unstructured.Unstructured
		if err == nil {
			all, err = objects.List()
		}
		if err != nil {
			refuse(w.Statuses, m.Gateway.Name, err)
			continue
		}
		out = append(out, all...)
	}
	return out
}
