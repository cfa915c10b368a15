package kube

import (
	"net/netip"
	"sync"
	"time"

	"github.com/weft-mesh/weft/mesh"
)

// A queue gathers what has changed since it was last taken. Informers add to
// it and never wait; one goroutine takes from it.
type queue struct {
	wake chan struct{} // holds a token while there may be something to take

	mu    sync.Mutex
	work  work
	clock func() time.Time
}

// work is what has changed.
type work struct {
	// pods that came, went or changed, each with the addresses that it had
	// before and has now.
	pods map[mesh.Name][]netip.Addr
	pod  time.Time // when the first of them did
	// world is set when something that is compiled as a whole changed; first
	// and last are when.
	world       bool
	first, last time.Time
}

func newQueue() queue {
	return queue{wake: make(chan struct{}, 1), clock: time.Now}
}

func (q *queue) addPod(pod mesh.Name, addrs []netip.Addr) {
	q.mu.Lock()
	if q.work.pods == nil {
		q.work.pods, q.work.pod = map[mesh.Name][]netip.Addr{}, q.clock()
	}
	q.work.pods[pod] = append(q.work.pods[pod], addrs...)
	q.mu.Unlock()
	q.signal()
}

func (q *queue) addWorld() {
	q.mu.Lock()
	q.work.last = q.clock()
	if !q.work.world {
		q.work.world, q.work.first = true, q.work.last
	}
	q.mu.Unlock()
	q.signal()
}

func (q *queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// takePods returns the changed pods, and when the first of them did, and
// forgets them.
func (q *queue) takePods() (pods map[mesh.Name][]netip.Addr, since time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	pods = q.work.pods
	q.work.pods = nil
	return pods, q.work.pod
}

// takeWorld reports whether the world is to be compiled now, for changes since
// then, and forgets that it was. When there is a change that has to wait for
// quiet, it returns for how long.
func (q *queue) takeWorld(quiet, patience time.Duration) (now bool, since time.Time, wait time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.work.world {
		return false, time.Time{}, 0
	}
	due := q.work.last.Add(quiet)
	if latest := q.work.first.Add(patience); latest.Before(due) {
		due = latest
	}
	if wait := due.Sub(q.clock()); wait > 0 {
		return false, time.Time{}, wait
	}
	q.work.world = false
	return true, q.work.first, 0
}
