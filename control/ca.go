package control

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"istio.io/api/security/v1alpha1"

	"github.com/weft-mesh/weft/identity/ca"
	"github.com/weft-mesh/weft/mesh"
)

// maxCSR bounds what a signing request may weigh; one with an RSA key of 8192
// bits has 4 KiB.
const maxCSR = 64 << 10

// impersonated is the key of the request's metadata under which a node's proxy
// names the identity that it asks for.
const impersonated = "ImpersonatedIdentity"

// Pods is what a CA must know of the cluster's pods.
type Pods interface {
	// NodeOf returns the node of the pod with exactly this UID, if it is live.
	NodeOf(pod mesh.Name, uid string) (node string, ok bool)
	// RunsOn reports whether a live pod with id's namespace and service
	// account is bound to the node.
	RunsOn(node string, id mesh.Identity) bool
}

// CAConfig says what a CA works with.
type CAConfig struct {
	Authority     *ca.Authority  // required
	Authenticator *Authenticator // required
	Pods          Pods           // required
	// NodeAccounts are the service accounts of node proxies: they may ask for
	// the identities of the pods on their own node. None means that nobody
	// may.
	NodeAccounts []mesh.Name
	Log          *slog.Logger          // nil discards
	Registerer   prometheus.Registerer // nil exports no metrics
}

// A CA serves istio.v1.auth.IstioCertificateService. A caller gets the
// identity of its own service account; a node's proxy, and nobody else, gets
// those of the pods on its node.
type CA struct {
	v1alpha1.UnimplementedIstioCertificateServiceServer
	cfg     CAConfig
	metrics caMetrics
}

type caMetrics struct {
	requests, issued, denied, signErrors prometheus.Counter
}

// NewCA returns a CA.
func NewCA(cfg CAConfig) *CA {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	c := &CA{cfg: cfg, metrics: caMetrics{
		requests:   counter("citadel_server_csr_count", "Signing requests received."),
		issued:     counter("citadel_server_success_cert_issuance_count", "Certificates issued."),
		denied:     counter("weft_ca_denied_total", "Signing requests for an identity that the caller may not have."),
		signErrors: counter("citadel_server_csr_sign_err_count", "Signing requests that were allowed and could not be signed."),
	}}
	if cfg.Registerer == nil {
		return c
	}
	cfg.Registerer.MustRegister(c.metrics.requests, c.metrics.issued, c.metrics.denied, c.metrics.signErrors,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "citadel_server_root_cert_expiry_timestamp",
			Help: "When the first root certificate expires, in Unix time.",
		}, func() float64 { return float64(cfg.Authority.RootExpiry().Unix()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "citadel_server_cert_chain_expiry_timestamp",
			Help: "When the first certificate of the signing chain expires, in Unix time.",
		}, func() float64 { return float64(cfg.Authority.Expiry().Unix()) }),
	)
	return c
}

// Register makes s serve c.
func (c *CA) Register(s grpc.ServiceRegistrar) { v1alpha1.RegisterIstioCertificateServiceServer(s, c) }

// CreateCertificate implements the service's one method.
func (c *CA) CreateCertificate(ctx context.Context, req *v1alpha1.IstioCertificateRequest) (*v1alpha1.IstioCertificateResponse, error) {
	c.metrics.requests.Inc()
	caller, err := c.cfg.Authenticator.Authenticate(ctx)
	if err != nil {
		return nil, err
	}
	id, err := c.authorize(caller, req)
	if err != nil {
		if status.Code(err) == codes.PermissionDenied {
			c.metrics.denied.Inc()
		}
		c.cfg.Log.Warn("signing request refused", "caller", caller.String(), "err", err)
		return nil, err
	}
	if len(req.GetCsr()) > maxCSR {
		return nil, status.Errorf(codes.InvalidArgument, "the signing request has %d bytes, at most %d are allowed", len(req.GetCsr()), maxCSR)
	}
	chain, err := c.cfg.Authority.Sign([]byte(req.GetCsr()), id, lifetime(req.GetValidityDuration()))
	if err != nil {
		c.metrics.signErrors.Inc()
		c.cfg.Log.Warn("cannot sign", "caller", caller.String(), "err", err)
		if errors.Is(err, ca.ErrRequest) {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
		return nil, status.Error(codes.Internal, err.Error())
	}
	c.metrics.issued.Inc()
	c.cfg.Log.Info("certificate signed", "identity", id.String(), "caller", caller.String())
	return answer(chain, c.cfg.Authority.RootPEM()), nil
}

// authorize decides which identity the request is for and whether the caller
// may have it.
func (c *CA) authorize(caller Caller, req *v1alpha1.IstioCertificateRequest) (mesh.Identity, error) {
	own := mesh.Identity{TrustDomain: c.cfg.Authority.TrustDomain(), Namespace: caller.Namespace, ServiceAccount: caller.ServiceAccount}
	field, onBehalf := req.GetMetadata().GetFields()[impersonated]
	if !onBehalf {
		return own, nil
	}
	id, err := mesh.ParseIdentity(field.GetStringValue())
	if err != nil {
		return mesh.Identity{}, status.Errorf(codes.InvalidArgument, "%s: %v", impersonated, err)
	}
	// A waypoint names the identity that it asks for as a node's proxy does;
	// its own is all that it gets.
	if id == own {
		return own, nil
	}
	if err := c.mayImpersonate(caller, id); err != nil {
		return mesh.Identity{}, status.Errorf(codes.PermissionDenied, "%s may not have %s: %v", caller, id, err)
	}
	return id, nil
}

// mayImpersonate says, as an error, why caller may not have id. Where the
// caller runs is taken from our own view of its pod, because a token does not
// have to say; if it does, the two must agree.
func (c *CA) mayImpersonate(caller Caller, id mesh.Identity) error {
	account := mesh.Name{Namespace: caller.Namespace, Name: caller.ServiceAccount}
	if !slices.Contains(c.cfg.NodeAccounts, account) {
		return fmt.Errorf("service account %s is not a node proxy's", account)
	}
	if caller.PodName == "" || caller.PodUID == "" {
		return errors.New("its token is not bound to a pod, so it is not known to run on any node")
	}
	pod := mesh.Name{Namespace: caller.Namespace, Name: caller.PodName}
	node, ok := c.cfg.Pods.NodeOf(pod, caller.PodUID)
	if !ok || node == "" {
		return fmt.Errorf("there is no live pod %s with UID %s", pod, caller.PodUID)
	}
	if caller.NodeName != "" && caller.NodeName != node {
		return fmt.Errorf("its token is for node %q, its pod runs on %q", caller.NodeName, node)
	}
	if id.TrustDomain != c.cfg.Authority.TrustDomain() {
		return fmt.Errorf("our trust domain is %q", c.cfg.Authority.TrustDomain())
	}
	if !c.cfg.Pods.RunsOn(node, id) {
		return fmt.Errorf("no pod with service account %s/%s runs on its node %q", id.Namespace, id.ServiceAccount, node)
	}
	return nil
}

// lifetime reads the seconds that a request asks for; 0 means the default.
func lifetime(seconds int64) time.Duration {
	if seconds <= 0 {
		return 0
	}
	return time.Duration(min(seconds, int64(ca.MaxTTL/time.Second))) * time.Second
}

// answer writes a chain as the protocol wants it: one certificate per element,
// leaf first, and the roots together in the last.
func answer(chain [][]byte, roots []byte) *v1alpha1.IstioCertificateResponse {
	var resp v1alpha1.IstioCertificateResponse
	for _, der := range chain {
		resp.CertChain = append(resp.CertChain, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	}
	resp.CertChain = append(resp.CertChain, string(roots))
	return &resp
}
