// Package pack writes plain values as bytes and reads them back, with one
// function for both: what names the fields of a type to a Coder in order is
// its writer and its reader. So the two cannot disagree.
//
// The bytes hold secrets. Whoever gets them from Write clears them after use,
// and what a Coder itself has copied on the way it has cleared.
package pack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// A Coder writes or reads. Its zero value writes.
type Coder struct {
	buf     []byte // written, or left to read
	reading bool
	err     error
}

// ErrShort says that the bytes end before the value does.
var ErrShort = errors.New("unpack: the bytes end too early")

// Write returns what fields names. The caller clears the bytes after use.
func Write(fields func(*Coder)) []byte {
	c := &Coder{}
	fields(c)
	return c.buf
}

// Read gives what fields names the values in b, which must be all that b
// holds. What is read shares no memory with b. After an error, what was read
// is of no use, and may hold secrets.
func Read(b []byte, fields func(*Coder)) error {
	c := &Coder{buf: b, reading: true}
	fields(c)
	if c.err == nil && len(c.buf) > 0 {
		c.err = fmt.Errorf("unpack: %d bytes follow the value", len(c.buf))
	}
	return c.err
}

// Reading reports whether c reads.
func (c *Coder) Reading() bool { return c.reading }

// Err returns the first error of a reading Coder. After it nothing changes.
func (c *Coder) Err() error { return c.err }

// Fail makes err the Coder's error, unless it has one.
func (c *Coder) Fail(err error) {
	if c.err == nil {
		c.err = err
	}
}

// Uint is a number that is not negative and at most limit.
func Uint[T ~uint8 | ~uint16 | ~uint32 | ~uint64 | ~int | ~int32 | ~int64](c *Coder, p *T, limit uint64) {
	if !c.reading {
		c.grow(binary.MaxVarintLen64)
		c.buf = binary.AppendUvarint(c.buf, uint64(*p))
		return
	}
	if c.err != nil {
		return
	}
	v, n := binary.Uvarint(c.buf)
	switch {
	case n == 0:
		c.err = ErrShort
	case n < 0 || v > limit:
		c.err = fmt.Errorf("unpack: a number is above %d", limit)
	default:
		c.buf = c.buf[n:]
		*p = T(v)
	}
}

// Int is a number of which at most limit is on either side of zero.
func Int[T ~int | ~int32 | ~int64](c *Coder, p *T, limit int64) {
	v := int64(*p)
	u := uint64(v<<1) ^ uint64(v>>63) // as protocol buffers do: small numbers stay short
	Uint(c, &u, 1<<64-1)
	if !c.reading || c.err != nil {
		return
	}
	v = int64(u>>1) ^ -int64(u&1)
	if v > limit || v < -limit {
		c.err = fmt.Errorf("unpack: a number is not within %d of zero", limit)
		return
	}
	*p = T(v)
}

// Bool is a truth value.
func Bool(c *Coder, p *bool) {
	var v uint8
	if *p {
		v = 1
	}
	Uint(c, &v, 1)
	if c.reading && c.err == nil {
		*p = v == 1
	}
}

// Bytes is a byte string of at most limit bytes. None is nil when it is read.
func Bytes[T ~[]byte](c *Coder, p *T, limit int) {
	n := len(*p)
	Uint(c, &n, uint64(limit))
	if !c.reading {
		c.grow(n)
		c.buf = append(c.buf, *p...)
		return
	}
	if b := c.take(n); len(b) > 0 {
		*p = T(slices.Clone(b))
	} else if c.err == nil {
		*p = nil
	}
}

// Array is a byte string of a length that both ends know.
func Array(c *Coder, p []byte) {
	if !c.reading {
		c.grow(len(p))
		c.buf = append(c.buf, p...)
		return
	}
	copy(p, c.take(len(p)))
}

// String is a text of at most limit bytes.
func String[T ~string](c *Coder, p *T, limit int) {
	n := len(*p)
	Uint(c, &n, uint64(limit))
	if !c.reading {
		c.grow(n)
		c.buf = append(c.buf, *p...)
		return
	}
	if b := c.take(n); c.err == nil {
		*p = T(b)
	}
}

// List is at most limit values, each named by each. What is read grows with
// the bytes that are there, not with what they claim.
func List[T any](c *Coder, p *[]T, limit int, each func(*Coder, *T)) {
	n := len(*p)
	Uint(c, &n, uint64(limit))
	if !c.reading {
		for i := range *p {
			each(c, &(*p)[i])
		}
		return
	}
	*p = nil
	for i := 0; i < n && c.err == nil; i++ {
		var v T
		each(c, &v)
		*p = append(*p, v)
	}
}

// take returns the next n bytes, or nothing if there are fewer.
func (c *Coder) take(n int) []byte {
	if c.err != nil {
		return nil
	}
	if n > len(c.buf) {
		c.err = ErrShort
		return nil
	}
	b := c.buf[:n]
	c.buf = c.buf[n:]
	return b
}

// grow makes room for n bytes more. The memory that it leaves is cleared: it
// may hold a secret.
func (c *Coder) grow(n int) {
	if cap(c.buf)-len(c.buf) >= n {
		return
	}
	old := c.buf
	c.buf = append(make([]byte, 0, 2*cap(old)+n+64), old...)
	clear(old)
}
