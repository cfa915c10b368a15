package kube

import (
	"context"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/weft-mesh/weft/api/feed"
	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/mesh"
)

// linger is how long a policy that no pod lists any more is kept with the
// proxies. A workload that still lists a policy which is gone denies, so the
// workloads' new lists have to arrive first.
const linger = time.Second

// A compiler is the state of the loop: what was compiled last, and what the
// sink has been told.
type compiler struct {
	w         *Watcher
	world     *compile.World
	sent      map[mesh.UID]mesh.Workload
	lingering time.Time // when to take back policies that are gone; zero is never
	pins      *pins
	mover     mover
	settled   time.Time // when to compile because a service has settled; zero is never
	told      map[conditionKey]string
}

type statusKey struct {
	kind string
	name mesh.Name
}

// A conditionKey is one condition of one object.
type conditionKey struct {
	statusKey
	condition string
}

// loop compiles what changes and tells the sink. Pods are told at once; the
// rest waits for a moment of quiet.
func (w *Watcher) loop(ctx context.Context) error {
	if !w.waitForSync(ctx) {
		return nil
	}
	ctx, stop := context.WithCancel(ctx)
	c := &compiler{w: w, sent: map[mesh.UID]mesh.Workload{}, told: map[conditionKey]string{}, pins: newPins(ctx, w)}
	defer c.pins.wait()
	defer stop()
	w.queue.takePods()
	w.queue.takeWorld(0, 0)
	c.compileWorld(time.Now())
	w.cfg.Sink.SetSynced()
	close(w.synced)
	w.cfg.Log.Info("read the cluster", "workloads", len(c.sent), "services", len(c.world.Services), "policies", len(c.world.Policies))

	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.queue.wake:
		case <-timer.C:
		}
		c.compilePods(w.queue.takePods())
		now, since, wait := w.queue.takeWorld(w.cfg.Quiet, w.cfg.Patience)
		if now {
			c.compileWorld(since)
		}
		for _, at := range []time.Time{c.lingering, c.settled} {
			if left := time.Until(at); !at.IsZero() && (wait == 0 || left < wait) {
				wait = max(left, time.Millisecond)
			}
		}
		c.dropLingering()
		if !c.settled.IsZero() && !time.Now().Before(c.settled) {
			c.settled = time.Time{}
			w.queue.addWorld()
		}
		if wait > 0 {
			timer.Reset(wait)
		}
	}
}

// waitForSync waits until every informer has listed its kind. It reports
// false when ctx ended first.
func (w *Watcher) waitForSync(ctx context.Context) bool {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	complain := time.NewTicker(30 * time.Second)
	defer complain.Stop()
	for {
		missing := w.missing()
		if len(missing) == 0 {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-complain.C:
			w.cfg.Log.Warn("waiting for the Kubernetes API; proxies are answered once all kinds are read", "missing", strings.Join(missing, " "))
		case <-tick.C:
		}
	}
}

// missing returns the kinds that have not been listed yet.
func (w *Watcher) missing() []string {
	var out []string
	for _, k := range []struct {
		kind string
		ok   bool
	}{
		{"pods", w.pods.HasSynced()}, {"nodes", w.nodes.HasSynced()}, {"services", w.services.HasSynced()},
		{"endpointslices", w.slices.HasSynced()}, {"namespaces", w.namespaces.HasSynced()},
	} {
		if !k.ok {
			out = append(out, k.kind)
		}
	}
	for _, o := range w.optional {
		if !o.known() {
			out = append(out, o.resource)
		}
	}
	return out
}

// compilePods compiles the pods that changed, the first of them at since.
func (c *compiler) compilePods(pods map[mesh.Name][]netip.Addr, since time.Time) {
	if len(pods) == 0 {
		return
	}
	var set []mesh.Workload
	var del []mesh.UID
	for name, addrs := range pods {
		if slices.ContainsFunc(addrs, c.world.Claims) {
			c.w.queue.addWorld()
		}
		uid := c.w.cfg.Settings.PodUID(name)
		wl, ok := c.pod(name)
		if ok && c.world.Lacks(wl) {
			c.w.queue.addWorld()
		}
		old, had := c.sent[uid]
		switch {
		case !ok && had:
			delete(c.sent, uid)
			del = append(del, uid)
		case ok && !(had && reflect.DeepEqual(old, wl)):
			c.sent[uid] = wl
			set = append(set, wl)
		}
	}
	if len(set)+len(del) > 0 {
		ordered(set, del)
		c.w.cfg.Sink.UpdateWorkloads(set, del, since)
	}
}

// ordered puts what the sink is told into an order that does not depend on a
// map's.
func ordered(set []mesh.Workload, del []mesh.UID) {
	slices.SortFunc(set, func(a, b mesh.Workload) int { return strings.Compare(string(a.UID), string(b.UID)) })
	slices.Sort(del)
}

// pod compiles the named pod as the informer has it now.
func (c *compiler) pod(name mesh.Name) (mesh.Workload, bool) {
	pod, ok := get[*corev1.Pod](c.w.pods, name.String())
	if !ok {
		return mesh.Workload{}, false
	}
	node, _ := get[*corev1.Node](c.w.nodes, pod.Spec.NodeName)
	return c.world.Workload(pod, node)
}

// compileWorld compiles everything anew. since is when the first of the changes
// was noticed.
func (c *compiler) compileWorld(since time.Time) {
	began := time.Now()
	c.pins.follow(c.w.named())
	in := c.w.inputs()
	in.ConfigMaps = c.pins.all()
	before := c.world
	in.Moving, c.settled = c.mover.moving(began)
	c.world = compile.Compile(c.w.cfg.Settings, in)
	if c.mover.moved(before, c.world, began) {
		in.Moving, c.settled = c.mover.moving(began)
		c.world = compile.Compile(c.w.cfg.Settings, in)
	}
	objects := provisioned(c.w.cfg.Provision, c.world)
	c.w.faults.tell(c.world.Statuses)
	c.w.waypoints.Store(new(accountsOf(c.world.Waypoints)))
	// The sink tells policies first, so that no workload lists one that has
	// not arrived; those that are gone stay until the workloads' lists have.
	policies, differ := transition(before, c.world)
	c.lingering = time.Time{}
	if differ {
		c.lingering = time.Now().Add(linger)
	}

	next := make(map[mesh.UID]mesh.Workload, len(in.Pods)+len(c.world.Endpoints))
	for _, p := range in.Pods {
		node, _ := get[*corev1.Node](c.w.nodes, p.Spec.NodeName)
		if wl, ok := c.world.Workload(p, node); ok {
			next[wl.UID] = wl
		}
	}
	for _, wl := range c.world.Endpoints {
		next[wl.UID] = wl
	}
	var set []mesh.Workload
	var del []mesh.UID
	for uid, wl := range next {
		if old, ok := c.sent[uid]; !ok || !reflect.DeepEqual(old, wl) {
			set = append(set, wl)
		}
	}
	for uid := range c.sent {
		if _, ok := next[uid]; !ok {
			del = append(del, uid)
		}
	}
	c.sent = next
	ordered(set, del)
	c.w.cfg.Sink.UpdateWorld(feed.Resources{
		Workloads: set, Services: c.world.Services, Policies: policies,
		Routes: c.world.Routes, TrafficPolicies: c.world.TrafficPolicies, Waypoints: c.world.Waypoints,
	}, del, since)
	c.w.statuses.set(c.world.Statuses, objects)
	c.tell(c.world.Statuses)
	c.w.compile.Observe(time.Since(began).Seconds())
}

// transition returns the policies to serve until the workloads' new lists have
// arrived, and whether they differ from those of now. Policies that are gone
// stay, because pods still list them. One that applied to a whole namespace or
// to the mesh, and now to pods that list it, stays as it was: none lists it
// yet, and it would apply to nobody.
func transition(before, now *compile.World) (policies []mesh.Policy, differ bool) {
	policies = slices.Clone(now.Policies)
	if before == nil {
		return policies, false
	}
	for _, p := range before.Policies {
		i, still := slices.BinarySearchFunc(now.Policies, p, func(a, b mesh.Policy) int { return a.Name.Compare(b.Name) })
		switch {
		case !still && p.Scope == mesh.ScopeSelector:
			policies, differ = append(policies, p), true
		case still && p.Scope != mesh.ScopeSelector && now.Policies[i].Scope == mesh.ScopeSelector:
			policies[i], differ = p, true
		}
	}
	return policies, differ
}

// dropLingering takes back policies that are gone, when it is time.
func (c *compiler) dropLingering() {
	if c.lingering.IsZero() || time.Now().Before(c.lingering) {
		return
	}
	c.lingering = time.Time{}
	c.w.cfg.Sink.SetPolicies(c.world.Policies)
}

// tell logs objects that are not enforced as written, each once for what is
// wrong with it.
func (c *compiler) tell(statuses []compile.Status) {
	told := map[conditionKey]string{}
	for _, s := range statuses {
		for _, cond := range s.Conditions {
			if cond.OK {
				continue
			}
			key := conditionKey{statusKey{s.Kind, s.Name}, cond.Type}
			told[key] = cond.Message
			if c.told[key] != cond.Message {
				c.w.cfg.Log.Warn("object is not enforced as written", "kind", s.Kind, "namespace", s.Name.Namespace, "name", s.Name.Name,
					"reason", cond.Reason, "why", cond.Message)
			}
		}
	}
	c.told = told
}

// inputs gathers what the informers hold.
func (w *Watcher) inputs() compile.Inputs {
	in := compile.Inputs{
		Pods:     list[*corev1.Pod](w.pods),
		Nodes:    list[*corev1.Node](w.nodes),
		Services: list[*corev1.Service](w.services),

		Namespaces: list[*corev1.Namespace](w.namespaces),
		Slices:     list[*discoveryv1.EndpointSlice](w.slices),
	}
	for _, o := range w.optional {
		for _, u := range o.objects() {
			o.add(&in, u)
		}
	}
	return in
}

// list returns all objects of an informer, in no order.
func list[T any](inf cache.SharedIndexInformer) []T {
	all := inf.GetStore().List()
	out := make([]T, 0, len(all))
	for _, o := range all {
		if t, ok := o.(T); ok {
			out = append(out, t)
		}
	}
	return out
}

// get returns one object of an informer by its key, "namespace/name" or
// "name".
func get[T any](inf cache.SharedIndexInformer, key string) (t T, ok bool) {
	o, exists, err := inf.GetStore().GetByKey(key)
	if err != nil || !exists {
		return t, false
	}
	t, ok = o.(T)
	return t, ok
}
