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
	"syscall"
	"time"
)

// A press makes HTTP requests at a fixed rate, however long the answers take,
// over connections that it keeps for some requests each, and accounts for every
// one of them. It does little else, so that hundreds a second cost a machine
// little that has to hold a cluster too.
type press struct {
	to, method string
	request    []byte
	slow       []byte // every slowEvery-th request; nil for none
	slowEvery  int
	rate       float64
	conns, per int
	retries    int
	tell       string // header of the answer; empty for none
	changes    bool   // tell what is seen
	timeout    time.Duration

	mu      sync.Mutex
	out     *json.Encoder
	waiting int // connections that nothing was answered on yet
	window  pressed
	made    int
}

// pressed sums up what a press did in a while. Times are nanoseconds since
// 1970, Longest is nanoseconds.
type pressed struct {
	Load    string `json:"load"`
	To      string `json:"to,omitempty"`
	Start   int64  `json:"start"`
	End     int64  `json:"end"`
	N       int    `json:"n,omitempty"`
	Longest int64  `json:"longest,omitempty"` // from when a request was due to its answer
	Text    string `json:"text,omitempty"`
	Error   string `json:"error,omitempty"`
}

// errCut says that a connection ended, and not one byte of an answer had come.
var errCut = errors.New("the connection ended without an answer")

// pressOn is the verb. It tells "answered" of some tenths of a second, "cut" of
// each try that was made again (as clients do with what may be asked twice),
// "failed" of each request that was not answered, or with an error; and if asked
// to, "seen" whenever a connection is answered something else than before.
func pressOn(ctx context.Context, args []string, out io.Writer) error {
	p := &press{out: json.NewEncoder(out)}
	fs := flag.NewFlagSet("press", flag.ContinueOnError)
	fs.StringVar(&p.to, "to", "", "HOST:PORT to connect to")
	host := fs.String("host", "", "Host of the requests; empty for that of -to")
	path := fs.String("path", "/", "what to request")
	slow := fs.String("slow", "", "what to request in place of it now and then, such as /slow/200ms")
	fs.IntVar(&p.slowEvery, "slow-every", 25, "one of so many requests is for -slow")
	fs.StringVar(&p.method, "method", http.MethodGet, "GET or POST; with POST nothing is tried again")
	fs.Float64Var(&p.rate, "rate", 100, "requests per second")
	fs.IntVar(&p.conns, "conns", 16, "connections")
	fs.IntVar(&p.per, "per", 50, "requests on a connection, before it is replaced by another")
	fs.IntVar(&p.retries, "retries", 2, "how often a GET is tried again that was cut")
	fs.BoolVar(&p.changes, "changes", false, "tell what is answered, status and text, whenever it changes; a failure is an answer then")
	fs.StringVar(&p.tell, "tell", "", "with -changes: also this header of the answer")
	fs.DurationVar(&p.timeout, "timeout", 15*time.Second, "for one exchange")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if p.to == "" || fs.NArg() != 0 || p.rate <= 0 || p.conns <= 0 || p.per <= 0 || p.slowEvery <= 0 {
		return errors.New("want -to, and positive numbers")
	}
	if *host == "" {
		*host = p.to
	}
	p.request = pressRequest(p.method, *path, *host)
	if *slow != "" {
		p.slow = pressRequest(p.method, *slow, *host)
	}
	if p.method != http.MethodGet {
		p.retries = 0
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	p.run(ctx)
	return nil
}

func pressRequest(method, path, host string) []byte {
	r := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\n", method, path, host)
	if method == http.MethodPost {
		return []byte(r + "Content-Length: 5\r\n\r\nhello")
	}
	return []byte(r + "\r\n")
}

// run asks until ctx ends, and waits for all answers.
func (p *press) run(ctx context.Context) {
	p.waiting = p.conns
	p.window.Start = time.Now().UnixNano()
	due := make(chan time.Time, 1<<14) // what waits for a connection
	var all sync.WaitGroup
	for i := range p.conns {
		all.Go(func() { p.work(strconv.Itoa(i), due) })
	}
	interval := time.Duration(float64(time.Second) / p.rate)
	told := time.Now()
	for at := told; ; at = at.Add(interval) {
		wait := time.NewTimer(time.Until(at))
		select {
		case <-ctx.Done():
			wait.Stop()
			close(due)
			all.Wait()
			p.sumUp()
			return
		case <-wait.C:
		}
		due <- at
		if time.Since(told) > 100*time.Millisecond {
			told = time.Now()
			p.sumUp()
		}
	}
}

// sumUp tells what was answered since it did so last.
func (p *press) sumUp() {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now().UnixNano()
	p.window.Load, p.window.To, p.window.End = "answered", p.to, now
	p.out.Encode(p.window)
	p.window = pressed{Start: now}
}

// answered counts an answer to a request that was due at a time.
func (p *press) answered(due time.Time, first bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.window.N++
	p.window.Longest = max(p.window.Longest, int64(time.Since(due)))
	if first {
		if p.waiting--; p.waiting == 0 {
			p.out.Encode(pressed{Load: "ready"})
		}
	}
}

func (p *press) say(e pressed) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.out.Encode(e)
}

// next returns the bytes of the next request.
func (p *press) next() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.made++; p.slow != nil && p.made%p.slowEvery == 0 {
		return p.slow
	}
	return p.request
}

// work makes requests on one connection after the other.
func (p *press) work(name string, due <-chan time.Time) {
	c := &pressConn{}
	defer func() { c.close() }()
	answered := false // once
	last := ""
	for at := range due {
		request := p.next()
		var start time.Time
		var status int
		var text string
		var err error
		for try := 0; ; try++ {
			start = time.Now()
			status, text, err = p.exchange(c, request)
			if err == nil || try >= p.retries || !errors.Is(err, errCut) {
				break
			}
			p.say(pressed{Load: "cut", To: p.to, Start: start.UnixNano(), End: time.Now().UnixNano(), Error: err.Error()})
		}
		end := time.Now()
		seen := fmt.Sprintf("%d %s", status, text)
		if err != nil {
			seen = "failed"
		}
		if p.changes && seen != last {
			last = seen
			e := pressed{Load: "seen", To: name, Start: start.UnixNano(), End: end.UnixNano(), Text: seen}
			if err != nil {
				e.Error = err.Error()
			}
			p.say(e)
		}
		if err == nil && status >= 400 && !p.changes {
			err = fmt.Errorf("status %d: %s", status, text)
		}
		if err != nil && !p.changes {
			p.say(pressed{Load: "failed", To: p.to, Start: start.UnixNano(), End: end.UnixNano(), Error: err.Error()})
			continue
		}
		p.answered(at, !answered)
		answered = true
	}
}

// A pressConn is a connection, or none.
type pressConn struct {
	c    *net.TCPConn
	in   *bufio.Reader
	used int
}

func (c *pressConn) close() {
	if c.c != nil {
		c.c.Close()
		c.c = nil
	}
}

// quiet reports whether the connection neither has ended nor says anything: as
// every client does before it uses one again.
func (c *pressConn) quiet() bool {
	raw, err := c.c.SyscallConn()
	if err != nil {
		return false
	}
	quiet := false
	err = raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		quiet = err == syscall.EAGAIN
		return true
	})
	return err == nil && quiet
}

// exchange makes one request. Text is of the server's answer, or the beginning
// of another's, with the header that is to be told before it.
func (p *press) exchange(c *pressConn, request []byte) (status int, text string, err error) {
	if c.c != nil && (c.used >= p.per || !c.quiet()) {
		c.close()
	}
	if c.c == nil {
		nc, err := net.DialTimeout("tcp", p.to, p.timeout)
		if err != nil {
			return 0, "", err
		}
		c.c, c.in, c.used = nc.(*net.TCPConn), bufio.NewReader(nc), 0
	}
	c.used++
	status, text, keep, err := p.ask(c, request)
	if err != nil || !keep {
		c.close()
	}
	return status, text, err
}

func (p *press) ask(c *pressConn, request []byte) (status int, text string, keep bool, err error) {
	if err := c.c.SetDeadline(time.Now().Add(p.timeout)); err != nil {
		return 0, "", false, err
	}
	if _, err := c.c.Write(request); err != nil {
		return 0, "", false, errors.Join(errCut, err)
	}
	if _, err := c.in.Peek(1); err != nil {
		return 0, "", false, errors.Join(errCut, err)
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return 0, "", false, err
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return 0, "", false, err
	}
	if p.changes || resp.StatusCode >= 400 {
		text = string(b[:min(len(b), 100)])
		var a answer
		if json.Unmarshal(b, &a) == nil {
			text = a.Text
		}
		if p.tell != "" {
			text = resp.Header.Get(p.tell) + " " + text
		}
	}
	return resp.StatusCode, strings.TrimSpace(text), !resp.Close, nil
}
