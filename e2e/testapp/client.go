package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// client asks steadily and accounts for every single request, so that a test
// can claim that none failed.
func client(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("client", flag.ContinueOnError)
	url := fs.String("url", "", "what to request; with -long the HOST:PORT of an echo server")
	rate := fs.Float64("rate", 10, "requests per second")
	keepAlive := fs.Bool("keepalive", false, "use a connection for many requests")
	marker := fs.String("marker", "", "text to send with each request and to want in the answer")
	long := fs.Bool("long", false, "hold one TCP connection and send a line on it each time")
	timeout := fs.Duration("timeout", 5*time.Second, "for one request")
	count := fs.Int("count", 0, "stop after so many requests; 0 for never")
	listen := fs.String("listen", ":8081", "serve the counters at http://ADDRESS/stats; empty for not")
	quiet := fs.Bool("quiet", false, "no line for requests that succeed")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *url == "" || fs.NArg() != 0 || *rate <= 0 {
		return errors.New("want -url and a positive -rate")
	}
	target := *url
	ask := asker(target, *marker, *keepAlive, *timeout)
	if *long {
		l := &longLived{address: target, timeout: *timeout}
		defer l.close()
		ask = l.ask
	}
	st := &stats{target: target}
	if *listen != "" {
		stop, err := serveStats(*listen, st)
		if err != nil {
			return err
		}
		defer stop()
	}
	steady(ctx, *rate, *count, func() {
		start := time.Now()
		// The end of the program must not fail a request that is on its way.
		host, err := ask(context.WithoutCancel(ctx))
		took := time.Since(start)
		st.add(start, took, host, err)
		report(out, *quiet, start, took, host, err)
	})
	sum := st.summary()
	if err := json.NewEncoder(out).Encode(sum); err != nil {
		return err
	}
	if sum.Failed > 0 {
		return fmt.Errorf("%d of %d requests failed", sum.Failed, sum.OK+sum.Failed)
	}
	return nil
}

func report(out io.Writer, quiet bool, at time.Time, took time.Duration, host string, err error) {
	stamp := at.UTC().Format("15:04:05.000")
	switch {
	case err != nil:
		fmt.Fprintf(out, "%s FAILED %s %v\n", stamp, took.Round(time.Microsecond), err)
	case !quiet:
		fmt.Fprintf(out, "%s ok %s %s\n", stamp, took.Round(time.Microsecond), host)
	}
}

// steady calls f rate times a second, count times or until ctx ends, one call
// at a time: when one takes long, the next follows at once, and none is left
// out of the account.
func steady(ctx context.Context, rate float64, count int, f func()) {
	t := time.NewTicker(time.Duration(float64(time.Second) / rate))
	defer t.Stop()
	for i := 0; count == 0 || i < count; i++ {
		if ctx.Err() != nil {
			return
		}
		f()
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// asker makes HTTP requests and returns who answered. An answer of 400 or more,
// and one without the marker, is a failure.
func asker(url, marker string, keepAlive bool, timeout time.Duration) func(context.Context) (string, error) {
	c := &http.Client{Timeout: timeout, Transport: &http.Transport{DisableKeepAlives: !keepAlive}}
	return func(ctx context.Context) (string, error) {
		status, a, err := request(ctx, c, url, marker)
		switch {
		case err != nil:
		case status >= 400:
			err = fmt.Errorf("status %d", status)
		case a.Body != marker:
			err = fmt.Errorf("sent %q, received %q", marker, a.Body)
		}
		return a.Host, err
	}
}

// longLived sends a line on the same connection each time and wants it back. A
// connection that breaks is a failed request; the next one opens another.
type longLived struct {
	address string
	timeout time.Duration
	conn    net.Conn
	in      *bufio.Reader
	n       int
}

func (l *longLived) ask(ctx context.Context) (string, error) {
	if l.conn == nil {
		d := net.Dialer{Timeout: l.timeout}
		c, err := d.DialContext(ctx, "tcp", l.address)
		if err != nil {
			return "", err
		}
		l.conn, l.in = c, bufio.NewReader(c)
	}
	l.n++
	got, err := l.exchange(fmt.Sprintf("line %d\n", l.n))
	if err != nil {
		l.close()
		return "", fmt.Errorf("long-lived connection: %w", err)
	}
	return strings.TrimSpace(got), nil
}

func (l *longLived) exchange(line string) (string, error) {
	if err := l.conn.SetDeadline(time.Now().Add(l.timeout)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(l.conn, line); err != nil {
		return "", err
	}
	got, err := l.in.ReadString('\n')
	if err == nil && got != line {
		err = fmt.Errorf("sent %q, received %q", line, got)
	}
	return got, err
}

func (l *longLived) close() {
	if l.conn != nil {
		l.conn.Close()
		l.conn = nil
	}
}

// stats is the account of all requests.
type stats struct {
	target string

	mu        sync.Mutex
	started   time.Time
	ok        int
	failed    int
	lastError string
	lastAt    time.Time     // of the last failure
	latencies []float64     // of the ok ones, in milliseconds, the newest last
	gap       time.Duration // the longest time between two successes
	lastOK    time.Time
	byHost    map[string]int
}

// keepLatencies bounds memory; an hour at 100 a second.
const keepLatencies = 360_000

func (s *stats) add(at time.Time, took time.Duration, host string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.started.IsZero() {
		s.started = at
	}
	if err != nil {
		s.failed++
		s.lastError, s.lastAt = err.Error(), at
		return
	}
	s.ok++
	if s.byHost == nil {
		s.byHost = map[string]int{}
	}
	s.byHost[host]++
	if end := at.Add(took); !s.lastOK.IsZero() && end.Sub(s.lastOK) > s.gap {
		s.gap = end.Sub(s.lastOK)
	}
	s.lastOK = at.Add(took)
	if len(s.latencies) < keepLatencies {
		s.latencies = append(s.latencies, float64(took.Microseconds())/1000)
	}
}

// A summary is what /stats and the last line say. Times are in milliseconds.
type summary struct {
	Target      string         `json:"target"`
	OK          int            `json:"ok"`
	Failed      int            `json:"failed"`
	LastError   string         `json:"lastError,omitempty"`
	LastErrorAt *time.Time     `json:"lastErrorAt,omitempty"`
	ByHost      map[string]int `json:"byHost"` // successes
	P50         float64        `json:"p50"`
	P90         float64        `json:"p90"`
	P99         float64        `json:"p99"`
	Max         float64        `json:"max"`
	LongestGap  float64        `json:"longestGap"` // between the ends of two successes
	Seconds     float64        `json:"seconds"`
}

func (s *stats) summary() summary {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := summary{
		Target: s.target, OK: s.ok, Failed: s.failed, LastError: s.lastError,
		LongestGap: float64(s.gap.Microseconds()) / 1000, ByHost: maps.Clone(s.byHost),
	}
	if !s.lastAt.IsZero() {
		at := s.lastAt
		sum.LastErrorAt = &at
	}
	if !s.started.IsZero() {
		sum.Seconds = time.Since(s.started).Seconds()
	}
	sorted := slices.Sorted(slices.Values(s.latencies))
	if n := len(sorted); n > 0 {
		at := func(q float64) float64 { return sorted[min(n-1, int(q*float64(n)))] }
		sum.P50, sum.P90, sum.P99, sum.Max = at(0.5), at(0.9), at(0.99), sorted[n-1]
	}
	return sum
}

// serveStats serves the summary until stop is called.
func serveStats(address string, st *stats) (stop func(), err error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/stats", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(st.summary())
	})
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	var done sync.WaitGroup
	done.Go(func() { s.Serve(l) })
	return func() { s.Close(); done.Wait() }, nil
}

// showStats prints the counters of the client that runs in this pod.
func showStats(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("stats", flag.ContinueOnError)
	addr := fs.String("addr", "127.0.0.1:8081", "where the client serves them")
	if err := fs.Parse(args); err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+*addr+"/stats", nil)
	if err != nil {
		return err
	}
	c := http.Client{Timeout: 5 * time.Second}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(out, resp.Body)
	return err
}
