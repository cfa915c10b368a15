package kube

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"reflect"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	coreinformers "k8s.io/client-go/informers/core/v1"
	discoveryinformers "k8s.io/client-go/informers/discovery/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/mesh"
)

// makeInformers makes all informers and wires their events to the queue.
func (w *Watcher) makeInformers() {
	c := w.cfg.Client
	w.pods = coreinformers.NewPodInformer(c, "", 0, cache.Indexers{indexRuns: runsKeys})
	w.nodes = coreinformers.NewNodeInformer(c, 0, nil)
	w.services = coreinformers.NewServiceInformer(c, "", 0, nil)
	w.namespaces = coreinformers.NewNamespaceInformer(c, 0, nil)
	// Slices derived from a selector are most of all slices and of all
	// events, and say nothing that pods and services do not.
	w.slices = discoveryinformers.NewFilteredEndpointSliceInformer(c, "", 0, nil, func(o *metav1.ListOptions) {
		o.LabelSelector = discoveryv1.LabelManagedBy + "!=" + compile.ManagedBySelector
	})
	world := func(any, any) { w.queue.addWorld() }
	w.wire(w.pods, "Pod", func(before, after any) {
		for _, o := range []any{before, after} {
			if p, ok := o.(*corev1.Pod); ok {
				w.queue.addPod(mesh.Name{Namespace: p.Namespace, Name: p.Name}, compile.PodAddrs(p))
				if compile.IsWaypointPod(p) {
					w.queue.addWorld()
				}
			}
		}
	})
	w.wire(w.nodes, "Node", world)
	w.wire(w.services, "Service", world)
	w.wire(w.slices, "EndpointSlice", world)
	w.wire(w.namespaces, "Namespace", world)
	for _, k := range kinds() {
		o := w.newOptionalInformer(k)
		for _, inf := range o.informers {
			w.wire(inf, k.name, world)
		}
		w.optional = append(w.optional, o)
	}
}

// wire strips inf's objects, and calls changed with the object before and
// after every event that changed what is left of it. Either may be nil.
func (w *Watcher) wire(inf cache.SharedIndexInformer, kind string, changed func(before, after any)) {
	event := func(name string, before, after any) {
		w.events.WithLabelValues(kind, name).Inc()
		changed(before, after)
	}
	// The three calls fail only on an informer that has been started or
	// stopped; this one was made a moment ago.
	_ = inf.SetTransform(strip)
	_ = inf.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) { w.outage.report("watching "+kind, err) })
	_, _ = inf.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(o any) { event("add", nil, o) },
		UpdateFunc: func(before, after any) {
			if !sameButVersion(before, after) {
				event("update", before, after)
			}
		},
		DeleteFunc: func(o any) {
			if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
				o = gone.Obj
			}
			event("delete", o, nil)
		},
	})
}

// sameButVersion reports whether two stripped objects differ in nothing but
// their resource version and status: the statuses are what is written here.
// Those of pods are read here, and stay.
func sameButVersion(a, b any) bool {
	x, y := unversioned(a), unversioned(b)
	return x != nil && reflect.DeepEqual(x, y)
}

// unversioned returns a copy of the object without its resource version, and
// of a kind whose status is written here without its status.
func unversioned(o any) runtime.Object {
	obj, ok := o.(runtime.Object)
	if !ok {
		return nil
	}
	obj = obj.DeepCopyObject()
	m, err := meta.Accessor(obj)
	if err != nil {
		return nil
	}
	m.SetResourceVersion("")
	switch o := obj.(type) {
	case *unstructured.Unstructured:
		unstructured.RemoveNestedField(o.Object, "status")
	case *corev1.Service:
		o.Status.Conditions = nil
	}
	return obj
}

// An optionalInformer watches a kind that may not be installed. While it is
// not, there is nothing of that kind.
type optionalInformer struct {
	kind
	client    dynamic.Interface
	log       *slog.Logger
	outage    *outage
	informers []cache.SharedIndexInformer // one for each version; at most one is run

	mu     sync.Mutex
	absent bool
	served int // the version that is read, as an index; -1 is none yet
}

func (w *Watcher) newOptionalInformer(k kind) *optionalInformer {
	o := &optionalInformer{kind: k, client: w.cfg.Dynamic, log: w.cfg.Log, outage: &w.outage, served: -1}
	for _, v := range k.versions {
		o.informers = append(o.informers, dynamicinformer.NewFilteredDynamicInformer(w.cfg.Dynamic, k.in(v), "", 0, cache.Indexers{}, nil).Informer())
	}
	return o
}

// current returns the informer that is run, and the resource that it watches.
func (o *optionalInformer) current() (cache.SharedIndexInformer, schema.GroupVersionResource, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.served < 0 {
		return nil, schema.GroupVersionResource{}, false
	}
	return o.informers[o.served], o.in(o.versions[o.served]), true
}

// objects returns all objects of the kind, in no order.
func (o *optionalInformer) objects() []*unstructured.Unstructured {
	inf, _, ok := o.current()
	if !ok {
		return nil
	}
	return list[*unstructured.Unstructured](inf)
}

// run waits until the kind is installed, then runs the informer.
func (o *optionalInformer) run(ctx context.Context) error {
	wait := run.Backoff{Min: time.Second, Max: 2 * time.Second}
	if !o.vital {
		wait.Max = 5 * time.Second // there are many, and they are asked for ever
	}
	err := run.Retry(ctx, wait, func(ctx context.Context) error {
		err := o.find(ctx)
		missing := apierrors.IsNotFound(err)
		if missing && o.vital {
			// Objects of a version that is not read here are policies all
			// the same: nobody is answered as if there were none.
			if older, ask := o.older(ctx); older || ask != nil {
				missing, err = false, cmp.Or(ask, errOlderVersion)
			}
		}
		level := slog.LevelInfo
		if o.vital {
			level = slog.LevelWarn
		}
		if was := o.setAbsent(missing); missing && !was {
			o.log.Log(ctx, level, "kind is not installed and nothing of it is enforced; install its custom resource definition to use it",
				"resource", o.in("").GroupResource().String())
		} else if was && err == nil {
			o.log.Info("kind is installed now", "resource", o.in("").GroupResource().String())
		}
		if err != nil && !missing {
			o.outage.report("watching "+o.resource, err)
		}
		return err
	})
	if err != nil {
		return nil // ctx has ended
	}
	inf, _, _ := o.current()
	inf.RunWithContext(ctx)
	return nil
}

// find looks for the first version that is served, and settles on it.
func (o *optionalInformer) find(ctx context.Context) error {
	var err error
	for i, v := range o.versions {
		if _, err = o.client.Resource(o.in(v)).List(ctx, metav1.ListOptions{Limit: 1}); err == nil {
			o.mu.Lock()
			o.served = i
			o.mu.Unlock()
			return nil
		}
		if !apierrors.IsNotFound(err) {
			return err
		}
	}
	return err
}

// olderVersion is the one that clusters with old definitions serve alone.
const olderVersion = "v1beta1"

// errOlderVersion says that there may be objects that are not read here.
var errOlderVersion = errors.New("the cluster serves the kind as " + olderVersion + " only")

// older reports whether the cluster serves the kind in an older version. An
// error says that it could not be asked.
func (o *optionalInformer) older(ctx context.Context) (bool, error) {
	_, err := o.client.Resource(o.in(olderVersion)).List(ctx, metav1.ListOptions{Limit: 1})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// setAbsent returns what was set before.
func (o *optionalInformer) setAbsent(absent bool) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	was := o.absent
	o.absent = absent
	return was
}

// known reports whether all objects of the kind are known: none, when it is
// not installed. An API server that does not answer, or refuses, is not known.
func (o *optionalInformer) known() bool {
	o.mu.Lock()
	absent, served := o.absent, o.served
	o.mu.Unlock()
	return absent || served >= 0 && o.informers[served].HasSynced()
}

// An outage logs failing calls of the API server: the first of each purpose
// at once, and then now and again while they last.
type outage struct {
	log   *slog.Logger
	every time.Duration

	mu   sync.Mutex
	last map[string]time.Time
}

// report logs that what is done for the given purpose failed with err, and
// what to do.
func (o *outage) report(purpose string, err error) {
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, context.Canceled) || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return // the ordinary end of a watch; the informer starts another
	}
	o.mu.Lock()
	if o.last == nil {
		o.last = map[string]time.Time{}
	}
	quiet := time.Since(o.last[purpose]) < o.every
	if !quiet {
		o.last[purpose] = time.Now()
	}
	o.mu.Unlock()
	if quiet {
		return
	}
	o.log.Error("cannot use the Kubernetes API; what was read last stays in force", "for", purpose, "error", err, "do", remedy(err))
}

// remedy says what the person on call can do about err.
func remedy(err error) string {
	switch {
	case errors.Is(err, errOlderVersion):
		return "replace its custom resource definition by the one of Weft's chart, which serves v1 too; no proxy is answered until then"
	case apierrors.IsForbidden(err):
		return "the ClusterRole of weft-control lacks a rule: apply the chart of this version again"
	case apierrors.IsUnauthorized(err):
		return "the token of weft-control is expired or not accepted: check the API server's clock and the pod's projected token, then restart weft-control"
	}
	return "check that the API server is up and reachable from this pod; it is tried again until then"
}
