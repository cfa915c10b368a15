// Command waypoint is one replica of a waypoint: see package waypoint.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	_ "golang.org/x/crypto/x509roots/fallback" // for TLS to the outside: the image has no file of authorities, unless one is mounted

	"github.com/weft-mesh/weft/api/feed"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/identity/issue"
	"github.com/weft-mesh/weft/internal/obs"
	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/waypoint"
	"github.com/weft-mesh/weft/waypoint/l7"
)

func main() {
	c, err := parseConfig(os.Args[1:], os.Getenv)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "waypoint: %v\n", err)
		os.Exit(2)
	}
	ctx, stop := run.UntilSignal(context.Background())
	defer stop()
	if err := serve(ctx, c, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "waypoint: %v\n", err)
		os.Exit(1)
	}
}

// serve runs a waypoint until ctx ends and it has drained.
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
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), obs.Build("waypoint"))

	roots := identity.NewRootsFile(c.rootsFile, c.trustDomain, log)
	controlTLS := identity.ControlTLS(c.rootsFile, c.serverName())
	issuer, err := issue.New(issue.Config{Address: c.controlAddress, TLS: controlTLS, TokenFile: c.tokenFile, Cluster: c.cluster})
	if err != nil {
		return err
	}
	defer issuer.Close()
	manager := identity.NewManager(identity.Config{Issuer: issuer, Roots: roots.Roots, TrustDomain: c.trustDomain, Log: log, Registerer: reg})
	store := new(view.Store)
	ip, err := netip.ParseAddr(c.podIP)
	if err != nil {
		return err
	}
	client, err := feed.NewClient(feed.ClientConfig{
		Address: c.controlAddress, TLS: controlTLS, Token: identity.TokenFile(c.tokenFile), Store: store, Log: log, Registerer: reg,
		Node: feed.NodeMeta{Role: feed.RoleWaypoint, PodName: c.podName, Namespace: c.podNamespace, IP: ip, NodeName: c.nodeName, Cluster: c.cluster},
	})
	if err != nil {
		return err
	}
	proxy, err := waypoint.New(waypoint.Config{
		View: store, Identity: manager, Roots: roots.Roots, ID: c.id(), Gateway: c.gatewayName(), Pod: c.pod(),
		Network: c.network, Cluster: c.cluster, Log: log, Metrics: reg, Linger: c.linger, Drain: c.drain,
	})
	if err != nil {
		return err
	}
	w := &worker{c: c, proxy: proxy, client: client, store: store, log: log, made: make(chan *l7.Engine, 1)}
	w.engine = l7.Config{
		Store: store, Dialer: proxy.Dialer(), Waypoint: c.gatewayName(), Logger: log, Metrics: reg, Limits: l7.Limits{Drain: c.drain},
	}
	if c.accessLog {
		w.engine.AccessLog = out
	}
	ready := func() error {
		if !roots.Loaded() {
			return errors.New("there are no roots to verify peers by")
		}
		return w.ready()
	}
	at := func(addr string, h http.Handler) run.Task {
		return func(ctx context.Context) error { return obs.Serve(ctx, addr, h) }
	}
	return run.UntilDrained(ctx, stopAll, w.serve,
		roots.Run, manager.Run, client.Run, w.keep,
		at(c.adminAddr, admin(c, store, level)), at(c.statsAddr, obs.Stats(reg)), at(c.promAddr, obs.Stats(reg)), at(c.readyAddr, obs.Health(ready)),
	)
}

// A worker makes the engine as soon as it is known what for.
type worker struct {
	c      config
	proxy  *waypoint.Proxy
	client *feed.Client
	store  *view.Store
	log    *slog.Logger
	engine l7.Config
	made   chan *l7.Engine
}

// selfPatience is how long the engine waits to know the workload that it runs
// in. Without it, nearness does not count.
const selfPatience = 2 * time.Second

// serve waits for the View, and then serves until ctx ends.
func (w *worker) serve(ctx context.Context) error {
	defer close(w.made)
	select {
	case <-w.client.Synced():
	case <-ctx.Done():
		return nil
	}
	w.engine.Self = w.self(ctx)
	engine, err := l7.New(w.engine)
	if err != nil {
		return err
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", w.c.listenAddr)
	if err != nil {
		return fmt.Errorf("listen for tunnels: %w", err)
	}
	w.made <- engine
	w.log.Info("serving", "gateway", w.c.gatewayName(), "identity", w.c.id(), "address", l.Addr())
	return w.proxy.Run(ctx, l, engine)
}

// keep does the engine's housekeeping until ctx ends, which is after serve has.
func (w *worker) keep(ctx context.Context) error {
	if engine := <-w.made; engine != nil {
		return engine.Run(ctx)
	}
	<-ctx.Done()
	return nil
}

// self returns the workload that this runs in, or an empty one.
func (w *worker) self(ctx context.Context) mesh.Workload {
	ctx, cancel := context.WithTimeout(ctx, selfPatience)
	defer cancel()
	for {
		changed := w.store.Changed()
		if own := w.store.Load().ByName(w.c.pod()); own != nil && own.Identity == w.c.id() {
			return *own
		}
		select {
		case <-changed:
		case <-ctx.Done():
			w.log.Warn("the mesh does not know this pod yet: endpoints are chosen without regard to how near they are", "pod", w.c.pod())
			return mesh.Workload{}
		}
	}
}

// ready reports, as an error, why this waypoint is not ready.
func (w *worker) ready() error {
	select {
	case <-w.client.Synced():
	default:
		return errors.New("the control service has not been reached yet")
	}
	return w.proxy.Ready()
}

// admin are the pages for debugging, for localhost only.
func admin(c config, store *view.Store, level *slog.LevelVar) http.Handler {
	mux := obs.Debug(level)
	mux.HandleFunc("GET /debug/view", func(w http.ResponseWriter, _ *http.Request) { obs.WriteJSON(w, store.Load()) })
	mux.HandleFunc("GET /config_dump", func(w http.ResponseWriter, _ *http.Request) { obs.WriteJSON(w, dump(c, store.Load())) })
	return mux
}

// A dumped is what /config_dump shows: who this is, and what it fronts.
type dumped struct {
	Gateway  mesh.Name             `json:"gateway"`
	Identity mesh.Identity         `json:"identity"`
	Version  string                `json:"version"`
	Waypoint *mesh.Waypoint        `json:"waypoint"` // nil if the View has none
	Services []mesh.ServiceName    `json:"services"` // bound to this waypoint
	Routes   []*mesh.Route         `json:"routes"`   // of these
	Traffic  []*mesh.TrafficPolicy `json:"trafficPolicies"`
	Policies []*mesh.Policy        `json:"policies"` // that protect any of these
}

func dump(c config, v *view.View) dumped {
	d := dumped{Gateway: c.gatewayName(), Identity: c.id(), Version: v.Version(), Waypoint: v.Waypoint(c.gatewayName()), Services: []mesh.ServiceName{}}
	fronted := map[mesh.ServiceName]bool{}
	seen := map[*mesh.Policy]bool{}
	for s := range v.Services() {
		if d.Waypoint == nil || s.Waypoint.Service != d.Waypoint.Service {
			continue
		}
		fronted[s.Name] = true
		d.Services = append(d.Services, s.Name)
		for _, p := range v.Targeted(s.Name, d.Gateway) {
			if !seen[p] {
				seen[p] = true
				d.Policies = append(d.Policies, p)
			}
		}
	}
	for r := range v.Routes() {
		if fronted[r.Service] {
			d.Routes = append(d.Routes, r)
		}
	}
	for p := range v.TrafficPolicies() {
		if fronted[p.Service] {
			d.Traffic = append(d.Traffic, p)
		}
	}
	return d
}
