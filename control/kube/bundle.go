package kube

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/weft-mesh/weft/internal/run"
)

// The trust bundle that every namespace gets. The name is the one that
// workloads and other implementations of the mesh mount.
const (
	BundleName = "istio-ca-root-cert"
	BundleKey  = "root-cert.pem"
)

// The label by which objects are known to be Weft's to change.
const (
	labelManagedBy = "app.kubernetes.io/managed-by"
	managedByWeft  = "weft"
)

// A BundleWriter keeps the mesh's trust bundle in every namespace. It changes
// only ConfigMaps that carry its label. Run it under leader election.
type BundleWriter struct {
	Client  kubernetes.Interface
	Watcher *Watcher      // for the namespaces
	Roots   func() []byte // the trust bundle, PEM; called at every write
	Log     *slog.Logger

	mu     sync.Mutex
	warned map[string]bool
}

// Run writes bundles, and repairs those that are changed or deleted, until
// ctx ends.
func (b *BundleWriter) Run(ctx context.Context) error {
	queue := workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](50*time.Millisecond, 30*time.Second))
	bundles := coreinformers.NewFilteredConfigMapInformer(b.Client, "", 0, nil, func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector("metadata.name", BundleName).String()
	})
	_ = bundles.SetTransform(strip) // fails only once the informer has started
	_ = bundles.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		b.Watcher.outage.report("watching ConfigMap", err)
	})
	onMap, err := bundles.AddEventHandler(enqueue(queue, func(o metav1.Object) string { return o.GetNamespace() }))
	if err != nil {
		return fmt.Errorf("watch trust bundles: %w", err)
	}
	onNamespace, err := b.Watcher.namespaces.AddEventHandler(enqueue(queue, metav1.Object.GetName))
	if err != nil {
		return fmt.Errorf("watch namespaces: %w", err)
	}
	defer func() { _ = b.Watcher.namespaces.RemoveEventHandler(onNamespace) }()

	work := func(ctx context.Context) error {
		defer queue.ShutDown()
		if !cache.WaitForCacheSync(ctx.Done(), onMap.HasSynced, onNamespace.HasSynced) {
			return nil
		}
		stop := context.AfterFunc(ctx, queue.ShutDown)
		defer stop()
		for {
			ns, down := queue.Get()
			if down {
				return nil
			}
			b.step(ctx, queue, bundles, ns)
		}
	}
	return run.All(ctx, runInformer(bundles), work)
}

// enqueue returns a handler that adds key's result for every event.
func enqueue(queue workqueue.TypedRateLimitingInterface[string], key func(metav1.Object) string) cache.ResourceEventHandler {
	add := func(o any) {
		if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
			o = gone.Obj
		}
		if m, ok := o.(metav1.Object); ok {
			queue.Add(key(m))
		}
	}
	return cache.ResourceEventHandlerFuncs{AddFunc: add, DeleteFunc: add, UpdateFunc: func(_, o any) { add(o) }}
}

// step brings one namespace in order, or puts it back for later.
func (b *BundleWriter) step(ctx context.Context, queue workqueue.TypedRateLimitingInterface[string], bundles cache.SharedIndexInformer, ns string) {
	defer queue.Done(ns)
	namespace, ok := get[*corev1.Namespace](b.Watcher.namespaces, ns)
	if !ok || namespace.DeletionTimestamp != nil || namespace.Status.Phase == corev1.NamespaceTerminating {
		queue.Forget(ns)
		b.warnedOf(ns, false)
		return
	}
	have, _ := get[*corev1.ConfigMap](bundles, ns+"/"+BundleName)
	err := b.write(ctx, ns, have)
	switch {
	case err == nil:
		queue.Forget(ns)
	case ctx.Err() != nil:
	default:
		if !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) { // those two: the informer is a moment behind
			b.Log.Error("cannot write the trust bundle; proxies in the namespace cannot verify the control service until it is there",
				"namespace", ns, "configmap", BundleName, "error", err, "do", remedy(err))
		}
		queue.AddRateLimited(ns)
	}
}

// write creates or repairs the bundle of a namespace. have is what is there,
// or nil.
func (b *BundleWriter) write(ctx context.Context, ns string, have *corev1.ConfigMap) error {
	want := map[string]string{BundleKey: string(b.Roots())}
	if have == nil {
		_, err := b.Client.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: BundleName, Namespace: ns, Labels: map[string]string{labelManagedBy: managedByWeft}},
			Data:       want,
		}, metav1.CreateOptions{FieldManager: fieldManager})
		return err
	}
	if maps.Equal(have.Data, want) && len(have.BinaryData) == 0 {
		b.warnedOf(ns, false)
		return nil
	}
	if have.Labels[labelManagedBy] != managedByWeft {
		if !b.warnedOf(ns, true) {
			b.Log.Warn("trust bundle is not Weft's and is left alone: proxies that mount it do not trust this mesh",
				"namespace", ns, "configmap", BundleName,
				"do", "delete the ConfigMap, or label it "+labelManagedBy+"="+managedByWeft+" to have it overwritten")
		}
		return nil
	}
	b.warnedOf(ns, false)
	fixed := have.DeepCopy()
	fixed.Data, fixed.BinaryData = want, nil
	_, err := b.Client.CoreV1().ConfigMaps(ns).Update(ctx, fixed, metav1.UpdateOptions{FieldManager: fieldManager})
	if err == nil {
		b.Log.Info("repaired the trust bundle", "namespace", ns, "configmap", BundleName)
	}
	return err
}

// warnedOf notes whether the namespace's foreign bundle has been warned of,
// and returns what was noted before.
func (b *BundleWriter) warnedOf(ns string, now bool) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	was := b.warned[ns]
	if b.warned == nil {
		b.warned = map[string]bool{}
	}
	b.warned[ns] = now
	if !now {
		delete(b.warned, ns)
	}
	return was
}
