package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// server serves every protocol at once, on IPv4 and IPv6.
func server(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("server", flag.ContinueOnError)
	host := fs.String("host", "", "address to listen on; empty for all of both families")
	httpPort := fs.String("http", "8080", "port of HTTP; empty for none")
	grpcPort := fs.String("grpc", "9090", "port of the gRPC health service; empty for none")
	echoPort := fs.String("echo", "9000", "port of the TCP echo; empty for none")
	bannerPort := fs.String("banner", "9001", "port of the TCP service that speaks first; empty for none")
	bulkPort := fs.String("bulk", "9002", "port of the TCP source and sink; empty for none")
	text := fs.String("text", "", "text to add to each HTTP answer")
	if err := fs.Parse(args); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var all sync.WaitGroup
	for _, s := range []struct {
		name, port string
		serve      func(context.Context, net.Listener) error
	}{
		{"HTTP", *httpPort, func(ctx context.Context, l net.Listener) error { return serveHTTP(ctx, l, *text) }},
		{"gRPC health", *grpcPort, serveGRPC},
		{"TCP echo", *echoPort, each(echo)},
		{"TCP banner", *bannerPort, each(banner)},
		{"TCP bulk", *bulkPort, each(bulk)},
	} {
		if s.port == "" {
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort(*host, s.port))
		if err != nil {
			cancel(err)
			break
		}
		fmt.Fprintf(out, "%s on %s\n", s.name, l.Addr())
		all.Go(func() {
			if err := s.serve(ctx, l); err != nil {
				cancel(fmt.Errorf("%s: %w", s.name, err))
			}
		})
	}
	all.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// An answer tells a client who served it and how the connection looked.
type answer struct {
	Host   string
	Node   string `json:",omitempty"`
	Local  string
	Remote string
	Proto  string
	Path   string
	Header http.Header `json:",omitempty"` // for /headers only
	Body   string      `json:",omitempty"` // of the request
	Text   string      `json:",omitempty"`
}

func serveHTTP(ctx context.Context, l net.Listener, text string) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
		a := answer{
			Host: host, Node: os.Getenv("NODE_NAME"), Local: fmt.Sprint(local), Remote: r.RemoteAddr,
			Proto: r.Proto, Path: r.URL.Path, Text: text,
		}
		if r.URL.Path == "/headers" {
			a.Header = r.Header
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		a.Body = string(body)
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(a)
	})
	var prober atomic.Value // where the last request for /healthz came from
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) {
		prober.Store(r.RemoteAddr)
		io.WriteString(w, "ok\n")
	})
	mux.HandleFunc("/prober", func(w http.ResponseWriter, _ *http.Request) {
		remote, _ := prober.Load().(string)
		json.NewEncoder(w).Encode(answer{Host: host, Remote: remote})
	})
	mux.HandleFunc("/status/{code}", func(w http.ResponseWriter, r *http.Request) {
		code, err := strconv.Atoi(r.PathValue("code"))
		if err != nil || code < 200 || code > 599 {
			code = http.StatusBadRequest
		}
		w.WriteHeader(code)
	})
	mux.HandleFunc("/slow/{duration}", func(_ http.ResponseWriter, r *http.Request) {
		d, _ := time.ParseDuration(r.PathValue("duration"))
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("/upgrade", serveUpgrade)
	var tries sync.Map // by key: how often /flaky was asked
	mux.HandleFunc("/flaky/{failures}/{key}", func(w http.ResponseWriter, r *http.Request) {
		n, _ := tries.LoadOrStore(r.PathValue("key"), new(atomic.Int64))
		failures, _ := strconv.ParseInt(r.PathValue("failures"), 10, 64)
		if try := n.(*atomic.Int64).Add(1); try <= failures {
			http.Error(w, fmt.Sprintf("failure %d", try), http.StatusServiceUnavailable)
			return
		}
		json.NewEncoder(w).Encode(answer{Host: host, Text: fmt.Sprint(n.(*atomic.Int64).Load())})
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	s := http.Server{Handler: mux, Protocols: protocols, ReadHeaderTimeout: 10 * time.Second}
	return until(ctx, func() error { return s.Serve(l) }, func() {
		// A terminating pod answers what it has been asked.
		grace, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if s.Shutdown(grace) != nil {
			s.Close()
		}
	})
}

func serveGRPC(ctx context.Context, l net.Listener) error {
	s := grpc.NewServer()
	h := health.NewServer()
	healthpb.RegisterHealthServer(s, h)
	h.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
	return until(ctx, func() error { return s.Serve(l) }, s.Stop)
}

// until runs serve, and stops it at the end of ctx.
func until(ctx context.Context, serve func() error, stop func()) error {
	stopped := make(chan struct{})
	served := make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case <-ctx.Done():
			stop()
		case <-served:
		}
	}()
	err := serve()
	close(served)
	<-stopped
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// each serves every connection of a listener with f until ctx ends.
func each(f func(*net.TCPConn)) func(context.Context, net.Listener) error {
	return func(ctx context.Context, l net.Listener) error {
		var conns sync.WaitGroup
		defer conns.Wait()
		return until(ctx, func() error {
			for {
				c, err := l.Accept()
				if err != nil {
					return err
				}
				conns.Go(func() {
					end := context.AfterFunc(ctx, func() { c.Close() })
					defer end()
					defer c.Close()
					f(c.(*net.TCPConn))
				})
			}
		}, func() { l.Close() })
	}
}

// echo sends back what it gets, and its end of stream when it gets one.
func echo(c *net.TCPConn) {
	if _, err := io.Copy(c, c); err != nil {
		c.SetLinger(0) // an echo cut short must not look whole
		return
	}
	c.CloseWrite()
}

// banner speaks first, as mail and database servers do, and then echoes lines.
func banner(c *net.TCPConn) {
	host, _ := os.Hostname()
	fmt.Fprintf(c, "220 %s ready, %s\n", host, c.RemoteAddr())
	for in := bufio.NewScanner(c); in.Scan(); {
		if in.Text() == "quit" {
			fmt.Fprintln(c, "221 bye")
			return
		}
		fmt.Fprintf(c, "250 %s\n", in.Text())
	}
}

// bulk reads one line: "source N" is answered with N bytes and the end of the
// stream; "sink" swallows all that follows and then answers with how much it
// was and its SHA-256; "drip" waits for the end, and then says a line now and
// then.
func bulk(c *net.TCPConn) {
	in := bufio.NewReader(c)
	line, err := in.ReadString('\n')
	if err != nil {
		return
	}
	switch verb, arg, _ := strings.Cut(strings.TrimSpace(line), " "); verb {
	case "source":
		n, err := strconv.ParseInt(arg, 10, 64)
		if err != nil {
			fmt.Fprintln(c, "error:", err)
			return
		}
		if _, err := io.Copy(c, pattern(n)); err != nil {
			c.SetLinger(0)
			return
		}
		c.CloseWrite()
		io.Copy(io.Discard, in)
	case "sink":
		d := newDigest()
		if _, err := io.Copy(d, in); err != nil {
			c.SetLinger(0)
			return
		}
		fmt.Fprintln(c, d)
	case "drip":
		drip(in, c)
	default:
		fmt.Fprintf(c, "error: want \"source N\", \"sink\" or \"drip\", not %q\n", verb)
	}
}
