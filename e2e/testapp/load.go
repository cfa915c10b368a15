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
	"strings"
	"sync"
	"syscall"
	"time"
)

// An event is how one thing ended that a load did: a request, a transfer, or a
// connection that was to last. Times are nanoseconds since 1970.
type event struct {
	Load    string `json:"load"`
	To      string `json:"to,omitempty"`
	Start   int64  `json:"start,omitempty"`
	End     int64  `json:"end,omitempty"`
	Refused bool   `json:"refused,omitempty"`
	Error   string `json:"error,omitempty"`
}

// A loader puts four loads on servers at once and accounts for everything.
type loader struct {
	rate    float64
	port    string        // of requests
	idle    int           // connections for each server that say nothing
	long    int           // and those that say something all the time
	bytes   int64         // of one transfer
	pace    int64         // of transfers, in bytes per second
	timeout time.Duration // for one exchange

	mu      sync.Mutex
	out     *json.Encoder
	waiting map[string]bool // loads, with their servers, that nothing has succeeded of yet
}

// load runs until its input ends. What is under way then is finished: each
// connection that was to last must prove that it still works.
func load(ctx context.Context, args []string, out io.Writer) error {
	l := &loader{out: json.NewEncoder(out), waiting: map[string]bool{}}
	fs := flag.NewFlagSet("load", flag.ContinueOnError)
	to := fs.String("to", "", "addresses or names of servers, separated by commas; a name is resolved for each connection")
	fs.StringVar(&l.port, "port", "8080", "port of the servers to which requests go")
	fs.Float64Var(&l.rate, "rate", 20, "requests per second to each server, each on a new connection, none waiting for another")
	fs.IntVar(&l.idle, "idle", 5, "idle connections to each server")
	fs.IntVar(&l.long, "long", 3, "long-lived connections to each server")
	fs.Int64Var(&l.bytes, "bytes", 4<<20, "bytes of one transfer, of which one follows the other; 0 for none")
	fs.Int64Var(&l.pace, "pace", 4<<20, "bytes per second of a transfer")
	fs.DurationVar(&l.timeout, "timeout", time.Minute, "for one exchange")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *to == "" || fs.NArg() != 0 || l.rate <= 0 || l.pace <= 0 {
		return errors.New("want -to, and positive rates")
	}
	ctx, stop := context.WithCancel(ctx)
	go func() {
		io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	l.run(ctx, strings.Split(*to, ","))
	return nil
}

func (l *loader) run(ctx context.Context, servers []string) {
	for _, s := range servers {
		l.waiting["requests"+s] = true
		if l.bytes > 0 {
			l.waiting["bulk"+s] = true
		}
		if l.long > 0 {
			l.waiting["long"+s] = true
		}
	}
	var all sync.WaitGroup
	for _, s := range servers {
		all.Go(func() { l.requests(ctx, s) })
		if l.bytes > 0 {
			all.Go(func() { l.transfers(ctx, s) })
		}
		for range l.idle {
			all.Go(func() { l.silent(ctx, net.JoinHostPort(s, "9000")) })
		}
		for range l.long {
			all.Go(func() { l.talks(ctx, s) })
		}
	}
	all.Wait()
}

// tell writes an event, and one of the load "ready" when everything has
// succeeded once.
func (l *loader) tell(load, to string, start time.Time, err error) {
	e := event{Load: load, To: to, Start: start.UnixNano(), End: time.Now().UnixNano()}
	if err != nil {
		e.Error, e.Refused = err.Error(), errors.Is(err, syscall.ECONNREFUSED)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.out.Encode(e)
	if err == nil {
		l.succeeded(load, to)
	}
}

// succeeded notes that a load works. The lock is held.
func (l *loader) succeeded(load, to string) {
	if !l.waiting[load+to] {
		return
	}
	delete(l.waiting, load+to)
	if len(l.waiting) == 0 {
		l.out.Encode(event{Load: "ready"})
	}
}

// requests asks at a fixed rate, however long the answers take.
func (l *loader) requests(ctx context.Context, server string) {
	c := &http.Client{Timeout: l.timeout, Transport: &http.Transport{DisableKeepAlives: true}}
	url := "http://" + net.JoinHostPort(server, l.port) + "/"
	var all sync.WaitGroup
	defer all.Wait()
	tick := time.NewTicker(time.Duration(float64(time.Second) / l.rate))
	defer tick.Stop()
	for {
		all.Go(func() {
			start := time.Now()
			status, _, err := request(context.WithoutCancel(ctx), c, url, "")
			if err == nil && status != http.StatusOK {
				err = fmt.Errorf("status %d", status)
			}
			l.tell("requests", server, start, err)
		})
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// transfers fetches one stream after the other and checks every byte.
func (l *loader) transfers(ctx context.Context, server string) {
	for ctx.Err() == nil {
		start := time.Now()
		err := l.transfer(net.JoinHostPort(server, "9002"))
		l.tell("bulk", server, start, err)
		if err != nil {
			pauseAfter(ctx)
		}
	}
}

func (l *loader) transfer(addr string) error {
	c, err := net.DialTimeout("tcp", addr, l.timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(l.timeout + time.Duration(l.bytes/l.pace)*time.Second)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(c, "source %d\n", l.bytes); err != nil {
		return err
	}
	_, err = check(&paced{c, l.pace, time.Now(), 0}, l.bytes)
	return err
}

// paced reads no faster than at a number of bytes per second.
type paced struct {
	io.Reader
	pace  int64
	start time.Time
	n     int64
}

// Read implements io.Reader. It waits until the bytes before are due.
func (p *paced) Read(b []byte) (int, error) {
	due := p.start.Add(time.Duration(float64(p.n) / float64(p.pace) * float64(time.Second)))
	time.Sleep(time.Until(due))
	n, err := p.Reader.Read(b)
	p.n += int64(n)
	return n, err
}

// silent opens a connection that says nothing until the end, when its first
// and only line must come back.
func (l *loader) silent(ctx context.Context, addr string) {
	start := time.Now()
	c, err := net.DialTimeout("tcp", addr, l.timeout)
	if err != nil {
		l.tell("idle", addr, start, err)
		return
	}
	defer c.Close()
	ended := make(chan error, 1)
	go func() {
		got, err := bufio.NewReader(c).ReadString('\n')
		if err == nil && (got != "still there\n" || ctx.Err() == nil) {
			err = fmt.Errorf("an idle connection received %q", got)
		}
		ended <- err
	}()
	select {
	case err := <-ended:
		l.tell("idle", addr, start, fmt.Errorf("ended while it was idle: %w", err))
		return
	case <-ctx.Done():
	}
	if err = c.SetDeadline(time.Now().Add(l.timeout)); err == nil {
		_, err = io.WriteString(c, "still there\n")
	}
	if err != nil {
		c.Close() // ends the reader
	}
	l.tell("idle", addr, start, errors.Join(err, <-ended))
}

// talks exchanges lines on a connection all the time, and opens another one
// when it breaks.
func (l *loader) talks(ctx context.Context, server string) {
	for ctx.Err() == nil {
		long := &longLived{address: net.JoinHostPort(server, "9000"), timeout: l.timeout}
		start := time.Now()
		err := l.talk(ctx, long, server)
		long.close()
		l.tell("long", server, start, err)
		if err != nil {
			pauseAfter(ctx)
		}
	}
}

func (l *loader) talk(ctx context.Context, long *longLived, server string) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		ending := ctx.Err() != nil // one more exchange then
		if _, err := long.ask(context.WithoutCancel(ctx)); err != nil {
			return err
		}
		if long.n == 1 {
			l.mu.Lock()
			l.succeeded("long", server)
			l.mu.Unlock()
		}
		if ending {
			return nil
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// pauseAfter keeps a load from trying without pause while all fails.
func pauseAfter(ctx context.Context) {
	t := time.NewTimer(50 * time.Millisecond)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
