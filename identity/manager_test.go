package identity

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
)

// A fakeIssuer signs what it is asked for, unless told otherwise.
type fakeIssuer struct {
	ca *testca.CA

	mu     sync.Mutex // guards what follows
	answer answerFunc // nil is honest
	asked  []mesh.Identity
	times  []time.Time
}

type answerFunc func(ctx context.Context, id mesh.Identity, csr *x509.CertificateRequest) (Issued, error)

func (f *fakeIssuer) set(answer answerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = answer
}

func (f *fakeIssuer) Issue(ctx context.Context, id mesh.Identity, der []byte) (Issued, error) {
	f.mu.Lock()
	f.asked = append(f.asked, id)
	f.times = append(f.times, time.Now())
	answer := f.answer
	f.mu.Unlock()
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return Issued{}, err
	}
	if err := csr.CheckSignature(); err != nil {
		return Issued{}, err
	}
	if answer != nil {
		return answer(ctx, id, csr)
	}
	return f.honest(id, csr, nil), nil
}

func (f *fakeIssuer) honest(id mesh.Identity, csr *x509.CertificateRequest, change func(*x509.Certificate)) Issued {
	return Issued{
		Chain: [][]byte{f.ca.Sign(id, csr.PublicKey, change).Raw},
		Roots: [][]byte{f.ca.Certificate().Raw},
	}
}

func (f *fakeIssuer) calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.asked)
}

// account is an identity of the tests' trust domain.
func account(name string) mesh.Identity {
	return mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: name}
}

// run starts a Manager in the bubble and stops it when the test ends.
func run(t *testing.T, cfg Config) *Manager {
	t.Helper()
	if cfg.TrustDomain == "" {
		cfg.TrustDomain = "cluster.local"
	}
	if cfg.Roots == nil {
		cfg.Roots = new(Roots)
	}
	m := NewManager(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	})
	return m
}

func mustCertificate(t *testing.T, m *Manager, id mesh.Identity) *tls.Certificate {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	cert, err := m.Certificate(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestCertificateIsObtainedOnceAndCached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		m := run(t, Config{Issuer: f})
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { mustCertificate(t, m, cart) })
		}
		wg.Wait()
		cert := mustCertificate(t, m, cart)
		if got, _ := leafIdentity(cert.Leaf); got != cart {
			t.Errorf("certificate of %s, want %s", got, cart)
		}
		if f.calls() != 1 {
			t.Errorf("the CA was asked %d times, want once", f.calls())
		}
		if mustCertificate(t, m, web) == cert {
			t.Error("two identities share a certificate")
		}
	})
}

func TestRootsComeWithTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		roots := rootsOf(t, testca.New(t, "cluster.local"))
		m := run(t, Config{Issuer: f, Roots: roots})
		cert := mustCertificate(t, m, cart)
		if _, err := roots.Verify([]*x509.Certificate{cert.Leaf}, time.Now(), x509.ExtKeyUsageClientAuth); err != nil {
			t.Errorf("the roots that came along are not trusted: %v", err)
		}
		if got := roots.Certificates("cluster.local"); len(got) != 1 || !got[0].Equal(f.ca.Certificate()) {
			t.Error("the old root is still trusted")
		}
	})
}

func TestWithoutRootsInTheAnswerOursDecide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		f.set(func(_ context.Context, id mesh.Identity, csr *x509.CertificateRequest) (Issued, error) {
			i := f.honest(id, csr, nil)
			i.Roots = nil
			return i, nil
		})
		mustCertificate(t, run(t, Config{Issuer: f, Roots: rootsOf(t, f.ca)}), cart)

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		m := run(t, Config{Issuer: f, Roots: rootsOf(t, testca.New(t, "cluster.local"))})
		if _, err := m.Certificate(ctx, cart); err == nil || !strings.Contains(err.Error(), "unknown authority") {
			t.Errorf("Certificate error = %v, want unknown authority", err)
		}
	})
}

// TestAnswersAreNotTrusted lets the CA answer with what must not be used.
func TestAnswersAreNotTrusted(t *testing.T) {
	ca := testca.New(t, "cluster.local")
	// In the bubble it is the year 2000, so each answer is made there.
	type answer func(f *fakeIssuer, id mesh.Identity, csr *x509.CertificateRequest) Issued
	tests := []struct {
		name   string
		answer answer
		want   string
	}{
		{"someone else's identity", func(f *fakeIssuer, id mesh.Identity, csr *x509.CertificateRequest) Issued {
			return f.honest(web, csr, nil)
		}, "is for spiffe://cluster.local/ns/shop/sa/web, want"},
		{"another trust domain", func(f *fakeIssuer, id mesh.Identity, csr *x509.CertificateRequest) Issued {
			return f.honest(evil, csr, nil)
		}, "not trusted here"},
		{"someone else's key", func(f *fakeIssuer, id mesh.Identity, csr *x509.CertificateRequest) Issued {
			i := f.honest(id, csr, nil)
			i.Chain = [][]byte{f.ca.Issue(id).Leaf.Raw}
			return i
		}, "key that is not ours"},
		{"a chain to another root", func(f *fakeIssuer, id mesh.Identity, csr *x509.CertificateRequest) Issued {
			i := f.honest(id, csr, nil)
			i.Roots = [][]byte{ca.Certificate().Raw}
			return i
		}, "verify certificate"},
		{"a root that is no CA", func(f *fakeIssuer, id mesh.Identity, csr *x509.CertificateRequest) Issued {
			i := f.honest(id, csr, nil)
			i.Roots = i.Chain
			return i
		}, "not a CA certificate"},
		{"nothing", func(*fakeIssuer, mesh.Identity, *x509.CertificateRequest) Issued { return Issued{} }, "holds no certificate"},
		{"rubbish", func(*fakeIssuer, mesh.Identity, *x509.CertificateRequest) Issued {
			return Issued{Chain: [][]byte{{1, 2, 3}}}
		}, "certificate 1"},
		{"an expired certificate", func(f *fakeIssuer, id mesh.Identity, csr *x509.CertificateRequest) Issued {
			return f.honest(id, csr, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })
		}, "expired"},
		{"a certificate of tomorrow", func(f *fakeIssuer, id mesh.Identity, csr *x509.CertificateRequest) Issued {
			return f.honest(id, csr, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) })
		}, "not yet valid"},
		{"a certificate for servers only", func(f *fakeIssuer, id mesh.Identity, csr *x509.CertificateRequest) Issued {
			return f.honest(id, csr, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })
		}, "incompatible key usage"},
		{"a CA certificate", func(f *fakeIssuer, id mesh.Identity, csr *x509.CertificateRequest) Issued {
			return f.honest(id, csr, func(c *x509.Certificate) { c.IsCA = true })
		}, "CA certificate"},
		{"two identities", func(f *fakeIssuer, id mesh.Identity, csr *x509.CertificateRequest) Issued {
			return f.honest(id, csr, func(c *x509.Certificate) { c.URIs = append(c.URIs, testca.URI(t, web.String())) })
		}, "more than one URI"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
				f.set(func(_ context.Context, id mesh.Identity, csr *x509.CertificateRequest) (Issued, error) {
					return tt.answer(f, id, csr), nil
				})
				roots := new(Roots)
				m := run(t, Config{Issuer: f, Roots: roots})
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				_, err := m.Certificate(ctx, cart)
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("Certificate error = %v, want one with %q", err, tt.want)
				}
				if got := roots.Certificates("cluster.local"); got != nil {
					t.Errorf("roots of a bad answer are trusted: %v", got)
				}
			})
		})
	}
}

func TestForeignIdentitiesAreRefusedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		m := run(t, Config{Issuer: f})
		m.Warm(evil)
		m.Warm(mesh.Identity{})
		for _, id := range []mesh.Identity{evil, {}} {
			if _, err := m.Certificate(t.Context(), id); err == nil {
				t.Errorf("Certificate(%v) succeeded", id)
			}
		}
		synctest.Wait()
		if f.calls() != 0 {
			t.Errorf("the CA was asked %d times", f.calls())
		}
	})
}

func TestRenewedAtHalfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		m := run(t, Config{Issuer: f})
		m.Warm(cart)
		first := mustCertificate(t, m, cart)
		time.Sleep(24 * time.Hour * 44 / 100)
		synctest.Wait()
		if f.calls() != 1 {
			t.Fatalf("renewed before 45%% of its life")
		}
		time.Sleep(24 * time.Hour * 12 / 100)
		synctest.Wait()
		if f.calls() != 2 {
			t.Fatalf("the CA was asked %d times at 56%% of life, want 2", f.calls())
		}
		second := mustCertificate(t, m, cart)
		if second == first || second.PrivateKey == first.PrivateKey {
			t.Error("the old certificate or key is still handed out")
		}
	})
}

func TestRenewalsAreSpread(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	seen := map[time.Time]bool{}
	for range 100 {
		at := renewAt(now, now.Add(24*time.Hour))
		seen[at] = true
		if d := at.Sub(now); d < 10*time.Hour+48*time.Minute || d > 13*time.Hour+12*time.Minute {
			t.Fatalf("renewal after %v, want half of 24h give or take a tenth", d)
		}
	}
	if len(seen) < 90 {
		t.Errorf("100 renewals fall on %d times", len(seen))
	}
	if at := renewAt(now, now.Add(time.Millisecond)); at.Sub(now) < backoffMin {
		t.Errorf("a certificate of 1ms is renewed after %v", at.Sub(now))
	}
}

func TestCADownKeepsTheCertificateUntilItExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		m := run(t, Config{Issuer: f})
		m.Warm(cart)
		first := mustCertificate(t, m, cart)
		f.set(func(context.Context, mesh.Identity, *x509.CertificateRequest) (Issued, error) {
			return Issued{}, errors.New("connection refused")
		})
		time.Sleep(23 * time.Hour)
		if f.calls() < 100 {
			t.Errorf("the CA was asked %d times in 11 hours, want about one a minute", f.calls())
		}
		if got := mustCertificate(t, m, cart); got != first {
			t.Error("the valid certificate was given up")
		}
		if s := m.Dump()[0]; s.State != Available || s.Error != "connection refused" {
			t.Errorf("state %s, error %q", s.State, s.Error)
		}

		time.Sleep(time.Hour + time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := m.Certificate(ctx, cart)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("expired: Certificate error = %v, want the deadline and the reason", err)
		}
		if s := m.Dump()[0]; s.State != Unavailable {
			t.Errorf("state %s, want %s", s.State, Unavailable)
		}
		client := ClientTLS(m.Only(cart), rootsOf(t, f.ca), []mesh.Identity{web})
		server := ServerTLS(fixed(f.ca.Issue(web)), rootsOf(t, f.ca), "cluster.local")
		a, b := net.Pipe()
		if _, _, cerr, _ := meetOver(t, a, b, client, server); cerr == nil || !strings.Contains(cerr.Error(), "connection refused") {
			t.Errorf("handshake with an expired certificate: %v, want the reason", cerr)
		}

		f.set(nil)
		mustCertificate(t, m, cart) // within seconds, because someone waits
	})
}

func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		f.set(func(context.Context, mesh.Identity, *x509.CertificateRequest) (Issued, error) {
			return Issued{}, errors.New("no")
		})
		m := run(t, Config{Issuer: f})
		m.Warm(cart)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		f.mu.Lock()
		var gaps []time.Duration
		for i := 1; i < len(f.times); i++ {
			gaps = append(gaps, f.times[i].Sub(f.times[i-1]))
		}
		f.mu.Unlock()
		for i, g := range gaps {
			top := min(backoffMin<<i, backoffMax)
			if g < top/2 || g > top {
				t.Errorf("pause %d is %v, want between %v and %v", i+1, g, top/2, top)
			}
		}
		if len(gaps) < 15 {
			t.Errorf("only %d attempts in ten minutes", len(gaps)+1)
		}

		// Many handshakes in a row do not mean many requests.
		before := f.calls()
		for range 100 {
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			if _, err := m.Certificate(ctx, cart); err == nil {
				t.Error("got a certificate")
			}
			cancel()
		}
		if n := f.calls() - before; n < 8 || n > 12 {
			t.Errorf("%d attempts in ten seconds of waiting, want one a second", n)
		}
	})
}

func TestAHangingCAIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		f.set(func(ctx context.Context, id mesh.Identity, csr *x509.CertificateRequest) (Issued, error) {
			<-ctx.Done()
			return Issued{}, ctx.Err()
		})
		m := run(t, Config{Issuer: f, Concurrency: 1})
		m.Warm(cart)
		time.Sleep(attemptTimeout + time.Minute)
		synctest.Wait()
		if f.calls() < 2 {
			t.Errorf("a CA that hangs was asked %d times", f.calls())
		}
	})
}

func TestOrderIsHandshakeWarmUpRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		m := run(t, Config{Issuer: f, Concurrency: 1})
		m.Warm(account("old"))
		mustCertificate(t, m, account("old"))

		// From now on the CA answers only when told to, and requests queue up.
		release := make(chan struct{})
		f.set(func(ctx context.Context, id mesh.Identity, csr *x509.CertificateRequest) (Issued, error) {
			<-release
			return f.honest(id, csr, nil), nil
		})
		time.Sleep(20 * time.Hour) // the renewal of old is under way
		synctest.Wait()
		m.mu.Lock()
		m.entries[account("old")].due = time.Time{}
		m.mu.Unlock()
		m.Warm(account("busy"))
		m.Warm(account("warm-1"))
		m.Warm(account("warm-2"))
		synctest.Wait()
		go m.Certificate(t.Context(), account("waiting"))
		synctest.Wait()
		for range 5 {
			release <- struct{}{}
			synctest.Wait()
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		var order []string
		for _, id := range f.asked[1:] {
			order = append(order, id.ServiceAccount)
		}
		// "old" had begun before the others came.
		want := []string{"old", "waiting", "busy", "warm-1", "warm-2"}
		if !slices.Equal(order, want) {
			t.Errorf("the CA was asked in the order %v, want %v", order, want)
		}
	})
}

func TestNext(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	cert := func(notAfter time.Time) *tls.Certificate {
		return &tls.Certificate{Leaf: &x509.Certificate{NotAfter: notAfter}}
	}
	fresh := entry{id: account("fresh"), pods: 1, cert: cert(now.Add(24 * time.Hour)), due: now.Add(12 * time.Hour)}
	renew := entry{id: account("renew"), pods: 1, cert: cert(now.Add(time.Hour)), due: now.Add(-time.Minute)}
	warm := entry{id: account("warm"), pods: 1}
	waits := entry{id: account("waits"), waiting: 1}
	expired := entry{id: account("expired"), pods: 1, cert: cert(now), due: now.Add(time.Hour)}
	failed := entry{id: account("failed"), pods: 1, failures: 9, failedAt: now, due: now.Add(20 * time.Second)}
	failedWaits := failed
	failedWaits.waiting = 1
	running := entry{id: account("running"), waiting: 1, running: true}

	tests := []struct {
		name        string
		entries     []entry
		busy, limit int
		want        string
		later       time.Duration
	}{
		{"nothing to do", nil, 0, 8, "", longestSleep},
		{"a fresh certificate is left alone", []entry{fresh}, 0, 8, "", longestSleep},
		{"one that is due is renewed", []entry{fresh, renew}, 0, 8, "renew", 0},
		{"a warm-up goes before a renewal", []entry{renew, warm}, 0, 8, "warm", 0},
		{"a handshake goes before a warm-up", []entry{renew, warm, waits}, 0, 8, "waits", 0},
		{"an expired certificate is replaced at once", []entry{expired}, 0, 8, "expired", 0},
		{"a failure pauses", []entry{failed}, 0, 8, "", 20 * time.Second},
		{"a failure pauses less when someone waits", []entry{failedWaits}, 0, 8, "", backoffWaiting},
		{"never two attempts for one identity", []entry{running}, 1, 8, "", longestSleep},
		{"the last place is not for a warm-up", []entry{warm}, 7, 8, "", longestSleep},
		{"the last place is for a handshake", []entry{warm, waits}, 7, 8, "waits", 0},
		{"no more than the limit", []entry{waits}, 8, 8, "", longestSleep},
		{"a limit of one is for everybody", []entry{warm}, 0, 1, "warm", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			entries := map[mesh.Identity]*entry{}
			for _, e := range tt.entries {
				entries[e.id] = &e
			}
			e, later := next(entries, now, tt.busy, tt.limit)
			got := ""
			if e != nil {
				got = e.id.ServiceAccount
			}
			if got != tt.want || later != tt.later {
				t.Errorf("next = %q, %v; want %q, %v", got, later, tt.want, tt.later)
			}
		})
	}
}

func TestConcurrencyIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		var mu sync.Mutex
		var now, most int
		f.set(func(ctx context.Context, id mesh.Identity, csr *x509.CertificateRequest) (Issued, error) {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			now--
			mu.Unlock()
			return f.honest(id, csr, nil), nil
		})
		m := run(t, Config{Issuer: f, Concurrency: 4})
		for i := range 40 {
			m.Warm(account("a" + string(rune('a'+i%26)) + string(rune('a'+i/26))))
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if most != 3 {
			t.Errorf("%d warm-ups at a time, want 3 of 4 places", most)
		}
		if c := m.count(); c.valid != 40 || c.missing != 0 {
			t.Errorf("%+v, want 40 valid", c)
		}
	})
}

func TestWarmAndForgetAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		m := run(t, Config{Issuer: f})
		m.Forget(cart) // never warmed: nothing happens
		m.Warm(cart)
		m.Warm(cart)
		synctest.Wait()
		if f.calls() != 1 {
			t.Errorf("two pods of one account asked for %d certificates", f.calls())
		}
		m.Forget(cart)
		if d := m.Dump(); len(d) != 1 || d[0].Pods != 1 || d[0].State != Available {
			t.Errorf("one pod is left, the dump is %+v", d)
		}
		m.Forget(cart)
		if d := m.Dump(); len(d) != 0 {
			t.Errorf("the last pod has gone, the dump is %+v", d)
		}
		time.Sleep(48 * time.Hour)
		if f.calls() != 1 {
			t.Error("a forgotten identity was renewed")
		}
	})
}

func TestForgetWhileAskingDropsTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		release := make(chan struct{})
		f.set(func(ctx context.Context, id mesh.Identity, csr *x509.CertificateRequest) (Issued, error) {
			<-release
			return f.honest(id, csr, nil), nil
		})
		m := run(t, Config{Issuer: f})
		m.Warm(cart)
		synctest.Wait()
		m.Forget(cart)
		close(release)
		synctest.Wait()
		if d := m.Dump(); len(d) != 0 {
			t.Errorf("the dump is %+v, want nothing", d)
		}
	})
}

// A certificate that no pod is behind lives as long as it is used.
func TestUnwarmedCertificates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		m := run(t, Config{Issuer: f})
		mustCertificate(t, m, cart)
		time.Sleep(14 * time.Hour)
		synctest.Wait()
		if f.calls() != 2 {
			t.Errorf("a used certificate was issued %d times after 14 hours, want 2", f.calls())
		}
		time.Sleep(14 * time.Hour)
		synctest.Wait()
		if d := m.Dump(); f.calls() != 2 || len(d) != 0 {
			t.Errorf("an unused certificate was kept: %d calls, %+v", f.calls(), d)
		}
		f.set(func(context.Context, mesh.Identity, *x509.CertificateRequest) (Issued, error) {
			return Issued{}, errors.New("no")
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		m.Certificate(ctx, web)
		synctest.Wait()
		if d := m.Dump(); len(d) != 0 {
			t.Errorf("a wait that ended left %+v", d)
		}
	})
}

func TestStopping(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		f.set(func(ctx context.Context, id mesh.Identity, csr *x509.CertificateRequest) (Issued, error) {
			<-ctx.Done()
			return Issued{}, ctx.Err()
		})
		m := NewManager(Config{Issuer: f, Roots: new(Roots), TrustDomain: "cluster.local"})
		ctx, cancel := context.WithCancel(t.Context())
		go m.Run(ctx)
		failed := make(chan error)
		go func() {
			_, err := m.Certificate(t.Context(), cart)
			failed <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-failed; err == nil || !strings.Contains(err.Error(), "stopping") {
			t.Errorf("Certificate error = %v, want stopping", err)
		}
	})
}

func TestBeforeRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		m := NewManager(Config{Issuer: f, Roots: new(Roots), TrustDomain: "cluster.local"})
		m.Warm(cart)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := m.Certificate(ctx, cart); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Certificate error = %v, want the deadline", err)
		}
		if d := m.Dump(); len(d) != 1 || d[0].State != Initializing {
			t.Errorf("the dump is %+v", d)
		}
		running, stop := context.WithCancel(t.Context())
		go m.Run(running)
		defer stop()
		mustCertificate(t, m, cart)
	})
}

func TestDumpAndLogTellNoKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		var out bytes.Buffer
		m := run(t, Config{Issuer: f, Log: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))})
		m.Warm(cart)
		cert := mustCertificate(t, m, cart)
		synctest.Wait()
		text, err := json.Marshal(m.Dump())
		if err != nil {
			t.Fatal(err)
		}
		key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		encoded, err := json.Marshal(key)
		if err != nil {
			t.Fatal(err)
		}
		secret := strings.Trim(string(encoded), `"`)[40:80]
		for name, s := range map[string]string{"dump": string(text), "log": out.String()} {
			if strings.Contains(s, "PRIVATE") || strings.Contains(s, secret) {
				t.Errorf("the %s holds a key: %s", name, s)
			}
		}
		for _, want := range []string{`"identity":"spiffe://cluster.local/ns/shop/sa/cart"`, `"state":"Available"`, `"certChain":[{"pem":"`, `"rootCerts":[{`} {
			if !strings.Contains(string(text), want) {
				t.Errorf("the dump lacks %s: %s", want, text)
			}
		}
	})
}

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeIssuer{ca: testca.New(t, "cluster.local")}
		f.set(func(ctx context.Context, id mesh.Identity, csr *x509.CertificateRequest) (Issued, error) {
			if id == web {
				return Issued{}, errors.New("no")
			}
			return f.honest(id, csr, nil), nil
		})
		reg := prometheus.NewPedanticRegistry()
		m := run(t, Config{Issuer: f, Registerer: reg})
		m.Warm(cart)
		m.Warm(web)
		synctest.Wait()
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]float64{}
		for _, f := range families {
			for _, x := range f.GetMetric() {
				name := f.GetName()
				for _, l := range x.GetLabel() {
					name += " " + l.GetValue()
				}
				got[name] = x.GetGauge().GetValue() + x.GetCounter().GetValue()
			}
		}
		want := map[string]float64{
			"weft_identity_certificates":                      1,
			"weft_identity_certificates_missing":              1,
			"weft_identity_earliest_expiry_timestamp_seconds": float64(time.Now().Add(24 * time.Hour).Unix()),
			"weft_identity_issue_total error":                 1,
			"weft_identity_issue_total success":               1,
		}
		for name, v := range want {
			if got[name] != v {
				t.Errorf("%s is %v, want %v", name, got[name], v)
			}
		}
	})
}
