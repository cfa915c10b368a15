package control

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// A fakeAPI reviews tokens that it has been told about.
type fakeAPI struct {
	mu     sync.Mutex // guards what follows
	tokens map[string]Review
	down   error
	asked  int
}

func (f *fakeAPI) review(_ context.Context, token, audience string) (Review, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	if f.down != nil {
		return Review{}, f.down
	}
	r, ok := f.tokens[token]
	if !ok {
		return Review{Refused: "token has expired"}, nil
	}
	return r, nil
}

func (f *fakeAPI) calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked
}

// bearing is the context of a request with these authorization headers.
func bearing(ctx context.Context, headers ...string) context.Context {
	md := metadata.MD{}
	md.Append("authorization", headers...)
	return metadata.NewIncomingContext(ctx, md)
}

var istioCA = []string{"istio-ca"}

func TestAuthenticate(t *testing.T) {
	f := &fakeAPI{tokens: map[string]Review{
		"good":        {Audiences: istioCA, Namespace: "shop", ServiceAccount: "cart", PodName: "cart-1", PodUID: "u1", NodeName: "n1"},
		"unbound":     {Audiences: istioCA, Namespace: "shop", ServiceAccount: "cart"},
		"kubernetes":  {Audiences: []string{"https://kubernetes.default.svc"}, Namespace: "shop", ServiceAccount: "cart"},
		"no-audience": {Namespace: "shop", ServiceAccount: "cart"},
		"nobody":      {Audiences: istioCA},
		"no-account":  {Audiences: istioCA, Namespace: "shop"},
	}}
	tests := []struct {
		name    string
		headers []string
		want    Caller
		code    codes.Code
		err     string
	}{
		{"a good token", []string{"Bearer good"}, Caller{"shop", "cart", "cart-1", "u1", "n1"}, codes.OK, ""},
		{"the scheme in lower case", []string{"bearer good"}, Caller{"shop", "cart", "cart-1", "u1", "n1"}, codes.OK, ""},
		{"a token without pod", []string{"Bearer unbound"}, Caller{Namespace: "shop", ServiceAccount: "cart"}, codes.OK, ""},
		{"no header", nil, Caller{}, codes.Unauthenticated, "got 0"},
		{"two headers", []string{"Bearer good", "Bearer good"}, Caller{}, codes.Unauthenticated, "got 2"},
		{"no scheme", []string{"good"}, Caller{}, codes.Unauthenticated, "not a bearer token"},
		{"another scheme", []string{"Basic good"}, Caller{}, codes.Unauthenticated, "not a bearer token"},
		{"an empty token", []string{"Bearer "}, Caller{}, codes.Unauthenticated, "not a bearer token"},
		{"an endless token", []string{"Bearer " + strings.Repeat("x", maxToken+1)}, Caller{}, codes.Unauthenticated, "not a bearer token"},
		{"an expired token", []string{"Bearer old"}, Caller{}, codes.Unauthenticated, "token has expired"},
		{"a token for another audience", []string{"Bearer kubernetes"}, Caller{}, codes.Unauthenticated, `want "istio-ca"`},
		{"a token without audience", []string{"Bearer no-audience"}, Caller{}, codes.Unauthenticated, `want "istio-ca"`},
		{"a token of nobody", []string{"Bearer nobody"}, Caller{}, codes.Unauthenticated, "not a service account's"},
		{"a token of half an account", []string{"Bearer no-account"}, Caller{}, codes.Unauthenticated, "not a service account's"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := NewAuthenticator(AuthenticatorConfig{Review: f.review})
			got, err := a.Authenticate(bearing(t.Context(), tt.headers...))
			if got != tt.want || status.Code(err) != tt.code {
				t.Errorf("Authenticate = %+v, %v; want %+v, %v", got, err, tt.want, tt.code)
			}
			if tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("error = %v, want one with %q", err, tt.err)
			}
		})
	}
}

func TestAuthenticateOutsideARequest(t *testing.T) {
	a := NewAuthenticator(AuthenticatorConfig{Review: new(fakeAPI).review})
	if _, err := a.Authenticate(t.Context()); status.Code(err) != codes.Unauthenticated {
		t.Errorf("Authenticate error = %v, want Unauthenticated", err)
	}
}

func TestAPIServerAway(t *testing.T) {
	f := &fakeAPI{down: errors.New("connection refused")}
	a := NewAuthenticator(AuthenticatorConfig{Review: f.review})
	_, err := a.Authenticate(bearing(t.Context(), "Bearer good"))
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("Authenticate error = %v, want Unavailable and the reason", err)
	}
}

func TestAHangingAPIServerIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := NewAuthenticator(AuthenticatorConfig{Review: func(ctx context.Context, _, _ string) (Review, error) {
			<-ctx.Done()
			return Review{}, ctx.Err()
		}})
		if _, err := a.Authenticate(bearing(t.Context(), "Bearer good")); status.Code(err) != codes.Unavailable {
			t.Errorf("Authenticate error = %v, want Unavailable", err)
		}
	})
}

func TestReviewsAreKeptForAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeAPI{tokens: map[string]Review{"good": {Audiences: istioCA, Namespace: "shop", ServiceAccount: "cart"}}}
		a := NewAuthenticator(AuthenticatorConfig{Review: f.review})
		ctx := bearing(t.Context(), "Bearer good")
		for range 10 {
			if _, err := a.Authenticate(ctx); err != nil {
				t.Fatal(err)
			}
		}
		if f.calls() != 1 {
			t.Errorf("ten requests were %d reviews", f.calls())
		}
		delete(f.tokens, "good") // revoked
		time.Sleep(reviewLife - time.Second)
		if _, err := a.Authenticate(ctx); err != nil {
			t.Errorf("the review was forgotten early: %v", err)
		}
		time.Sleep(time.Second)
		if _, err := a.Authenticate(ctx); status.Code(err) != codes.Unauthenticated {
			t.Errorf("a revoked token after a minute: %v, want Unauthenticated", err)
		}
		// What was refused is not kept: a token may become good.
		f.tokens["good"] = Review{Audiences: istioCA, Namespace: "shop", ServiceAccount: "cart"}
		if _, err := a.Authenticate(ctx); err != nil {
			t.Error(err)
		}
	})
}

func TestTheCacheIsBounded(t *testing.T) {
	f := &fakeAPI{tokens: map[string]Review{}}
	a := NewAuthenticator(AuthenticatorConfig{Review: f.review})
	for i := range maxReviews + 100 {
		token := strconv.Itoa(i)
		f.tokens[token] = Review{Audiences: istioCA, Namespace: "shop", ServiceAccount: "a" + token}
		caller, err := a.Authenticate(bearing(t.Context(), "Bearer "+token))
		if err != nil || caller.ServiceAccount != "a"+token {
			t.Fatalf("token %s is %v, %v", token, caller, err)
		}
	}
	if len(a.known) != maxReviews {
		t.Errorf("%d reviews are kept, want %d", len(a.known), maxReviews)
	}
}

func TestAFloodOfTokensIsHeldBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var now, most int
		a := NewAuthenticator(AuthenticatorConfig{Review: func(context.Context, string, string) (Review, error) {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			now--
			mu.Unlock()
			return Review{Refused: "no"}, nil
		}})
		ctx, cancel := context.WithTimeout(t.Context(), 2500*time.Millisecond)
		defer cancel()
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() { a.Authenticate(bearing(ctx, "Bearer "+strconv.Itoa(i))) })
		}
		wg.Wait()
		if most != reviewsAtOnce {
			t.Errorf("%d reviews at once, want %d", most, reviewsAtOnce)
		}
	})
}
