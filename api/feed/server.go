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
		tables:  map[string]*table{TypeAddress: newTable(), TypeAuthorization: newTable()},
		streams: map[*stream]bool{},
	}
}

// Register adds the service to g, which was made with ServerOptions.
func (s *Server) Register(g *grpc.Server) { discovery.RegisterAggregatedDiscoveryServiceServer(g, s) }

// SetSynced says that what was set is complete, and starts answering. Before
// that, half a mesh could be taken for the whole.
func (s *Server) SetSynced() { s.syncedOnce.Do(func() { close(s.synced) }) }

// Update replaces the whole state in one step. On the wire new policies go
// first, then workloads and services, then the removal of policies, so that a
// proxy never misses one that a workload lists.
func (s *Server) Update(r Resources) {
	addresses := slices.Concat(encodeAll(s.log, r.Workloads, encodeWorkload), encodeAll(s.log, r.Services, encodeService))
	policies := encodeAll(s.log, r.Policies, encodePolicy)
	s.edit(func() {
		s.tables[TypeAddress].replace(addresses, func(*resource) bool { return true })
		s.tables[TypeAuthorization].replace(policies, func(*resource) bool { return true })
	})
}

// UpdateWorkloads adds or replaces the workloads of set, and removes those of
// del. A policy that is listed for the first time must have been set before.
func (s *Server) UpdateWorkloads(set []mesh.Workload, del []mesh.UID) {
	rows := encodeAll(s.log, set, encodeWorkload)
	s.edit(func() {
		t := s.tables[TypeAddress]
		for _, u := range del {
			t.remove(string(u))
		}
		for _, r := range rows {
			t.set(r)
		}
	})
}

// SetServices replaces all services.
func (s *Server) SetServices(list []mesh.Service) {
	rows := encodeAll(s.log, list, encodeService)
	s.edit(func() {
		s.tables[TypeAddress].replace(rows, func(r *resource) bool { return r.service != mesh.ServiceName{} })
	})
}

// SetPolicies replaces all policies. One that goes should no longer be listed
// by any workload: proxies deny for a listed policy that they do not have.
func (s *Server) SetPolicies(list []mesh.Policy) {
	rows := encodeAll(s.log, list, encodePolicy)
	s.edit(func() { s.tables[TypeAuthorization].replace(rows, func(*resource) bool { return true }) })
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

// edit runs f on the tables and wakes the streams.
func (s *Server) edit(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	for url, t := range s.tables {
		t.compact(s.seen(url))
	}
	for st := range s.streams {
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
	st := &stream{subs: map[string]*subscription{}, unacked: map[string]string{}, wake: make(chan struct{}, 1)}
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
	if of, ok := st.unacked[req.GetResponseNonce()]; ok && of == url {
		delete(st.unacked, req.GetResponseNonce())
		if e := req.GetErrorDetail(); e != nil {
			s.metrics.rejects.WithLabelValues(shortType(url)).Inc()
			log.Error("subscriber rejected what it was sent; it goes on with what it had", "type", shortType(url), "err", e.GetMessage())
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
	var list []*discovery.DeltaDiscoveryResponse
	var gone answer // policies that are removed: last of all
	if sub := st.subs[TypeAuthorization]; sub != nil {
		a := sub.collect(s.tables[TypeAuthorization])
		if !a.whole {
			gone.removed, a.removed = a.removed, nil
		}
		list = append(list, a.responses(TypeAuthorization)...)
	}
	if sub := st.subs[TypeAddress]; sub != nil {
		list = append(list, sub.collect(s.tables[TypeAddress]).responses(TypeAddress)...)
	}
	list = append(list, gone.responses(TypeAuthorization)...)
	for _, r := range list {
		s.nonce++
		r.Nonce = strconv.FormatUint(s.nonce, 10)
		r.SystemVersionInfo = fmt.Sprint(s.tables[r.GetTypeUrl()].seq)
		st.unacked[r.GetNonce()] = r.GetTypeUrl()
	}
	return list
}
