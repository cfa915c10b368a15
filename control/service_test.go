package control

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"istio.io/api/security/v1alpha1"

	"github.com/weft-mesh/weft/api/feed"
	"github.com/weft-mesh/weft/identity/ca"
	"github.com/weft-mesh/weft/mesh"
)

// nobody is Pods of an empty cluster.
type nobody struct{}

func (nobody) NodeOf(mesh.Name, string) (string, bool)   { return "", false }
func (nobody) RunsOn(string, mesh.Identity) (there bool) { return false }

// onlyShop says that shop/waypoint is a waypoint; of namespace late nothing is
// known yet.
func onlyShop(account mesh.Name) (is, known bool) {
	return account == mesh.Name{Namespace: "shop", Name: "waypoint"}, account.Namespace != "late"
}

// A rig is a service on a local port, and what a test needs to call it.
type rig struct {
	addr  string
	roots *x509.CertPool
	stop  context.CancelFunc
	done  chan error
}

// newRig starts a service whose API server accepts the tokens "ztunnel",
// "tenant", "waypoint" and "late".
func newRig(t *testing.T) *rig {
	t.Helper()
	authority, err := ca.New("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	cfg := Defaults("")
	authn := NewAuthenticator(AuthenticatorConfig{Registerer: reg, Review: func(_ context.Context, token, audience string) (Review, error) {
		switch token {
		case "ztunnel":
			return Review{Audiences: []string{audience}, Namespace: "weft-system", ServiceAccount: "ztunnel", NodeName: "n"}, nil
		case "tenant":
			return Review{Audiences: []string{audience}, Namespace: "shop", ServiceAccount: "ztunnel"}, nil
		case "waypoint":
			return Review{Audiences: []string{audience}, Namespace: "shop", ServiceAccount: "waypoint"}, nil
		case "late":
			return Review{Audiences: []string{audience}, Namespace: "late", ServiceAccount: "waypoint"}, nil
		}
		return Review{Refused: "unknown"}, nil
	}})
	f := NewFeed(cfg, authn, onlyShop, silent(), reg)
	f.UpdateWorkloads([]mesh.Workload{{UID: "u", Name: mesh.Name{Namespace: "shop", Name: "cart"}, Transport: mesh.PlainTCP}}, nil, time.Now())
	f.SetSynced()
	s := NewService(Parts{Config: cfg, Authority: authority, Authenticator: authn, Feed: f, Pods: nobody{}, Log: silent(), Registerer: reg})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &rig{addr: l.Addr().String(), roots: x509.NewCertPool(), stop: cancel, done: make(chan error, 1)}
	r.roots.AppendCertsFromPEM(authority.RootPEM())
	go func() { r.done <- s.serve(ctx, l) }()
	t.Cleanup(func() { cancel(); <-r.done })
	return r
}

// dial connects as one who expects the given name.
func (r *rig) dial(t *testing.T, name string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(r.addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: r.roots, ServerName: name, MinVersion: tls.VersionTLS13})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func as(ctx context.Context, token string) context.Context {
	if token == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
}

// subscribe asks for all addresses and returns the first answer.
func subscribe(ctx context.Context, conn *grpc.ClientConn) (*discovery.DeltaDiscoveryResponse, discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient, error) {
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return nil, nil, err
	}
	_ = stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: feed.TypeAddress}) // a failure shows in Recv
	resp, err := stream.Recv()
	return resp, stream, err
}

// TestService proves who is served on the one port, and who is not.
func TestService(t *testing.T) {
	r := newRig(t)
	conn := r.dial(t, "weft-control.weft-system.svc")
	for _, tc := range []struct {
		name, token string
		feed        string // in the refusal; "" is served
		cert        codes.Code
	}{
		{"no token", "", "authorization header", codes.Unauthenticated},
		{"a token that is not accepted", "forged", "does not accept the token", codes.Unauthenticated},
		{"a workload may not see the whole mesh, and needs a signing request", "tenant", "shop/ztunnel may not subscribe", codes.InvalidArgument},
		{"a node proxy", "ztunnel", "", codes.InvalidArgument},
		{"a waypoint, which gets its own certificate too", "waypoint", "", codes.InvalidArgument},
		{"a waypoint, perhaps, is told to come again", "late", "before the cluster has been read", codes.InvalidArgument},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			resp, _, err := subscribe(as(ctx, tc.token), conn)
			if (err == nil) != (tc.feed == "") || err != nil && !strings.Contains(err.Error(), tc.feed) {
				t.Errorf("subscription: %v, want %q", err, tc.feed)
			}
			if tc.feed == "" && len(resp.GetResources()) != 1 {
				t.Errorf("%d resources, want 1", len(resp.GetResources()))
			}
			_, err = v1alpha1.NewIstioCertificateServiceClient(conn).CreateCertificate(as(ctx, tc.token), &v1alpha1.IstioCertificateRequest{Csr: "nonsense"})
			if got := status.Code(err); got != tc.cert {
				t.Errorf("certificate: %v, want %v", err, tc.cert)
			}
		})
	}
	t.Run("only waypoints are told of routes", func(t *testing.T) {
		for token, want := range map[string]string{"waypoint": feed.TypeRoute, "ztunnel": feed.TypeAddress} {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(as(ctx, token))
			if err != nil {
				t.Fatal(err)
			}
			for _, url := range []string{feed.TypeRoute, feed.TypeAddress} {
				_ = stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: url}) // a failure shows in Recv
				if url == feed.TypeRoute && token == "waypoint" {
					break
				}
			}
			if m, err := stream.Recv(); err != nil || m.GetTypeUrl() != want {
				t.Errorf("%s is answered %q (%v), want %q", token, m.GetTypeUrl(), err, want)
			}
		}
	})
	t.Run("under another name it is not trusted", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, _, err := subscribe(as(ctx, "ztunnel"), r.dial(t, "weft-control.other.svc")); status.Code(err) != codes.Unavailable {
			t.Errorf("a server of another name is trusted: %v", err)
		}
	})
}

// TestServiceStops proves that open subscriptions do not keep the service from
// stopping.
func TestServiceStops(t *testing.T) {
	r := newRig(t)
	_, stream, err := subscribe(as(t.Context(), "ztunnel"), r.dial(t, "weft-control"))
	if err != nil {
		t.Fatal(err)
	}
	r.stop()
	select {
	case err := <-r.done:
		if err != nil {
			t.Errorf("stopped with %v", err)
		}
		r.done <- nil // for the cleanup
	case <-time.After(stopTime + 10*time.Second):
		t.Fatal("the service does not stop")
	}
	if _, err := stream.Recv(); err == nil {
		t.Error("the subscription goes on")
	}
}
