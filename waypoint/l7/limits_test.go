package l7

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// policyFor is the traffic policy of cart, changed by f.
func policyFor(f func(p *mesh.TrafficPolicy)) []*mesh.TrafficPolicy {
	p := &mesh.TrafficPolicy{Service: cart}
	f(p)
	return []*mesh.TrafficPolicy{p}
}

// numbered serves connections with their numbers, from 1.
func (w *world) numbered(addresses ...string) {
	n := 0
	for _, a := range addresses {
		w.raw(a, func(c net.Conn) {
			w.mu.Lock()
			n++
			id := n
			w.mu.Unlock()
			serveHTTP(c, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				fmt.Fprint(rw, id)
			}))
		})
	}
}

// one changes a policy so that all goes to one endpoint.
func one(p *mesh.TrafficPolicy) {
	p.Balance = mesh.Balance{Algorithm: mesh.RingHash, Hash: &mesh.HashKey{SourceIP: true}}
}

// Connections to endpoints live as long as the policy says, and carry as many
// requests.
func TestConnectionsEnd(t *testing.T) {
	for _, tt := range []struct {
		name   string
		limits mesh.Connections
		pauses []time.Duration // before each request
		want   string          // the numbers of the connections
	}{
		{"nothing is said", mesh.Connections{}, []time.Duration{0, time.Minute, 30 * time.Minute}, "1 1 1"},
		{"idle for an hour", mesh.Connections{}, []time.Duration{0, 59 * time.Minute, 62 * time.Minute}, "1 1 2"},
		{"idle for ten seconds", mesh.Connections{IdleHTTP: 10_000 * ms}, []time.Duration{0, 9 * time.Second, 12 * time.Second}, "1 1 2"},
		{"three requests each", mesh.Connections{MaxRequestsPerConn: 3}, make([]time.Duration, 7), "1 1 1 2 2 2 3"},
		{"a minute each", mesh.Connections{MaxDuration: 60_000 * ms}, []time.Duration{0, 30 * time.Second, 31 * time.Second, 30 * time.Second}, "1 1 2 2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorldWith(t, Config{}, []mesh.Rule{toCart(nil)}, policyFor(func(p *mesh.TrafficPolicy) {
					one(p)
					p.Connections = tt.limits
				}))
				w.numbered("10.0.0.1:8080", "10.0.0.2:8080")
				var got []string
				for _, d := range tt.pauses {
					time.Sleep(d)
					_, body := w.client(80).get("/") // one of its own: those of clients end too
					got = append(got, body)
					synctest.Wait() // until the connection is put back
				}
				if s := strings.Join(got, " "); s != tt.want {
					t.Errorf("requests went over the connections %s, want %s", s, tt.want)
				}
			})
		})
	}
}

// An endpoint that does not take the connection costs as long as the policy
// says, and then another one is tried.
func TestConnectTimeout(t *testing.T) {
	for _, tt := range []struct {
		within mesh.Duration
		want   time.Duration
	}{{0, 10 * time.Second}, {250 * ms, 250 * time.Millisecond}} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorldWith(t, Config{}, []mesh.Rule{toCart(nil)}, policyFor(func(p *mesh.TrafficPolicy) { p.Connections.ConnectFor = tt.within }))
			w.e.cfg.Dialer = deaf{}
			start := time.Now()
			r, body := w.client(80).get("/")
			if took := time.Since(start); r.StatusCode != 503 || body != resetBody+"connection failure" || took < tt.want || took > tt.want+tt.want/50 {
				t.Errorf("%v: %d %q after %v, want 503 after %v", time.Duration(tt.within), r.StatusCode, body, took, tt.want)
			}
			if f := w.last().Flags.String(); f != "UF" {
				t.Errorf("flags are %s", f)
			}
		})
	}
}

// deaf answers no connection.
type deaf struct{}

func (deaf) Dial(ctx context.Context, _ Target) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// Tries go to endpoints that have not failed, unless the policy lets them.
func TestPreviousHosts(t *testing.T) {
	for _, tt := range []struct {
		previous bool
		most     int // dials to one of the two endpoints
	}{{false, 1}, {true, 2}} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorldWith(t, Config{}, []mesh.Rule{toCart(func(r *mesh.Rule) {
				r.Retry = &mesh.Retry{Attempts: 1, On: []string{"connect-failure"}, PreviousHosts: tt.previous}
			})}, policyFor(one))
			r, _ := w.client(80).get("/")
			seen := map[netip.AddrPort]int{}
			most := 0
			for _, d := range w.dials {
				seen[d.Address]++
				most = max(most, seen[d.Address])
			}
			if r.StatusCode != 503 || len(w.dials) != 2 || most != tt.most {
				t.Errorf("previous hosts %v: %d, tried %v", tt.previous, r.StatusCode, seen)
			}
		})
	}
}

// A connection that was made for one name, or in clear, is not used for another
// name, or where TLS has come to be asked for.
func TestConnectionsAreVerifiedForWhatTheyCarry(t *testing.T) {
	for _, version := range []string{"", "upgrade"} {
		synctest.Test(t, func(t *testing.T) {
			policy := func(tls *mesh.UpstreamTLS) []*mesh.TrafficPolicy {
				return policyFor(func(p *mesh.TrafficPolicy) {
					one(p)
					p.TLS, p.Connections.HTTP2 = tls, version
				})
			}
			rules := []mesh.Rule{toCart(nil)}
			w := newWorldWith(t, Config{}, rules, policy(nil))
			for _, a := range []string{"10.0.0.1:8080", "10.0.0.2:8080"} {
				if version == "" {
					w.backend(a, echo("a"))
				} else {
					w.backend2(a, echo("a"))
				}
			}
			ask := func(host string) string {
				t.Helper()
				before := len(w.dials)
				c := w.client(80)
				c.say("GET / HTTP/1.1\r\nHost: " + host + "\r\n\r\n")
				if r, body := c.answer("GET"); r.StatusCode != 200 {
					t.Fatalf("%d %s", r.StatusCode, body)
				}
				synctest.Wait()
				if len(w.dials) == before {
					return "old"
				}
				d := w.dials[before]
				if d.TLS == nil {
					return "in clear"
				}
				return d.ServerName
			}
			simple := func(sni string, names ...string) *mesh.UpstreamTLS {
				return &mesh.UpstreamTLS{Mode: mesh.TLSSimple, SNI: sni, SubjectAltNames: names}
			}
			var got []string
			got = append(got, ask("a.example"), ask("b.example"))
			w.set(rules, policy(simple("")))
			got = append(got, ask("a.example"), ask("a.example"), ask("b.example:8443"), ask("b.example"))
			w.set(rules, policy(simple(""))) // the same, said again
			got = append(got, ask("b.example"))
			w.set(rules, policy(simple("c.example")))
			got = append(got, ask("a.example"), ask("b.example"))
			w.set(rules, policy(simple("c.example", "d.example")))
			got = append(got, ask("a.example"))
			w.set(rules, policy(nil))
			got = append(got, ask("a.example"))
			want := "in clear, old, a.example, old, b.example, old, old, c.example, old, c.example, in clear"
			if version != "" {
				want = strings.TrimSuffix(want, "in clear") + "old" // the first one has its use again
			}
			if s := strings.Join(got, ", "); s != want {
				t.Errorf("HTTP/2 %q: connections were\n%s, want\n%s", version, s, want)
			}
		})
	}
}
