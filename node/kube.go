package node

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/weft-mesh/weft/internal/handoff"
)

// Connect makes a client of the API server: that of the kubeconfig file, or of
// the pod's service account if there is none. It does not talk to it yet.
// version names this program to the API server.
func Connect(kubeconfig, version string) (kubernetes.Interface, error) {
	rc, err := rest.InClusterConfig()
	if kubeconfig != "" {
		rc, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("find the API server: %w", err)
	}
	// A label on a namespace is a patch for each of its pods here, at once.
	rc.QPS, rc.Burst = 100, 300
	rc.UserAgent = "weft-node/" + version
	rc.ContentType = runtime.ContentTypeProtobuf // a list of pods takes a fraction of the memory of JSON
	client, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return nil, fmt.Errorf("find the API server: %w", err)
	}
	return client, nil
}

// mirrorAnnotation holds the UID under which the kubelet runs a static pod.
// The object in the API server, the mirror pod, has a UID of its own.
const mirrorAnnotation = "kubernetes.io/config.mirror"

// byUID is the name of the index of pods by UID. Of two pods of a StatefulSet
// with one name, the old one's sandbox can outlive its object.
const byUID = "uid"

// kube is the agent's view of the API server: the pods of its own node, all
// namespaces, and its own DaemonSet.
type kube struct {
	client     kubernetes.Interface
	node       string
	system     string // the namespace Weft runs in
	daemonSet  string
	log        *slog.Logger
	pods       cache.SharedIndexInformer
	namespaces cache.SharedIndexInformer
	daemonSets cache.SharedIndexInformer
	factories  []informers.SharedInformerFactory
}

// newKube prepares the informers. They start with run.
func newKube(client kubernetes.Interface, node, system, daemonSet string, log *slog.Logger) (*kube, error) {
	k := &kube{client: client, node: node, system: system, daemonSet: daemonSet, log: log}
	ofNode := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", node).String()
	}))
	all := informers.NewSharedInformerFactory(client, 0)
	own := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(system), informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, daemonSet).String()
	}))
	k.pods = ofNode.Core().V1().Pods().Informer()
	k.namespaces = all.Core().V1().Namespaces().Informer()
	k.daemonSets = own.Apps().V1().DaemonSets().Informer()
	k.factories = []informers.SharedInformerFactory{ofNode, all, own}

	if err := k.pods.AddIndexers(cache.Indexers{byUID: func(obj any) ([]string, error) {
		if p, ok := obj.(*corev1.Pod); ok {
			return []string{string(p.UID)}, nil
		}
		return nil, nil
	}}); err != nil {
		return nil, fmt.Errorf("index pods: %v", err)
	}
	for what, inf := range map[string]cache.SharedIndexInformer{"pods": k.pods, "namespaces": k.namespaces, "daemonsets": k.daemonSets} {
		if err := inf.SetTransform(strip); err != nil {
			return nil, fmt.Errorf("watch %s: %v", what, err)
		}
		if err := inf.SetWatchErrorHandlerWithContext(k.watchFailed(what)); err != nil {
			return nil, fmt.Errorf("watch %s: %v", what, err)
		}
	}
	return k, nil
}

// watchFailed logs a failure of a watch once per cause: client-go tries again
// by itself, for as long as it takes.
func (k *kube) watchFailed(what string) cache.WatchErrorHandlerWithContext {
	var last string // handlers of one informer run one at a time
	return func(ctx context.Context, _ *cache.Reflector, err error) {
		if ctx.Err() != nil || apierrors.IsResourceExpired(err) || err.Error() == last {
			return
		}
		last = err.Error()
		k.log.Error("the API server cannot be watched; captured pods stay as they are, and it is tried again", "what", what, "error", err)
	}
}

// strip drops what the agent never reads, so that its memory does not grow
// with other people's annotations.
func strip(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Pod:
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				Name: o.Name, Namespace: o.Namespace, UID: o.UID, ResourceVersion: o.ResourceVersion,
				CreationTimestamp: o.CreationTimestamp, DeletionTimestamp: o.DeletionTimestamp, Labels: only(o.Labels, modeLabel, dnsSetting),
				Annotations: only(o.Annotations, capturedAnnotation, mirrorAnnotation, existingAnnotation, dnsSetting, releaseAnnotation),
			},
			Spec:   corev1.PodSpec{NodeName: o.Spec.NodeName, HostNetwork: o.Spec.HostNetwork, ServiceAccountName: o.Spec.ServiceAccountName},
			Status: corev1.PodStatus{Phase: o.Status.Phase, PodIP: o.Status.PodIP, PodIPs: o.Status.PodIPs},
		}, nil
	case *corev1.Namespace:
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
			Name: o.Name, UID: o.UID, ResourceVersion: o.ResourceVersion, DeletionTimestamp: o.DeletionTimestamp,
			Labels: only(o.Labels, modeLabel), Annotations: only(o.Annotations, existingAnnotation),
		}}, nil
	case *appsv1.DaemonSet:
		return &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{
			Name: o.Name, Namespace: o.Namespace, UID: o.UID, ResourceVersion: o.ResourceVersion,
			CreationTimestamp: o.CreationTimestamp, DeletionTimestamp: o.DeletionTimestamp,
		}}, nil
	}
	return obj, nil
}

func only(m map[string]string, keys ...string) map[string]string {
	var out map[string]string
	for _, k := range keys {
		if v, ok := m[k]; ok {
			if out == nil {
				out = map[string]string{}
			}
			out[k] = v
		}
	}
	return out
}

// run watches until ctx ends.
func (k *kube) run(ctx context.Context) error {
	for _, f := range k.factories {
		f.StartWithContext(ctx)
	}
	<-ctx.Done()
	for _, f := range k.factories {
		f.Shutdown()
	}
	return nil
}

// synced reports whether everything was listed once.
func (k *kube) synced() bool {
	return k.pods.HasSynced() && k.namespaces.HasSynced() && k.daemonSets.HasSynced()
}

// pod returns the pod of this node with a UID, or nil.
func (k *kube) pod(uid string) *corev1.Pod {
	objs, err := k.pods.GetIndexer().ByIndex(byUID, uid)
	if err != nil || len(objs) == 0 {
		return nil
	}
	p, _ := objs[0].(*corev1.Pod)
	return p
}

// podsOf returns the pods of this node in a namespace.
func (k *kube) podsOf(namespace string) []*corev1.Pod {
	objs, err := k.pods.GetIndexer().ByIndex(cache.NamespaceIndex, namespace)
	if err != nil {
		return nil
	}
	var pods []*corev1.Pod
	for _, o := range objs {
		if p, ok := o.(*corev1.Pod); ok {
			pods = append(pods, p)
		}
	}
	return pods
}

// labels returns the labels of a namespace as last seen.
func (k *kube) labels(namespace string) (labels map[string]string, known bool) {
	ns := k.namespace(namespace)
	if ns == nil {
		return nil, false
	}
	return ns.Labels, true
}

// namespace returns a namespace as last seen, or nil.
func (k *kube) namespace(name string) *corev1.Namespace {
	obj, ok, err := k.namespaces.GetIndexer().GetByKey(name)
	if err != nil || !ok {
		return nil
	}
	ns, _ := obj.(*corev1.Namespace)
	return ns
}

// installed returns when Weft was installed, by the age of its DaemonSet. It
// is zero if that is not known.
func (k *kube) installed() time.Time {
	obj, ok, err := k.daemonSets.GetIndexer().GetByKey(k.system + "/" + k.daemonSet)
	if err != nil || !ok {
		return time.Time{}
	}
	ds, ok := obj.(*appsv1.DaemonSet)
	if !ok {
		return time.Time{}
	}
	return ds.CreationTimestamp.Time
}

// How long a look at the API server may take while a pod waits to start, and
// how long it is repeated for a pod that is not there yet.
const (
	liveTimeout  = 3 * time.Second
	liveInterval = 250 * time.Millisecond
	liveWait     = 5 * time.Second
)

// starting returns the pod that a runtime is about to start and the labels of
// its namespace. It asks the API server itself: a watch may be behind, and
// then a pod that belongs to the mesh would start outside it. Only when the
// API server does not answer is what the watches saw good enough.
func (k *kube) starting(ctx context.Context, namespace, name, uid string) (*corev1.Pod, map[string]string, error) {
	end := time.Now().Add(liveWait)
	for {
		pod, err := k.livePod(ctx, namespace, name, uid)
		if err == nil {
			labels, err := k.liveLabels(ctx, namespace)
			return pod, labels, err
		}
		// The mirror pod of a static pod can appear after its sandbox.
		if time.Now().After(end) || ctx.Err() != nil {
			return nil, nil, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(liveInterval):
		}
	}
}

func (k *kube) livePod(ctx context.Context, namespace, name, uid string) (*corev1.Pod, error) {
	ask, cancel := context.WithTimeout(ctx, liveTimeout)
	defer cancel()
	pod, err := k.client.CoreV1().Pods(namespace).Get(ask, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("look up pod %s/%s: the API server does not have it", namespace, name)
	}
	if err != nil {
		obj, ok, _ := k.pods.GetIndexer().GetByKey(namespace + "/" + name)
		if pod, _ = obj.(*corev1.Pod); !ok || pod == nil {
			return nil, fmt.Errorf("look up pod %s/%s: %v; the node agent needs the API server to tell whether the pod belongs to the mesh", namespace, name, err)
		}
	}
	if uid != "" && string(pod.UID) != uid && pod.Annotations[mirrorAnnotation] != uid {
		return nil, fmt.Errorf("look up pod %s/%s: the runtime starts the one with UID %s, the API server has %s", namespace, name, uid, pod.UID)
	}
	return pod, nil
}

func (k *kube) liveLabels(ctx context.Context, namespace string) (map[string]string, error) {
	ask, cancel := context.WithTimeout(ctx, liveTimeout)
	defer cancel()
	ns, err := k.client.CoreV1().Namespaces().Get(ask, namespace, metav1.GetOptions{})
	if err == nil {
		return ns.Labels, nil
	}
	if labels, ok := k.labels(namespace); ok && !apierrors.IsNotFound(err) {
		return labels, nil
	}
	return nil, fmt.Errorf("look up namespace %s: %v", namespace, err)
}

// annotate writes on the pod whether it is captured. A pod that is gone, or
// another one of that name, is left alone without an error.
func (k *kube) annotate(ctx context.Context, p handoff.Pod, captured bool) error {
	var value any // null removes
	if captured {
		value = capturedValue
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid":         p.UID, // a precondition: the API server answers Conflict for another pod
		"annotations": map[string]any{capturedAnnotation: value},
	}})
	if err != nil {
		return err
	}
	ask, cancel := context.WithTimeout(ctx, liveTimeout)
	defer cancel()
	_, err = k.client.CoreV1().Pods(p.Namespace).Patch(ask, p.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if err == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return fmt.Errorf("annotate pod %s/%s: %w", p.Namespace, p.Name, err)
}

// warn writes an event on a pod. It is tried once.
func (k *kube) warn(ctx context.Context, p *corev1.Pod, reason, message string) error {
	ask, cancel := context.WithTimeout(ctx, liveTimeout)
	defer cancel()
	now := metav1.Now()
	_, err := k.client.CoreV1().Events(p.Namespace).Create(ask, &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "weft-", Namespace: p.Namespace},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: p.UID,
		},
		Type: corev1.EventTypeWarning, Reason: reason, Message: message,
		Source:         corev1.EventSource{Component: "weft-node", Host: k.node},
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
	}, metav1.CreateOptions{})
	return err
}

// evict asks Kubernetes to end a pod, so that its controller makes another. A
// pod without a controller, and one that the kubelet runs from a file, would
// not come back: they are left alone, and evicted is false.
func (k *kube) evict(ctx context.Context, p *corev1.Pod) (evicted bool, err error) {
	ask, cancel := context.WithTimeout(ctx, liveTimeout)
	defer cancel()
	live, err := k.client.CoreV1().Pods(p.Namespace).Get(ask, p.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("look up pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	if live.UID != p.UID || live.DeletionTimestamp != nil {
		return true, nil
	}
	if metav1.GetControllerOf(live) == nil || live.Annotations[mirrorAnnotation] != "" {
		return false, nil
	}
	err = k.client.PolicyV1().Evictions(p.Namespace).Evict(ask, &policyv1.Eviction{
		ObjectMeta:    metav1.ObjectMeta{Name: p.Name, Namespace: p.Namespace},
		DeleteOptions: &metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &p.UID}},
	})
	if err == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return true, nil
	}
	return false, fmt.Errorf("evict pod %s/%s: %w", p.Namespace, p.Name, err)
}

// untaint takes the taints with these keys off the agent's node. It reports
// how many there were. Another writer in between is an error, and it is to be
// tried again.
func (k *kube) untaint(ctx context.Context, keys []string) (removed int, err error) {
	ask, cancel := context.WithTimeout(ctx, liveTimeout)
	defer cancel()
	n, err := k.client.CoreV1().Nodes().Get(ask, k.node, metav1.GetOptions{})
	if err != nil {
		return 0, fmt.Errorf("look up node %s: %w", k.node, err)
	}
	left := slices.DeleteFunc(slices.Clone(n.Spec.Taints), func(t corev1.Taint) bool { return slices.Contains(keys, t.Key) })
	removed = len(n.Spec.Taints) - len(left)
	if removed == 0 {
		return 0, nil
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": n.ResourceVersion}, // a precondition: nobody else's taint is lost
		"spec":     map[string]any{"taints": left},
	})
	if err != nil {
		return 0, err
	}
	if _, err := k.client.CoreV1().Nodes().Patch(ask, k.node, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return 0, fmt.Errorf("take the startup taint off node %s: %w", k.node, err)
	}
	return removed, nil
}

// uninstalled reports whether Weft's DaemonSet is gone or going, or the
// namespace that it is in, asking the API server itself.
func (k *kube) uninstalled(ctx context.Context) (bool, error) {
	ask, cancel := context.WithTimeout(ctx, liveTimeout)
	defer cancel()
	ds, err := k.client.AppsV1().DaemonSets(k.system).Get(ask, k.daemonSet, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("look up DaemonSet %s/%s: %w", k.system, k.daemonSet, err)
	}
	if ds.DeletionTimestamp != nil {
		return true, nil
	}
	// What is in a namespace that is deleted goes in any order.
	ns, err := k.client.CoreV1().Namespaces().Get(ask, k.system, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil // there is a DaemonSet in it
	}
	if err != nil {
		return false, fmt.Errorf("look up namespace %s: %w", k.system, err)
	}
	return ns.DeletionTimestamp != nil, nil
}

// kubeletUID returns the UID under which the kubelet runs a pod, given its UID
// and its object, which may be nil.
func kubeletUID(uid string, p *corev1.Pod) string {
	if p != nil && p.Annotations[mirrorAnnotation] != "" {
		return p.Annotations[mirrorAnnotation]
	}
	return uid
}

// addresses returns the addresses in a pod's status.
func addresses(p *corev1.Pod) []netip.Addr {
	var out []netip.Addr
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			out = append(out, a.Unmap())
		}
	}
	if a, err := netip.ParseAddr(p.Status.PodIP); err == nil && len(out) == 0 {
		out = append(out, a.Unmap())
	}
	return out
}

// handed returns who a pod is, as ztunnel needs to know it.
func handed(p *corev1.Pod, node string, addrs []netip.Addr) handoff.Pod {
	sa := p.Spec.ServiceAccountName
	if sa == "" {
		sa = "default"
	}
	return handoff.Pod{UID: string(p.UID), Name: p.Name, Namespace: p.Namespace, ServiceAccount: sa, Addresses: addrs, Node: node}
}
