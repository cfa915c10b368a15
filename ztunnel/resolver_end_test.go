package ztunnel

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/internal/handoff"
	"github.com/weft-mesh/weft/internal/relay"
	"github.com/weft-mesh/weft/ztunnel/dns"
)

// endDrain is the drain time of a proxy that ends under connections to name
// servers.
const endDrain = 20 * time.Second

// A streamEnd is a connection to a name server that a proxy serves, in a bubble.
type streamEnd struct {
	t       *testing.T
	client  net.Conn
	leave   func()        // the pod is not served any more
	answers chan struct{} // the name server gives one for each
	done    chan error
}

func newStreamEnd(t *testing.T, w *world) *streamEnd {
	log := slog.New(slog.DiscardHandler)
	p := New(Config{
		View: w.view, Identity: identity.NewManager(identity.Config{Issuer: issuer{w.ca}, Roots: w.roots, TrustDomain: trustDomain, Log: log}),
		Roots: w.roots, TrustDomain: trustDomain, Log: log, Metrics: prometheus.NewRegistry(), DrainTimeout: endDrain,
	})
	q := &pod{proxy: p}
	q.info.Store(&handoff.Pod{UID: "uid", Name: "client", Namespace: "shop", ServiceAccount: "client"})
	q.alive, q.forceStop = context.WithCancel(context.Background())
	q.serving, q.stopServing = context.WithCancel(q.alive)
	client, near := net.Pipe()
	e := &streamEnd{t: t, client: client, leave: q.stopServing, answers: make(chan struct{}), done: make(chan error, 1)}
	r := &resolver{pod: q, streams: make(chan struct{}, 1)}
	up := func(context.Context) (net.Conn, error) {
		c, server := net.Pipe()
		go func() {
			defer server.Close()
			for range e.answers {
				m, err := dns.ReadFrame(server)
				if err != nil {
					return
				}
				m[2] |= 0x80 // an answer
				if dns.WriteFrame(server, m) != nil {
					return
				}
			}
		}()
		return c, nil
	}
	go func() {
		e.done <- r.serveStream(q.alive, &flow{plain: &plainFlow{stats: new(relay.Stats)}}, near, up)
	}()
	t.Cleanup(func() {
		client.Close()
		close(e.answers)
		q.forceStop()
	})
	return e
}

// query is a question for a name outside of the mesh, in its frame.
func (e *streamEnd) query(id uint16) []byte {
	m := question(e.t, id, "www.example.net.", dnsmessage.TypeA)
	return append([]byte{byte(len(m) >> 8), byte(len(m))}, m...)
}

func (e *streamEnd) send(b []byte) {
	e.t.Helper()
	if _, err := e.client.Write(b); err != nil {
		e.t.Fatal(err)
	}
}

func (e *streamEnd) answered(id uint16) {
	e.t.Helper()
	if b, err := dns.ReadFrame(e.client); err != nil || b[0] != byte(id>>8) || b[1] != byte(id) {
		e.t.Fatalf("answer to question %d: %x, %v", id, b, err)
	}
}

// over wants the connection to end in order within a time.
func (e *streamEnd) over(within time.Duration) {
	e.t.Helper()
	start := time.Now()
	if n, err := e.client.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		e.t.Errorf("after the last answer: %d bytes, %v, want the end", n, err)
	}
	if took := time.Since(start); took > within {
		e.t.Errorf("it ended after %v, want at most %v", took, within)
	}
	if err := <-e.done; err != nil {
		e.t.Errorf("serveStream: %v", err)
	}
}

// TestStreamEndsBetweenQuestions: a proxy that ends, as in a rollout, answers
// what it was asked, and then closes its connections to name servers, in order
// and before those that are left are reset.
func TestStreamEndsBetweenQuestions(t *testing.T) {
	w := newWorld(t)
	const linger = endDrain / lingerPart
	for name, story := range map[string]func(e *streamEnd){
		"idle": func(e *streamEnd) {
			e.send(e.query(1))
			e.answers <- struct{}{}
			e.answered(1)
			time.Sleep(2 * linger)
			e.leave()
			e.over(linger)
		},
		"a question is under way": func(e *streamEnd) {
			e.send(e.query(1))
			e.leave()
			time.Sleep(linger + time.Second)
			e.answers <- struct{}{}
			e.answered(1)
			e.over(linger)
		},
		"half a question has come": func(e *streamEnd) {
			q := e.query(1)
			e.send(q[:1])
			synctest.Wait()
			e.leave()
			time.Sleep(linger + time.Second)
			e.send(q[1:])
			e.answers <- struct{}{}
			e.answered(1)
			e.over(linger)
		},
		"it has just connected": func(e *streamEnd) {
			e.leave()
			time.Sleep(linger - time.Second)
			e.send(e.query(1))
			e.answers <- struct{}{}
			e.answered(1)
			e.over(linger)
		},
		"one after another": func(e *streamEnd) {
			e.leave()
			start := time.Now()
			id := uint16(0)
			for ; time.Since(start) < endDrain; id++ {
				if _, err := e.client.Write(e.query(id)); err != nil {
					break // between two
				}
				e.answers <- struct{}{}
				e.answered(id)
				time.Sleep(time.Second)
			}
			if took := time.Since(start); id < 3 || took > endDrain*3/4 {
				e.t.Errorf("it ended after %v and %d answers", took, id)
			}
			e.over(0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { story(newStreamEnd(t, w)) })
		})
	}
}
