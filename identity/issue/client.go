// Package issue asks the control service, or any other server of
// istio.v1.auth.IstioCertificateService, for certificates. Its Client is an
// identity.Issuer.
package issue

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	"istio.io/api/security/v1alpha1"

	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/mesh"
)

const (
	defaultTimeout = 10 * time.Second
	defaultCluster = "Kubernetes"
	// maxAnswer bounds what a certificate chain with its roots may weigh.
	maxAnswer = 1 << 20
)

// Config says where the CA is and how to talk to it.
type Config struct {
	Address string // of the CA, host:port
	// TLS makes the configuration of each new connection, see
	// identity.ControlTLS.
	TLS func() (*tls.Config, error)
	// TokenFile holds our service-account token for the audience istio-ca. It
	// is read again for every request, because kubelet replaces it.
	TokenFile string
	// OnBehalf asks for the identities of others, as a node's proxy does for
	// its pods. Without it the CA gives us the identity of our own token.
	OnBehalf bool
	Cluster  string        // our cluster's name; "" means Kubernetes
	TTL      time.Duration // life to ask for; 0 leaves it to the CA
	Timeout  time.Duration // of one request; 0 means 10 s
}

// Validate returns everything that is wrong with c.
func (c Config) Validate() error {
	var wrong []error
	if c.Address == "" {
		wrong = append(wrong, errors.New("the CA's address is missing"))
	}
	if c.TLS == nil {
		wrong = append(wrong, errors.New("the TLS configuration for the CA is missing"))
	}
	if c.TokenFile == "" {
		wrong = append(wrong, errors.New("the token file is missing"))
	}
	if c.TTL < 0 || c.Timeout < 0 {
		wrong = append(wrong, errors.New("a negative time makes no sense"))
	}
	return errors.Join(wrong...)
}

// A Client asks one CA for certificates. Close it after use.
type Client struct {
	cfg  Config
	conn *grpc.ClientConn
	stub v1alpha1.IstioCertificateServiceClient
}

var _ identity.Issuer = (*Client)(nil)

// New returns a Client. It connects when it is first asked.
func New(cfg Config) (*Client, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configure the CA client: %w", err)
	}
	conn, err := grpc.NewClient(cfg.Address,
		grpc.WithTransportCredentials(transport{config: cfg.TLS}),
		grpc.WithConnectParams(grpc.ConnectParams{
			// The Manager paces its attempts itself. Here the pause must only
			// not outlast it.
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 2, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		// A control service that vanished without a word must not be asked
		// for the quarter of an hour that TCP needs to notice.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	)
	if err != nil {
		return nil, fmt.Errorf("configure the CA client for %s: %w", cfg.Address, err)
	}
	return &Client{cfg: cfg, conn: conn, stub: v1alpha1.NewIstioCertificateServiceClient(conn)}, nil
}

// Close ends the connection and every request on it.
func (c *Client) Close() error { return c.conn.Close() }

// Issue asks the CA once. The gRPC status of a refusal can be read from the
// error with status.FromError.
func (c *Client) Issue(ctx context.Context, id mesh.Identity, csr []byte) (identity.Issued, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout())
	defer cancel()
	token, err := c.token()
	if err != nil {
		return identity.Issued{}, err
	}
	req, err := c.request(id, csr)
	if err != nil {
		return identity.Issued{}, err
	}
	resp, err := c.stub.CreateCertificate(ctx, req, grpc.PerRPCCredentials(bearer{token: token, cluster: c.cluster()}))
	if err != nil {
		return identity.Issued{}, c.explain(id, err)
	}
	issued, err := read(resp.GetCertChain())
	if err != nil {
		return identity.Issued{}, fmt.Errorf("read the answer of the CA at %s: %w", c.cfg.Address, err)
	}
	return issued, nil
}

func (c *Client) timeout() time.Duration {
	if c.cfg.Timeout == 0 {
		return defaultTimeout
	}
	return c.cfg.Timeout
}

func (c *Client) cluster() string {
	if c.cfg.Cluster == "" {
		return defaultCluster
	}
	return c.cfg.Cluster
}

func (c *Client) token() (string, error) {
	b, err := os.ReadFile(c.cfg.TokenFile)
	if err != nil {
		return "", fmt.Errorf("read our token for the CA: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" {
		return "", fmt.Errorf("read our token for the CA: %s is empty, is the token volume mounted?", c.cfg.TokenFile)
	}
	return token, nil
}

// request writes the question. csr is DER.
func (c *Client) request(id mesh.Identity, csr []byte) (*v1alpha1.IstioCertificateRequest, error) {
	req := &v1alpha1.IstioCertificateRequest{
		Csr:              string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})),
		ValidityDuration: int64(c.cfg.TTL / time.Second),
	}
	if !c.cfg.OnBehalf {
		return req, nil
	}
	var err error
	req.Metadata, err = structpb.NewStruct(map[string]any{"ImpersonatedIdentity": id.String()})
	if err != nil {
		return nil, fmt.Errorf("ask the CA for %s: %w", id, err)
	}
	return req, nil
}

// explain says what a refusal means and what to do.
func (c *Client) explain(id mesh.Identity, err error) error {
	var hint string
	switch status.Code(err) {
	case codes.Unauthenticated:
		hint = fmt.Sprintf("it does not accept our token: has %s expired, or is its audience not the CA's?", c.cfg.TokenFile)
	case codes.PermissionDenied:
		hint = "it does not let us have this identity: does a pod with this service account run on this node, and is our own service account among its node accounts?"
	case codes.InvalidArgument:
		hint = "it does not like the request"
	case codes.Unavailable:
		hint = "it cannot be reached, or we do not trust its certificate: is the control service running, and is our root certificate current?"
	case codes.DeadlineExceeded:
		hint = fmt.Sprintf("it did not answer within %s", c.timeout())
	case codes.Unimplemented:
		hint = "it is no certificate service: is the address right?"
	default:
		hint = "it failed"
	}
	return fmt.Errorf("ask the CA at %s for %s: %s: %w", c.cfg.Address, id, hint, err)
}

// read takes an answer apart. Its last element holds the roots, one or more;
// those before it are the leaf and its intermediates, leaf first. A single
// element is a chain without roots.
func read(elements []string) (identity.Issued, error) {
	var issued identity.Issued
	if len(elements) == 0 {
		return issued, errors.New("it holds no certificate")
	}
	chain, roots := elements, ""
	if last := len(elements) - 1; last > 0 {
		chain, roots = elements[:last], elements[last]
	}
	var rootCerts []*x509.Certificate
	if roots != "" {
		var err error
		if rootCerts, err = identity.ParseCertificates([]byte(roots)); err != nil {
			return issued, fmt.Errorf("its roots: %w", err)
		}
	}
	for i, text := range chain {
		certs, err := identity.ParseCertificates([]byte(text))
		if err != nil {
			return identity.Issued{}, fmt.Errorf("element %d: %w", i+1, err)
		}
		for _, cert := range certs {
			// Peers have the roots already.
			if !contains(rootCerts, cert) {
				issued.Chain = append(issued.Chain, cert.Raw)
			}
		}
	}
	for _, cert := range rootCerts {
		issued.Roots = append(issued.Roots, cert.Raw)
	}
	return issued, nil
}

func contains(certs []*x509.Certificate, c *x509.Certificate) bool {
	for _, o := range certs {
		if o.Equal(c) {
			return true
		}
	}
	return false
}
