package control

import (
	"context"
	"crypto/sha256"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	defaultAudience = "istio-ca"
	// reviewLife is how long the API server's word about a token is believed.
	// It bounds how long a revoked token still works.
	reviewLife = time.Minute
	// maxReviews bounds the memory of the cache, reviewsAtOnce what a flood of
	// bad tokens can ask of the API server.
	maxReviews    = 4096
	reviewsAtOnce = 16
	maxToken      = 16 << 10
	reviewTimeout = 10 * time.Second
)

// A Review is what the API server says of a token.
type Review struct {
	Refused   string   // why the token is not accepted; "" when it is
	Audiences []string // those that the token is for, among the asked
	// The service account that the token was made for.
	Namespace, ServiceAccount string
	// The pod and node that the token is bound to; "" when it is not.
	PodName, PodUID, NodeName string
}

// A TokenReviewer asks the API server about a token. Its error says that the
// server could not be asked; a bad token is a Review with Refused set.
type TokenReviewer func(ctx context.Context, token, audience string) (Review, error)

// A Caller is who a request comes from, by the word of the API server.
type Caller struct {
	Namespace, ServiceAccount string
	// The pod and node that the caller's token is bound to; "" when it is not.
	PodName, PodUID, NodeName string
}

// String returns what a log should say of c.
func (c Caller) String() string {
	s := c.Namespace + "/" + c.ServiceAccount
	if c.PodName != "" {
		s += " (pod " + c.PodName + ")"
	}
	return s
}

// AuthenticatorConfig says what an Authenticator works with.
type AuthenticatorConfig struct {
	Review     TokenReviewer         // required
	Audience   string                // that a token must be for; "" means istio-ca
	Log        *slog.Logger          // nil discards
	Registerer prometheus.Registerer // nil exports no metrics
}

// An Authenticator tells who is calling, by the service-account token that
// comes with a gRPC request. It believes the API server for a minute, so that
// a node's hundred requests are one review.
type Authenticator struct {
	cfg      AuthenticatorConfig
	failures prometheus.Counter
	slots    chan struct{} // one for each review under way

	mu    sync.Mutex // guards known
	known map[[sha256.Size]byte]known
}

// known is a token that the API server accepted. Tokens themselves are not
// kept, only their hashes.
type known struct {
	caller Caller
	until  time.Time
}

// NewAuthenticator returns an Authenticator.
func NewAuthenticator(cfg AuthenticatorConfig) *Authenticator {
	if cfg.Audience == "" {
		cfg.Audience = defaultAudience
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	a := &Authenticator{
		cfg: cfg,
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "citadel_server_authentication_failure_count",
			Help: "Requests whose caller could not be authenticated.",
		}),
		slots: make(chan struct{}, reviewsAtOnce),
		known: make(map[[sha256.Size]byte]known),
	}
	if cfg.Registerer != nil {
		cfg.Registerer.MustRegister(a.failures)
	}
	return a
}

// Authenticate returns who sent the request that ctx belongs to. Its errors
// are gRPC statuses: Unauthenticated for a token that is missing or not
// accepted, Unavailable when the API server cannot tell.
func (a *Authenticator) Authenticate(ctx context.Context) (Caller, error) {
	caller, err := a.authenticate(ctx)
	if err != nil {
		a.failures.Inc()
		a.cfg.Log.Debug("cannot authenticate a caller", "err", err)
	}
	return caller, err
}

func (a *Authenticator) authenticate(ctx context.Context) (Caller, error) {
	token, err := bearerToken(ctx)
	if err != nil {
		return Caller{}, err
	}
	key := sha256.Sum256([]byte(token))
	if caller, ok := a.recall(key, time.Now()); ok {
		return caller, nil
	}
	ctx, cancel := context.WithTimeout(ctx, reviewTimeout) // a stream's has no end
	defer cancel()
	select {
	case a.slots <- struct{}{}:
		defer func() { <-a.slots }()
	case <-ctx.Done():
		return Caller{}, status.FromContextError(ctx.Err()).Err()
	}
	began := time.Now()
	r, err := a.cfg.Review(ctx, token, a.cfg.Audience)
	if err != nil {
		return Caller{}, status.Errorf(codes.Unavailable, "cannot ask the API server about the token: %v", err)
	}
	caller, err := judge(r, a.cfg.Audience)
	if err != nil {
		return Caller{}, err
	}
	a.remember(key, caller, began)
	return caller, nil
}

// bearerToken reads the token of a request.
func bearerToken(ctx context.Context) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get("authorization")
	if len(values) != 1 {
		return "", status.Errorf(codes.Unauthenticated, "want one authorization header with a service-account token, got %d", len(values))
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	if !strings.EqualFold(scheme, "bearer") || token == "" || len(token) > maxToken {
		return "", status.Error(codes.Unauthenticated, "the authorization header is not a bearer token")
	}
	return token, nil
}

// judge decides from a review who the caller is. Everything that is not there
// counts against him.
func judge(r Review, audience string) (Caller, error) {
	switch {
	case r.Refused != "":
		return Caller{}, status.Errorf(codes.Unauthenticated, "the API server does not accept the token: %s", r.Refused)
	case !slices.Contains(r.Audiences, audience):
		return Caller{}, status.Errorf(codes.Unauthenticated, "the token is for audience %q, want %q", r.Audiences, audience)
	case r.Namespace == "" || r.ServiceAccount == "":
		return Caller{}, status.Error(codes.Unauthenticated, "the token is not a service account's")
	}
	return Caller{
		Namespace: r.Namespace, ServiceAccount: r.ServiceAccount,
		PodName: r.PodName, PodUID: r.PodUID, NodeName: r.NodeName,
	}, nil
}

func (a *Authenticator) recall(key [sha256.Size]byte, now time.Time) (Caller, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	k, ok := a.known[key]
	if !ok || !now.Before(k.until) {
		return Caller{}, false
	}
	return k.caller, true
}

// remember keeps an answer that was asked for at began. When the cache is full
// of live answers, a random one goes.
func (a *Authenticator) remember(key [sha256.Size]byte, c Caller, began time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.known) >= maxReviews {
		for k, v := range a.known {
			if !began.Before(v.until) {
				delete(a.known, k)
			}
		}
	}
	for k := range a.known {
		if len(a.known) < maxReviews {
			break
		}
		delete(a.known, k)
	}
	a.known[key] = known{caller: c, until: began.Add(reviewLife)}
}
