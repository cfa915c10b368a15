package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// A mixer holds many connections of four kinds to one server for a long time.
// A quarter is half closed and hears a line now and then, a seventh talks, one
// in twenty moves bytes in bulk, one or the other way, and the rest is idle.
type mixer struct {
	server  string
	timeout time.Duration
	slow    time.Duration // exchanges that take longer are told

	mu   sync.Mutex
	out  *json.Encoder
	open sync.WaitGroup // until all connections are open
}

// mixed runs until its input ends. Then each connection proves that it still
// works, and says so.
func mixed(ctx context.Context, args []string, out io.Writer) error {
	m := &mixer{out: json.NewEncoder(out)}
	fs := flag.NewFlagSet("mixed", flag.ContinueOnError)
	fs.StringVar(&m.server, "to", "", "address of the server")
	n := fs.Int("n", 100, "connections")
	fs.DurationVar(&m.timeout, "timeout", 30*time.Second, "for one exchange")
	fs.DurationVar(&m.slow, "slow", 20*time.Millisecond, "tell exchanges that take longer")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if m.server == "" || fs.NArg() != 0 || *n <= 0 {
		return errors.New("want -to and a number of connections")
	}
	ctx, stop := context.WithCancel(ctx)
	go func() {
		io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	var all sync.WaitGroup
	opening := make(chan struct{}, 32)
	m.open.Add(*n)
	for i := range *n {
		all.Go(func() { m.hold(ctx, i, opening) })
	}
	m.open.Wait()
	m.tell(event{Load: "ready"})
	all.Wait()
	return nil
}

func (m *mixer) tell(e event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.out.Encode(e)
}

// hold is one connection.
func (m *mixer) hold(ctx context.Context, i int, opening chan struct{}) {
	kind, port, run := "idle", "9000", m.idle
	switch {
	case i%4 == 1:
		kind, port, run = "half", "9002", m.half
	case i%40 == 0:
		kind, port, run = "source", "9002", m.source
	case i%40 == 20:
		kind, port, run = "sink", "9002", m.sink
	case i%5 == 2:
		kind, run = "echo", m.echo(i)
	}
	opened := sync.OnceFunc(m.open.Done)
	defer opened()
	start := time.Now()
	opening <- struct{}{}
	c, err := net.DialTimeout("tcp", net.JoinHostPort(m.server, port), m.timeout)
	<-opening
	if err == nil {
		defer c.Close()
		err = run(ctx, c.(*net.TCPConn), opened)
	}
	e := event{Load: kind, To: m.server, Start: start.UnixNano(), End: time.Now().UnixNano()}
	if err != nil {
		e.Error, e.Refused = err.Error(), errors.Is(err, syscall.ECONNREFUSED)
	}
	m.tell(e)
}

// exchange sends a line and wants it back.
func (m *mixer) exchange(c net.Conn, r *bufio.Reader, text string) error {
	if err := c.SetDeadline(time.Now().Add(m.timeout)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	if got, err := r.ReadString('\n'); err != nil || got != text {
		return fmt.Errorf("sent %q, received %q: %w", text, got, err)
	}
	return c.SetDeadline(time.Time{})
}

// idle says something at the beginning and at the end.
func (m *mixer) idle(ctx context.Context, c *net.TCPConn, opened func()) error {
	r := bufio.NewReader(c)
	if err := m.exchange(c, r, "hello\n"); err != nil {
		return err
	}
	opened()
	ended := make(chan error, 1)
	go func() {
		_, err := r.Peek(1)
		ended <- err
	}()
	select {
	case err := <-ended:
		return fmt.Errorf("ended while it was idle: %w", err)
	case <-ctx.Done():
	}
	if _, err := io.WriteString(c, "still there\n"); err != nil {
		return err
	}
	if err := c.SetReadDeadline(time.Now().Add(m.timeout)); err != nil {
		return err
	}
	if err := <-ended; err != nil {
		return err
	}
	if got, err := r.ReadString('\n'); err != nil || got != "still there\n" {
		return fmt.Errorf("received %q: %w", got, err)
	}
	return nil
}

// echo returns what talks four times a second.
func (m *mixer) echo(i int) func(context.Context, *net.TCPConn, func()) error {
	return func(ctx context.Context, c *net.TCPConn, opened func()) error { return m.talk(ctx, i, c, opened) }
}

func (m *mixer) talk(ctx context.Context, i int, c *net.TCPConn, opened func()) error {
	r := bufio.NewReader(c)
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		ending := ctx.Err() != nil // one more exchange then
		start := time.Now()
		if err := m.exchange(c, r, fmt.Sprintf("line %d\n", n)); err != nil {
			return fmt.Errorf("after %d: %w", n, err)
		}
		if d := time.Since(start); d > m.slow && n > 0 {
			m.tell(event{Load: "slow", To: strconv.Itoa(i), Start: start.UnixNano(), End: start.Add(d).UnixNano()})
		}
		opened()
		if ending {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// half ends its direction and goes on hearing lines.
func (m *mixer) half(ctx context.Context, c *net.TCPConn, opened func()) error {
	if _, err := io.WriteString(c, "drip\n"); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	r := bufio.NewReader(c)
	for n := 0; ; n++ {
		ending := ctx.Err() != nil
		if err := c.SetReadDeadline(time.Now().Add(m.timeout)); err != nil {
			return err
		}
		if got, err := r.ReadString('\n'); err != nil || got != fmt.Sprintf("drop %d\n", n) {
			return fmt.Errorf("the drop after %d was %q: %w", n, got, err)
		}
		opened()
		if ending {
			return nil
		}
	}
}

// bulkPace is how many bytes a second a bulk connection moves.
const bulkPace = 128 << 10

// source receives without an end and checks every byte.
func (m *mixer) source(ctx context.Context, c *net.TCPConn, opened func()) error {
	if _, err := fmt.Fprintf(c, "source %d\n", int64(1)<<40); err != nil {
		return err
	}
	in := &paced{c, bulkPace, time.Now(), 0}
	got, want, all := make([]byte, 16<<10), make([]byte, 16<<10), &patternReader{}
	for {
		ending := ctx.Err() != nil
		if err := c.SetReadDeadline(time.Now().Add(m.timeout)); err != nil {
			return err
		}
		n, err := in.Read(got)
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", all.at, err)
		}
		at := all.at
		all.Read(want[:n])
		if !bytes.Equal(got[:n], want[:n]) {
			return fmt.Errorf("of the bytes from %d on some are others", at)
		}
		opened()
		if ending {
			return nil
		}
	}
}

// sink sends until the end, and then wants to hear what arrived.
func (m *mixer) sink(ctx context.Context, c *net.TCPConn, opened func()) error {
	if _, err := io.WriteString(c, "sink\n"); err != nil {
		return err
	}
	d, all, buf := newDigest(), &patternReader{}, make([]byte, 16<<10)
	tick := time.NewTicker(time.Second * time.Duration(len(buf)) / bulkPace)
	defer tick.Stop()
	for ctx.Err() == nil {
		all.Read(buf)
		if err := c.SetWriteDeadline(time.Now().Add(m.timeout)); err != nil {
			return err
		}
		if _, err := c.Write(buf); err != nil {
			return fmt.Errorf("after %d bytes: %w", d.n, err)
		}
		d.Write(buf)
		opened()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	if err := errors.Join(c.CloseWrite(), c.SetReadDeadline(time.Now().Add(m.timeout))); err != nil {
		return err
	}
	if got, err := bufio.NewReader(c).ReadString('\n'); err != nil || got != d.String()+"\n" {
		return fmt.Errorf("the sink received %q, want %q: %w", got, d, err)
	}
	return nil
}

// drip waits for the end of what it is sent, and then says a line now and then.
func drip(in io.Reader, out io.Writer) {
	if _, err := io.Copy(io.Discard, in); err != nil {
		return
	}
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for n := 0; ; n++ {
		if _, err := fmt.Fprintf(out, "drop %d\n", n); err != nil {
			return
		}
		<-tick.C
	}
}
