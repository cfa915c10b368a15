package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// A result is what the program says of one try, as one line of JSON.
type result struct {
	OK     bool    `json:"ok"`
	Status int     `json:"status,omitempty"`
	Server string  `json:"server,omitempty"` // host name of who answered
	Remote string  `json:"remote,omitempty"` // our address, as the server saw it
	Local  string  `json:"local,omitempty"`  // the server's address, as it saw it
	Banner string  `json:"banner,omitempty"`
	Bytes  int64   `json:"bytes,omitempty"`
	Echoes int     `json:"echoes,omitempty"`
	MS     float64 `json:"ms"`
	End    int64   `json:"end"` // nanoseconds since 1970
	Error  string  `json:"error,omitempty"`
}

// say prints r, completed with how the try ended.
func (r result) say(out io.Writer, start time.Time, err error) error {
	now := time.Now()
	r.MS, r.End = float64(now.Sub(start).Microseconds())/1000, now.UnixNano()
	r.OK = err == nil
	if err != nil {
		r.Error = err.Error()
	}
	return errors.Join(json.NewEncoder(out).Encode(r), err)
}

// get requests URLs, each on a connection of its own.
func get(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("get", flag.ContinueOnError)
	n := fs.Int("n", 1, "how many times to request each URL")
	host := fs.String("host", "", "Host header; empty for the URL's")
	body := fs.String("body", "", "send this text, with POST")
	timeout := fs.Duration("timeout", 5*time.Second, "for one request")
	insecure := fs.Bool("insecure", false, "accept any server certificate, where only reachability is asked for")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() == 0 {
		return errors.New("want a URL")
	}
	c := http.Client{Timeout: *timeout, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: *insecure, MinVersion: tls.VersionTLS12},
	}}
	if *host != "" {
		c.Transport = withHost{c.Transport, *host}
	}
	var failed error
	for _, url := range fs.Args() {
		for range *n {
			start := time.Now()
			status, a, err := request(ctx, &c, url, *body)
			if err == nil && status >= 400 {
				err = fmt.Errorf("%s answered %d", url, status)
			}
			r := result{Status: status, Server: a.Host, Remote: a.Remote, Local: a.Local}
			if err := r.say(out, start, err); err != nil {
				failed = err
			}
		}
	}
	return failed
}

// withHost sends requests under another Host.
type withHost struct {
	http.RoundTripper
	host string
}

// RoundTrip sends a copy of r to the host.
func (w withHost) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Host = w.host
	return w.RoundTripper.RoundTrip(r)
}

// request makes one request and reads the answer to its end; the answer stays
// zero when it is not one of our server's.
func request(ctx context.Context, c *http.Client, url, body string) (status int, a answer, err error) {
	method := http.MethodGet
	if body != "" {
		method = http.MethodPost
	}
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return 0, a, err
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, a, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if json.Unmarshal(b, &a) != nil {
		a = answer{}
	}
	return resp.StatusCode, a, err
}

// A target is what the verbs over TCP are told.
type target struct {
	bytes   int64
	hold    time.Duration
	timeout time.Duration
}

// verb makes a command of a try over one TCP connection.
func verb(try func(c *net.TCPConn, t target) (result, error)) func(context.Context, []string, io.Writer) error {
	return func(ctx context.Context, args []string, out io.Writer) error {
		var t target
		fs := flag.NewFlagSet("testapp", flag.ContinueOnError)
		addr := fs.String("addr", "", "HOST:PORT to connect to")
		fs.Int64Var(&t.bytes, "bytes", 1<<20, "length of a stream")
		fs.DurationVar(&t.hold, "for", 10*time.Second, "how long to hold a connection")
		fs.DurationVar(&t.timeout, "timeout", 30*time.Second, "for connecting, and for all that is not held")
		if err := fs.Parse(args); err != nil {
			return err
		}
		if *addr == "" || fs.NArg() != 0 {
			return errors.New("want -addr HOST:PORT")
		}
		start := time.Now()
		d := net.Dialer{Timeout: t.timeout}
		conn, err := d.DialContext(ctx, "tcp", *addr)
		if err != nil {
			return result{}.say(out, start, err)
		}
		defer conn.Close()
		end := context.AfterFunc(ctx, func() { conn.Close() })
		defer end()
		if err := conn.SetDeadline(start.Add(t.timeout)); err != nil {
			return err
		}
		r, err := try(conn.(*net.TCPConn), t)
		return r.say(out, start, err)
	}
}

func connectOnce(c *net.TCPConn, _ target) (result, error) {
	return result{Remote: c.LocalAddr().String(), Local: c.RemoteAddr().String()}, nil
}

// echoOnce sends and receives at the same time, as an echo of more than the
// buffers on the way needs, and ends its own direction first.
func echoOnce(c *net.TCPConn, t target) (result, error) {
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(c, pattern(t.bytes))
		if err == nil {
			err = c.CloseWrite()
		}
		sent <- err
	}()
	r, err := check(c, t.bytes)
	if err != nil {
		c.Close()
	}
	return r, errors.Join(err, <-sent)
}

// check reads c to its end, which must be the pattern of n bytes.
func check(c io.Reader, n int64) (result, error) {
	d := newDigest()
	_, err := io.Copy(d, c)
	if want := patternDigest(n); err == nil && d.String() != want {
		err = fmt.Errorf("received %s, want %s", d, want)
	}
	return result{Bytes: d.n}, err
}

func sourceOnce(c *net.TCPConn, t target) (result, error) {
	if _, err := fmt.Fprintf(c, "source %d\n", t.bytes); err != nil {
		return result{}, err
	}
	return check(c, t.bytes)
}

func sinkOnce(c *net.TCPConn, t target) (result, error) {
	if _, err := io.WriteString(c, "sink\n"); err != nil {
		return result{}, err
	}
	n, err := io.Copy(c, pattern(t.bytes))
	r := result{Bytes: n}
	if err != nil {
		return r, err
	}
	if err := c.CloseWrite(); err != nil {
		return r, err
	}
	got, err := io.ReadAll(io.LimitReader(c, 1<<10))
	if want := patternDigest(t.bytes); err == nil && strings.TrimSpace(string(got)) != want {
		err = fmt.Errorf("the sink received %q, want %q", got, want)
	}
	return r, err
}

// bannerOnce says nothing before the server has spoken, and then one line.
func bannerOnce(c *net.TCPConn, _ target) (result, error) {
	in := bufio.NewReader(c)
	banner, err := in.ReadString('\n')
	r := result{Banner: strings.TrimSpace(banner)}
	if err != nil {
		return r, fmt.Errorf("read the banner: %w", err)
	}
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return r, err
	}
	got, err := in.ReadString('\n')
	if err == nil && got != "250 hello\n" {
		err = fmt.Errorf("sent hello, received %q", got)
	}
	return r, err
}

// holdOn exchanges a line with an echo server every 50 ms on one connection.
func holdOn(c *net.TCPConn, t target) (result, error) {
	const every = 50 * time.Millisecond
	var r result
	in := bufio.NewReader(c)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for end := time.Now().Add(t.hold); time.Now().Before(end); <-tick.C {
		line := fmt.Sprintf("line %d\n", r.Echoes)
		if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return r, err
		}
		if _, err := io.WriteString(c, line); err != nil {
			return r, err
		}
		got, err := in.ReadString('\n')
		if err == nil && got != line {
			err = fmt.Errorf("sent %q, received %q", line, got)
		}
		if err != nil {
			return r, err
		}
		r.Echoes++
	}
	return r, nil
}
