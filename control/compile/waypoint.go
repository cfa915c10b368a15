package compile

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weft-mesh/weft/mesh"
)

// What binds services and pods to waypoints.
const (
	labelUseWaypoint          = "istio.io/use-waypoint"
	labelUseWaypointNamespace = "istio.io/use-waypoint-namespace"
	labelWaypointFor          = "istio.io/waypoint-for"
	labelGatewayName          = "gateway.networking.k8s.io/gateway-name"
	// labelWaypointFailure on a namespace, with the value bypass, lets traffic
	// to its services go around a waypoint that is not ready, and to its pods
	// directly at any time. Without it such traffic waits, and then fails.
	labelWaypointFailure = "ambient.weft.dev/waypoint-failure"
	// labelWaypointOutside on a Service or its namespace, with the value bypass,
	// lets those without an identity of the mesh (what comes in by a NodePort,
	// say) reach its pods directly. Without it they are refused.
	labelWaypointOutside = "ambient.weft.dev/waypoint-outside"
	// annotationAccessLog on the Gateway of a waypoint is text or json.
	annotationAccessLog = "ambient.weft.dev/access-log"

	istioWaypointController = "istio.io/mesh-controller"
	hbonePort               = 15008
	protocolHBONE           = "HBONE"
)

// A waypoint is a Gateway that asks for one, read.
type waypoint struct {
	gateway Gateway
	mesh.Waypoint
	addresses []string
	ready     int    // pods
	refused   string // why it is not served
	selector  labels.Selector
	open      bool // to every namespace
	attached  int32
}

// usable reports whether traffic can be sent there now.
func (w *waypoint) usable() bool { return w.refused == "" && w.ready > 0 && len(w.addresses) > 0 }

// admits reports whether services of the namespace may be bound to w.
func (w *waypoint) admits(namespace string, set labels.Set) bool {
	return w.open || namespace == w.Name.Namespace || w.selector != nil && w.selector.Matches(set)
}

// serves reports whether w is for traffic to services, or else to workloads.
func (w *waypoint) serves(services bool) bool {
	return w.For == "all" || services && w.For == "service" || !services && w.For == "workload"
}

// A binding says which waypoint stands in front of a service or pod. The zero
// binding is none.
type binding struct {
	gateway  mesh.Name // that the user has named
	ref      mesh.GatewayRef
	identity mesh.Identity
	guarded  bool // what does not come from the waypoint is refused
	outside  bool // but for those who are outside of the mesh
}

// A Managed is a Gateway whose proxy is to be run.
type Managed struct {
	Gateway Gateway
	// Parameters are the data of the ConfigMap that
	// spec.infrastructure.parametersRef names.
	Parameters map[string]string
}

// compileWaypoints reads classes and Gateways, binds services to them, and
// says what became of each.
func (w *World) compileWaypoints(in Inputs) {
	w.namespaces = map[string]labels.Set{}
	for _, ns := range in.Namespaces {
		w.namespaces[ns.Name] = ns.Labels
	}
	w.moving = in.Moving
	classes := w.compileClasses(in.GatewayClasses)
	w.waypoints = map[mesh.Name]*waypoint{}
	services := kubeServices(in.Services)
	ready := readyWaypointPods(in.Pods)
	for _, g := range in.Gateways {
		class, ours := classes[string(g.Spec.GatewayClassName)]
		if !ours {
			continue
		}
		wp := w.readWaypoint(g, class)
		if svc := services[g.Name]; svc != nil {
			wp.addresses = clusterIPs(svc)
		}
		wp.ready = ready[g.Name]
		w.waypoints[g.Name] = wp
		w.manage(wp, in.ConfigMaps)
	}
	w.compileServiceEntries(in)
	w.bindServices()
	for _, wp := range w.waypoints {
		if wp.refused == "" {
			w.Waypoints = append(w.Waypoints, wp.Waypoint)
		}
		w.Statuses = append(w.Statuses, wp.status())
	}
	slices.SortFunc(w.Waypoints, func(a, b mesh.Waypoint) int { return a.Name.Compare(b.Name) })
	slices.SortFunc(w.Managed, func(a, b Managed) int { return a.Gateway.Name.Compare(b.Gateway.Name) })
}

// compileClasses returns the classes that are served, by name.
func (w *World) compileClasses(in []GatewayClass) map[string]GatewayClass {
	out := map[string]GatewayClass{}
	for _, c := range in {
		switch {
		case c.Spec.ControllerName == ControllerName:
		case w.settings.IstioWaypoints && c.Spec.ControllerName == istioWaypointController && c.Name.Name == "istio-waypoint":
		default:
			continue
		}
		out[c.Name.Name] = c
		cond := Condition{Type: Accepted, OK: true, Reason: reasonAccepted, Message: "Weft runs waypoints for Gateways of this class"}
		if c.Err != nil {
			cond = Condition{Type: Accepted, Reason: string(gatewayv1.GatewayClassReasonUnsupported), Message: "not understood: " + c.Err.Error()}
		} else if c.Spec.ParametersRef != nil {
			cond = Condition{Type: Accepted, Reason: string(gatewayv1.GatewayClassReasonInvalidParameters),
				Message: "spec.parametersRef is not supported: use spec.infrastructure.parametersRef of the Gateway"}
		}
		w.Statuses = append(w.Statuses, Status{Kind: KindGatewayClass, Name: c.Name, Generation: c.Generation, Conditions: []Condition{cond}})
	}
	return out
}

// readWaypoint reads what a Gateway asks for.
func (w *World) readWaypoint(g Gateway, class GatewayClass) *waypoint {
	wp := &waypoint{gateway: g, Waypoint: mesh.Waypoint{
		Name:     g.Name,
		Service:  w.settings.serviceName(g.Name.Namespace, g.Name.Name),
		Identity: w.settings.waypointIdentity(g.Name),
		For:      cmp.Or(g.Labels[labelWaypointFor], class.Labels[labelWaypointFor], "service"),
	}}
	if v := g.Annotations[annotationAccessLog]; v == "text" || v == "json" {
		wp.AccessLog = v
	}
	if !slices.Contains([]string{"service", "workload", "all", "none"}, wp.For) {
		wp.refused = fmt.Sprintf("label %s is %q, want service, workload, all or none", labelWaypointFor, wp.For)
		wp.For = "service" // what is bound to it stays bound
	}
	mesh := slices.IndexFunc(g.Spec.Listeners, meshListener)
	switch {
	case g.Err != nil:
		wp.refused = g.Err.Error()
	case mesh < 0:
		wp.refused = fmt.Sprintf("spec.listeners has none with port %d and protocol %s", hbonePort, protocolHBONE)
	default:
		wp.readAllowed(g.Spec.Listeners[mesh].AllowedRoutes)
	}
	return wp
}

// readAllowed reads which namespaces may bind to the waypoint.
func (w *waypoint) readAllowed(allowed *gatewayv1.AllowedRoutes) {
	if allowed == nil || allowed.Namespaces == nil {
		return
	}
	switch from := deref(allowed.Namespaces.From); from {
	case "", gatewayv1.NamespacesFromSame, gatewayv1.NamespacesFromNone:
	case gatewayv1.NamespacesFromAll:
		w.open = true
	case gatewayv1.NamespacesFromSelector:
		s, err := metav1.LabelSelectorAsSelector(allowed.Namespaces.Selector)
		if err != nil {
			w.refused = fmt.Sprintf("spec.listeners: allowedRoutes.namespaces.selector: %v", err)
			return
		}
		w.selector = s
	default:
		w.refused = fmt.Sprintf("spec.listeners: allowedRoutes.namespaces.from is %q, want All, Same, Selector or None", from)
	}
}

func meshListener(l gatewayv1.Listener) bool {
	return l.Port == hbonePort && l.Protocol == protocolHBONE
}

// manage lists the Gateway as one whose proxy is to be run.
func (w *World) manage(wp *waypoint, maps []*corev1.ConfigMap) {
	if wp.refused != "" {
		return
	}
	m := Managed{Gateway: wp.gateway}
	if infra := wp.gateway.Spec.Infrastructure; infra != nil && infra.ParametersRef != nil {
		ref := infra.ParametersRef
		i := slices.IndexFunc(maps, func(c *corev1.ConfigMap) bool {
			return c.Namespace == wp.Name.Namespace && c.Name == ref.Name
		})
		if ref.Group != "" || ref.Kind != "ConfigMap" || i < 0 {
			wp.refused = fmt.Sprintf("spec.infrastructure.parametersRef names %s %q, and no ConfigMap of that name is in namespace %s",
				ref.Kind, ref.Name, wp.Name.Namespace)
			return
		}
		m.Parameters = maps[i].Data
	}
	w.Managed = append(w.Managed, m)
}

// waypointIdentity returns who the replicas of a waypoint are: their service
// account has the Gateway's name.
func (s Settings) waypointIdentity(gateway mesh.Name) mesh.Identity {
	return mesh.Identity{TrustDomain: s.TrustDomain, Namespace: gateway.Namespace, ServiceAccount: gateway.Name}
}

// clusterIPs returns the virtual addresses of a service.
func clusterIPs(s *corev1.Service) []string {
	ips := s.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{s.Spec.ClusterIP}
	}
	return slices.DeleteFunc(slices.Clone(ips), func(ip string) bool { return ip == "" || ip == corev1.ClusterIPNone })
}

// IsWaypointPod reports whether the pod says that it is a replica of a
// Gateway's proxy. When such a pod comes, goes or gets ready the World has to
// be compiled anew.
func IsWaypointPod(pod *corev1.Pod) bool { return pod.Labels[labelGatewayName] != "" }

// waypointPod returns the Gateway that the pod is a replica of. Its label is
// not enough: it must run as the Gateway's service account and belong to the
// Deployment that is made for the Gateway.
func waypointPod(pod *corev1.Pod) (mesh.Name, bool) {
	name := mesh.Name{Namespace: pod.Namespace, Name: pod.Labels[labelGatewayName]}
	owner := podOwner(pod)
	if name.Name == "" || pod.Spec.HostNetwork || pod.Spec.ServiceAccountName != name.Name || owner.Kind != "deployment" {
		return mesh.Name{}, false
	}
	return name, true
}

// readyWaypointPods counts the ready replicas by Gateway.
func readyWaypointPods(pods []*corev1.Pod) map[mesh.Name]int {
	out := map[mesh.Name]int{}
	for _, p := range pods {
		if name, ok := waypointPod(p); ok && ready(p) && !ended(p) {
			out[name]++
		}
	}
	return out
}

// isWaypoint reports whether the pod is a replica of a waypoint.
func (w *World) isWaypoint(pod *corev1.Pod) bool {
	name, ok := waypointPod(pod)
	return ok && w.waypoints[name] != nil
}

// bindServices decides for each service which waypoint stands in front of it.
func (w *World) bindServices() {
	w.bound = map[mesh.ServiceName]binding{}
	w.virtual = map[mesh.ServiceName]bool{}
	for i := range w.Services {
		s := &w.Services[i]
		w.virtual[s.Name] = len(s.VIPs) > 0
		of := w.origins[s.Name]
		if of.kind == KindService && w.waypoints[of.name] != nil {
			continue // the waypoint's own service
		}
		b, cond := w.bind(s.Name.Namespace, of.labels, true)
		if b == (binding{}) {
			continue
		}
		// A headless service has no address to be sent to the waypoint by.
		b.guarded = b.guarded && len(s.VIPs) > 0 && !w.moving[s.Name]
		w.bound[s.Name] = b
		s.Waypoint = b.ref
		if wp := w.waypoints[b.gateway]; wp != nil && cond.OK {
			wp.attached++
		}
		if of.kind == KindService {
			w.Statuses = append(w.Statuses, Status{Kind: KindService, Name: of.name, Conditions: []Condition{cond}})
		}
	}
	for _, e := range w.entries {
		var cond Condition
		if b, c := w.bind(e.Name.Namespace, e.Labels, true); b != (binding{}) {
			cond = c
		}
		if cond.OK && slices.ContainsFunc(e.services, func(s mesh.ServiceName) bool { return !w.virtual[s] }) {
			cond.OK, cond.Reason = false, reasonUnsupported
			cond.Message += ", but it has no address by which connections could be sent there: they go around it"
		}
		w.Statuses = append(w.Statuses, e.status(cond))
	}
}

// bind decides which waypoint stands in front of something in a namespace
// whose own labels are set.
func (w *World) bind(namespace string, set labels.Set, service bool) (binding, Condition) {
	explicit := set[labelUseWaypoint] != ""
	from := set
	if !explicit {
		from = w.namespaces[namespace]
	}
	name := mesh.Name{Namespace: cmp.Or(from[labelUseWaypointNamespace], namespace), Name: from[labelUseWaypoint]}
	if name.Name == "" || name.Name == "none" {
		return binding{}, Condition{}
	}
	wp := w.waypoints[name]
	switch {
	case wp == nil && !service && !explicit, wp != nil && wp.For == "none",
		wp != nil && !explicit && !wp.serves(service):
		return binding{}, Condition{} // the namespace's label speaks of the other kind of traffic
	}
	b := binding{gateway: name, identity: w.settings.waypointIdentity(name),
		ref: mesh.GatewayRef{Service: w.settings.serviceName(name.Namespace, name.Name)}}
	bypass := w.namespaces[namespace][labelWaypointFailure] == "bypass"
	b.guarded = !bypass
	b.outside = cmp.Or(set[labelWaypointOutside], w.namespaces[namespace][labelWaypointOutside]) == "bypass"
	cond := Condition{Type: WaypointBound, OK: true, Reason: "WaypointAccepted", Message: "bound to waypoint " + name.String()}
	dead := b.ref // a name that nothing has
	dead.Service.Host = "not-allowed." + dead.Service.Host
	fails := func(reason, why string) (binding, Condition) {
		cond.OK, cond.Reason = false, reason
		if bypass {
			cond.Message = why + "; traffic goes around it, as the namespace's label " + labelWaypointFailure + " says"
			return binding{gateway: name}, cond
		}
		cond.Message = why + "; connections wait for it, and then fail"
		return b, cond
	}
	switch {
	case wp == nil:
		return fails("WaypointMissing", "there is no waypoint "+name.String())
	case !wp.admits(namespace, w.namespaces[namespace]):
		// Its owner has not agreed, so it must not be asked; and what was meant
		// to pass a waypoint must not pass none.
		b.ref = dead
		return fails("WaypointNotAllowed", fmt.Sprintf("the listener of waypoint %s does not allow namespace %s (allowedRoutes.namespaces)", name, namespace))
	case !wp.serves(service):
		b.ref = dead
		return fails("WaypointTypeMismatch", fmt.Sprintf("waypoint %s is for %s traffic only (label %s)", name, wp.For, labelWaypointFor))
	case wp.refused != "":
		return fails("WaypointInvalid", fmt.Sprintf("waypoint %s is invalid: %s", name, wp.refused))
	case !wp.usable():
		return fails("WaypointNotReady", fmt.Sprintf("waypoint %s is not ready", name))
	}
	return b, cond
}

// waypointOf returns the Gateway of the waypoint that a service is bound to.
func (w *World) waypointOf(s mesh.ServiceName) (mesh.Name, bool) {
	b, ok := w.bound[s]
	return b.gateway, ok
}

// waypointsOfClass returns the waypoints of a GatewayClass.
func (w *World) waypointsOfClass(class string) []mesh.Name {
	var out []mesh.Name
	for name, wp := range w.waypoints {
		if string(wp.gateway.Spec.GatewayClassName) == class {
			out = append(out, name)
		}
	}
	slices.SortFunc(out, mesh.Name.Compare)
	return out
}

// status reports what became of the Gateway.
func (w *waypoint) status() Status {
	accepted := Condition{Type: Accepted, OK: true, Reason: string(gatewayv1.GatewayReasonAccepted), Message: "a waypoint for " + w.For + " traffic"}
	programmed := Condition{Type: Programmed, OK: true, Reason: string(gatewayv1.GatewayReasonProgrammed),
		Message: fmt.Sprintf("pods that are ready: %d, reached at %s", w.ready, strings.Join(w.addresses, " and "))}
	switch {
	case w.refused != "":
		accepted = Condition{Type: Accepted, Reason: string(gatewayv1.GatewayReasonInvalidParameters), Message: w.refused}
		if !slices.ContainsFunc(w.gateway.Spec.Listeners, meshListener) {
			accepted.Reason = string(gatewayv1.GatewayReasonListenersNotValid)
		}
		programmed = Condition{Type: Programmed, Reason: string(gatewayv1.GatewayReasonInvalid), Message: "not run, because it is not accepted"}
	case len(w.gateway.Spec.Addresses) > 0:
		accepted.Message += "; spec.addresses is not supported and does nothing: it is reached at its Service"
		accepted.OK, accepted.Reason = false, string(gatewayv1.GatewayReasonUnsupportedAddress)
	}
	if w.refused == "" && len(w.addresses) == 0 {
		programmed = Condition{Type: Programmed, Reason: string(gatewayv1.GatewayReasonAddressNotAssigned),
			Message: fmt.Sprintf("its Service %s has no address yet", w.Name)}
	} else if w.refused == "" && w.ready == 0 {
		programmed = Condition{Type: Programmed, Reason: string(gatewayv1.GatewayReasonPending),
			Message: "none of its pods is ready; look at Deployment " + w.Name.String()}
	}
	out := Status{Kind: KindGateway, Name: w.Name, Generation: w.gateway.Generation,
		Conditions: []Condition{accepted, programmed}, Addresses: w.addresses}
	for _, l := range w.gateway.Spec.Listeners {
		out.Listeners = append(out.Listeners, w.listenerStatus(l, programmed))
	}
	return out
}

func (w *waypoint) listenerStatus(l gatewayv1.Listener, programmed Condition) ListenerStatus {
	out := ListenerStatus{Name: string(l.Name)}
	if !meshListener(l) {
		why := fmt.Sprintf("a waypoint has only a listener of port %d and protocol %s", hbonePort, protocolHBONE)
		out.Conditions = []Condition{
			{Type: Accepted, Reason: string(gatewayv1.ListenerReasonUnsupportedProtocol), Message: why},
			{Type: Programmed, Reason: string(gatewayv1.ListenerReasonInvalid), Message: why},
			{Type: ResolvedRefs, OK: true, Reason: string(gatewayv1.ListenerReasonResolvedRefs)},
		}
		return out
	}
	out.AttachedRoutes = w.attached
	out.Conditions = []Condition{
		{Type: Accepted, OK: true, Reason: string(gatewayv1.ListenerReasonAccepted)},
		{Type: Programmed, OK: programmed.OK, Reason: programmed.Reason, Message: programmed.Message},
		{Type: ResolvedRefs, OK: true, Reason: string(gatewayv1.ListenerReasonResolvedRefs)},
	}
	return out
}
