package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/pflag"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
)

// A target is the cluster that a command speaks to, as its flags say.
type target struct {
	kubeconfig string
	context    string
	namespace  string
}

func (t *target) flags(f *pflag.FlagSet) {
	f.StringVar(&t.kubeconfig, "kubeconfig", "", "path of the kubeconfig (default: $KUBECONFIG, then ~/.kube/config)")
	f.StringVar(&t.context, "context", "", "context of the kubeconfig (default: its current one)")
	f.StringVarP(&t.namespace, "namespace", "n", "weft-system", "namespace that Weft is installed in")
}

// A kube is a connection to one cluster's API server.
type kube struct {
	typed   kubernetes.Interface
	dynamic dynamic.Interface
	mapper  *restmapper.DeferredDiscoveryRESTMapper
	host    string
}

// connect reads the kubeconfig and asks the API server for its version, so
// that a cluster out of reach is said once and clearly.
func (t *target) connect(ctx context.Context) (*kube, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = t.kubeconfig
	cfg, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: t.context}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("read the kubeconfig: %w: name one with --kubeconfig or $KUBECONFIG", err)
	}
	cfg.QPS, cfg.Burst = 50, 100
	cfg.UserAgent = "weft/" + version
	k, err := newKube(cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	if err := k.typed.Discovery().RESTClient().Get().AbsPath("/version").Do(ctx).Error(); err != nil {
		return nil, fmt.Errorf("reach the API server at %s: %w: check that the cluster is up and that the kubeconfig is the right one", k.host, err)
	}
	return k, nil
}

func newKube(cfg *rest.Config) (*kube, error) {
	typed, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("use the kubeconfig: %w", err)
	}
	dyn, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return nil, fmt.Errorf("use the kubeconfig: %w", err)
	}
	return &kube{
		typed:   typed,
		dynamic: dyn,
		mapper:  restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(typed.Discovery())),
		host:    cfg.Host,
	}, nil
}

// resource returns the API resource of an object.
func (k *kube) resource(o *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	gvk := o.GroupVersionKind()
	m, err := k.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	if meta.IsNoMatchError(err) {
		k.mapper.Reset()
		m, err = k.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	}
	if err != nil {
		return nil, fmt.Errorf("the cluster does not know %s %s: %w", gvk.GroupVersion(), gvk.Kind, err)
	}
	if m.Scope.Name() == meta.RESTScopeNameNamespace {
		return k.dynamic.Resource(m.Resource).Namespace(o.GetNamespace()), nil
	}
	return k.dynamic.Resource(m.Resource), nil
}

// apply makes an object what it should be (server-side apply, as field
// manager "weft").
func (k *kube) apply(ctx context.Context, o *unstructured.Unstructured) error {
	r, err := k.resource(o)
	if err != nil {
		return err
	}
	if _, err := r.Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: "weft", Force: true}); err != nil {
		return fmt.Errorf("apply %s: %w", describe(o), err)
	}
	return nil
}

// create makes an object unless there is one. It reports whether it did.
func (k *kube) create(ctx context.Context, o *unstructured.Unstructured) (bool, error) {
	r, err := k.resource(o)
	if err != nil {
		return false, err
	}
	_, err = r.Create(ctx, o, metav1.CreateOptions{FieldManager: "weft"})
	if apierrors.IsAlreadyExists(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("create %s: %w", describe(o), err)
	}
	return true, nil
}

// remove deletes an object. It reports whether there was one.
func (k *kube) remove(ctx context.Context, o *unstructured.Unstructured, policy metav1.DeletionPropagation) (bool, error) {
	r, err := k.resource(o)
	if meta.IsNoMatchError(errors.Unwrap(err)) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	err = r.Delete(ctx, o.GetName(), metav1.DeleteOptions{PropagationPolicy: &policy})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("delete %s: %w", describe(o), err)
	}
	return true, nil
}

func describe(o *unstructured.Unstructured) string {
	if o.GetNamespace() == "" {
		return o.GetKind() + " " + o.GetName()
	}
	return o.GetKind() + " " + o.GetNamespace() + "/" + o.GetName()
}

// errFinal marks an error for which there is no use in asking again.
var errFinal = errors.New("cannot go on")

// await asks again and again until done says that it is, telling progress to
// out whenever it changes. An error is progress too, unless it will not go
// away: errFinal, or a right that is missing.
func await(ctx context.Context, out io.Writer, limit time.Duration, done func(context.Context) (bool, string, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	last := ""
	for {
		ok, progress, err := done(ctx)
		if ok {
			return nil
		}
		if errors.Is(err, errFinal) || apierrors.IsForbidden(err) {
			return err
		}
		if err != nil && ctx.Err() == nil {
			progress = err.Error()
		}
		if progress != last && progress != "" {
			fmt.Fprintf(out, "  %s\n", progress)
			last = progress
		}
		select {
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), context.Canceled) {
				return context.Canceled
			}
			return fmt.Errorf("not done within %v: %s", limit, last)
		case <-tick.C:
		}
	}
}
