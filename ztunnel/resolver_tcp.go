package ztunnel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"time"

	"github.com/weft-mesh/weft/ztunnel/dns"
)

const (
	// maxStreams bounds the connections of one pod to name servers that are
	// read here.
	maxStreams = 64
	// streamIdle is how long a client may take to ask the next question, and
	// streamTimeout how long one takes.
	streamIdle    = 30 * time.Second
	streamTimeout = 10 * time.Second
	// lingerPart of Config.DrainTimeout is how long a client may take to ask the
	// next question of a proxy that ends, and twice that how long it may ask.
	lingerPart = 4
)

// serveStream serves f, a connection c of the pod to a name server outside the
// mesh: names of the mesh are answered here, everything else by the server, which
// up connects to. What is not a question with one answer is carried as it is. It
// closes c: when the proxy ends or the pod leaves, between two questions, as
// clients expect of a server at any time (RFC 7766 6.2.3, 6.2.4).
func (r *resolver) serveStream(ctx context.Context, f *flow, c net.Conn, up func(context.Context) (net.Conn, error)) error {
	defer c.Close()
	select {
	case r.streams <- struct{}{}:
		defer func() { <-r.streams }()
	default:
		return errors.New("refused: the pod has too many connections to name servers")
	}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	s := stream{resolver: r, flow: f, client: c, connect: up}
	defer s.hangUp()
	for {
		query, err := s.next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read name query: %w", err)
		}
		f.plain.stats.Sent.Add(int64(2 + len(query)))
		if done, err := s.serve(ctx, query); done || err != nil {
			return err
		}
	}
}

// A stream is a connection of a client, and the one to its name server once
// there is one.
type stream struct {
	*resolver
	flow    *flow
	client  net.Conn
	connect func(context.Context) (net.Conn, error)
	server  net.Conn
	leaving time.Time // since when it is to end between two questions; zero if it is not
}

// next reads a question. The error is io.EOF when the connection is over.
func (s *stream) next(ctx context.Context) ([]byte, error) {
	var first [1]byte
	if err := s.await(first[:]); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) && s.pod.serving.Err() != nil {
			err = io.EOF
		}
		return nil, errors.Join(ctx.Err(), err)
	}
	if err := errors.Join(s.client.SetDeadline(time.Now().Add(streamTimeout)), ctx.Err()); err != nil {
		return nil, err
	}
	query, err := dns.ReadFrame(io.MultiReader(bytes.NewReader(first[:]), s.client))
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return query, err
}

// await reads the first byte of a question. When the pod is not served here any
// more it waits a little for who has just connected, or asks one after another.
func (s *stream) await(first []byte) error {
	if err := s.client.SetDeadline(time.Now().Add(streamIdle)); err != nil {
		return err
	}
	linger := s.pod.proxy.cfg.DrainTimeout / lingerPart
	set := make(chan struct{})
	stop := context.AfterFunc(s.pod.serving, func() {
		defer close(set)
		now := time.Now()
		if s.leaving.IsZero() {
			s.leaving = now
		}
		until := now.Add(linger)
		if last := s.leaving.Add(2 * linger); until.After(last) {
			until = last
		}
		s.client.SetDeadline(until) // if it fails, so does the read
		if s.pod.alive.Err() != nil {
			s.client.SetDeadline(now)
		}
	})
	_, err := io.ReadFull(s.client, first)
	if !stop() {
		<-set // it must not change the next deadline
	}
	return err
}

func (s *stream) hangUp() {
	if s.server != nil {
		s.server.Close()
		s.server = nil
	}
}

// serve serves one query, and reports whether the connection is over.
func (s *stream) serve(ctx context.Context, query []byte) (done bool, err error) {
	q := s.pod
	v := q.proxy.cfg.View.Load()
	who := s.labels(v, "tcp")
	d := dns.Decide(v, dns.Client{Namespace: q.info.Load().Namespace, Network: q.proxy.cfg.Network}, dns.Packet{Message: query, TCP: true}, rand.Uint64())
	who.kind = d.Type
	if d.Verdict == dns.Drop {
		return true, errors.New("refused: what the client sent is no name query")
	}
	q.proxy.telemetry.names.request(who)
	if d.Verdict == dns.Reply {
		return false, s.reply(d.Message)
	}
	if dns.Streams(query) {
		return true, s.carry(ctx, query)
	}
	began := time.Now()
	answer, err := s.exchange(ctx, query)
	q.proxy.telemetry.names.upstream(who, time.Since(began), err)
	if err != nil {
		q.proxy.cfg.Log.Debug("a name server did not answer", "pod", q.info.Load().Name, "error", err)
		answer = dns.Failure(query)
	}
	return false, s.reply(answer)
}

func (s *stream) reply(message []byte) error {
	if err := s.client.SetDeadline(time.Now().Add(streamTimeout)); err != nil {
		return err
	}
	s.flow.plain.stats.Received.Add(int64(2 + len(message)))
	return dns.WriteFrame(s.client, message)
}

// exchange asks the server. A connection that it has closed since the last
// question is opened again, once.
func (s *stream) exchange(ctx context.Context, query []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, streamTimeout)
	defer cancel()
	for {
		used := s.server != nil
		if !used {
			c, err := s.connect(ctx)
			if err != nil {
				return nil, err
			}
			s.server = c
		}
		answer, err := s.exchangeOnce(ctx, query)
		if err == nil {
			return answer, nil
		}
		s.hangUp()
		if !used || ctx.Err() != nil {
			return nil, err
		}
	}
}

func (s *stream) exchangeOnce(ctx context.Context, query []byte) ([]byte, error) {
	deadline, _ := ctx.Deadline()
	if err := s.server.SetDeadline(deadline); err != nil {
		return nil, err
	}
	server := s.server
	stop := context.AfterFunc(ctx, func() { server.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := dns.WriteFrame(s.server, query); err != nil {
		return nil, fmt.Errorf("ask name server: %w", err)
	}
	answer, err := dns.ReadFrame(s.server)
	if err != nil {
		return nil, fmt.Errorf("wait for name server: %w", err)
	}
	if !dns.Answers(query, answer) {
		return nil, errors.New("the name server answers something else")
	}
	return answer, nil
}

// carry sends query on, and from then on carries bytes both ways.
func (s *stream) carry(ctx context.Context, query []byte) error {
	s.hangUp() // what it said would be for earlier questions
	server, err := s.connect(ctx)
	if err != nil {
		return err
	}
	// Until here both have deadlines of single questions.
	if err := errors.Join(s.client.SetDeadline(time.Time{}), server.SetDeadline(time.Time{}), dns.WriteFrame(server, query)); err != nil {
		server.Close()
		return err
	}
	return s.flow.copy(ctx, s.client, server) // so a successor can take it
}
