package kube

import (
	"context"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/mesh"
)

// pins are the ConfigMaps that other objects name, each watched alone: a
// cluster has many, and few of them matter here. One goroutine owns them.
type pins struct {
	w       *Watcher
	ctx     context.Context
	running sync.WaitGroup
	maps    map[mesh.Name]pin
}

type pin struct {
	informer cache.SharedIndexInformer
	stop     context.CancelFunc
}

// newPins returns pins that end with ctx; wait waits for their end.
func newPins(ctx context.Context, w *Watcher) *pins {
	return &pins{w: w, ctx: ctx, maps: map[mesh.Name]pin{}}
}

func (p *pins) wait() { p.running.Wait() }

// pinTime is how long at most a compilation waits for a ConfigMap that was
// named a moment ago. Without it a Gateway would be refused for want of it.
const pinTime = 2 * time.Second

// follow watches the ConfigMaps of names, and no others, and waits a while
// until those that are new have been read.
func (p *pins) follow(names map[mesh.Name]bool) {
	for n, old := range p.maps {
		if !names[n] {
			old.stop()
			delete(p.maps, n)
		}
	}
	waiting, cancel := context.WithTimeout(p.ctx, pinTime)
	defer cancel()
	for n := range names {
		if _, there := p.maps[n]; there {
			continue
		}
		inf := coreinformers.NewFilteredConfigMapInformer(p.w.cfg.Client, n.Namespace, 0, nil, func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector("metadata.name", n.Name).String()
		})
		p.w.wire(inf, "ConfigMap", func(any, any) { p.w.queue.addWorld() })
		ctx, stop := context.WithCancel(p.ctx)
		p.maps[n] = pin{inf, stop}
		p.running.Go(func() { inf.RunWithContext(ctx) })
	}
	for _, m := range p.maps {
		cache.WaitForCacheSync(waiting.Done(), m.informer.HasSynced)
	}
}

// all returns the ConfigMaps that are there.
func (p *pins) all() []*corev1.ConfigMap {
	var out []*corev1.ConfigMap
	for n, m := range p.maps {
		if c, ok := get[*corev1.ConfigMap](m.informer, n.String()); ok {
			out = append(out, c)
		}
	}
	return out
}

// named returns the ConfigMaps that Gateways and policies name.
func (w *Watcher) named() map[mesh.Name]bool {
	out := map[mesh.Name]bool{}
	take := func(u *unstructured.Unstructured, ref any) {
		r, _ := ref.(map[string]any)
		name, _ := r["name"].(string)
		if r["kind"] == "ConfigMap" && name != "" {
			out[mesh.Name{Namespace: u.GetNamespace(), Name: name}] = true
		}
	}
	for _, o := range w.optional {
		switch o.name {
		case compile.KindGateway:
			for _, u := range o.objects() {
				ref, _, _ := unstructured.NestedFieldNoCopy(u.Object, "spec", "infrastructure", "parametersRef")
				take(u, ref)
			}
		case compile.KindBackendTLSPolicy:
			for _, u := range o.objects() {
				refs, _, _ := unstructured.NestedFieldNoCopy(u.Object, "spec", "validation", "caCertificateRefs")
				list, _ := refs.([]any)
				for _, ref := range list {
					take(u, ref)
				}
			}
		}
	}
	return out
}
