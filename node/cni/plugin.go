package cni

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

// How long the plugin waits for the agent. The kubelet gives the runtime two
// minutes for a sandbox; other plugins need some of it.
const (
	addTimeout = dialRetry + answerTimeout
	// The agent loads programs and hands the pod to ztunnel.
	answerTimeout = 25 * time.Second
	delTimeout    = 5 * time.Second
)

// A Plugin is the CNI plugin. It is stateless; Out is where results go.
type Plugin struct {
	Out io.Writer
}

// Funcs returns the plugin's commands, for skel.
func (p Plugin) Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{Add: p.add, Check: p.check, Del: p.del, GC: p.gc, Status: p.status}
}

// Versions are the CNI versions the plugin speaks. Chaining begins with 0.3.0;
// the older two are named so that the error is about prevResult and not about
// a version.
func Versions() version.PluginInfo { return version.All }

// add captures the pod, or lets it through, and prints the result of the
// plugins before it unchanged.
func (p Plugin) add(args *skel.CmdArgs) error {
	conf, err := parseConf(args.StdinData)
	if err != nil {
		return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	addrs, raw, err := conf.previous()
	if err != nil {
		return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	pod, err := parseArgs(args.Args)
	if err != nil {
		return types.NewError(types.ErrInvalidEnvironmentVariables, err.Error(), "")
	}
	if pod.name != "" && !conf.excluded(pod.namespace) {
		req := request(args, pod)
		req.Addresses = addrs
		ctx, cancel := context.WithTimeout(context.Background(), addTimeout)
		defer cancel()
		if _, err := NewClient(conf.AgentSocket).Add(ctx, req); err != nil {
			return refuse(pod, err)
		}
	}
	if _, err := p.Out.Write(raw); err != nil {
		return fmt.Errorf("write the result: %v", err)
	}
	return nil
}

// check reports an error if the pod should be captured and is not.
func (p Plugin) check(args *skel.CmdArgs) error {
	conf, err := parseConf(args.StdinData)
	if err != nil {
		return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	pod, err := parseArgs(args.Args)
	if err != nil {
		return types.NewError(types.ErrInvalidEnvironmentVariables, err.Error(), "")
	}
	if pod.name == "" || conf.excluded(pod.namespace) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), delTimeout)
	defer cancel()
	if err := NewClient(conf.AgentSocket).Check(ctx, request(args, pod)); err != nil {
		return refuse(pod, err)
	}
	return nil
}

// del tells the agent that the sandbox goes away. It never fails: the agent
// also notices by itself, and a removal that fails leaves a pod that nobody
// can delete.
func (p Plugin) del(args *skel.CmdArgs) error {
	conf, err := parseConf(args.StdinData)
	if err != nil {
		return nil
	}
	pod, err := parseArgs(args.Args)
	if err != nil || pod.name == "" || conf.excluded(pod.namespace) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), delTimeout)
	defer cancel()
	_ = NewClient(conf.AgentSocket).Del(ctx, request(args, pod))
	return nil
}

// gc has nothing to do: the plugin keeps no state, and the agent sweeps its own.
func (p Plugin) gc(*skel.CmdArgs) error { return nil }

// status reports ready whether the agent is there or not. A plugin that is not
// ready makes the node's network not ready, and then the kubelet would not
// start the agent's own pod, which is what the plugin waits for.
func (p Plugin) status(args *skel.CmdArgs) error {
	if _, err := parseConf(args.StdinData); err != nil {
		return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	return nil
}

// request names the sandbox of a call.
func request(args *skel.CmdArgs, pod podArgs) Request {
	return Request{
		Namespace: pod.namespace, Pod: pod.name, UID: pod.uid,
		ContainerID: args.ContainerID, Netns: args.Netns, Interface: args.IfName,
	}
}

// refuse turns the failure of a call into what the kubelet shows on the pod.
func refuse(pod podArgs, err error) error {
	if errors.Is(err, errAway) {
		return types.NewError(types.ErrTryAgainLater,
			fmt.Sprintf("pod %s/%s is not started, because it could run outside the mesh: the Weft agent of this node does not answer", pod.namespace, pod.name),
			fmt.Sprintf("%v; look at the pods of DaemonSet ztunnel on this node (weft status); the kubelet tries again by itself", err))
	}
	return types.NewError(types.ErrTryAgainLater,
		fmt.Sprintf("pod %s/%s is not started, because it could not be brought into the mesh", pod.namespace, pod.name), err.Error())
}
