package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"
)

// chain is a Copy that is taken over again and again, each time with copies of
// the descriptors, as another process would.
type chain struct {
	t              *testing.T
	client, server *net.TCPConn
	stats          Stats
	halter         *Halter
	done           chan error
}

func newChain(t *testing.T) *chain {
	client, left := tcp(t)
	right, server := tcp(t)
	c := &chain{t: t, client: client, server: server}
	c.run(left, right, [2]bool{})
	t.Cleanup(func() {
		client.Close()
		server.Close()
		<-c.done
	})
	return c
}

func (c *chain) run(a, b *net.TCPConn, over [2]bool) {
	h, done := new(Halter), make(chan error, 1)
	h.Ended(over[0], over[1])
	c.halter, c.done = h, done
	go func() { done <- CopyUntil(context.Background(), a, b, &c.stats, h) }()
	for begun := false; !begun; { // before that there is nothing to halt
		h.mu.Lock()
		begun = h.ends[0] != nil
		h.mu.Unlock()
		runtime.Gosched()
	}
}

// next takes the Copy over, and reports whether that was possible.
func (c *chain) next() bool {
	c.t.Helper()
	ends, over, ok := c.halter.Halt(10 * time.Second)
	if !ok {
		return false
	}
	var copies [2]*net.TCPConn
	for i, e := range ends {
		f, err := e.File()
		if err != nil {
			c.t.Fatal(err)
		}
		dup, err := net.FileConn(f)
		f.Close()
		if err != nil {
			c.t.Fatal(err)
		}
		copies[i] = dup.(*net.TCPConn)
	}
	c.halter.Leave()
	if err := <-c.done; err != ErrLeft {
		c.t.Fatalf("Copy: %v, want ErrLeft", err)
	}
	c.run(copies[0], copies[1], over)
	return true
}

// started wants a byte to pass.
func (c *chain) started() {
	c.t.Helper()
	send1(c.t, c.client, "x")
	if _, err := io.ReadFull(c.server, make([]byte, 1)); err != nil {
		c.t.Fatal(err)
	}
}

// TestLeaveAndGoOn takes a Copy over while bytes move both ways, then while one
// direction has ended. No byte is lost, and each end comes once, at its place.
func TestLeaveAndGoOn(t *testing.T) {
	c := newChain(t)
	c.started()
	up, down := bytes.Repeat(random(251<<10), 96), bytes.Repeat(random(127<<10), 64)
	var wg sync.WaitGroup
	var gotUp, gotDown []byte
	var errUp, errDown error
	read := make(chan struct{})
	wg.Go(func() { send(t, c.client, up) })
	wg.Go(func() {
		defer close(read)
		gotUp, errUp = io.ReadAll(c.server)
	})
	go10 := func(what string) {
		t.Helper()
		for i := range 10 {
			if !c.next() {
				t.Fatalf("%s: take-over %d was not possible", what, i)
			}
		}
	}
	go10("while bytes move")
	<-read // the client's direction has ended
	go10("half closed")
	wg.Go(func() { gotDown, errDown = io.ReadAll(c.client) })
	wg.Go(func() { send(t, c.server, down) })
	wg.Wait()
	if errUp != nil || !bytes.Equal(gotUp, up) {
		t.Errorf("the server got %d of %d bytes, %v", len(gotUp), len(up), errUp)
	}
	if errDown != nil || !bytes.Equal(gotDown, down) {
		t.Errorf("the client got %d of %d bytes, %v", len(gotDown), len(down), errDown)
	}
	err := <-c.done
	if c.done <- err; err != nil {
		t.Errorf("Copy: %v", err)
	}
	if s, r := c.stats.Sent.Load(), c.stats.Received.Load(); s != int64(len(up)+1) || r != int64(len(down)) {
		t.Errorf("counted %d and %d bytes, want %d and %d", s, r, len(up)+1, len(down))
	}
	if c.next() {
		t.Error("what is over can be taken over")
	}
}

// TestHaltOfABlockedCopy: what has been read must be written first, and a peer
// that does not read is not waited for.
func TestHaltOfABlockedCopy(t *testing.T) {
	c := newChain(t)
	c.started()
	data := bytes.Repeat(random(251<<10), 128) // more than sockets hold
	var wg sync.WaitGroup
	wg.Go(func() { send(t, c.client, data) })
	var last int64 // nothing moves any more when two looks agree and a halt fails
	deadline := time.Now().Add(30 * time.Second)
	for {
		_, _, ok := c.halter.Halt(20 * time.Millisecond)
		if ok {
			c.halter.Resume()
		}
		n := c.stats.Sent.Load()
		if !ok && n == last {
			break
		}
		if last = n; time.Now().After(deadline) {
			t.Fatal("a halt succeeds though the server does not read")
		}
	}
	got, err := io.ReadAll(io.LimitReader(c.server, int64(len(data))))
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("the server got %d of %d bytes, %v", len(got), len(data), err)
	}
	wg.Wait()
}

func TestHaltAndResume(t *testing.T) {
	c := newChain(t)
	c.started()
	for i := range 100 {
		if _, _, ok := c.halter.Halt(10 * time.Second); !ok {
			t.Fatal("it cannot be halted")
		}
		if _, _, ok := c.halter.Halt(10 * time.Second); ok {
			t.Fatal("it was halted twice")
		}
		word := string(random(10 + i))
		send1(t, c.client, word)
		c.halter.Resume()
		b := make([]byte, len(word))
		if _, err := io.ReadFull(c.server, b); err != nil || string(b) != word {
			t.Fatalf("after halt %d: %q, %v", i, b, err)
		}
	}
}

// TestHaltOfNothing: before and after a Copy, and between connections that the
// kernel cannot join.
func TestHaltOfNothing(t *testing.T) {
	if _, _, ok := new(Halter).Halt(time.Minute); ok {
		t.Error("there was nothing to halt")
	}
	h := new(Halter)
	a, b := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- CopyUntil(t.Context(), a, b, nil, h) }()
	if _, _, ok := h.Halt(time.Millisecond); ok {
		t.Error("pipes were halted")
	}
	a.Close()
	<-done

	c := newChain(t)
	c.started()
	_ = c.client.SetLinger(0)
	_ = c.client.Close()
	err := <-c.done
	if c.done <- err; err == nil || errors.Is(err, ErrLeft) {
		t.Errorf("Copy: %v, want that of the reset", err)
	}
	if _, _, ok := c.halter.Halt(time.Minute); ok {
		t.Error("a Copy that has failed was halted")
	}
}
