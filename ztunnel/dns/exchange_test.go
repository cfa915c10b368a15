package dns

import (
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"golang.org/x/net/dns/dnsmessage"
)

// A wire is a connected datagram socket whose other end sends what replies
// returns for what was written, then nothing until the deadline.
type wire struct {
	sent    []byte
	replies func(sent []byte) [][]byte
	queue   [][]byte
}

func (w *wire) Write(p []byte) (int, error) {
	w.sent = bytes.Clone(p)
	w.queue = w.replies(w.sent)
	return len(p), nil
}

func (w *wire) Read(p []byte) (int, error) {
	if len(w.queue) == 0 {
		return 0, os.ErrDeadlineExceeded
	}
	n := copy(p, w.queue[0])
	w.queue = w.queue[1:]
	if n == 0 {
		return 0, io.EOF // as a file says of a datagram without bytes
	}
	return n, nil
}

// to answers a query with so many bytes more than it has.
func to(query []byte, more int) []byte {
	m := append(bytes.Clone(query), make([]byte, more)...)
	m[2] |= bitResponse
	return m
}

func TestExchange(t *testing.T) {
	query := ask{name: "www.example.net.", kind: dnsmessage.TypeA}.message(t)
	other := func(sent []byte) []byte { m := to(sent, 0); m[1]++; return m }
	for _, tc := range []struct {
		name    string
		replies func(sent []byte) [][]byte
		want    string // in the error; empty: an answer
		cut     bool
	}{
		{"the answer", func(s []byte) [][]byte { return [][]byte{to(s, 9)} }, "", false},
		{"after others", func(s []byte) [][]byte { return [][]byte{nil, {1}, other(s), s, to(s, 9)} }, "", false},
		{"as long as it may be", func(s []byte) [][]byte { return [][]byte{to(s, 512-len(s))} }, "", false},
		{"too long", func(s []byte) [][]byte { return [][]byte{to(s, 513-len(s))} }, "", true},
		{"nothing", func([]byte) [][]byte { return nil }, "wait for name server", false},
		{"guesses without end", func(s []byte) [][]byte { return slices.Repeat([][]byte{other(s)}, 1000) }, "guessing", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ids := map[[2]byte]bool{}
			for range 8 {
				w := &wire{replies: tc.replies}
				got, err := Exchange(w, query, 512)
				ids[[2]byte(w.sent)] = true
				if !bytes.Equal(w.sent[2:], query[2:]) {
					t.Fatalf("sent %x, want the query but for its ID", w.sent)
				}
				if tc.want != "" {
					if err == nil || !strings.Contains(err.Error(), tc.want) {
						t.Fatalf("%x, %v; want %q", got, err, tc.want)
					}
					continue
				}
				if err != nil || !Answers(query, got) || (got[2]&bitTruncated != 0) != tc.cut {
					t.Fatalf("%x, %v; want an answer with the client's own ID, truncated %v", got, err, tc.cut)
				}
			}
			if len(ids) < 7 {
				t.Errorf("8 queries had %d different IDs", len(ids))
			}
		})
	}
	if _, err := Exchange(&wire{}, query[:5], 512); err == nil {
		t.Error("half a header was sent")
	}
}

func TestFrames(t *testing.T) {
	for _, size := range []int{0, 1, 512, 65535} {
		var b bytes.Buffer
		message := bytes.Repeat([]byte{7}, size)
		if err := WriteFrame(&b, message); err != nil {
			t.Fatal(err)
		}
		got, err := ReadFrame(iotest.OneByteReader(&b))
		if err != nil || !bytes.Equal(got, message) || b.Len() != 0 {
			t.Errorf("%d bytes became %d, %v", size, len(got), err)
		}
	}
	if err := WriteFrame(io.Discard, make([]byte, 65536)); err == nil {
		t.Error("a message was written whose length its frame cannot say")
	}
	for _, tc := range []struct {
		text string
		want error
	}{{"", io.EOF}, {"\x00", io.ErrUnexpectedEOF}, {"\x00\x05four", io.ErrUnexpectedEOF}, {"\xff\xff", io.ErrUnexpectedEOF}} {
		if _, err := ReadFrame(strings.NewReader(tc.text)); !errors.Is(err, tc.want) {
			t.Errorf("%q: %v, want %v", tc.text, err, tc.want)
		}
	}
	if n := testing.AllocsPerRun(10, func() { ReadFrame(strings.NewReader("\xff\xffx")) }); n > 20 {
		t.Errorf("%v allocations for one byte of an announced 65535", n)
	}
}
