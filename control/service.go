// Package control is the control service: it serves proxies their picture of
// the mesh and their certificates. What it serves comes from control/kube;
// what it knows of callers, from their tokens.
package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/weft-mesh/weft/api/feed"
	"github.com/weft-mesh/weft/identity/ca"
	"github.com/weft-mesh/weft/internal/obs"
	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/mesh"
)

// stopTime is how long calls in flight may finish when the service stops.
// Subscriptions never finish by themselves: their clients go to another
// replica, or come back.
const stopTime = 2 * time.Second

// IsWaypoint reports whether pods of a service account are replicas of a
// waypoint. Before the cluster has been read that is not known.
type IsWaypoint func(account mesh.Name) (is, known bool)

// NewFeed returns the server that tells proxies the state of the mesh, to be
// filled by control/kube. Only node proxies and waypoints may subscribe: the
// whole mesh and all its policies are in there.
func NewFeed(cfg Config, a *Authenticator, isWaypoint IsWaypoint, log *slog.Logger, reg prometheus.Registerer) *feed.Server {
	return feed.NewServer(log, reg, func(ctx context.Context) (feed.Subscriber, error) {
		caller, err := a.Authenticate(ctx)
		if err != nil {
			return feed.Subscriber{}, err
		}
		return subscriber(cfg, isWaypoint, caller)
	})
}

// subscriber decides whether the caller may subscribe, and as what.
func subscriber(cfg Config, isWaypoint IsWaypoint, caller Caller) (feed.Subscriber, error) {
	account := mesh.Name{Namespace: caller.Namespace, Name: caller.ServiceAccount}
	s := feed.Subscriber{
		Identity: mesh.Identity{TrustDomain: cfg.TrustDomain, Namespace: caller.Namespace, ServiceAccount: caller.ServiceAccount},
		Node:     caller.NodeName,
	}
	if slices.Contains(cfg.NodeAccounts, account) {
		return s, nil
	}
	switch is, known := isWaypoint(account); {
	case !known:
		return feed.Subscriber{}, status.Errorf(codes.Unavailable, "whether %s is a waypoint is not known before the cluster has been read", caller)
	case is:
		s.Role = feed.RoleWaypoint
		return s, nil
	}
	return feed.Subscriber{}, status.Errorf(codes.PermissionDenied, "%s may not subscribe: its service account is neither a node proxy's nor a waypoint's", caller)
}

// Parts are what a Service is put together from. All are required.
type Parts struct {
	Config        Config
	Authority     *ca.Authority
	Authenticator *Authenticator
	Feed          *feed.Server
	Pods          Pods
	Log           *slog.Logger
	Registerer    prometheus.Registerer
}

// A Service is the gRPC server that proxies talk to.
type Service struct {
	addr string
	log  *slog.Logger
	grpc *grpc.Server
}

// NewService returns a Service; Run starts it.
func NewService(p Parts) *Service {
	serving := NewServing(p.Authority, p.Config.ServerNames(), p.Log)
	g := grpc.NewServer(append(feed.ServerOptions(),
		grpc.Creds(credentials.NewTLS(serving.TLS())),
		grpc.ConnectionTimeout(15*time.Second), // for the handshake
	)...)
	p.Feed.Register(g)
	NewCA(CAConfig{
		Authority: p.Authority, Authenticator: p.Authenticator, Pods: p.Pods,
		NodeAccounts: p.Config.NodeAccounts, Log: p.Log, Registerer: p.Registerer,
	}).Register(g)
	return &Service{addr: p.Config.GRPC, log: p.Log, grpc: g}
}

// Run serves until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", s.addr)
	if err != nil {
		return fmt.Errorf("serve proxies: %w", err)
	}
	return s.serve(ctx, l)
}

// serve serves on l, which it closes, until ctx ends.
func (s *Service) serve(ctx context.Context, l net.Listener) error {
	s.log.Info("serving proxies", "address", l.Addr().String())
	stop := func(ctx context.Context) error {
		<-ctx.Done()
		kill := time.AfterFunc(stopTime, s.grpc.Stop)
		defer kill.Stop()
		s.grpc.GracefulStop()
		return nil
	}
	serve := func(context.Context) error {
		if err := s.grpc.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			return fmt.Errorf("serve proxies on %v: %w", l.Addr(), err)
		}
		return nil
	}
	return run.All(ctx, stop, serve)
}

// ServeMetrics serves /metrics until ctx ends.
func ServeMetrics(ctx context.Context, addr string, reg *prometheus.Registry) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", obs.MetricsHandler(reg))
	return obs.Serve(ctx, addr, mux)
}
