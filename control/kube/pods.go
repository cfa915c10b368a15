package kube

import (
	corev1 "k8s.io/api/core/v1"

	"github.com/weft-mesh/weft/mesh"
)

// indexRuns is the pod index by node, namespace and service account.
const indexRuns = "runs"

// runsKeys returns the keys of a pod in the index.
func runsKeys(o any) ([]string, error) {
	p, ok := o.(*corev1.Pod)
	if !ok || !live(p) {
		return nil, nil
	}
	return []string{runsKey(p.Spec.NodeName, p.Namespace, accountOf(p))}, nil
}

// runsKey joins with a slash, which none of the parts may contain.
func runsKey(node, namespace, account string) string {
	return node + "/" + namespace + "/" + account
}

// accountOf returns the pod's service account.
func accountOf(p *corev1.Pod) string {
	if p.Spec.ServiceAccountName == "" {
		return "default"
	}
	return p.Spec.ServiceAccountName
}

// live reports whether the pod is bound to a node and its processes may still
// run there. One that is being deleted is live until it is gone.
func live(p *corev1.Pod) bool {
	return p.Spec.NodeName != "" && p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed
}

// NodeOf returns the node that a live pod is bound to. The pod must exist with
// exactly this UID: a token outlives its pod, and its name may be taken by
// another.
func (w *Watcher) NodeOf(pod mesh.Name, uid string) (node string, ok bool) {
	p, ok := get[*corev1.Pod](w.pods, pod.String())
	if !ok || uid == "" || string(p.UID) != uid || !live(p) {
		return "", false
	}
	return p.Spec.NodeName, true
}

// RunsOn reports whether a live pod with id's namespace and service account is
// bound to the node. The trust domain is not looked at.
func (w *Watcher) RunsOn(node string, id mesh.Identity) bool {
	if node == "" || id.IsZero() {
		return false
	}
	keys, err := w.pods.GetIndexer().IndexKeys(indexRuns, runsKey(node, id.Namespace, id.ServiceAccount))
	return err == nil && len(keys) > 0
}

// IsWaypoint reports whether pods of a service account are replicas of a
// waypoint, and whether that is known: not before the cluster has been read.
func (w *Watcher) IsWaypoint(account mesh.Name) (is, known bool) {
	accounts := w.waypoints.Load()
	if accounts == nil {
		return false, false
	}
	return (*accounts)[account], true
}

// accountsOf returns the service accounts of waypoints.
func accountsOf(list []mesh.Waypoint) map[mesh.Name]bool {
	accounts := map[mesh.Name]bool{}
	for _, w := range list {
		if !w.Identity.IsZero() {
			accounts[mesh.Name{Namespace: w.Identity.Namespace, Name: w.Identity.ServiceAccount}] = true
		}
	}
	return accounts
}
