package node

import (
	"cmp"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// The names by which users and other tools say and see which pods are in the
// mesh.
const (
	modeLabel = "istio.io/dataplane-mode"
	modeOn    = "ambient"
	modeOff   = "none"

	capturedAnnotation = "ambient.istio.io/redirection"
	capturedValue      = "enabled"

	// existingAnnotation, on a pod or else on its namespace, says what becomes
	// of the connections that a running pod has when it joins the mesh:
	// ExistingKeep or ExistingReset.
	existingAnnotation = "ambient.weft.dev/existing-connections"
	// dnsSetting is a label or an annotation of a pod. "false" leaves its DNS
	// requests alone.
	dnsSetting = "ambient.istio.io/dns-capture"
	// releaseAnnotation on the agent's own pod asks it to let every pod of the
	// node go: "true".
	releaseAnnotation = "node.weft.dev/release"
)

// A decision says whether a pod belongs to the mesh, and why in words. The
// zero decision is that it does not.
type decision struct {
	enrol  bool
	reason string
}

// decide tells whether pod belongs to the mesh, given the labels of its
// namespace. excluded are namespaces whose pods never do. A label value that
// is not known counts as not set: see unknownMode.
func decide(pod *corev1.Pod, namespace map[string]string, excluded []string) decision {
	switch {
	case slices.Contains(excluded, pod.Namespace):
		return decision{reason: fmt.Sprintf("namespace %s is never in the mesh", pod.Namespace)}
	case pod.Spec.HostNetwork:
		return decision{reason: "the pod uses the network of its node"}
	case ended(pod):
		return decision{reason: "the pod has ended"}
	case pod.Labels[modeLabel] == modeOff:
		return decision{reason: "the pod's label " + modeLabel + "=" + modeOff}
	case pod.Labels[modeLabel] == modeOn:
		return decision{enrol: true, reason: "the pod's label " + modeLabel + "=" + modeOn}
	case namespace[modeLabel] == modeOn:
		return decision{enrol: true, reason: "the namespace's label " + modeLabel + "=" + modeOn}
	}
	return decision{reason: "neither pod nor namespace has the label " + modeLabel + "=" + modeOn}
}

// unknownMode returns the value of the label if it is one that means nothing.
func unknownMode(labels map[string]string) (value string, unknown bool) {
	v, set := labels[modeLabel]
	return v, set && v != modeOn && v != modeOff
}

// existing returns what shall become of the connections of a running pod that
// joins, given its annotations and those of its namespace: what they do not
// say is def. A value that has no meaning counts as not set; bad is the first
// such value.
func existing(pod, namespace map[string]string, def string) (what, bad string) {
	for _, m := range []map[string]string{pod, namespace} {
		switch v := m[existingAnnotation]; v {
		case ExistingKeep, ExistingReset:
			return v, bad
		default:
			bad = cmp.Or(bad, v)
		}
	}
	return def, bad
}

// wantsDNS reports whether a pod's DNS requests are to be captured, where the
// node captures any.
func wantsDNS(pod *corev1.Pod) bool {
	return pod.Labels[dnsSetting] != "false" && pod.Annotations[dnsSetting] != "false"
}

// ended reports whether no process of the pod runs or will run again.
func ended(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// A step is what a worker does next for one pod.
type step int

// The steps. The zero step does nothing.
const (
	stay     step = iota // as it should be
	enrol                // capture the running pod
	annotate             // it is captured: say so on the object
	retract              // it shall leave: first take the annotation away, so that nobody tunnels to it
	linger               // the annotation is gone; those who have not heard yet are still served
	leave                // stop capturing it
	watch                // its object is gone or has ended: serve it until its sandbox is gone
	disclaim             // it is not captured and says it is
)

// A situation is what is known of one pod when its worker runs.
type situation struct {
	there     bool // its object exists and it has not ended
	wanted    bool // it belongs to the mesh
	running   bool // it has an address, so a sandbox
	captured  bool
	annotated bool // its object says that it is captured
	retracted bool // leaving, and the annotation was taken away
	lingered  bool // leaving, and the time for others to hear of it is over
}

// next returns what to do in a situation.
func next(s situation) step {
	switch {
	case s.captured && !s.there:
		return watch
	case s.captured && s.wanted && !s.annotated:
		return annotate
	case s.captured && s.wanted:
		return stay
	case s.captured && !s.retracted:
		return retract
	case s.captured && !s.lingered:
		return linger
	case s.captured:
		return leave
	case s.there && s.wanted && s.running:
		return enrol
	case s.there && !s.wanted && s.annotated:
		return disclaim
	}
	// Wanted but without a sandbox: the CNI plugin asks when there is one.
	return stay
}
