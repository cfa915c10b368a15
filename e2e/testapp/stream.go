package main

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
)

// patternReader yields bytes that differ wherever a stream could be cut,
// repeated or reordered by mistake.
type patternReader struct{ at int64 }

func (p *patternReader) Read(b []byte) (int, error) {
	for i := range b {
		x := uint64(p.at) * 0x9e3779b97f4a7c15
		b[i] = byte(x >> 56)
		p.at++
	}
	return len(b), nil
}

// pattern returns a stream of n bytes, the same ones each time.
func pattern(n int64) io.Reader { return io.LimitReader(&patternReader{}, n) }

// A digest counts and hashes what is written to it. As text it is
// "<bytes> <sha256>".
type digest struct {
	n    int64
	hash hash.Hash
}

func newDigest() *digest { return &digest{hash: sha256.New()} }

func (d *digest) Write(b []byte) (int, error) {
	d.n += int64(len(b))
	return d.hash.Write(b)
}

func (d *digest) String() string { return fmt.Sprintf("%d %x", d.n, d.hash.Sum(nil)) }

func patternDigest(n int64) string {
	d := newDigest()
	io.Copy(d, pattern(n))
	return d.String()
}
