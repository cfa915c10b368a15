package view

import (
	"sync"
	"sync/atomic"
)

// A Store holds the current View. Its zero value holds the zero View. All
// methods may be called at any time from anywhere.
type Store struct {
	current atomic.Pointer[View]

	mu      sync.Mutex
	changed chan struct{} // made on demand, closed by the next Set
}

// Load returns the current View, never nil.
func (s *Store) Load() *View {
	if v := s.current.Load(); v != nil {
		return v
	}
	return &View{}
}

// Set makes v the current View and wakes all who wait for a change. A nil v is
// the zero View.
func (s *Store) Set(v *View) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current.Store(v)
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// Changed returns a channel that the next Set closes. Take the channel first
// and Load after it, or a change in between is missed.
func (s *Store) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.changed
}
