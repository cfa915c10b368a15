package ztunnel

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestPausesInTheLog: what the person on call reads after a rollout, and tests
// on a cluster do too.
func TestPausesInTheLog(t *testing.T) {
	var p Proxy
	p.pauses.begin()(pause{conns: 2, whole: 1500 * time.Microsecond, read: time.Microsecond})
	p.pauses.begin()(pause{conns: 3, whole: 2 * time.Millisecond, arrive: 3 * time.Microsecond, read: 4 * time.Microsecond, resume: 5 * time.Microsecond, begin: 6 * time.Microsecond})
	p.pauses.begin()(pause{conns: 1, plain: true, whole: time.Millisecond})
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(&b, nil))
	log.Info("took over", p.TookOver()...)
	want := "tunnels=2 connections=6 without_tunnel=1 pauses=2@1.5ms,3@2ms,1@1ms slowest_arrive=3µs slowest_read=4µs slowest_resume=5µs slowest_go=6µs longest_pause=2ms"
	if !strings.Contains(b.String(), want) {
		t.Errorf("the log says %s, want %s", b.String(), want)
	}
	b.Reset()
	for range 2 * maxPauses {
		p.pauses.begin()(pause{conns: 1, whole: time.Second})
	}
	log.Info("took over", p.TookOver()...)
	if n := strings.Count(b.String(), "1@1s"); n != maxPauses || strings.Contains(b.String(), "2@1.5ms") {
		t.Errorf("%d tunnels of another takeover, want %d and none of the first", n, maxPauses)
	}

	var gs gifts
	gs.add(gift{conns: 7, ahead: 1, early: 1, freeze: 1, pack: 2, give: 3})
	gs.add(gift{conns: 8, ahead: 2, early: 9, freeze: 4})
	if gs.conns != 15 || gs.slowest.conns != 7 || gs.ahead != 3 || gs.early != 9 {
		t.Errorf("what was handed over is %+v", gs)
	}
}

// TestAwait: nothing stands still while the heir answers late, but for one that
// always does.
func TestAwait(t *testing.T) {
	for name, c := range map[string]struct {
		answers time.Duration // the first three
		then    time.Duration
		asked   int // for two parts
		awaited time.Duration
	}{
		"prompt":      {answers: promptAnswer, then: time.Millisecond, asked: 2},
		"late":        {answers: 50 * time.Millisecond, then: time.Millisecond, asked: 5, awaited: 150 * time.Millisecond},
		"always late": {answers: 50 * time.Millisecond, then: 200 * time.Millisecond, asked: 8, awaited: 1150 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				asked := 0
				heir := &heirs{settle: func() error {
					if asked++; asked <= 3 {
						time.Sleep(c.answers)
					} else {
						time.Sleep(c.then)
					}
					return nil
				}}
				var gs gifts
				for range 2 {
					if err := gs.await(heir); err != nil {
						t.Fatal(err)
					}
				}
				if asked != c.asked || gs.awaited != c.awaited {
					t.Errorf("it was asked %d times, and late for %v, want %d and %v", asked, gs.awaited, c.asked, c.awaited)
				}
			})
		})
	}
	gone := errors.New("gone")
	if err := new(gifts).await(&heirs{settle: func() error { return gone }}); !errors.Is(err, gone) {
		t.Errorf("an heir that is gone: %v", err)
	}
}
