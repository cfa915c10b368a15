package feed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strconv"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/weft-mesh/weft/mesh"
)

// A Subscriber is who listens on a stream, as its credentials proved it.
type Subscriber struct {
	Identity mesh.Identity
	Node     string // the Kubernetes node it runs on; empty if not known
	// Role is RoleWaypoint for those who may know what waypoints do.
	Role string
}

// ServerOptions are what a grpc.Server needs to carry a Server: requests may
// name the versions of a whole mesh, clients may ping often, and nobody stays
// longer than half an hour on a token that may have been revoked since. A
// client that comes back is sent only what changed. Headers are read before
// anybody has proved who he is, so they are small, and streams are few: a
// proxy has one, and a call or two for certificates.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(16 << 20),
		grpc.MaxHeaderListSize(64 << 10),
		grpc.MaxConcurrentStreams(100),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: 30 * time.Second, Timeout: 10 * time.Second,
			MaxConnectionAge: 30 * time.Minute, MaxConnectionAgeGrace: 10 * time.Second,
		}),
	}
}

// A Server holds the state of the mesh and tells it to all proxies that
// subscribe. A slow subscriber gets the newest state, not every state between.
// All methods may be called at any time from anywhere.
type Server struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer

	log     *slog.Logger
	auth    func(context.Context) (Subscriber, error)
	metrics *serverMetrics

	synced     chan struct{}
	syncedOnce sync.Once

	mu      sync.Mutex
	tables  map[string]*table // by type; the keys never change
	streams map[*stream]bool
	nonce   uint64
}

// NewServer returns a Server that knows nothing and answers nobody until
// SetSynced. It registers its metrics with reg. auth says who calls, from the
// gRPC metadata and peer of its context; its error refuses the caller, who
// gets to see it. A nil auth refuses everybody.
func NewServer(log *slog.Logger, reg prometheus.Registerer, auth func(ctx context.Context) (Subscriber, error)) *Server {
	if auth == nil {
		auth = func(context.Context) (Subscriber, error) {
			return Subscriber{}, errors.New("no way to authenticate is configured")
		}
	}
	return &Server{
		log:     log,
		auth:    auth,
		metrics: newServerMetrics(reg),
		synced:  make(chan struct{}),
		tables:  newTables(),
		streams: map[*stream]bool{},
	}
}

// newTables returns an empty table for each type.
func newTables() map[string]*table {
	tables := map[string]*table{}
	for _, url := range sending() {
		tables[url] = newTable()
	}
	return tables
}

// Register adds the service to g, which was made with ServerOptions.
func (s *Server) Register(g *grpc.Server) { discovery.RegisterAggregatedDiscoveryServiceServer(g, s) }

// SetSynced says that what was set is complete, and starts answering. Before
// that, half a mesh could be taken for the whole.
func (s *Server) SetSynced() { s.syncedOnce.Do(func() { close(s.synced) }) }

// Update replaces the whole state in one step. On the wire what is new goes
// before what refers to it, and what is gone after: a proxy never misses a
// policy that a workload lists, nor a service that a route leads to.
func (s *Server) Update(r Resources) {
	rows := s.encode(r)
	s.edit(time.Now(), func() {
		for url, t := range s.tables {
			t.replace(rows[url], all)
		}
	})
}

// UpdateWorld is Update for one who knows which workloads have changed:
// r.Workloads are those, and del are gone. since is when the first of the
// changes was noticed; the time until proxies have them counts from there.
func (s *Server) UpdateWorld(r Resources, del []mesh.UID, since time.Time) {
	rows := s.encode(Resources{Services: r.Services, Policies: r.Policies, Routes: r.Routes, TrafficPolicies: r.TrafficPolicies, Waypoints: r.Waypoints})
	workloads := encodeAll(s.log, r.Workloads, encodeWorkload)
	s.edit(since, func() {
		for url, t := range s.tables {
			mine := all
			if url == TypeAddress {
				mine = func(r *resource) bool { return r.service != mesh.ServiceName{} }
			}
			t.replace(rows[url], mine)
		}
		s.tables[TypeAddress].apply(workloads, del)
	})
}

// UpdateWorkloads adds or replaces the workloads of set, and removes those of
// del. A policy that is listed for the first time must have been set before.
// since is as for UpdateWorld.
func (s *Server) UpdateWorkloads(set []mesh.Workload, del []mesh.UID, since time.Time) {
	rows := encodeAll(s.log, set, encodeWorkload)
	s.edit(since, func() { s.tables[TypeAddress].apply(rows, del) })
}

// SetPolicies replaces all policies. One that goes should no longer be listed
// by any workload: proxies deny for a listed policy that they do not have.
func (s *Server) SetPolicies(list []mesh.Policy) {
	rows := s.encode(Resources{Policies: list})
	s.edit(time.Now(), func() {
		s.tables[TypeAuthorization].replace(rows[TypeAuthorization], all)
		s.tables[TypePolicy].replace(rows[TypePolicy], all)
	})
}

// all is every resource of a table.
func all(*resource) bool { return true }

// encode encodes everything, by type.
func (s *Server) encode(r Resources) map[string][]*resource {
	var wide, targeted []mesh.Policy
	for _, p := range r.Policies {
		if p.Scope == mesh.ScopeTarget {
			targeted = append(targeted, p)
		} else {
			wide = append(wide, p)
		}
	}
	return map[string][]*resource{
		TypeAddress:       slices.Concat(encodeAll(s.log, r.Workloads, encodeWorkload), encodeAll(s.log, r.Services, encodeService)),
		TypeAuthorization: encodeAll(s.log, wide, encodePolicy),
		TypePolicy:        encodeAll(s.log, targeted, encodeTargeted),
		TypeRoute:         encodeAll(s.log, r.Routes, encodeRoute),
		TypeTrafficPolicy: encodeAll(s.log, r.TrafficPolicies, encodeTrafficPolicy),
		TypeWaypoint:      encodeAll(s.log, r.Waypoints, encodeWaypoint),
	}
}

// encodeAll encodes a list. What cannot be encoded (a string that is not
// UTF-8) is left out and logged.
func encodeAll[T any](log *slog.Logger, list []T, encode func(T) (*resource, error)) []*resource {
	rows := make([]*resource, 0, len(list))
	for _, x := range list {
		r, err := encode(x)
		if err != nil {
			log.Error("cannot tell proxies about an object: rename or remove it", "err", err)
			continue
		}
		rows = append(rows, r)
	}
	return rows
}

// edit runs f on the tables and wakes the streams. since is when what f does
// was noticed.
func (s *Server) edit(since time.Time, f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	for url, t := range s.tables {
		t.compact(s.seen(url))
	}
	for st := range s.streams {
		if st.since.IsZero() {
			st.since = since
		}
		st.rouse()
	}
}

// seen returns what every stream has seen of a table.
func (s *Server) seen(url string) uint64 {
	seq := uint64(math.MaxUint64)
	for st := range s.streams {
		if sub := st.subs[url]; sub != nil && sub.everything && !sub.first {
			seq = min(seq, sub.at)
		}
	}
	return seq
}

// A stream is one subscriber's connection. The server's mutex guards it.
type stream struct {
	subs    map[string]*subscription // by type
	unacked map[string]string        // nonces of responses under way -> type
	wake    chan struct{}
	role    string

	since  time.Time // when the first change that is not sent yet was noticed
	flight time.Time // the same of what is under way
}

// rouse makes the stream look for what is due; it never blocks.
func (st *stream) rouse() {
	select {
	case st.wake <- struct{}{}:
	default:
	}
}

// DeltaAggregatedResources serves one subscriber; gRPC calls it.
func (s *Server) DeltaAggregatedResources(rpc discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	who, err := s.auth(rpc.Context())
	log := s.log.With("peer", remote(rpc.Context()))
	if err != nil {
		log.Warn("refused a subscriber", "err", err)
		return refusal(err)
	}
	log = log.With("subscriber", who.Identity.String(), "node", who.Node)
	st := &stream{subs: map[string]*subscription{}, unacked: map[string]string{}, wake: make(chan struct{}, 1), role: who.Role}
	s.mu.Lock()
	s.streams[st] = true
	s.mu.Unlock()
	s.metrics.connected.Inc()
	log.Info("subscriber connected")
	began := time.Now()
	defer func() {
		s.mu.Lock()
		delete(s.streams, st)
		s.mu.Unlock()
		s.metrics.connected.Dec()
		log.Info("subscriber left", "after", time.Since(began).Round(time.Millisecond))
	}()

	// A Send that blocks ends when the connection does, and so does Recv.
	ctx, cancel := context.WithCancel(rpc.Context())
	var sender sync.WaitGroup
	sender.Go(func() { s.send(ctx, rpc, st) })
	defer sender.Wait()
	defer cancel()
	for {
		req, err := rpc.Recv()
		if err != nil {
			return nil
		}
		s.receive(log, st, req)
	}
}

// refusal is the answer to a caller that auth refused with err. A code that auth
// chose stays: a caller treats "not now" and "never" differently. An error
// without one says that the caller did not prove who it is, and so does one
// whose code would pass for success.
func refusal(err error) error {
	if s, ok := status.FromError(err); ok && s.Code() != codes.OK {
		return status.Error(s.Code(), "subscribe: "+s.Message())
	}
	return status.Errorf(codes.Unauthenticated, "subscribe: %v", err)
}

// remote returns the address of the caller.
func remote(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		return p.Addr.String()
	}
	return "unknown"
}

// receive takes in one request: an answer to a response, a change of the
// subscription, or both.
func (s *Server) receive(log *slog.Logger, st *stream, req *discovery.DeltaDiscoveryRequest) {
	url := req.GetTypeUrl()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tables[url] == nil {
		log.Warn("subscriber asked for a type that is not served; ignored", "type", url)
		return
	}
	if st.role != RoleWaypoint && slices.Contains(ofRequests(), url) {
		log.Warn("subscriber asked for a type that is for waypoints; ignored", "type", url)
		return
	}
	if of, ok := st.unacked[req.GetResponseNonce()]; ok && of == url {
		delete(st.unacked, req.GetResponseNonce())
		if e := req.GetErrorDetail(); e != nil {
			s.metrics.rejects.WithLabelValues(shortType(url)).Inc()
			log.Error("subscriber rejected what it was sent; it goes on with what it had, or refuses", "type", shortType(url), "err", e.GetMessage())
		}
		if len(st.unacked) == 0 && !st.flight.IsZero() {
			s.metrics.converged.Observe(time.Since(st.flight).Seconds())
			st.flight = time.Time{}
		}
	}
	sub := st.subs[url]
	if sub == nil {
		sub = newSubscription(req)
		st.subs[url] = sub
		log.Debug("subscribed", "type", shortType(url), "id", req.GetNode().GetId(), "has", len(sub.known), "everything", sub.everything)
	}
	sub.change(req)
	st.rouse()
}

// send sends what is due, whenever something may be, until ctx ends.
func (s *Server) send(ctx context.Context, rpc discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer, st *stream) {
	select {
	case <-ctx.Done():
		return
	case <-s.synced:
	}
	for {
		for _, r := range s.due(st) {
			began := time.Now()
			if rpc.Send(r) != nil {
				return // Recv reports it
			}
			s.metrics.pushed(r, time.Since(began))
		}
		select {
		case <-ctx.Done():
			return
		case <-st.wake:
		}
	}
}

// due returns the responses to send now, in their order. As long as one that
// was sent is not acknowledged there are none: changes gather meanwhile.
func (s *Server) due(st *stream) []*discovery.DeltaDiscoveryResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(st.unacked) > 0 {
		return nil
	}
	st.flight, st.since = st.since, time.Time{}
	var list, last []*discovery.DeltaDiscoveryResponse
	for _, url := range sending() {
		sub := st.subs[url]
		if sub == nil {
			continue
		}
		a := sub.collect(s.tables[url])
		if !a.whole && st.deferred(url) {
			gone := answer{removed: a.removed}
			last = slices.Concat(gone.responses(url), last)
			a.removed = nil
		}
		list = append(list, a.responses(url)...)
	}
	list = append(list, last...)
	for _, r := range list {
		s.nonce++
		r.Nonce = strconv.FormatUint(s.nonce, 10)
		r.SystemVersionInfo = fmt.Sprint(s.tables[r.GetTypeUrl()].seq)
		st.unacked[r.GetNonce()] = r.GetTypeUrl()
	}
	if len(list) == 0 {
		st.flight = time.Time{}
	}
	return list
}

// deferred reports whether what is removed of a type is sent behind everything
// else: when something else may refer to it. To a stream without routes nothing
// refers to a workload or service, and one that takes the place of another is
// told in one step with it.
func (st *stream) deferred(url string) bool {
	switch url {
	case TypeAddress, TypeTrafficPolicy:
		return st.subs[TypeRoute] != nil
	case TypeRoute, TypeWaypoint:
		return false
	}
	return true
}
