//lint:file-ignore SA1019 golang.org/x/net/http2 is the oracle: net/http hides the frames.

package l7

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	xhttp2 "golang.org/x/net/http2"

	"github.com/weft-mesh/weft/mesh"
)

// byGoroutines ends the names of tests whose exchanges do not flow.
const byGoroutines = "by goroutines"

// bothWays runs a test twice: with exchanges that flow, and with a goroutine for
// each of them.
func bothWays(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	t.Run("flowing", func(t *testing.T) { synctest.Test(t, f) })
	t.Run(byGoroutines, func(t *testing.T) { synctest.Test(t, f) })
}

// lockedBuffer takes a log.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// ask is one request as a scenario makes it, and what comes of it.
func ask(ctx context.Context, cc *xhttp2.ClientConn, method, path string, body io.Reader, fields ...string) string {
	req, err := http.NewRequestWithContext(ctx, method, "http://cart"+path, body)
	if err != nil {
		return err.Error()
	}
	for i := 0; i+1 < len(fields); i += 2 {
		req.Header.Add(fields[i], fields[i+1])
	}
	resp, err := cc.RoundTrip(req)
	if err != nil {
		return "no answer: " + streamNumber.ReplaceAllString(err.Error(), "")
	}
	b, err := io.ReadAll(resp.Body)
	if len(b) > 200 {
		b = fmt.Appendf(nil, "%d bytes", len(b))
	}
	return fmt.Sprintf("%d %q %v %v", resp.StatusCode, b, resp.Trailer, streamNumber.ReplaceAllString(fmt.Sprint(err), ""))
}

// streamNumber is what differs between two runs: whoever sends first has the
// lower number.
var streamNumber = regexp.MustCompile(`stream ID \d+; `)

// A scenario is a story of one connection: what a client does, what endpoints
// do, and what must be seen of it.
type scenario struct {
	name   string
	rule   mesh.Rule
	policy mesh.TrafficPolicy
	limits Limits
	h      http.HandlerFunc
	do     func(w *world, cc *xhttp2.ClientConn) string
	want   string // in the answers
	logged string // in the access log
}

func get(w *world, cc *xhttp2.ClientConn) string { return ask(w.ctx, cc, "GET", "/", nil) }

func gRPC(w *world, cc *xhttp2.ClientConn) string {
	return ask(w.ctx, cc, "POST", "/s/m", strings.NewReader("\x00\x00\x00\x00\x02hi\x00\x00\x00\x00\x00"), "Content-Type", "application/grpc", "Te", "trailers")
}

// warm answers what is asked for before a story begins.
func warm(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/warm" {
			return
		}
		h(w, r)
	}
}

// sometimes is bad n times, and then good.
func sometimes(n int, bad, good http.HandlerFunc) http.HandlerFunc {
	var mu sync.Mutex
	seen := 0
	return func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen++
		first := seen <= n
		mu.Unlock()
		if first {
			bad(w, r)
			return
		}
		good(w, r)
	}
}

func cutOff(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

func never(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(code)
		fmt.Fprint(w, code)
	}
}

// grpcAnswered answers with one message for each byte, and a status.
func grpcAnswered(code string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		for range 3 {
			w.Write([]byte{0, 0, 0, 0, 1})
			http.NewResponseController(w).Flush()
			w.Write([]byte{'x'})
		}
		w.Header().Set("Grpc-Status", code)
	}
}

func scenarios() []scenario {
	retry := func(n int, on ...string) mesh.Rule { return mesh.Rule{Retry: &mesh.Retry{Attempts: n, On: on}} }
	large := strings.Repeat("0123456789abcdef", 25_000)
	return []scenario{
		{name: "an answer", h: echoAll, do: func(w *world, cc *xhttp2.ClientConn) string {
			return ask(w.ctx, cc, "POST", "/p?q", strings.NewReader("hello"), "X-Y", "1")
		}, want: `200 "hello"`, logged: `"POST /p?q HTTP/2" 200 - via_upstream - "-" 5 5 `},
		{name: "bodies that are larger than windows", rule: retry(2, "5xx"), h: echoAll, do: func(w *world, cc *xhttp2.ClientConn) string {
			return ask(w.ctx, cc, "POST", "/", strings.NewReader(large))
		}, want: "400000 bytes", logged: " 400000 400000 "},
		{name: "HEAD", h: status(200), do: func(w *world, cc *xhttp2.ClientConn) string { return ask(w.ctx, cc, "HEAD", "/", nil) }, want: `200 ""`},
		{name: "gRPC", h: grpcAnswered("0"), do: gRPC, want: "Grpc-Status:[0]", logged: "200 - via_upstream"},
		{name: "gRPC that is unavailable", h: grpcAnswered("14"), do: gRPC, want: "Grpc-Status:[14]"},
		{name: "gRPC in error at once", h: func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Grpc-Status", "12")
		}, do: gRPC, want: "200"},
		{name: "interim answers", h: func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(103)
			fmt.Fprint(w, "done")
		}, do: get, want: `200 "done"`},
		{name: "trailers of the request", h: func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			fmt.Fprint(w, r.Trailer.Get("X-Sum"))
		}, do: func(w *world, cc *xhttp2.ClientConn) string {
			req, _ := http.NewRequestWithContext(w.ctx, "POST", "http://cart/", io.MultiReader(strings.NewReader("x")))
			req.Trailer = http.Header{"X-Sum": {"7"}}
			resp, err := cc.RoundTrip(req)
			if err != nil {
				return err.Error()
			}
			b, err := io.ReadAll(resp.Body)
			return fmt.Sprintf("%s %v", b, err)
		}, want: "7 <nil>"},
		{name: "the route's time is over", rule: mesh.Rule{Timeout: mesh.Duration(time.Second)}, h: never, do: get, want: "504", logged: "504 UT response_timeout"},
		{name: "the route's time is over within the answer", rule: mesh.Rule{Timeout: mesh.Duration(time.Second)}, h: func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "half")
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, do: get, want: `200 "half" map[] stream error`, logged: " 200 UT "},
		{name: "a try's time is over, and the next is good", rule: mesh.Rule{Retry: &mesh.Retry{Attempts: 2, PerTryTimeout: mesh.Duration(time.Second), On: []string{"5xx"}}},
			h: sometimes(1, never, echoAll), do: func(w *world, cc *xhttp2.ClientConn) string {
				return ask(w.ctx, cc, "POST", "/", strings.NewReader("again"))
			}, want: `200 "again"`, logged: "200 - via_upstream"},
		{name: "nothing moves", limits: Limits{StreamIdle: time.Minute}, h: never, do: get, want: "504", logged: "504 SI stream_idle_timeout"},
		{name: "nothing moves within the answer", limits: Limits{StreamIdle: time.Minute}, h: func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "half")
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, do: get, want: `200 "half" map[] stream error`, logged: " 200 SI "},
		{name: "cut before the head", h: cutOff, do: get, want: "503", logged: "503 UR"},
		{name: "cut before the head, and tried again with the body", rule: retry(2, "reset"), h: sometimes(2, func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			panic(http.ErrAbortHandler)
		}, echoAll), do: func(w *world, cc *xhttp2.ClientConn) string {
			return ask(w.ctx, cc, "POST", "/", strings.NewReader("again"))
		}, want: `200 "again"`, logged: ` 200 - via_upstream - "-" 5 5 `},
		{name: "tried too often", rule: retry(2, "reset"), h: cutOff, do: get, want: "503", logged: "503 UR,URX "},
		{name: "a body too large to be kept", rule: retry(2, "reset"), h: func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			panic(http.ErrAbortHandler)
		}, do: func(w *world, cc *xhttp2.ClientConn) string {
			return ask(w.ctx, cc, "POST", "/", strings.NewReader(strings.Repeat("x", 400_000)))
		}, want: "503"},
		{name: "an answer that is tried again", rule: retry(1, "5xx"), h: sometimes(1, status(503), echoAll), do: func(w *world, cc *xhttp2.ClientConn) string {
			return ask(w.ctx, cc, "POST", "/", strings.NewReader("again"))
		}, want: `200 "again"`},
		{name: "answers that are tried again too often", rule: retry(1, "5xx"), h: status(503), do: get, want: `503 "503"`, logged: "503 URX "},
		{name: "gRPC that is tried again", rule: retry(1, "unavailable"), h: sometimes(1, func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Content-Type", "application/grpc")
			w.Header().Set("Grpc-Status", "14")
		}, grpcAnswered("0")), do: gRPC, want: "Grpc-Status:[0]"},
		{name: "cut within the answer", h: func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "half")
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}, do: get, want: `200 "half" map[] stream error`},
		{name: "the client leaves before the answer", h: never, do: func(w *world, cc *xhttp2.ClientConn) string {
			ctx, cancel := context.WithTimeout(w.ctx, time.Second)
			defer cancel()
			return ask(ctx, cc, "GET", "/", nil)
		}, want: "no answer", logged: " DC downstream_remote_disconnect"},
		{name: "the client leaves within the answer", h: func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "half")
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, do: func(w *world, cc *xhttp2.ClientConn) string {
			ctx, cancel := context.WithTimeout(w.ctx, time.Second)
			defer cancel()
			return ask(ctx, cc, "GET", "/", nil)
		}, want: `200 "half" map[] context deadline exceeded`, logged: " 200 DC downstream_remote_disconnect"},
		{name: "an answer before the request's end", h: status(413), do: func(w *world, cc *xhttp2.ClientConn) string {
			r, pw := io.Pipe()
			defer pw.Close()
			go pw.Write([]byte("x"))
			time.AfterFunc(time.Second, func() { pw.CloseWithError(io.EOF) })
			return ask(w.ctx, cc, "POST", "/", r)
		}, want: "413"},
		{name: "too many at once", policy: mesh.TrafficPolicy{Connections: mesh.Connections{MaxRequests: 1}}, h: never, do: func(w *world, cc *xhttp2.ClientConn) string {
			ctx, cancel := context.WithCancel(w.ctx)
			done := make(chan string)
			go func() { done <- ask(ctx, cc, "GET", "/first", nil) }()
			synctest.Wait()
			second := ask(w.ctx, cc, "GET", "/second", nil)
			synctest.Wait()
			cancel()
			return second + <-done
		}, want: "503", logged: "503 UO "},
		{name: "a fault's delay", rule: mesh.Rule{Fault: &mesh.Fault{Delay: &mesh.FaultDelay{PerMillion: 1_000_000, For: mesh.Duration(5 * time.Second)}}}, h: echoAll, do: get, want: "200", logged: "200 DI "},
		{name: "a fault's answer", rule: mesh.Rule{Fault: &mesh.Fault{Abort: &mesh.FaultAbort{PerMillion: 1_000_000, Status: 418}}}, h: echoAll, do: get, want: "418", logged: "418 FI "},
		{name: "outliers", policy: mesh.TrafficPolicy{Outlier: &mesh.Outlier{Consecutive5xx: 2, MaxEjected: 100, BaseEjection: mesh.Duration(time.Minute), Interval: mesh.Duration(time.Second)}}, h: status(500),
			do: func(w *world, cc *xhttp2.ClientConn) (all string) {
				for range 6 {
					all += get(w, cc) + "\n"
					synctest.Wait()
				}
				return all
			}, want: `503 "no healthy upstream"`, logged: "503 UH "},
		{name: "a connection that had ended", h: echoAll, do: func(w *world, cc *xhttp2.ClientConn) string {
			w.hangUp()
			return get(w, cc)
		}, want: "200"},
	}
}

// TestHTTP2FlowsLikeGoroutines tells each story twice, and compares all that is
// seen of the two: answers, the access log, and metrics.
func TestHTTP2FlowsLikeGoroutines(t *testing.T) {
	for i, sc := range scenarios() {
		t.Run(sc.name, func(t *testing.T) {
			var seen []string
			bothWays(t, func(t *testing.T) {
				sc := scenarios()[i] // what endpoints remember is of one run
				got, logged, counted := sc.play(t)
				if !strings.Contains(got, sc.want) {
					t.Errorf("got %s, want %s", got, sc.want)
				}
				if !strings.Contains(logged, sc.logged) {
					t.Errorf("logged %s, want %s", logged, sc.logged)
				}
				seen = append(seen, got+"\n"+logged+"\n"+counted)
			})
			if len(seen) == 2 {
				if diff := cmp.Diff(seen[1], seen[0]); diff != "" {
					t.Errorf("what flows differs from what goroutines do: -want +got:\n%s", diff)
				}
			}
		})
	}
}

// play tells the story.
func (sc *scenario) play(t *testing.T) (got, logged, counted string) {
	var log lockedBuffer
	reg := prometheus.NewRegistry()
	sc.rule.Backends = []mesh.Backend{{Service: cart, Port: 81, Weight: 1}}
	sc.policy.Service = cart
	w := newWorldWith(t, Config{Limits: sc.limits, AccessLog: &log, Metrics: reg, Rand: func() uint64 { return 1 }}, []mesh.Rule{sc.rule}, []*mesh.TrafficPolicy{&sc.policy})
	w.backend2("10.0.0.1:8081", warm(sc.h))
	w.backend2("10.0.0.2:8081", warm(sc.h))
	cc := w.client2(80)
	w.do(cc, "GET", "/warm", "") // a connection to the endpoint is there then
	synctest.Wait()
	got = sc.do(w, cc)
	w.last()
	cc.Close()
	time.Sleep(time.Second) // the log is written
	synctest.Wait()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		counted += fmt.Sprintln(f)
	}
	return got, log.String(), counted
}
