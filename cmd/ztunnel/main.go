// Command ztunnel is the node's L4 proxy: see package ztunnel.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/weft-mesh/weft/api/feed"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/identity/issue"
	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/obs"
	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/ztunnel"
)

func main() {
	c, err := parseConfig(os.Args[1:], os.Getenv)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "ztunnel: %v\n", err)
		os.Exit(2)
	}
	ctx, stop := run.UntilSignal(context.Background())
	defer stop()
	if err := serve(ctx, c, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "ztunnel: %v\n", err)
		os.Exit(1)
	}
}

// serve runs a proxy until ctx ends and its connections have been drained.
func serve(ctx context.Context, c config, out io.Writer) error {
	ctx, stopAll := context.WithCancel(ctx)
	defer stopAll()
	level := new(slog.LevelVar)
	l, err := obs.ParseLevel(c.logLevel)
	if err != nil {
		return err
	}
	level.Set(l)
	log := obs.NewLogger(out, c.logFormat, level)
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), obs.Build("ztunnel"))

	roots := identity.NewRootsFile(c.rootsFile, c.trustDomain, log)
	controlTLS := identity.ControlTLS(c.rootsFile, c.serverName())
	issuer, err := issue.New(issue.Config{
		Address: c.controlAddress, TLS: controlTLS, TokenFile: c.tokenFile, OnBehalf: true, Cluster: c.cluster,
	})
	if err != nil {
		return err
	}
	defer issuer.Close()
	manager := identity.NewManager(identity.Config{
		Issuer: issuer, Roots: roots.Roots, TrustDomain: c.trustDomain, Log: log, Registerer: reg,
	})
	store := new(view.Store)
	ip, err := netip.ParseAddr(c.podIP)
	if err != nil {
		return err
	}
	client, err := feed.NewClient(feed.ClientConfig{
		Address: c.controlAddress, TLS: controlTLS, Token: identity.TokenFile(c.tokenFile), Store: store, Log: log, Registerer: reg,
		Node: feed.NodeMeta{PodName: c.podName, Namespace: c.podNamespace, IP: ip, NodeName: c.nodeName, Cluster: c.cluster},
	})
	if err != nil {
		return err
	}
	cfg := ztunnel.Config{
		View: store, Identity: manager, Roots: roots.Roots, TrustDomain: c.trustDomain, Network: c.network, Cluster: c.cluster,
		SameNode: c.sameNode, Log: log, Metrics: reg, DrainTimeout: c.drain, HoldTimeout: c.hold,
		Standby: true, // until the agent says who of the pair is active
	}
	if c.accessLog {
		cfg.AccessLog, cfg.AccessJSON, cfg.AccessLevel = out, c.logFormat == "json", level
	}
	var after *succession
	cfg.Heir = func() ztunnel.Heir { return after.heir() }
	proxy := ztunnel.New(cfg)
	turn := &turnstile{standby: c.standby, activated: make(chan struct{}), comm: "/proc/self/comm", log: log}
	agent := handoff.NewClient(handoff.ClientConfig{
		Path: c.handoffPath, Instance: c.instance(), Handler: proxy, Log: log, DNS: true,
		Pair: c.podName, Standby: c.standby, Activate: func() { proxy.Activate(); turn.activate() },
	})
	turn.synced = agent.Synced()
	after = newSuccession(&succession{
		path: c.handoverPath, instance: c.instance(), standby: c.standby, proxy: proxy, tookOver: proxy.TookOver, alone: agent.Alone(), log: log,
		warm: func(ctx context.Context) error { return warm(ctx, client, agent, proxy) },
	})
	whole := readiness{view: client.Synced(), pods: agent.Synced(), agent: agent.Connected, roots: roots.Loaded, joined: after.joined}
	pages := pages{proxy: proxy, store: store, level: level, ready: whole.missing}

	return run.UntilDrained(ctx, stopAll, proxy.Run,
		roots.Run, manager.Run, client.Run,
		func(inner context.Context) error {
			// Not while it drains: the agent is to ask another ztunnel then.
			if err := servePods(ctx, client, agent); err != nil {
				return err
			}
			<-inner.Done()
			return nil
		},
		turn.watch, tidyMemory,
		func(inner context.Context) error { return after.run(ctx, inner) },
		func(ctx context.Context) error { return turn.serve(ctx, c.adminAddr, pages.admin()) },
		func(ctx context.Context) error { return turn.serve(ctx, c.statsAddr, obs.Stats(reg)) },
		func(ctx context.Context) error { return turn.serve(ctx, c.readyAddr, obs.Health(pages.ready)) },
	)
}

// servePods takes pods from the node agent once the View is there: until then
// this ztunnel could only hold their connections up, and another that still
// runs may serve them.
func servePods(ctx context.Context, client *feed.Client, agent *handoff.Client) error {
	select {
	case <-client.Synced():
	case <-ctx.Done():
		return nil
	}
	return agent.Run(ctx)
}

// warm returns when this ztunnel serves every pod of the node, with what that
// needs.
func warm(ctx context.Context, client *feed.Client, agent *handoff.Client, proxy *ztunnel.Proxy) error {
	for _, c := range []<-chan struct{}{client.Synced(), agent.Synced()} {
		select {
		case <-c:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return proxy.Warm(ctx)
}

// A readiness is all that makes this ztunnel ready.
type readiness struct {
	view, pods <-chan struct{} // closed when the control service, and the node agent, have sent everything
	agent      func() bool     // the agent is connected
	roots      func() bool     // there are some
	joined     <-chan struct{} // closed when the ztunnel before this one knows of it
}

// missing reports, as an error, why this ztunnel is not ready. In a rollout the
// one before it ends as soon as it is.
func (r readiness) missing() error {
	select {
	case <-r.view:
	default:
		return errors.New("the control service has not been reached yet")
	}
	select {
	case <-r.pods:
	default:
		return errors.New("the node agent has not handed over its pods yet")
	}
	if !r.agent() {
		return errors.New("the node agent is not connected")
	}
	if !r.roots() {
		return errors.New("there are no roots to verify peers by")
	}
	select {
	case <-r.joined:
	default:
		return errors.New("the ztunnel before this one has not heard yet that its connections can be taken over")
	}
	return nil
}
