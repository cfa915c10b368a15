package l7

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// loop serves one client over TCP, and returns what makes one request and reads
// its answer. Neither client nor endpoint allocates.
func loop(t testing.TB, request string) func() {
	t.Helper()
	answer := fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\n\r\n%s", bytes.Repeat([]byte("x"), 1024))
	backend, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := backend.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b := make([]byte, 64<<10)
				for {
					if _, err := c.Read(b); err != nil {
						return
					}
					if _, err := c.Write(answer); err != nil {
						return
					}
				}
			}()
		}
	}()
	e, err := benchEngine(backend.Addr().(*net.TCPAddr).AddrPort(), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{}, 2)
	go func() { e.Run(ctx); ended <- struct{}{} }()
	go func() {
		defer func() { ended <- struct{}{} }()
		c, err := front.Accept()
		if err == nil {
			e.Serve(ctx, c, Facts{Service: cart, Port: 80, Source: c.RemoteAddr().(*net.TCPAddr).AddrPort()})
		}
	}()
	c, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		front.Close()
		cancel()
		<-ended
		<-ended
		backend.Close()
	})
	buf := make([]byte, 8<<10)
	req := []byte(request)
	return func() {
		if _, err := c.Write(req); err != nil {
			t.Fatal(err)
		}
		for n := 0; ; {
			k, err := c.Read(buf[n:])
			if err != nil {
				t.Fatal(err)
			}
			n += k
			if i := bytes.Index(buf[:n], []byte("\r\n\r\n")); i >= 0 && n == i+4+1024 {
				return
			}
		}
	}
}

const plainGet = "GET /api/v1/res17/1k HTTP/1.1\r\nHost: cart\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"

// A request must not allocate in steady state, with routes, metrics and access
// log: the collector would cost as much as the request.
func TestNoAllocations(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector makes sync.Pool forget")
	}
	one := loop(t, plainGet)
	for range 100 {
		one()
	}
	if n := testing.AllocsPerRun(2000, one); n >= 1 {
		t.Errorf("%v allocations for a request", n)
	}
}

func BenchmarkGet(b *testing.B) {
	one := loop(b, plainGet)
	b.ReportAllocs()
	for b.Loop() {
		one()
	}
}

// tcpDialer dials the loopback address.
type tcpDialer struct{ to netip.AddrPort }

func (d tcpDialer) Dial(ctx context.Context, _ Target) (net.Conn, error) {
	var n net.Dialer
	return n.DialContext(ctx, "tcp", d.to.String())
}

// benchEngine returns an engine with 200 routes, metrics and an access log.
func benchEngine(to netip.AddrPort, log io.Writer) (*Engine, error) {
	var rules []mesh.Rule
	for i := range 200 {
		rules = append(rules, mesh.Rule{Name: fmt.Sprint("r", i), Backends: []mesh.Backend{{Weight: 1}},
			Matches: []mesh.RequestMatch{{Path: &mesh.PathMatch{Kind: mesh.PathSegment, Value: fmt.Sprintf("/api/v1/res%d", i)}}}})
	}
	rules = append(rules, toCart(nil))
	store := &view.Store{}
	ws := []mesh.Workload{workload("a", "10.0.0.1", cart), workload("b", "10.0.0.2", cart)}
	ss := []mesh.Service{service(cart, "http")}
	wp := mesh.Name{Namespace: "shop", Name: "waypoint"}
	store.Set(view.WithL7("1", pointersTo(ws), pointersTo(ss), nil, view.L7{
		Waypoints: []*mesh.Waypoint{{Name: wp, For: "service", AccessLog: "text"}},
		Routes:    []*mesh.Route{{RouteKey: mesh.RouteKey{Service: cart, Port: 80, Protocol: mesh.RouteHTTP}, Rules: rules}}}))
	return New(Config{Store: store, Dialer: tcpDialer{to}, Waypoint: wp, AccessLog: log, Metrics: prometheus.NewRegistry()})
}
