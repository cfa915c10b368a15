package l7

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/weft-mesh/weft/internal/bench"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/waypoint/l7/h1"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

const cpuTest = "TestBenchmarkL7"

// ports are those of one stage, on the loopback address.
type ports struct {
	Backend, Proxy, Nginx, Haproxy uint16
}

func loopback(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
}

// TestBenchmarkL7 compares the CPU time of the engine, with 200 routes, metrics
// and an access log, to that of nginx and haproxy without any of them, for the
// same requests to the same endpoint over plain TCP. Each round measures all of
// them next to each other; ratios are the medians of the rounds' ratios. It runs
// when WEFT_BENCH names the file for its figures.
func TestBenchmarkL7(t *testing.T) {
	switch role, arg := bench.Role(); role {
	case "backend", "proxy":
		var p ports
		err := json.Unmarshal([]byte(arg), &p)
		if err == nil {
			bench.EndWithParent()
			err = map[string]func(ports) error{"backend": playBackend, "proxy": playProxy}[role](p)
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	out := os.Getenv("WEFT_BENCH")
	if out == "" {
		t.Skip("a benchmark: make bench runs it")
	}
	p := ports{18081, 18082, 18083, 18084}
	start := func(role string) *bench.Process {
		b, err := bench.Start(cpuTest, role, p, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(b.Stop)
		return b
	}
	start("backend")
	type contender struct {
		name  string
		port  uint16
		procs []*bench.Process
	}
	all := []contender{{"weft", p.Proxy, []*bench.Process{start("proxy")}}}
	if procs := startNginx(t, p); procs != nil {
		all = append(all, contender{"nginx", p.Nginx, procs})
	}
	if procs := startHaproxy(t, p); procs != nil {
		all = append(all, contender{"haproxy", p.Haproxy, procs})
	}
	rounds, during := 5, time.Second
	if v, err := strconv.Atoi(os.Getenv("WEFT_BENCH_ROUNDS")); err == nil && v > 0 {
		rounds = v
	}
	post := append(fmt.Appendf(nil, "POST /api/v1/res17/x HTTP/1.1\r\nHost: cart\r\nContent-Length: %d\r\n\r\n", 16<<10), bytes.Repeat([]byte("x"), 16<<10)...)
	cases := []struct {
		name    string
		request []byte
		conns   int
	}{
		{"get1k_c1", []byte("GET /api/v1/res17/1k HTTP/1.1\r\nHost: cart\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"), 1},
		{"get1k_c64", []byte("GET /api/v1/res17/1k HTTP/1.1\r\nHost: cart\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"), 64},
		{"post16k_c64", post, 64},
		{"stream100m", []byte("GET /100m HTTP/1.1\r\nHost: cart\r\n\r\n"), 1},
	}
	figures := map[string]float64{}
	rows := [][]string{{"l7: CPU us a request"}}
	for _, c := range all {
		rows[0] = append(rows[0], c.name)
	}
	for _, cs := range cases {
		found := make([][]float64, len(all))
		for range rounds {
			for i, c := range all {
				us, err := cpuOf(c.procs, func() (int64, error) { return load(c.port, cs.request, cs.conns, during) })
				if err != nil {
					t.Fatalf("%s, %s: %v", cs.name, c.name, err)
				}
				found[i] = append(found[i], us)
			}
		}
		row := []string{cs.name}
		for i, c := range all {
			row = append(row, bench.Number(bench.Median(found[i])))
			if i == 0 {
				figures["l7."+cs.name+".cpu_us"] = bench.Median(found[0])
			} else {
				figures["l7."+cs.name+".vs_"+c.name] = bench.Ratio(found[0], found[i])
				row[i+1] += fmt.Sprintf(" (%.2f)", bench.Ratio(found[0], found[i]))
			}
		}
		rows = append(rows, row)
	}
	if err := errors.Join(bench.Table(os.Stdout, rows), bench.Merge(out, figures)); err != nil {
		t.Fatal(err)
	}
}

// cpuOf returns the microseconds of CPU time that ps use for each of the
// requests that f makes.
func cpuOf(ps []*bench.Process, f func() (int64, error)) (float64, error) {
	before, err := bench.CPU(ps...)
	if err != nil {
		return 0, err
	}
	n, err := f()
	if err != nil {
		return 0, err
	}
	after, err := bench.CPU(ps...)
	if err != nil {
		return 0, err
	}
	return float64((after - before).Microseconds()) / float64(n), nil
}

// load makes requests for d and returns how many were answered.
func load(port uint16, request []byte, conns int, d time.Duration) (int64, error) {
	var n atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, conns)
	end := time.Now().Add(d)
	for i := range conns {
		wg.Go(func() {
			c, err := net.Dial("tcp", loopback(port).String())
			if err != nil {
				errs[i] = err
				return
			}
			defer c.Close()
			r := bufio.NewReaderSize(c, 256<<10)
			for time.Now().Before(end) {
				if _, err := c.Write(request); err != nil {
					errs[i] = err
					return
				}
				if err := skipAnswer(r); err != nil {
					errs[i] = err
					return
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	return n.Load(), errors.Join(errs...)
}

// skipAnswer reads one answer of known length.
func skipAnswer(r *bufio.Reader) error {
	length := -1
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(line) == 2 {
			break
		}
		if name, value, _ := bytes.Cut(line, []byte(":")); bytes.EqualFold(name, []byte("content-length")) {
			length, _ = strconv.Atoi(string(bytes.TrimSpace(value)))
		}
	}
	if length < 0 {
		return errors.New("an answer without a length")
	}
	_, err := r.Discard(length)
	return err
}

// playBackend answers as cheaply as it can.
func playBackend(p ports) error {
	l, err := net.Listen("tcp", loopback(p.Backend).String())
	if err != nil {
		return err
	}
	bench.Ready()
	small := fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\n\r\n%s", bytes.Repeat([]byte("x"), 1024))
	big := bytes.Repeat([]byte("x"), 1<<20)
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			r := bufio.NewReaderSize(c, 64<<10)
			var parser h1.Parser
			var h msg.Head
			for {
				var n int
				for want := 1; n == 0; want++ {
					b, err := r.Peek(max(r.Buffered(), want))
					if err != nil {
						return
					}
					if n, err = parser.Request(&h, b[:r.Buffered()]); err != nil {
						return
					}
					want = len(b)
				}
				large := bytes.HasSuffix(h.Path, []byte("100m"))
				r.Discard(n)
				r.Discard(int(max(h.Length, 0)))
				if !large {
					c.Write(small)
					continue
				}
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", 100<<20)
				for range 100 {
					if _, err := c.Write(big); err != nil {
						return
					}
				}
			}
		}()
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

// playProxy serves with the engine.
func playProxy(p ports) error {
	log, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	e, err := benchEngine(loopback(p.Backend), log)
	if err != nil {
		return err
	}
	ctx := context.Background()
	go e.Run(ctx)
	l, err := net.Listen("tcp", loopback(p.Proxy).String())
	if err != nil {
		return err
	}
	bench.Ready()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go e.Serve(ctx, c, Facts{Service: cart, Port: 80, Source: c.RemoteAddr().(*net.TCPAddr).AddrPort(),
			Peer: mesh.Identity{TrustDomain: "td", Namespace: "web", ServiceAccount: "front"}})
	}
}

const nginxConf = `
daemon off; master_process off; pid %[1]s/pid; error_log %[1]s/error.log;
events { worker_connections 4096; }
http {
  access_log off; client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  client_body_buffer_size 64k; proxy_buffers 16 16k; keepalive_requests 1000000;
  upstream backend { server 127.0.0.1:%[2]d; keepalive 128; keepalive_requests 1000000; }
  server { listen 127.0.0.1:%[3]d;
    location / { proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; proxy_max_temp_file_size 0; } }
}
`

const haproxyConf = `
global
  nbthread 2
  maxconn 4096
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  option forwardfor
  http-reuse always
frontend f
  bind 127.0.0.1:%[3]d
  default_backend b
backend b
  server s 127.0.0.1:%[2]d
`

// startNginx starts nginx, in one process.
func startNginx(t *testing.T, p ports) []*bench.Process {
	return startPeer(t, "nginx", nginxConf, p.Backend, p.Nginx, func(conf, dir string) []string { return []string{"-p", dir, "-c", conf} })
}

func startHaproxy(t *testing.T, p ports) []*bench.Process {
	return startPeer(t, "haproxy", haproxyConf, p.Backend, p.Haproxy, func(conf, _ string) []string { return []string{"-f", conf} })
}

func startPeer(t *testing.T, name, conf string, backend, port uint16, args func(conf, dir string) []string) []*bench.Process {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "conf")
	if err := os.WriteFile(file, fmt.Appendf(nil, conf, dir, backend, port), 0o666); err != nil {
		t.Fatal(err)
	}
	program, err := exec.LookPath(name)
	if err != nil {
		fmt.Printf("%s is left out: %v\n", name, err)
		return nil
	}
	b, err := bench.Exec(program, args(file, dir), nil, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	end := time.Now().Add(10 * time.Second)
	for {
		if c, err := net.Dial("tcp", loopback(port).String()); err == nil {
			c.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%s does not listen", name)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return []*bench.Process{b}
}
