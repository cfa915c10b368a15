// Package cni keeps pods that belong to the mesh from starting outside it: it
// holds the chained CNI plugin, the socket by which the plugin asks the node
// agent, and the installer that keeps the plugin chained.
//
// The plugin decides nothing. It runs last in the node's chain, when the pod
// has its addresses and none of its processes runs yet, and asks the agent to
// capture the pod. If the agent cannot be asked, the pod does not start: a pod
// that fails is tried again by the kubelet, a pod that runs outside the mesh
// is a leak. Only the namespaces that the agent itself needs are let through
// without asking.
package cni
