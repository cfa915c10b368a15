package feed

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/weft-mesh/weft/internal/run"
	"github.com/weft-mesh/weft/mesh/view"
)

// maxReceive is the largest response a Client takes: a first answer is the
// whole mesh.
const maxReceive = 200 << 20

// NodeMeta says which proxy a Client speaks for.
type NodeMeta struct {
	Role      string // empty is "ztunnel"; RoleWaypoint is told more
	PodName   string
	Namespace string
	IP        netip.Addr
	NodeName  string
	Cluster   string
	Domain    string // of the cluster's DNS; empty is "cluster.local"
}

// proto returns the node as the wire names it.
func (n NodeMeta) proto() *core.Node {
	return &core.Node{
		Id: fmt.Sprintf("%s~%v~%s.%s~%s.svc.%s", cmp.Or(n.Role, "ztunnel"), n.IP, n.PodName, n.Namespace, n.Namespace, cmp.Or(n.Domain, "cluster.local")),
		Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			"NAME":         structpb.NewStringValue(n.PodName),
			"NAMESPACE":    structpb.NewStringValue(n.Namespace),
			"INSTANCE_IPS": structpb.NewStringValue(n.IP.String()),
			"NODE_NAME":    structpb.NewStringValue(n.NodeName),
			"CLUSTER_ID":   structpb.NewStringValue(n.Cluster),
		}},
	}
}

// ClientConfig says where the control service is and who asks.
type ClientConfig struct {
	Address string // host:port
	// TLS returns how to verify the control service. It is called for every
	// connection, so that the roots in it may change.
	TLS func() (*tls.Config, error)
	// Token returns the bearer token that proves who asks. It is called for
	// every connection, because tokens expire.
	Token      func() (string, error)
	Node       NodeMeta
	Log        *slog.Logger
	Store      *view.Store           // what the Client keeps current
	Registerer prometheus.Registerer // of its metrics

	// dial replaces TCP in tests.
	dial func(ctx context.Context, addr string) (net.Conn, error)
}

// validate returns everything that is missing, joined.
func (c ClientConfig) validate() error {
	var errs []error
	need := func(there bool, what string) {
		if !there {
			errs = append(errs, fmt.Errorf("%s is not set", what))
		}
	}
	need(c.Address != "", "address")
	need(c.TLS != nil, "tls")
	need(c.Token != nil, "token")
	need(c.Node.PodName != "" && c.Node.Namespace != "", "pod name or namespace")
	need(c.Log != nil, "log")
	need(c.Store != nil, "store")
	need(c.Registerer != nil, "registerer of metrics")
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("feed client: %w", err)
	}
	return nil
}

// A Client keeps a view.Store current with what the control service says.
// While there is no connection the Store keeps its last View.
type Client struct {
	cfg     ClientConfig
	metrics *clientMetrics
	synced  chan struct{}
	cache   *cache // owned by Run
}

// NewClient returns a Client that does nothing until Run.
func NewClient(cfg ClientConfig) (*Client, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	return &Client{cfg: cfg, metrics: newClientMetrics(cfg.Registerer), synced: make(chan struct{}), cache: newCache(cfg.Node.Role)}, nil
}

// Synced returns a channel that is closed when the Store holds its first View.
func (c *Client) Synced() <-chan struct{} { return c.synced }

// Run connects, and connects again whenever the connection is lost, until ctx
// ends; then it returns nil. It may be called once.
func (c *Client) Run(ctx context.Context) error {
	complaint := &complaint{to: c.cfg.Log}
	run.Retry(ctx, backoff(), func(ctx context.Context) error {
		began := time.Now()
		err := c.connect(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		c.metrics.terminations.WithLabelValues(reason(err)).Inc()
		complaint.log(time.Since(began), c.cfg.Address, err)
		return err
	})
	return nil
}

// connectTimeout bounds one attempt to connect.
const connectTimeout = 3 * time.Second

// backoff is how long a Client waits before it connects again.
func backoff() run.Backoff { return run.Backoff{Min: 10 * time.Millisecond, Max: 5 * time.Second} }

// A complaint is what a Client last said about its connection. The same one
// every few seconds would bury all others.
type complaint struct {
	to   *slog.Logger
	said string
	when time.Time
}

// log says that a connection ended with err after lasted: once a minute for
// the same err. The end of one that worked is no reason to worry, because the
// control service ends them now and then.
func (c *complaint) log(lasted time.Duration, address string, err error) {
	level := slog.LevelWarn
	switch {
	case lasted > backoff().Max:
		level = slog.LevelInfo
	case err.Error() == c.said && time.Since(c.when) < time.Minute:
		level = slog.LevelDebug
	default:
		c.said, c.when = err.Error(), time.Now()
	}
	c.to.Log(context.Background(), level, "connection to the control service ended; going on with what is known, and connecting again",
		"address", address, "after", lasted.Round(time.Millisecond), "err", err)
}

// reason classifies the end of a connection for metrics.
func reason(err error) string {
	switch status.Code(err) {
	case codes.Unavailable:
		return "connection_error"
	case codes.OK, codes.Canceled:
		return "complete"
	}
	return "error"
}

// connect subscribes on a new connection and follows it to its end. Its error
// is never nil.
func (c *Client) connect(ctx context.Context) error {
	conf, err := c.cfg.TLS()
	if err != nil {
		return fmt.Errorf("prepare to verify the control service: %w", err)
	}
	if conf == nil {
		return errors.New("prepare to verify the control service: no tls config")
	}
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(conf)),
		grpc.WithPerRPCCredentials(bearer{token: c.cfg.Token, cluster: c.cfg.Node.Cluster}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReceive)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 10 * time.Second}),
		// A SYN to a control service that has just gone is answered by
		// nobody, and gRPC would wait 20 s for it while a new one is there.
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: grpcbackoff.DefaultConfig, MinConnectTimeout: connectTimeout}),
		grpc.WithInitialWindowSize(4 << 20),
		grpc.WithInitialConnWindowSize(8 << 20),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	}
	if c.cfg.dial != nil {
		opts = append(opts, grpc.WithContextDialer(c.cfg.dial))
	}
	conn, err := grpc.NewClient(c.cfg.Address, opts...)
	if err != nil {
		return fmt.Errorf("connect to the control service: %w", err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	rpc, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	for _, url := range c.cache.types {
		// A failed Send says nothing but EOF; Recv has the reason.
		if rpc.Send(c.subscribe(url)) != nil {
			break
		}
	}
	return c.follow(ctx, rpc)
}

// subscribe asks for everything of a type but what is here already.
func (c *Client) subscribe(url string) *discovery.DeltaDiscoveryRequest {
	return &discovery.DeltaDiscoveryRequest{
		Node:                    c.cfg.Node.proto(),
		TypeUrl:                 url,
		ResourceNamesSubscribe:  []string{wildcard},
		InitialResourceVersions: maps.Clone(c.cache.versions[url]),
	}
}

type deltaClient = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

// follow applies responses until the stream ends. All that have arrived while
// a View was made go into the next one together.
func (c *Client) follow(ctx context.Context, rpc deltaClient) error {
	arrived := make(chan *discovery.DeltaDiscoveryResponse, 16)
	again := c.cache.complete() // from an earlier connection
	return run.All(ctx,
		func(ctx context.Context) error {
			for {
				r, err := rpc.Recv()
				if err != nil {
					return fmt.Errorf("receive: %w", err)
				}
				c.metrics.received(r)
				select {
				case arrived <- r:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		},
		func(ctx context.Context) error {
			defer rpc.CloseSend()
			for {
				select {
				case <-ctx.Done():
					return ctx.Err()
				case r := <-arrived:
					if again {
						c.cfg.Log.Info("the control service answers again", "address", c.cfg.Address)
						again = false
					}
					c.take(rpc, gather(r, arrived))
				}
			}
		})
}

// gather returns r and all that waits behind it.
func gather(r *discovery.DeltaDiscoveryResponse, arrived <-chan *discovery.DeltaDiscoveryResponse) []*discovery.DeltaDiscoveryResponse {
	list := []*discovery.DeltaDiscoveryResponse{r}
	for {
		select {
		case r := <-arrived:
			list = append(list, r)
		default:
			return list
		}
	}
}

// take applies responses, puts the View they make into the Store and then
// acknowledges them, so that an acknowledged state is one in force.
func (c *Client) take(rpc deltaClient, list []*discovery.DeltaDiscoveryResponse) {
	acks := make([]*discovery.DeltaDiscoveryRequest, 0, len(list))
	for _, r := range list {
		ack := &discovery.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()}
		if err := c.cache.apply(r); err != nil {
			c.cfg.Log.Error("refused resources of the control service; what was known of them stays in force", "type", shortType(r.GetTypeUrl()), "err", err)
			ack.ErrorDetail = &statuspb.Status{Code: int32(codes.InvalidArgument), Message: err.Error()}
		}
		acks = append(acks, ack)
	}
	for _, err := range c.cache.doubts {
		c.cfg.Log.Warn("the control service sent what this version does not wholly understand; where in doubt, traffic is refused", "err", err)
	}
	c.cache.doubts = nil
	if c.cache.complete() {
		v := c.cache.view()
		c.cfg.Store.Set(v)
		select {
		case <-c.synced:
		default:
			c.cfg.Log.Info("received the mesh from the control service", "workloads", len(c.cache.workloads), "services", len(c.cache.services), "policies", len(c.cache.policies))
			close(c.synced)
		}
	}
	for _, ack := range acks {
		if rpc.Send(ack) != nil {
			return // Recv has the reason
		}
	}
}

// bearer puts a fresh token into the metadata of every call. gRPC refuses it
// on a connection without TLS.
type bearer struct {
	token   func() (string, error)
	cluster string
}

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := b.token()
	if err != nil {
		return nil, status.Errorf(codes.Unauthenticated, "read the token that proves who asks: %v", err)
	}
	return map[string]string{"authorization": "Bearer " + token, "clusterid": b.cluster}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (b bearer) RequireTransportSecurity() bool { return true }
