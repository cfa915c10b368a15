package compile

import (
	"cmp"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/weft-mesh/weft/mesh"
)

// The labels and annotations that compile reads.
const (
	annotationRedirection = "ambient.istio.io/redirection"
	labelNetwork          = "topology.istio.io/network"
	labelSubzone          = "topology.istio.io/subzone"
	labelWorkloadName     = "service.istio.io/workload-name"
	labelSameNode         = "ambient.weft.dev/same-node" // on namespaces
)

// PodUID returns the UID that the workload of the named pod has.
func (s Settings) PodUID(pod mesh.Name) mesh.UID {
	return mesh.UID(s.withDefaults().Cluster + "//Pod/" + pod.String())
}

// Workload compiles one pod. The node may be nil when it is not known yet:
// the workload then has no locality. Workload reports false for a pod that is
// nothing on the network: one without an address, or one that has ended.
func (w *World) Workload(pod *corev1.Pod, node *corev1.Node) (mesh.Workload, bool) {
	addrs := PodAddrs(pod)
	if len(addrs) == 0 || ended(pod) {
		return mesh.Workload{}, false
	}
	name := mesh.Name{Namespace: pod.Namespace, Name: pod.Name}
	owner := podOwner(pod)
	set := labels.Set(pod.Labels)
	facts := w.facts(pod, addrs)
	out := mesh.Workload{
		UID:       w.settings.PodUID(name),
		Name:      name,
		Addresses: addrs,
		Network:   cmp.Or(set[labelNetwork], w.settings.Network),
		Cluster:   w.settings.Cluster,
		Node:      pod.Spec.NodeName,
		Locality:  locality(node),
		Identity: mesh.Identity{
			TrustDomain:    w.settings.TrustDomain,
			Namespace:      pod.Namespace,
			ServiceAccount: cmp.Or(pod.Spec.ServiceAccountName, "default"),
		},
		Transport:         mesh.PlainTCP,
		HostNetwork:       pod.Spec.HostNetwork,
		Healthy:           ready(pod),
		CanonicalName:     canonicalName(set, owner),
		CanonicalRevision: canonicalRevision(set),
		Owner:             owner,
		Services:          facts.services,
		Policies:          w.policiesFor(pod.Namespace, set),
		Direct:            w.direct[pod.Namespace],
		Labels:            w.asked(pod.Labels),
	}
	// The node agent writes the annotation once the pod is captured and takes
	// it off before it lets go, so nobody tunnels to a pod that is not
	// listening. A host-network pod is never captured, whatever it claims.
	if pod.Annotations[annotationRedirection] == "enabled" && !pod.Spec.HostNetwork {
		out.Transport = mesh.HBONE
	}
	// A waypoint speaks HBONE itself, and is not captured.
	if w.isWaypoint(pod) {
		out.Transport = mesh.HBONE
		return out, true
	}
	if own, _ := w.bind(pod.Namespace, set, false); !pod.Spec.HostNetwork {
		out.Waypoint = own.ref
	}
	if p := facts.guard; p != nil {
		out.Policies = append(out.Policies, p.Name)
		slices.SortFunc(out.Policies, mesh.Name.Compare)
	}
	return out, true
}

// asked returns those of the labels that some TrafficPolicy asks for: the
// others would be sent to every proxy for nobody.
func (w *World) asked(set map[string]string) map[string]string {
	var out map[string]string
	for k := range w.labelKeys {
		if v, ok := set[k]; ok {
			if out == nil {
				out = map[string]string{}
			}
			out[k] = v
		}
	}
	return out
}

// directNamespaces returns the namespaces whose label says that connections
// between their pods may stay within a node.
func directNamespaces(in []*corev1.Namespace) map[string]bool {
	out := map[string]bool{}
	for _, ns := range in {
		if ns.Labels[labelSameNode] == "direct" {
			out[ns.Name] = true
		}
	}
	return out
}

// ended reports whether every container of the pod has stopped for good. Its
// address may already belong to another pod.
func ended(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// ready reports whether new connections may be sent to the pod.
func ready(pod *corev1.Pod) bool {
	if pod.DeletionTimestamp != nil {
		return false
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// PodAddrs returns the pod's addresses in the order of its status, without
// those that do not parse. It is empty until the pod's sandbox is up.
func PodAddrs(pod *corev1.Pod) []netip.Addr {
	var out []netip.Addr
	add := func(s string) {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return
		}
		if a = a.Unmap().WithZone(""); !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	for _, ip := range pod.Status.PodIPs {
		add(ip.IP)
	}
	if len(out) == 0 {
		add(pod.Status.PodIP)
	}
	return out
}

// locality reads a node's topology labels.
func locality(node *corev1.Node) mesh.Locality {
	if node == nil {
		return mesh.Locality{}
	}
	return mesh.Locality{
		Region:  node.Labels[corev1.LabelTopologyRegion],
		Zone:    node.Labels[corev1.LabelTopologyZone],
		Subzone: node.Labels[labelSubzone],
	}
}

// canonicalName returns the service name that telemetry groups pods by.
func canonicalName(set labels.Set, owner mesh.Owner) string {
	return cmp.Or(set["service.istio.io/canonical-name"], set["app.kubernetes.io/name"], set["app"], owner.Name)
}

// canonicalRevision returns the version that telemetry groups pods by.
func canonicalRevision(set labels.Set) string {
	return cmp.Or(set["service.istio.io/canonical-revision"], set["app.kubernetes.io/version"], set["version"], "latest")
}

// cronRun is the suffix that the CronJob controller gives its jobs: the
// scheduled time in minutes, or in seconds in old versions.
var cronRun = regexp.MustCompile(`^(.+)-\d{8,10}$`)

// podOwner returns what the user deployed: the Deployment, CronJob or Job the
// pod comes from, else the pod itself.
func podOwner(pod *corev1.Pod) mesh.Owner {
	out := mesh.Owner{Kind: "pod", Name: pod.Name}
	ref := metav1.GetControllerOf(pod)
	switch {
	case ref == nil:
	case ref.Kind == "ReplicaSet":
		// A Deployment names its ReplicaSets name-hash and puts the hash on
		// the pods. Without that label the ReplicaSet stands for itself.
		hash := pod.Labels["pod-template-hash"]
		if name, ok := strings.CutSuffix(ref.Name, "-"+hash); ok && hash != "" {
			out = mesh.Owner{Kind: "deployment", Name: name}
		}
	case ref.Kind == "Job":
		out = mesh.Owner{Kind: "job", Name: ref.Name}
		if m := cronRun.FindStringSubmatch(ref.Name); m != nil {
			out = mesh.Owner{Kind: "cronjob", Name: m[1]}
		}
	}
	if name := pod.Labels[labelWorkloadName]; name != "" {
		out.Name = name
	}
	return out
}
