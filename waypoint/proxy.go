// Package waypoint is the proxy in front of services: tunnels of the mesh come
// in, an engine decides on what is in them, and tunnels go out to the pods, in
// the waypoint's own name.
//
// What a tunnel asks for must be bound to this waypoint, so that it is no way
// around the rules of another (bind). What goes out is in a tunnel to exactly
// the workload that the View names, or in clear to one of which the View says
// that it is outside of the mesh (planDial). Both are pure functions of one
// view.View.
package waypoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/waypoint/l7"
)

// Config is what a Proxy works with.
type Config struct {
	View     *view.Store       // required
	Identity *identity.Manager // required
	Roots    *identity.Roots   // required
	// ID is who this waypoint is: the only identity it may have.
	ID mesh.Identity
	// Gateway is the Gateway that this is a replica of.
	Gateway mesh.Name
	// Pod is the pod that this runs in.
	Pod     mesh.Name
	Network string // of this pod; "" is the default network
	Cluster string // of this pod, for baggage

	Log     *slog.Logger          // required
	Metrics prometheus.Registerer // nil exports none

	// Linger is how long new connections are still taken after the end was asked
	// for: until then others may not have heard of it. 0 is a second.
	Linger time.Duration
	// Drain is how long what is open may last after that. 0 is 20 seconds.
	Drain time.Duration
}

// validate returns everything that is missing, joined.
func (c Config) validate() error {
	var errs []error
	need := func(there bool, what string) {
		if !there {
			errs = append(errs, fmt.Errorf("waypoint: Config.%s is missing", what))
		}
	}
	need(c.View != nil, "View")
	need(c.Identity != nil, "Identity")
	need(c.Roots != nil, "Roots")
	need(!c.ID.IsZero(), "ID")
	need(c.Gateway != mesh.Name{}, "Gateway")
	need(c.Log != nil, "Log")
	return errors.Join(errs...)
}

// Timings that are not worth a setting.
const (
	// patience is how long a new connection waits for the View to know what it
	// asks for: the sender's may be ahead of ours.
	patience = 2 * time.Second
	// afterlife is how long a service that was unbound is still served: the
	// sender's View may be behind ours.
	afterlife = 10 * time.Second
	// acceptPause is how long accepting pauses when the process is out of files.
	acceptPause = 50 * time.Millisecond
)

// An Engine serves the connections that come through tunnels; *l7.Engine is one.
type Engine interface {
	// Serve serves one connection, and closes it. The end of ctx cuts it.
	Serve(ctx context.Context, c net.Conn, f l7.Facts) error
	// Drain brings what is served to an end, in order.
	Drain()
}

// A Proxy is one replica of a waypoint. Make it with New; then call Run.
type Proxy struct {
	cfg     Config
	pool    *hbone.Pool
	shake   hbone.ServerConfig
	metrics *metrics
	recent  recent
	lookup  func(ctx context.Context, host string) ([]netip.Addr, error)

	draining atomic.Bool
	open     atomic.Int64 // connections
}

// New returns a proxy that serves nothing yet.
func New(cfg Config) (*Proxy, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	cfg.Linger = cmp.Or(cfg.Linger, time.Second)
	cfg.Drain = cmp.Or(cfg.Drain, 20*time.Second)
	p := &Proxy{cfg: cfg, metrics: newMetrics(cfg.Metrics), lookup: lookup}
	own := cfg.Identity.Only(cfg.ID)
	handshakes := hbone.NewHandshakes()
	p.shake = hbone.ServerConfig{
		TLS: identity.ServerTLS(own, cfg.Roots, cfg.ID.TrustDomain),
		Ready: func(ctx context.Context) error {
			_, err := own(ctx)
			return err
		},
		Handshakes:   handshakes,
		DrainTimeout: cfg.Drain,
		Log:          cfg.Log,
	}
	p.pool = hbone.NewPool(hbone.PoolConfig{Dial: p.dialTunnel, TLS: p.tunnelTLS, Handshakes: handshakes, Log: cfg.Log})
	return p, nil
}

// Run takes tunnels on l, which it closes, and gives the connections in them to
// engine, until ctx ends. Then it is not Ready any more; for Config.Linger it
// takes new connections, then it tells the peers to go elsewhere and drains
// engine, and when everything has ended, or has been cut after Config.Drain, it
// returns.
func (p *Proxy) Run(ctx context.Context, l net.Listener, engine Engine) error {
	p.cfg.Identity.Warm(p.cfg.ID)
	defer p.cfg.Identity.Forget(p.cfg.ID)
	defer p.pool.Close()
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	shake := p.shake
	shake.Handle = func(alive context.Context, r *hbone.Request) { p.serve(alive, r, engine) }
	server := hbone.NewServer(shake)

	var work sync.WaitGroup
	work.Go(func() { p.follow(serving) })
	ended := make(chan error, 1)
	work.Go(func() { ended <- p.accept(serving, l, server, &work) })
	var err error
	select {
	case <-ctx.Done():
		p.draining.Store(true)
		p.cfg.Log.Info("draining", "connections", p.open.Load(), "linger", p.cfg.Linger, "timeout", p.cfg.Drain)
		select {
		case <-time.After(p.cfg.Linger):
		case err = <-ended:
		}
	case err = <-ended:
	}
	stop()
	_ = l.Close() // it fails only if it is closed
	engine.Drain()
	work.Wait()
	return err
}

// accept gives tunnels to server until ctx ends.
func (p *Proxy) accept(ctx context.Context, l net.Listener, server *hbone.Server, work *sync.WaitGroup) error {
	var complained time.Time
	for {
		c, err := l.Accept()
		switch {
		case err == nil:
			work.Go(func() {
				p.metrics.tunnels.Inc()
				defer p.metrics.tunnels.Dec()
				from := c.RemoteAddr()
				if err := server.ServeConn(ctx, c); err != nil {
					// Anybody can make them fail: not worth more.
					p.cfg.Log.Debug("a tunnel ended", "from", from, "error", err)
				}
			})
			continue
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept tunnels: %w", err)
		}
		// Out of files or memory: those in the backlog wait.
		if now := time.Now(); now.Sub(complained) >= time.Minute {
			complained = now
			p.cfg.Log.Error("cannot accept a tunnel: trying again", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(acceptPause):
		}
	}
}

// serve serves one connection of a tunnel. ctx ends when the connection is gone,
// or the server's patience with it is over.
func (p *Proxy) serve(ctx context.Context, r *hbone.Request, engine Engine) {
	facts, err := p.admit(ctx, r)
	if err != nil {
		p.metrics.refused.Inc()
		p.cfg.Log.Info("a connection was refused", "peer", r.Peer, "from", r.Remote, "target", r.Authority, "error", err)
		_ = r.Reject(statusNotFound) // it fails when the peer is gone
		return
	}
	s, err := r.Accept(hbone.Header{})
	if err != nil {
		return // as above
	}
	p.open.Add(1)
	p.metrics.connections.Inc()
	defer func() {
		p.open.Add(-1)
		p.metrics.connections.Dec()
	}()
	if err := engine.Serve(ctx, s, facts); err != nil {
		p.cfg.Log.Debug("a connection ended", "peer", r.Peer, "source", facts.Source, "target", r.Authority, "error", err)
	}
}

// statusNotFound answers a CONNECT for what is not behind this waypoint.
const statusNotFound = 404

// admit finds out what a request asks for, and waits a moment for the View to
// know it.
func (p *Proxy) admit(ctx context.Context, r *hbone.Request) (l7.Facts, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		changed := p.cfg.View.Changed()
		v := p.cfg.View.Load()
		facts, err := bind(v, p.cfg.Gateway, p.recent.has, r.Peer, r.Authority)
		if err == nil {
			facts.Peer = r.Peer
			facts.Source = clientAddress(v, r.Peer, r.Remote, r.Header.Forwarded)
			return facts, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return l7.Facts{}, err
		}
	}
}

// follow remembers which services were bound to this waypoint lately, until ctx
// ends.
func (p *Proxy) follow(ctx context.Context) {
	for {
		changed := p.cfg.View.Changed()
		p.recent.update(bound(p.cfg.View.Load(), p.cfg.Gateway), time.Now())
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// Ready reports, as an error, why this waypoint takes no connections (yet, or
// any more).
func (p *Proxy) Ready() error {
	switch v := p.cfg.View.Load(); {
	case p.draining.Load():
		return errors.New("the waypoint is ending")
	case !v.Synced():
		return errors.New("the control service has not been reached yet")
	case v.Waypoint(p.cfg.Gateway) == nil:
		return fmt.Errorf("the control service knows no waypoint %s: does the Gateway exist, and is it accepted?", p.cfg.Gateway)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // only what is there
	if _, err := p.cfg.Identity.Certificate(ctx, p.cfg.ID); err != nil {
		return fmt.Errorf("there is no certificate for %s: %w", p.cfg.ID, err)
	}
	return nil
}
