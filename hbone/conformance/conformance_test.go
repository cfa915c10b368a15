//lint:file-ignore SA1019 some of the servers under test are of golang.org/x/net/http2

package conformance

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	h2 "golang.org/x/net/http2"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/relay"
	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
)

var (
	web  = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web"}
	cart = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}
)

// A world is a CA, an application that echoes, and a server in front of it.
type world struct {
	t      *testing.T
	ca     *testca.CA
	app    string
	closed string
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, ca: testca.New(t, "cluster.local")}
	w.app = w.listen(func(c net.Conn) {
		_, _ = io.Copy(c, c)
		_ = c.Close()
	})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.closed = ln.Addr().String()
	_ = ln.Close() // and nobody listens there now
	return w
}

// listen serves connections until the test ends.
func (w *world) listen(serve func(net.Conn)) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				serve(c)
				_ = c.Close()
				mu.Lock()
				delete(open, c)
				mu.Unlock()
			})
		}
	})
	w.t.Cleanup(func() {
		_ = ln.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return ln.Addr().String()
}

func (w *world) serverTLS() *tls.Config {
	roots, err := identity.NewRoots("cluster.local", w.ca.PEM())
	if err != nil {
		w.t.Fatal(err)
	}
	c := w.ca.Issue(cart)
	return identity.ServerTLS(func(context.Context) (*tls.Certificate, error) { return &c, nil }, roots, "cluster.local")
}

// config tests the server at address.
func (w *world) config(address string) Config {
	c := w.ca.Issue(web)
	roots := x509.NewCertPool()
	roots.AddCert(w.ca.Certificate())
	return Config{
		Address: address, Certificate: &c, Roots: roots, Peer: cart.String(),
		Target: w.app, Closed: w.closed, Timeout: time.Minute,
	}
}

// ours serves the application with hbone.Server, as a pod's ztunnel does.
func (w *world) ours() string {
	ctx, stop := context.WithCancel(context.Background())
	w.t.Cleanup(stop)
	app, closed := netip.MustParseAddrPort(w.app), netip.MustParseAddrPort(w.closed)
	srv := hbone.NewServer(hbone.ServerConfig{TLS: w.serverTLS(), Handle: func(ctx context.Context, r *hbone.Request) {
		to := r.Authority.AddrPort()
		if to != app && to != closed {
			_ = r.Reject(400)
			return
		}
		up, err := net.Dial("tcp", to.String())
		if err != nil {
			_ = r.Reject(503)
			return
		}
		down, err := r.Accept(hbone.Header{})
		if err != nil {
			_ = up.Close()
			return
		}
		_ = relay.Copy(ctx, down, up, nil)
	}})
	return w.listen(func(c net.Conn) { _ = srv.ServeConn(ctx, c) })
}

func TestOurServerConforms(t *testing.T) {
	w := newWorld(t)
	rs, err := Run(t.Context(), w.config(w.ours()), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rs {
		switch {
		case r.Name == "h2.liveness" && r.Verdict == Skip: // it is slow, and tested with fake time
		case r.Verdict != Pass:
			t.Errorf("%s (%s %s): %s: %s", r.Name, r.Level, r.Section, r.Verdict, r.Detail)
		}
	}
	if len(rs) < 90 {
		t.Errorf("%d checks", len(rs))
	}
}

// x serves with the HTTP/2 server of golang.org/x/net, which speaks HTTP/2
// well, and HBONE only as far as handler makes it.
func (w *world) x(cfg *tls.Config, handler http.HandlerFunc) string {
	srv := &h2.Server{MaxConcurrentStreams: 100}
	return w.listen(func(c net.Conn) {
		t := tls.Server(c, cfg)
		if t.Handshake() != nil {
			return
		}
		srv.ServeConn(t, &h2.ServeConnOpts{Handler: handler, BaseConfig: &http.Server{ErrorLog: log.New(io.Discard, "", 0)}})
	})
}

// believes answers every request as if it were fine, and echoes by itself.
func believes(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	w.WriteHeader(200)
	_ = rc.Flush()
	_, _ = io.Copy(flushing{w, rc}, r.Body)
}

type flushing struct {
	io.Writer
	rc *http.ResponseController
}

func (f flushing) Write(b []byte) (int, error) {
	n, err := f.Writer.Write(b)
	if err == nil {
		err = f.rc.Flush()
	}
	return n, err
}

// shuffles sends back other bytes than came, and forgets the last.
func shuffles(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	w.WriteHeader(200)
	_ = rc.Flush()
	b, _ := io.ReadAll(r.Body)
	for i := range b {
		b[i] ^= 1
	}
	_, _ = w.Write(b[:max(len(b)-1, 0)])
}

// Each of these is wrong in its own way, and found out.
func TestBrokenServersFail(t *testing.T) {
	lax := func(w *world) *tls.Config {
		c := w.serverTLS()
		c.ClientAuth, c.VerifyConnection, c.MinVersion, c.MaxVersion = tls.NoClientCert, nil, tls.VersionTLS12, tls.VersionTLS13
		c.NextProtos = []string{"h2", "http/1.1"}
		c.SessionTicketsDisabled = false
		return c
	}
	rows := []struct {
		name  string
		serve func(w *world) string
		only  string
		want  []string // checks that must fail
	}{
		{"takes anybody, with old TLS", func(w *world) string { return w.x(lax(w), believes) }, "tls.",
			[]string{"tls.version", "tls.client.none", "tls.client.untrusted", "tls.tickets"}},
		{"is somebody else", func(w *world) string {
			c := w.ca.Issue(web)
			cfg := w.serverTLS()
			cfg.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &c, nil }
			return w.x(cfg, believes)
		}, "tls.identity", []string{"tls.identity"}},
		{"speaks no HTTP/2", func(w *world) string {
			return w.listen(func(c net.Conn) {
				t := tls.Server(c, w.serverTLS())
				_, _ = io.WriteString(t, "HTTP/1.1 200 OK\r\n\r\n")
				_, _ = io.Copy(io.Discard, t)
			})
		}, "h2.settings.", []string{"h2.settings.first", "h2.settings.ack"}},
		{"serves every target", func(w *world) string { return w.x(w.serverTLS(), believes) }, "connect.",
			[]string{"connect.foreign", "connect.loopback", "connect.closed", "connect.get", "connect.authority.port"}},
		{"changes what it carries", func(w *world) string { return w.x(w.serverTLS(), shuffles) }, "data.",
			[]string{"data.echo", "data.frames.16k", "data.padding"}},
		{"answers and reads nothing", func(w *world) string {
			return w.listen(func(c net.Conn) {
				t := tls.Server(c, w.serverTLS())
				fr := h2.NewFramer(t, t)
				_ = fr.WriteSettings()
				_ = fr.WriteSettingsAck()
				<-w.t.Context().Done()
			})
		}, "flood.ping", []string{"flood.ping"}},
		{"bears everything", func(w *world) string {
			return w.listen(func(c net.Conn) {
				t := tls.Server(c, w.serverTLS())
				fr := h2.NewFramer(t, t)
				fr.AllowIllegalReads = true
				_ = fr.WriteSettings()
				_ = fr.WriteSettingsAck()
				_, _ = io.Copy(io.Discard, t)
			})
		}, "h2.error.w", []string{"h2.error.window.size", "h2.error.window.zero", "h2.error.window.idle", "h2.error.window.overflow"}},
		{"keeps its old key", func(w *world) string { return w.deafToKeys() }, "tls.keyupdate", []string{"tls.keyupdate"}},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			w := newWorld(t)
			cfg := w.config(row.serve(w))
			cfg.Only, cfg.Timeout = row.only, 300*time.Millisecond
			rs, err := Run(t.Context(), cfg, nil)
			if err != nil {
				t.Fatal(err)
			}
			failed := map[string]bool{}
			for _, r := range rs {
				failed[r.Name] = r.Verdict == Fail
			}
			for _, name := range row.want {
				if !failed[name] {
					t.Errorf("%s did not fail", name)
				}
			}
			if !Failed(rs, true) {
				t.Error("the run as a whole passed")
			}
		})
	}
}

// deafToKeys ends every connection on which a second record of one read is
// small, as KeyUpdates are: as good as a peer that does not know them.
func (w *world) deafToKeys() string {
	inner := w.ours()
	return w.listen(func(c net.Conn) {
		up, err := net.Dial("tcp", inner)
		if err != nil {
			return
		}
		defer up.Close()
		go func() { _, _ = io.Copy(c, up) }() // ends with either
		head, handshakes := make([]byte, 5), 0
		for {
			if _, err := io.ReadFull(c, head); err != nil {
				return
			}
			rec := append([]byte(nil), head...)
			rec = append(rec, make([]byte, int(head[3])<<8|int(head[4]))...)
			if _, err := io.ReadFull(c, rec[5:]); err != nil {
				return
			}
			if head[0] == 23 {
				handshakes++
			}
			if handshakes > 1 && len(rec) == 5+5+1+16 {
				continue // a KeyUpdate is lost
			}
			if _, err := up.Write(rec); err != nil {
				return
			}
		}
	})
}

func TestRunNeedsAServer(t *testing.T) {
	w := newWorld(t)
	cfg := w.config(w.closed)
	if _, err := Run(t.Context(), cfg, nil); err == nil || !strings.Contains(err.Error(), "cannot be reached") {
		t.Errorf("nobody listens: %v", err)
	}
	cfg.Certificate = nil
	if _, err := Run(t.Context(), cfg, nil); err == nil {
		t.Error("without a certificate: no error")
	}
}

// What is no HBONE server at all is told so once, and soon, and passes nothing
// that it cannot have understood.
func TestServersThatAreNone(t *testing.T) {
	rows := []struct {
		name  string
		serve func(w *world) string
		fails string // the first check that fails
		why   string
		runs  int // checks that were made
	}{
		{"an echo", func(w *world) string { return w.app }, "tls.identity", "does not seem to speak TLS", 1},
		{"hangs up", func(w *world) string { return w.listen(func(net.Conn) {}) }, "tls.identity", "ends it without an alert", 1},
		{"speaks first", func(w *world) string {
			return w.listen(func(c net.Conn) {
				_, _ = io.WriteString(c, "220 mail.example.com ready\r\n")
				_, _ = io.Copy(io.Discard, c)
			})
		}, "tls.identity", "does not seem to speak TLS", 1},
		{"says nothing", func(w *world) string { return w.listen(func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }) },
			"tls.identity", "says nothing", 1},
		{"TLS, and something else in it", func(w *world) string {
			return w.listen(func(c net.Conn) {
				t := tls.Server(c, w.serverTLS())
				_, _ = io.WriteString(t, "220 mail.example.com ready\r\n")
				_ = t.Close()
			})
		}, "h2.settings.first", "the first frame is", 13},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			cfg := w.config(row.serve(w))
			if row.why == "says nothing" {
				cfg.Timeout = 100 * time.Millisecond
			}
			rs, err := Run(t.Context(), cfg, nil)
			if err != nil {
				t.Fatal(err)
			}
			made, first := 0, Result{}
			for _, r := range rs {
				if r.Verdict != Skip {
					made++
				}
				if r.Verdict == Fail && r.Name == row.fails {
					first = r
				}
			}
			if !strings.Contains(first.Detail, row.why) || made != row.runs || len(rs) != len(checks()) || !Failed(rs, false) {
				t.Errorf("%d of %d checks made, want %d; %+v, want %s", made, len(rs), row.runs, first, row.why)
			}
		})
	}
}

func TestChecksAreSkippedWithoutATarget(t *testing.T) {
	w := newWorld(t)
	cfg := w.config(w.ours())
	cfg.Target, cfg.Closed, cfg.Only = "", "", "data."
	rs, err := Run(t.Context(), cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rs {
		if r.Verdict != Skip || r.Detail == "" {
			t.Errorf("%+v, want it skipped, with the reason", r)
		}
	}
	if Failed(rs, true) {
		t.Error("what is skipped has failed")
	}
}

// Every check has a name of its own and a section that is in the specification.
func TestCheckTable(t *testing.T) {
	b, err := os.ReadFile("../../docs/hbone.md")
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, k := range checks() {
		if names[k.name] || k.level == "" {
			t.Errorf("check %q is not complete, or there twice", k.name)
		}
		names[k.name] = true
		if !strings.Contains(string(b), "# "+k.section+" ") {
			t.Errorf("check %s: docs/hbone.md has no section %q", k.name, k.section)
		}
	}
}
