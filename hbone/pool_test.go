package hbone

import (
	"context"
	"errors"
	"io"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/http2"
	"github.com/weft-mesh/weft/mesh"
)

func TestEcho(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		for _, n := range []int{0, 1, 1000, 16384, 16385, 300_000, 7 << 20} {
			exchange(t, w.connect(), payload(n))
		}
		if n := w.dials.Load(); n != 1 {
			t.Errorf("%d tunnels for one target", n)
		}
	})
}

func TestRequestIsWhatWasAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := Header{Forwarded: `for="10.1.1.1:999"`, Baggage: "k8s.namespace.name=shop", Traceparent: "00-aa-bb-01", Network: "n1"}
		got := make(chan *Request, 1)
		w := newWorld(t, func(_ context.Context, r *Request) {
			got <- r
			_ = r.Reject(503)
		})
		_, err := w.pool.Connect(t.Context(), w.target(), "cart.shop.svc:80", h)
		var status *StatusError
		if !errors.As(err, &status) || status.Code != 503 {
			t.Errorf("Connect: %v, want status 503", err)
		}
		r := <-got
		if r.Peer != web || r.Header != h || r.Authority != (Authority{Host: "cart.shop.svc", Port: 80}) {
			t.Errorf("request is %+v", r)
		}
	})
}

func TestPeerOfStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		if s := w.connect(); s.Peer() != cart {
			t.Errorf("peer is %v", s.Peer())
		}
	})
}

func TestWrongPeerIsNeverRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		tg := w.target()
		tg.Peers = []mesh.Identity{web}
		_, err := w.pool.Connect(t.Context(), tg, target, Header{})
		if !errors.Is(err, identity.ErrWrongPeer) {
			t.Errorf("Connect: %v, want ErrWrongPeer", err)
		}
		if n := w.dials.Load(); n != 1 {
			t.Errorf("%d dials", n)
		}
	})
}

func TestClientOfForeignTrustDomainIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		tg := w.target()
		tg.Source = mesh.Identity{TrustDomain: "evil.example", Namespace: "shop", ServiceAccount: "web"}
		_, err := w.pool.Connect(t.Context(), tg, target, Header{})
		if err == nil {
			t.Fatal("a foreign client was served")
		}
		t.Log(err)
		if n := w.dials.Load(); n != 1 {
			t.Errorf("%d dials", n)
		}
		if err := <-w.errs; err == nil {
			t.Error("ServeConn: no error")
		}
	})
}

func TestBadAuthorityIsAnswered400(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		for _, a := range []string{"", "nothing", "1.2.3.4:0", "1.2.3.4:80:80", "/:80"} {
			_, err := w.pool.Connect(t.Context(), w.target(), a, Header{})
			var status *StatusError
			if a == "" {
				// Encoded as no field at all, which is malformed.
				if err == nil {
					t.Error("a request without :authority was served")
				}
				continue
			}
			if !errors.As(err, &status) || status.Code != 400 {
				t.Errorf("Connect to %q: %v, want status 400", a, err)
			}
		}
	})
}

func TestSingleFlightAndShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		var wg sync.WaitGroup
		for range 250 {
			wg.Go(func() { w.connect() })
		}
		wg.Wait()
		if n := w.dials.Load(); n != 3 {
			t.Errorf("%d tunnels for 250 connections, want 3", n)
		}
	})
}

func TestTargetsDoNotShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		a := w.target()
		b, c, d := a, a, a
		b.Owner = "pod-2"
		c.Peers = []mesh.Identity{web, cart}
		d.Source = cart
		for _, tg := range []Target{a, b, c, d, a, b, c, d} {
			s, err := w.pool.Connect(t.Context(), tg, target, Header{})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
		}
		e := c
		e.Peers = []mesh.Identity{cart, web, cart} // the same set
		if _, err := w.pool.Connect(t.Context(), e, target, Header{}); err != nil {
			t.Fatal(err)
		}
		if n := w.dials.Load(); n != 4 {
			t.Errorf("%d tunnels, want 4", n)
		}
	})
}

func TestIdleTunnelIsReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		exchange(t, w.connect(), []byte("x"))
		time.Sleep(4*time.Minute + 50*time.Second)
		exchange(t, w.connect(), []byte("x"))
		if n := w.dials.Load(); n != 1 {
			t.Errorf("%d tunnels: one that is in use was released", n)
		}
		time.Sleep(5*time.Minute + time.Second)
		if err := <-w.errs; err != nil {
			t.Errorf("ServeConn: %v", err)
		}
		exchange(t, w.connect(), []byte("x"))
		if n := w.dials.Load(); n != 2 {
			t.Errorf("%d tunnels, want 2", n)
		}
	})
}

// Who comes when a tunnel's stream ids are used up gets another tunnel.
func TestStreamIDsEndForThePool(t *testing.T) {
	w := newWorld(t, echo)
	s := w.connect()
	s.link.mu.Lock()
	s.link.tunnel.next = http2.MaxStreamID
	s.link.mu.Unlock()
	last, next := w.connect(), w.connect()
	if last.link != s.link || next.link == s.link {
		t.Error("the last id was not used, or one more")
	}
	for _, s := range []*Stream{s, last, next} {
		exchange(t, s, []byte("hello"))
	}
}

func TestOpenStreamKeepsTunnel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		s := w.connect()
		time.Sleep(time.Hour)
		exchange(t, s, []byte("still here"))
		if n := w.dials.Load(); n != 1 {
			t.Errorf("%d tunnels", n)
		}
	})
}

func TestCloseOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		s := w.connect()
		w.pool.CloseOwner("pod-2")
		if _, err := s.Write([]byte("x")); err != nil {
			t.Fatalf("another pod's end reached us: %v", err)
		}
		w.pool.CloseOwner("pod-1")
		synctest.Wait()
		if _, err := io.ReadAll(s); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Read: %v, want ECONNRESET", err)
		}
		exchange(t, w.connect(), []byte("a pod of the same name may come back"))
	})
}

func TestConnectAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, echo)
		w.connect()
		w.pool.Close()
		if _, err := w.pool.Connect(t.Context(), w.target(), target, Header{}); err == nil {
			t.Error("Connect on a closed pool: no error")
		}
	})
}

func TestContextEndsConnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan struct{})
		w := newWorld(t, func(ctx context.Context, _ *Request) {
			<-ctx.Done()
			close(ended)
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := w.pool.Connect(ctx, w.target(), target, Header{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Connect: %v", err)
		}
		<-ended // the handler hears of it
	})
}
