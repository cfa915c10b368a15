package l7

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

const ms = mesh.Duration(time.Millisecond)

// toCart is the rule that sends everything to cart, changed by f.
func toCart(f func(r *mesh.Rule)) mesh.Rule {
	r := mesh.Rule{Name: "r", Backends: []mesh.Backend{{Weight: 1}}}
	if f != nil {
		f(&r)
	}
	return r
}

// silent reads and says nothing.
func silent(c net.Conn) { io.Copy(io.Discard, c) }

func TestFailures(t *testing.T) {
	closes := func(c net.Conn) { http.ReadRequest(bufio.NewReader(c)) }
	tests := []struct {
		name    string
		rule    mesh.Rule
		policy  *mesh.TrafficPolicy
		backend func(net.Conn)
		status  int
		body    string
		flags   string
		after   time.Duration
	}{
		{"no connection", toCart(nil), nil, nil, 503, resetBody + "connection failure", "UF", 0},
		{"closed before an answer", toCart(nil), nil, closes, 503, resetBody + "connection termination", "UC", 0},
		{"an answer that is none", toCart(nil), nil, script("ICY 200 OK\r\n\r\n"), 502, resetBody + "protocol error", "UPE", 0},
		{"an answer with two lengths", toCart(nil), nil, script("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na"), 502, resetBody + "protocol error", "UPE", 0},
		{"an answer whose first chunk is bad", toCart(nil), nil, script("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), 502, resetBody + "protocol error", "UPE", 0},
		{"the route's timeout", toCart(func(r *mesh.Rule) { r.Timeout = 1000 * ms }), nil, silent, 504, "upstream request timeout", "UT", time.Second},
		{"the backend's timeout", toCart(func(r *mesh.Rule) { r.Backends[0].Timeout = 300 * ms }), nil, silent, 504, "upstream request timeout", "UT", 300 * time.Millisecond},
		{"a try's timeout", toCart(func(r *mesh.Rule) { r.Retry = &mesh.Retry{PerTryTimeout: 200 * ms} }), nil, silent, 504, "upstream request timeout", "UT", 200 * time.Millisecond},
		{"nothing moves", toCart(nil), nil, silent, 504, "stream timeout", "SI", 5 * time.Minute},
		{"no rule", mesh.Rule{Matches: []mesh.RequestMatch{{Never: true}}}, nil, silent, 404, "", "NR", 0},
		{"no such service", toCart(func(r *mesh.Rule) {
			r.Backends[0].Service = mesh.ServiceName{Namespace: "x", Host: "y"}
		}), nil, silent, 503, "", "NC", 0},
		{"no such subset", toCart(func(r *mesh.Rule) { r.Backends[0].Subset = "v9" }), nil, silent, 503, "", "NC", 0},
		{"a backend of Gateway API that is none", toCart(func(r *mesh.Rule) { r.Backends[0].Unroutable, r.Backends[0].Status = "no such Service", 500 }), nil, silent, 500, "", "-", 0},
		{"a rule that nobody understands", mesh.Rule{Broken: "x"}, nil, silent, 500, "", "-", 0},
		{"nobody has the labels", toCart(nil), &mesh.TrafficPolicy{Service: cart, Labels: map[string]string{"version": "v9"}}, silent, 503, "no healthy upstream", "UH", 0},
		{"a policy that nobody understands", toCart(nil), &mesh.TrafficPolicy{Service: cart, Broken: "x"}, silent, 503, "", "NC", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var policies []*mesh.TrafficPolicy
				if tt.policy != nil {
					policies = append(policies, tt.policy)
				}
				w := newWorldWith(t, Config{}, []mesh.Rule{tt.rule}, policies)
				if tt.backend != nil {
					w.everywhere(tt.backend)
				}
				c := w.client(80)
				start := time.Now()
				r, body := c.get("/")
				if r.StatusCode != tt.status || body != tt.body {
					t.Errorf("got %d %q, want %d %q", r.StatusCode, body, tt.status, tt.body)
				}
				if took := time.Since(start); took < tt.after || took > tt.after+tt.after/50+2*tick {
					t.Errorf("took %v, want %v", took, tt.after)
				}
				if x := w.last(); x.Flags.String() != tt.flags {
					t.Errorf("flags are %v, want %v", x.Flags, tt.flags)
				}
				if tt.flags != "SI" { // the connection is still good
					if r, _ := c.get("/"); r.StatusCode != tt.status {
						t.Errorf("then got %d", r.StatusCode)
					}
				}
			})
		})
	}
}

// counting answers by what number the request has, over all connections.
func counting(n *atomic.Int32, f func(n int, r *http.Request) (status int)) func(net.Conn) {
	return func(c net.Conn) {
		serveHTTP(c, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			rw.WriteHeader(f(int(n.Add(1)), r))
			fmt.Fprintf(rw, "%s %s", r.Header.Get("X-Envoy-Attempt-Count"), b)
		}))
	}
}

// What retryOn's words stand for, as people know them from Envoy.
func TestRetryOn(t *testing.T) {
	failures := map[failed]string{
		failedConnect: "5xx gateway-error reset reset-before-request connect-failure", failedRefused: "5xx gateway-error reset reset-before-request refused-stream",
		failedClosed: "5xx gateway-error reset", failedReset: "5xx gateway-error reset", failedProtocol: "5xx gateway-error reset",
		failedTry: "5xx gateway-error reset", failedOther: "5xx gateway-error reset",
		failedTimeout: "", failedIdle: "", failedClient: "", failedRequest: "", failedStopped: "", failedOverflow: "", failedNoHealthy: "", failedNoCluster: "",
	}
	answers := map[string]string{
		"500": "5xx", "501": "5xx", "502": "5xx gateway-error", "503": "5xx gateway-error", "504": "5xx gateway-error", "409": "retriable-4xx",
		"404": "", "418": "retriable-status-codes", "307": "retriable-status-codes", "200": "",
		"200 grpc 1": "cancelled", "200 grpc 4": "deadline-exceeded", "200 grpc 8": "resource-exhausted", "200 grpc 13": "internal", "200 grpc 14": "unavailable", "200 grpc 0": "",
	}
	for _, on := range []string{"5xx", "gateway-error", "reset", "reset-before-request", "connect-failure", "refused-stream", "retriable-4xx",
		"retriable-status-codes", "cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable", "nonsense"} {
		r := &mesh.Retry{On: []string{on}, Codes: []int{307, 418}}
		for kind, want := range failures {
			if got := retriable(r, kind, false); got != slices.Contains(strings.Fields(want), on) {
				t.Errorf("%s after %q: %v", on, outcomes[kind].details, got)
			}
		}
		for answer, want := range answers {
			var h msg.Head
			h.Reset()
			code, grpc, _ := strings.Cut(answer, " grpc ")
			h.Status, _ = strconv.Atoi(code)
			if grpc != "" {
				msg.Set(&h, "grpc-status", grpc)
			}
			if got := retriableAnswer(r, &h); got != slices.Contains(strings.Fields(want), on) {
				t.Errorf("%s after %s: %v", on, answer, got)
			}
		}
	}
	if !retriable(&mesh.Retry{On: []string{"unavailable"}}, failedConnect, true) || retriable(nil, failedConnect, true) || retriableAnswer(nil, new(msg.Head)) {
		t.Error("unavailable does not stand for no connection, or no policy for something")
	}
}

// Who would answer whatever the backend is does so if there is none.
func TestAnswersWithoutBackend(t *testing.T) {
	none := func(f func(*mesh.Rule)) mesh.Rule {
		return toCart(func(r *mesh.Rule) {
			r.Backends[0].Unroutable, r.Backends[0].Status = "no such Service", 500
			f(r)
		})
	}
	inWorld(t, "a fault", func(t *testing.T, w *world) {
		if r, b := w.client(80).get("/"); r.StatusCode != 418 || b != "fault filter abort" {
			t.Errorf("answered %d %q", r.StatusCode, b)
		}
	}, none(func(r *mesh.Rule) { r.Fault = &mesh.Fault{Abort: &mesh.FaultAbort{PerMillion: 1e6, Status: 418}} }))
	inWorld(t, "a question of a browser", func(t *testing.T, w *world) {
		c := w.client(80)
		c.say("OPTIONS / HTTP/1.1\r\nHost: cart\r\nOrigin: http://a\r\nAccess-Control-Request-Method: GET\r\n\r\n")
		if r, _ := c.answer("OPTIONS"); r.StatusCode != 200 || r.Header.Get("Access-Control-Allow-Origin") != "http://a" {
			t.Errorf("answered %d %v", r.StatusCode, r.Header)
		}
		// What it asks for then has nowhere to go, and says so to scripts too.
		if r, _ := c.get("/", "Origin: http://a"); r.StatusCode != 500 || r.Header.Get("Access-Control-Allow-Origin") != "http://a" {
			t.Errorf("answered %d %v", r.StatusCode, r.Header)
		}
	}, none(func(r *mesh.Rule) {
		r.CORS = &mesh.CORS{AllowOrigins: []mesh.TextMatch{textOf(mesh.TextExact, "http://a")}, AllowMethods: []string{"GET"}}
	}))
}

func TestRetries(t *testing.T) {
	retry := func(r mesh.Retry) mesh.Rule { return toCart(func(rule *mesh.Rule) { rule.Retry = &r }) }
	five := retry(mesh.Retry{Attempts: 3, On: []string{"5xx"}})
	inWorld(t, "attempts 3 are at most 4 tries, and then URX", func(t *testing.T, w *world) {
		var n atomic.Int32
		w.everywhere(counting(&n, func(int, *http.Request) int { return 503 }))
		if r, b := w.client(80).get("/"); r.StatusCode != 503 || b != "4 " || n.Load() != 4 {
			t.Errorf("got %d %q after %d tries", r.StatusCode, b, n.Load())
		}
		if x := w.last(); x.Attempts != 4 || x.Flags != FlagRetriesExhausted {
			t.Errorf("%d attempts, flags %v", x.Attempts, x.Flags)
		}
	}, five)
	inWorld(t, "a body is sent again", func(t *testing.T, w *world) {
		var n atomic.Int32
		w.everywhere(counting(&n, func(n int, _ *http.Request) int { return map[bool]int{true: 500, false: 200}[n < 3] }))
		c := w.client(80)
		c.say("POST / HTTP/1.1\r\nHost: cart\r\nContent-Length: 5\r\n\r\nhello")
		if r, b := c.answer("POST"); r.StatusCode != 200 || b != "3 hello" {
			t.Errorf("got %d %q", r.StatusCode, b)
		}
	}, five)
	inWorld(t, "a streamed body is sent again as long as it is small", func(t *testing.T, w *world) {
		var n atomic.Int32
		w.everywhere(counting(&n, func(n int, _ *http.Request) int { return map[bool]int{true: 500, false: 200}[n < 3] }))
		c := w.client(80)
		go func() {
			io.WriteString(c, "POST / HTTP/1.1\r\nHost: cart\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n")
			time.Sleep(time.Second)
			io.WriteString(c, "3\r\nllo\r\n0\r\n\r\n")
		}()
		if r, b := c.answer("POST"); r.StatusCode != 200 || b != "3 hello" {
			t.Errorf("got %d %q", r.StatusCode, b)
		}
	}, five)
	inWorld(t, "a large body is not", func(t *testing.T, w *world) {
		var n atomic.Int32
		w.everywhere(counting(&n, func(n int, _ *http.Request) int { return 500 }))
		c := w.client(80)
		big := strings.Repeat("x", 100<<10)
		c.say(fmt.Sprintf("POST / HTTP/1.1\r\nHost: cart\r\nContent-Length: %d\r\n\r\n%s", len(big), big))
		if r, _ := c.answer("POST"); r.StatusCode != 500 || n.Load() != 1 {
			t.Errorf("got %d after %d tries", r.StatusCode, n.Load())
		}
	}, five)
	inWorld(t, "at another endpoint", func(t *testing.T, w *world) {
		w.raw("10.0.0.1:8080", func(c net.Conn) {})
		for range 10 {
			if _, b := w.client(80).get("/"); b != "GET cart / 0:" {
				t.Errorf("got %q", b)
			}
		}
	}, retry(mesh.Retry{Attempts: 1, On: []string{"reset"}}))
	inWorld(t, "connect-failure by default", func(t *testing.T, w *world) {
		w.mu.Lock()
		for a := range w.backends {
			if a.String() == "10.0.0.1:8080" {
				delete(w.backends, a)
			}
		}
		w.mu.Unlock()
		for range 10 {
			c := w.client(81 - 1)
			c.say("POST / HTTP/1.1\r\nHost: cart\r\nContent-Length: 2\r\n\r\nhi")
			if _, b := c.answer("POST"); b != "POST cart / 2:hi" {
				t.Errorf("got %q", b)
			}
		}
	})
	inWorld(t, "not what was not asked for", func(t *testing.T, w *world) {
		var n atomic.Int32
		w.everywhere(counting(&n, func(int, *http.Request) int { return 503 }))
		w.client(80).get("/")
		if n.Load() != 1 {
			t.Errorf("%d tries", n.Load())
		}
	}, retry(mesh.Retry{Attempts: 3, On: []string{"connect-failure", "retriable-status-codes", "retriable-4xx"}, Codes: []int{404}}))
	inWorld(t, "a try's timeout, within the route's", func(t *testing.T, w *world) {
		var n atomic.Int32
		w.everywhere(func(c net.Conn) { n.Add(1); silent(c) })
		start := time.Now()
		r, _ := w.client(80).get("/")
		if took := time.Since(start); r.StatusCode != 504 || took != time.Second {
			t.Errorf("got %d after %v", r.StatusCode, took)
		}
		if n.Load() < 3 {
			t.Errorf("%d tries", n.Load())
		}
	}, toCart(func(r *mesh.Rule) {
		r.Timeout = 1000 * ms
		r.Retry = &mesh.Retry{Attempts: 9, On: []string{"5xx"}, PerTryTimeout: 200 * ms, Backoff: ms}
	}))
}

// backoff stays within what it promises.
func TestBackoff(t *testing.T) {
	r := &mesh.Retry{}
	for n := 1; n < 40; n++ {
		most := min(25*time.Millisecond*time.Duration(1<<min(n, 20)-1), 250*time.Millisecond)
		for _, chance := range []uint64{0, 1, 1 << 40, 1<<64 - 1} {
			if d := backoff(r, n, chance); d < 0 || d >= most {
				t.Errorf("try %d waits %v, want below %v", n, d, most)
			}
		}
	}
}

func TestOverflow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorldWith(t, Config{}, nil, []*mesh.TrafficPolicy{{Service: cart, Connections: mesh.Connections{MaxRequests: 1}}})
		w.everywhere(silent)
		first := w.client(80)
		first.say("GET / HTTP/1.1\r\nHost: cart\r\n\r\n")
		synctest.Wait()
		r, b := w.client(80).get("/")
		if r.StatusCode != 503 || b != resetBody+"overflow" || r.Header.Get("X-Envoy-Overloaded") != "true" {
			t.Errorf("got %d %q %v", r.StatusCode, b, r.Header)
		}
		if x := w.last(); x.Flags != FlagOverflow {
			t.Errorf("flags are %v", x.Flags)
		}
	})
}

// A reused connection that the endpoint has closed at the same moment must not
// fail a request that may be sent again.
func TestStaleConnection(t *testing.T) {
	inWorld(t, "GET", func(t *testing.T, w *world) {
		w.everywhere(func(c net.Conn) {
			r := bufio.NewReader(c)
			http.ReadRequest(r)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			http.ReadRequest(r) // and is gone
		})
		c := w.client(80)
		for range 5 {
			if r, _ := c.get("/"); r.StatusCode != 200 {
				t.Fatalf("got %d", r.StatusCode)
			}
		}
	}, toCart(nil))
}

func TestSlowClients(t *testing.T) {
	inWorld(t, "a head that does not come", func(t *testing.T, w *world) {
		c := w.client(80)
		start := time.Now()
		c.say("GET / HTTP/1.1\r\nHo")
		if r, _ := c.answer("GET"); r.StatusCode != 408 {
			t.Errorf("got %d", r.StatusCode)
		}
		if took := time.Since(start); took < 10*time.Second || took > 11*time.Second {
			t.Errorf("took %v", took)
		}
		c.closed()
	})
	inWorld(t, "no request", func(t *testing.T, w *world) {
		c := w.client(80)
		start := time.Now()
		c.closed()
		if took := time.Since(start); took < time.Hour || took > time.Hour+time.Second {
			t.Errorf("took %v", took)
		}
	})
	inWorld(t, "a body that does not come", func(t *testing.T, w *world) {
		c := w.client(80)
		c.say("POST / HTTP/1.1\r\nHost: cart\r\nContent-Length: 5\r\n\r\nhe")
		if r, _ := c.answer("POST"); r.StatusCode != 408 && r.StatusCode != 504 {
			t.Errorf("got %d", r.StatusCode)
		}
		c.closed()
	})
	inWorld(t, "an answer that is not taken", func(t *testing.T, w *world) {
		w.everywhere(func(c net.Conn) {
			http.ReadRequest(bufio.NewReader(c))
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
			io.Copy(c, neverEnding{})
		})
		c := w.client(80)
		c.say("GET / HTTP/1.1\r\nHost: cart\r\n\r\n")
		c.r.Peek(1)
		time.Sleep(6 * time.Minute)
		if x := w.last(); x.Flags&(FlagIdle|FlagDownstreamClosed) == 0 {
			t.Errorf("flags are %v", x.Flags)
		}
	})
}

type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) { return len(p), nil }

func TestDrain(t *testing.T) {
	inWorld(t, "answers say close, and quiet connections end late", func(t *testing.T, w *world) {
		busy, quiet := w.client(80), w.client(80)
		busy.get("/")
		quiet.get("/")
		start := time.Now()
		w.e.Drain()
		if r, _ := busy.get("/"); r.StatusCode != 200 || !r.Close {
			t.Errorf("got %v", r)
		}
		busy.closed()
		quiet.closed()
		if took := time.Since(start); took < 18*time.Second || took > 19*time.Second {
			t.Errorf("quiet one ended after %v", took)
		}
	})
	inWorld(t, "the end of the context cuts", func(t *testing.T, w *world) {
		w.everywhere(silent)
		c := w.client(80)
		c.say("GET / HTTP/1.1\r\nHost: cart\r\n\r\n")
		synctest.Wait()
		w.cancel()
		c.closed()
	})
}

func TestConnections(t *testing.T) {
	line := func(c net.Conn) {
		io.WriteString(c, "hello\n")
		r := bufio.NewReader(c)
		s, _ := r.ReadString('\n')
		io.WriteString(c, "got "+s)
	}
	inWorld(t, "the server speaks first", func(t *testing.T, w *world) {
		w.raw("10.0.0.1:8081", line)
		w.raw("10.0.0.2:8081", line)
		c := w.client(81)
		start := time.Now()
		c.expect("hello\n")
		if took := time.Since(start); took != 100*time.Millisecond {
			t.Errorf("stalled for %v", took)
		}
		c.say("you\n")
		c.expect("got you\n")
	})
	inWorld(t, "the client speaks something else first", func(t *testing.T, w *world) {
		w.raw("10.0.0.1:8081", line)
		w.raw("10.0.0.2:8081", line)
		c := w.client(81)
		start := time.Now()
		c.say("EHLO you\n")
		c.expect("hello\ngot EHLO you\n")
		if took := time.Since(start); took != 0 {
			t.Errorf("stalled for %v", took)
		}
	})
	inWorld(t, "HTTP is found", func(t *testing.T, w *world) {
		w.backend("10.0.0.1:8081", echo("a"))
		w.backend("10.0.0.2:8081", echo("b"))
		c := w.client(81)
		if r, b := c.get("/x"); b != "GET cart /x 0:" || r.Header.Get("X-Envoy-Upstream-Service-Time") == "" {
			t.Errorf("got %q", b)
		}
	})
	inWorld(t, "a connection on which nothing moves", func(t *testing.T, w *world) {
		w.set(nil, []*mesh.TrafficPolicy{{Service: cart, Connections: mesh.Connections{IdleTCP: mesh.Duration(8 * time.Second)}}})
		w.raw("10.0.0.1:8081", func(c net.Conn) { io.Copy(c, c) })
		w.raw("10.0.0.2:8081", func(c net.Conn) { io.Copy(c, c) })
		c := w.client(81)
		for range 5 {
			c.say("still here")
			c.expect("still here")
			time.Sleep(7 * time.Second)
		}
		c.say("and now not")
		c.expect("and now not")
		start := time.Now()
		c.closed()
		if took := time.Since(start); took < 6*time.Second || took > 11*time.Second {
			t.Errorf("ended after %v", took)
		}
		if x := w.last(); x.Failure != errIdleTCP.Error() {
			t.Errorf("it ended because of %q", x.Failure)
		}
	})
	inWorld(t, "nobody listens", func(t *testing.T, w *world) {
		c := w.client(81)
		c.closed()
		if x := w.last(); x.Flags != FlagConnectFailed {
			t.Errorf("flags are %v", x.Flags)
		}
	})
}

// An engine that knows nothing yet passes nothing.
func TestNotSynced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.store.Set(nil)
		near, far := net.Pipe()
		defer near.Close()
		if err := w.e.Serve(context.Background(), far, Facts{Service: cart, Port: 80}); err == nil {
			t.Error("it serves")
		}
	})
}
