package blackbox

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// An opener opens a connection to the service: grpc says for what.
type opener func(ctx context.Context, grpc bool) (net.Conn, error)

const streamLen = 100 << 20

// A user uses the service with connections of its own until close.
type user struct {
	run   func(time.Duration) (load, error)
	close func()
}

// http1 returns who makes requests, one after the other on each connection.
func http1(method, path string, body int64, answer int64) func(opener, int) (*user, error) {
	head := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: app\r\nUser-Agent: bench\r\nAccept: */*\r\n", method, path)
	if body > 0 {
		head += fmt.Sprintf("Content-Length: %d\r\n", body)
	}
	request := append([]byte(head+"\r\n"), bytes.Repeat([]byte("x"), int(body))...)
	return func(open opener, n int) (*user, error) {
		var conns []net.Conn
		u := &user{close: func() {
			for _, c := range conns {
				c.Close()
			}
		}}
		for range n {
			c, err := open(context.Background(), false)
			if err != nil {
				u.close()
				return nil, err
			}
			conns = append(conns, c)
		}
		u.run = func(d time.Duration) (load, error) {
			return together(n, func(i int) ([]time.Duration, error) {
				c := conns[i]
				in := bufio.NewReaderSize(c, 64<<10)
				var took []time.Duration
				for end := time.Now().Add(d); time.Now().Before(end); {
					start := time.Now()
					if _, err := c.Write(request); err != nil {
						return nil, err
					}
					if err := readAnswer(in, answer); err != nil {
						return nil, err
					}
					took = append(took, time.Since(start))
				}
				return took, nil
			})
		}
		return u, nil
	}
}

// readAnswer reads an answer of 200 with want bytes of body.
func readAnswer(in *bufio.Reader, want int64) error {
	line, err := in.ReadSlice('\n')
	if err != nil {
		return err
	}
	if !bytes.HasPrefix(line, []byte("HTTP/1.1 200 ")) {
		return fmt.Errorf("answered %q", line)
	}
	length := false
	for {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(line) == 2 {
			break
		}
		if i := bytes.IndexByte(line, ':'); i > 0 && strings.EqualFold(string(line[:i]), "content-length") {
			if got := strings.TrimSpace(string(line[i+1:])); got != fmt.Sprint(want) {
				return fmt.Errorf("the answer has %s bytes, want %d", got, want)
			}
			length = true
		}
	}
	if !length {
		return errors.New("the answer has no length")
	}
	for want > 0 {
		n, err := in.Discard(int(min(want, 1<<20)))
		if err != nil {
			return err
		}
		want -= int64(n)
	}
	return nil
}

// together runs f for 0 to n-1 at once, and joins what they found.
func together(n int, f func(int) ([]time.Duration, error)) (load, error) {
	var mu sync.Mutex
	var all []time.Duration
	var errs []error
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			took, err := f(i)
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
			if err != nil {
				errs = append(errs, err)
			}
		})
	}
	wg.Wait()
	return load{n: len(all), p50: median(all)}, errors.Join(errs...)
}

const unaryStreams = 64

// unary returns who makes gRPC calls, many at a time on one connection.
func unary(open opener, _ int) (*user, error) {
	t := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return open(ctx, true) }}
	t.Protocols.SetUnencryptedHTTP2(true)
	message := append([]byte{0, 0, 0, 0, 100}, bytes.Repeat([]byte("m"), 100)...)
	calls := func(d time.Duration) ([]time.Duration, error) {
		var took []time.Duration
		for end := time.Now().Add(d); time.Now().Before(end); {
			start := time.Now()
			req, err := http.NewRequest(http.MethodPost, "http://app/bench.Service/Unary", bytes.NewReader(message))
			if err != nil {
				return nil, err
			}
			req.Header = http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}}
			resp, err := t.RoundTrip(req)
			if err != nil {
				return nil, err
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil {
				return nil, err
			}
			if !bytes.Equal(b, message) || !slices.Equal(resp.Trailer["Grpc-Status"], []string{"0"}) {
				return nil, fmt.Errorf("answered %d, %d bytes, trailer %v", resp.StatusCode, len(b), resp.Trailer)
			}
			took = append(took, time.Since(start))
		}
		return took, nil
	}
	return &user{
		run: func(d time.Duration) (load, error) {
			return together(unaryStreams, func(int) ([]time.Duration, error) { return calls(d) })
		},
		close: t.CloseIdleConnections,
	}, nil
}
