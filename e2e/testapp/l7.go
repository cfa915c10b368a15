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
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// An exchange is what the program says of one request at layer 7.
type exchange struct {
	Status  int         `json:"status"`
	Server  string      `json:"server,omitempty"`
	Proto   string      `json:"proto,omitempty"`
	Text    string      `json:"text,omitempty"` // of an answer that is not the server's
	Header  http.Header `json:"header,omitempty"`
	Request http.Header `json:"request,omitempty"` // as the server saw it, of /headers
	MS      float64     `json:"ms"`
	Error   string      `json:"error,omitempty"`
}

// ask makes requests and tells everything of the answers. A status is no
// failure.
func ask(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("ask", flag.ContinueOnError)
	n := fs.Int("n", 1, "how many requests")
	atOnce := fs.Int("c", 1, "how many of them at the same time")
	brief := fs.Bool("brief", false, "leave the headers out")
	method := fs.String("method", http.MethodGet, "method")
	timeout := fs.Duration("timeout", 20*time.Second, "for one request")
	h2c := fs.Bool("h2c", false, "speak HTTP/2 without TLS")
	header := http.Header{}
	fs.Func("header", "NAME:VALUE; may be repeated", func(s string) error {
		k, v, ok := strings.Cut(s, ":")
		if !ok {
			return errors.New("want NAME:VALUE")
		}
		header.Add(k, strings.TrimSpace(v))
		return nil
	})
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() != 1 || *atOnce < 1 {
		return errors.New("want one URL")
	}
	t := &http.Transport{Protocols: new(http.Protocols), MaxIdleConnsPerHost: *atOnce}
	t.Protocols.SetHTTP1(!*h2c)
	t.Protocols.SetUnencryptedHTTP2(*h2c)
	c := http.Client{Transport: t, Timeout: *timeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	left := make(chan struct{}, *n)
	for range *n {
		left <- struct{}{}
	}
	close(left)
	var mu sync.Mutex
	var all sync.WaitGroup
	var failed error // to write
	for range *atOnce {
		all.Go(func() {
			for range left {
				start := time.Now()
				x, err := askOnce(ctx, &c, *method, fs.Arg(0), header)
				x.MS = float64(time.Since(start).Microseconds()) / 1000
				if err != nil {
					x.Error = err.Error()
				}
				if *brief {
					x.Header, x.Request = nil, nil
				}
				mu.Lock()
				failed = errors.Join(failed, json.NewEncoder(out).Encode(x))
				mu.Unlock()
			}
		})
	}
	all.Wait()
	return failed
}

func askOnce(ctx context.Context, c *http.Client, method, url string, header http.Header) (exchange, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return exchange{}, err
	}
	req.Header = header.Clone()
	if h := header.Get("Host"); h != "" {
		req.Host = h
	}
	resp, err := c.Do(req)
	if err != nil {
		return exchange{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	x := exchange{Status: resp.StatusCode, Proto: resp.Proto, Header: resp.Header}
	var a answer
	if json.Unmarshal(b, &a) == nil {
		x.Server, x.Request, x.Text = a.Host, a.Header, a.Text
	} else {
		x.Text = string(b)
	}
	return x, err
}

// raw sends bytes, as a Go string without its quotes, and prints what is
// answered until the end, or until nothing comes for a while.
func raw(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("raw", flag.ContinueOnError)
	addr := fs.String("addr", "", "HOST:PORT")
	send := fs.String("send", "", `bytes, such as GET / HTTP/1.1\r\n\r\n`)
	idle := fs.Duration("idle", 2*time.Second, "how long to wait for more")
	if err := fs.Parse(args); err != nil {
		return err
	}
	text, err := strconv.Unquote(`"` + *send + `"`)
	if err != nil {
		return fmt.Errorf("-send: %w", err)
	}
	c, err := new(net.Dialer).DialContext(ctx, "tcp", *addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	var got []byte
	buf := make([]byte, 4096)
	ended := ""
	for {
		if err := c.SetReadDeadline(time.Now().Add(*idle)); err != nil {
			return err
		}
		n, err := c.Read(buf)
		got = append(got, buf[:n]...)
		if err != nil {
			ended = err.Error()
			break
		}
	}
	return json.NewEncoder(out).Encode(struct {
		Got   string `json:"text"`
		Ended string `json:"error"` // EOF if the other end has closed
	}{string(got), ended})
}

// callGRPC asks the gRPC health service.
func callGRPC(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("grpc", flag.ContinueOnError)
	addr := fs.String("addr", "", "HOST:PORT")
	n := fs.Int("n", 1, "how many calls, on one connection")
	if err := fs.Parse(args); err != nil {
		return err
	}
	c, err := grpc.NewClient("passthrough:///"+*addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return err
	}
	defer c.Close()
	for range *n {
		start := time.Now()
		call, cancel := context.WithTimeout(ctx, 10*time.Second)
		resp, err := healthpb.NewHealthClient(c).Check(call, &healthpb.HealthCheckRequest{})
		cancel()
		if err := (result{Server: resp.GetStatus().String()}).say(out, start, err); err != nil {
			return err
		}
	}
	return nil
}

// upgradeOnce asks for another protocol, and then echoes on the connection, as
// a client of WebSockets does.
func upgradeOnce(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("upgrade", flag.ContinueOnError)
	addr := fs.String("addr", "", "HOST:PORT")
	if err := fs.Parse(args); err != nil {
		return err
	}
	start := time.Now()
	c, err := new(net.Dialer).DialContext(ctx, "tcp", *addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(start.Add(10 * time.Second)); err != nil {
		return err
	}
	r := result{}
	err = func() error {
		fmt.Fprintf(c, "GET /upgrade HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", *addr)
		in := bufio.NewReader(c)
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			return err
		}
		if r.Status = resp.StatusCode; r.Status != http.StatusSwitchingProtocols {
			return fmt.Errorf("answered %d", r.Status)
		}
		for i := range 20 {
			line := fmt.Sprintf("message %d\n", i)
			if _, err := io.WriteString(c, line); err != nil {
				return err
			}
			if got, err := in.ReadString('\n'); err != nil || got != line {
				return fmt.Errorf("sent %q, received %q: %w", line, got, err)
			}
			r.Echoes++
		}
		return nil
	}()
	return r.say(out, start, err)
}

// serveUpgrade takes a connection over and echoes on it.
func serveUpgrade(w http.ResponseWriter, r *http.Request) {
	h, ok := w.(http.Hijacker)
	if !ok || r.Header.Get("Upgrade") == "" {
		http.Error(w, "want an Upgrade", http.StatusUpgradeRequired)
		return
	}
	c, rw, err := h.Hijack()
	if err != nil {
		return
	}
	defer c.Close()
	fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", r.Header.Get("Upgrade"))
	io.Copy(c, rw)
}
