package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/weft-mesh/weft/internal/handover"
	"github.com/weft-mesh/weft/ztunnel"
)

// redialPause is how often a ztunnel looks for one whose connections it could
// take over.
const redialPause = 500 * time.Millisecond

// joinPatience bounds how long a ztunnel is not ready because the one before it
// does not know of it yet: that may hang, or one pod may never get a certificate.
const joinPatience = 30 * time.Second

// A succession takes the connections of the ztunnel before this one, and gives
// those of this one to the next.
type succession struct {
	path     string
	instance string
	standby  bool
	proxy    handover.Taker
	warm     func(ctx context.Context) error // returns when this ztunnel could take over
	tookOver func() []any                    // what the log says of tunnels that were taken over
	alone    <-chan struct{}                 // closed when this ztunnel is active, and the other of its pod is not
	log      *slog.Logger
	server   *handover.Server
	joined   chan struct{} // closed when the one before knows of this one, or there is none
	join     func()        // closes it
	given    chan struct{} // closed when there is nothing left to give
	once     sync.Once
}

// newSuccession completes s, whose path, instance, proxy and functions are set.
func newSuccession(s *succession) *succession {
	s.given, s.joined = make(chan struct{}), make(chan struct{})
	s.join = sync.OnceFunc(func() { close(s.joined) })
	s.server = handover.NewServer(handover.ServerConfig{Path: s.path, Parts: []uint32{ztunnel.PartVersion}, Log: s.log})
	return s
}

// heir returns who takes over when this ztunnel ends now, or nil.
func (s *succession) heir() ztunnel.Heir {
	h, _ := s.server.Heir()
	if h == nil {
		return nil
	}
	s.log.Info("handing over", "successor", h.Instance)
	return lastGift{h, s}
}

// A lastGift is an heir after whom nobody gets anything: those that wait here
// look for the next owner.
type lastGift struct {
	*handover.Heir
	s *succession
}

// Done tells the heir that it has all.
func (g lastGift) Done() error {
	defer g.s.once.Do(func() { close(g.s.given) })
	return g.Heir.Done()
}

// run takes over until this ztunnel is active and has nobody before it. Then it
// waits for successors, until inner ends or everything is given. ending ends
// when this ztunnel is asked to: it takes nothing more then.
func (s *succession) run(ending, inner context.Context) error {
	if s.inherit(ending) {
		ctx, cancel := context.WithCancel(inner)
		defer cancel()
		go func() {
			defer cancel()
			select {
			case <-s.given:
			case <-ctx.Done():
			}
		}()
		if err := s.server.Run(ctx); err != nil {
			// Connections are carried all the same: they only end with this process.
			s.log.Error("no successor can take over the connections of this ztunnel", "error", err)
		}
	}
	<-inner.Done()
	return nil
}

// inherit returns true when this ztunnel is active and nobody is before it, and
// false when ctx ends. While the other one of the pod is active too, that one is
// before it, whether it answers just now or not: successors must find the one
// with the connections.
func (s *succession) inherit(ctx context.Context) bool {
	ready := make(chan struct{})
	warm, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	wg.Go(func() {
		if s.warm(warm) == nil {
			close(ready)
		}
	})
	rank := uint32(1)
	if s.standby {
		rank = 0
	}
	patience := time.AfterFunc(joinPatience, s.join)
	defer patience.Stop()
	var last string
	for {
		_, err := handover.Take(ctx, handover.ClientConfig{
			Path: s.path, Greeting: handover.Greeting{Instance: s.instance, Rank: rank, Parts: []uint32{ztunnel.PartVersion}},
			Taker: s.proxy, Ready: ready, Joined: s.join, Log: s.log,
		})
		nobody := errors.Is(err, handover.ErrNobody)
		switch {
		case ctx.Err() != nil:
			return false
		case err == nil:
			s.log.Info("took over", s.tookOver()...)
		case !nobody && fmt.Sprint(err) != last:
			last = fmt.Sprint(err)
			s.log.Info("the ztunnel before this one has ended, or cannot hand over", "error", err)
		}
		if err == nil || nobody {
			s.join()
			select {
			case <-s.alone:
				return true
			default:
			}
		}
		pause := time.NewTimer(redialPause)
		select {
		case <-ctx.Done():
			pause.Stop()
			return false
		case <-pause.C:
		}
	}
}
