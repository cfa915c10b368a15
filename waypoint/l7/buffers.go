package l7

import "sync"

const (
	// smallLen holds nearly every head of a request without a body, so that a
	// connection between requests costs little.
	smallLen = 2 << 10
	// bufLen is the size of the buffers that messages are read into and written
	// from.
	bufLen = 16 << 10
	// bigLen is that of those for bodies: the largest head and what is
	// gathered fit.
	bigLen = 128 << 10
)

// The pools cache memory between exchanges. They hold nothing anyone depends
// on.
var (
	bufPool = sync.Pool{New: func() any { return new([bufLen]byte) }}
	bigPool = sync.Pool{New: func() any { return new([bigLen]byte) }}
)
