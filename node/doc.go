// Package node is the agent of one node: it knows which of the node's pods
// belong to the mesh, and keeps exactly those captured.
//
// What should be comes from the API server (labels of pods and namespaces) and
// from the CNI plugin, which asks before a pod starts. What is comes from the
// capture programs pinned in the kernel. A worker per pod brings the second to
// the first. The agent never loosens anything to make progress: when ztunnel
// or the API server is away, captured pods stay captured, running pods wait,
// and new pods of the mesh do not start.
//
// Restarting the agent changes nothing for traffic. It takes the pods out of
// the mesh only when its DaemonSet is gone, that is when Weft is uninstalled.
package node
