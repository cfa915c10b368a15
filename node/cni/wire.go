package cni

import (
	"net/netip"
)

// The paths of the agent's socket. Requests and answers are JSON; every answer
// but 200 carries a refusal.
const (
	addPath   = "/v1/add"
	delPath   = "/v1/del"
	checkPath = "/v1/check"
)

// maxBody bounds a request or an answer, in bytes.
const maxBody = 64 << 10

// A Request is what the plugin knows about a sandbox.
type Request struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	// UID is the pod's UID as the container runtime says it. Old runtimes do
	// not: then it is empty and the pod is known by its name alone.
	UID string `json:"uid,omitempty"`
	// ContainerID names the sandbox. Two sandboxes of one pod, one after the
	// other, differ in it.
	ContainerID string `json:"containerID"`
	// Netns is the path of the pod's network namespace on the host. It may be
	// empty in a removal.
	Netns string `json:"netns,omitempty"`
	// Interface is the pod's interface, as a rule eth0.
	Interface string `json:"interface,omitempty"`
	// Addresses are those that the plugins before ours gave to the pod.
	Addresses []netip.Addr `json:"addresses,omitempty"`
}

// A Response is the agent's answer to a Request.
type Response struct {
	// Captured reports whether the pod's traffic goes through the mesh now.
	Captured bool `json:"captured"`
	// Reason says why it does or does not, in words.
	Reason string `json:"reason,omitempty"`
}

// A refusal is the body of an answer that is not 200.
type refusal struct {
	Message string `json:"message"`
}
