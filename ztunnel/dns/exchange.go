package dns

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"golang.org/x/net/dns/dnsmessage"
)

// Exchange sends query over a connected datagram socket and returns the answer
// to it, of at most limit bytes. Everything else that arrives meanwhile is
// passed over: on the way the query has an ID that only chance knows, whatever
// the client's is. In place of an answer that is longer it returns one that
// says so, for the client to ask over TCP. The caller sets deadlines on s.
func Exchange(s io.ReadWriter, query []byte, limit int) ([]byte, error) {
	if len(query) < headerSize {
		return nil, errors.New("the query has no header")
	}
	sent := bytes.Clone(query)
	if _, err := rand.Read(sent[:2]); err != nil {
		return nil, err
	}
	if _, err := s.Write(sent); err != nil {
		return nil, fmt.Errorf("ask name server: %w", err)
	}
	b := make([]byte, limit+1)
	for range maxGuesses {
		n, err := s.Read(b)
		if err != nil && !errors.Is(err, io.EOF) { // which a datagram of no bytes is
			return nil, fmt.Errorf("wait for name server: %w", err)
		}
		if !Answers(sent, b[:min(n, limit)]) {
			continue
		}
		if n > limit {
			return truncated(query), nil
		}
		copy(b, query[:2])
		return b[:n], nil
	}
	return nil, fmt.Errorf("%d packets came from the name server that are no answer: somebody may be guessing", maxGuesses)
}

// maxGuesses bounds the packets that are passed over: who sends them in the
// name of the server would have to guess one of 65536 IDs, and a port.
const maxGuesses = 64

// truncated returns a reply to query that says that the answer is too long.
func truncated(query []byte) []byte {
	b := failure(nil, query, dnsmessage.RCodeSuccess)
	b[2] |= bitTruncated
	return b
}

// maxFrame is as much as the length in front of a message over TCP can say.
const maxFrame = maxTCP

// ReadFrame reads one message from a TCP connection. At the end of the
// connection the error is io.EOF.
func ReadFrame(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	// Memory is for bytes that are there, not for those that are announced.
	var b bytes.Buffer
	n := int64(binary.BigEndian.Uint16(size[:]))
	if m, err := io.CopyN(&b, r, n); err != nil {
		if m < n && errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return b.Bytes(), nil
}

// WriteFrame writes one message to a TCP connection, with one call.
func WriteFrame(w io.Writer, message []byte) error {
	if len(message) > maxFrame {
		return fmt.Errorf("a message of %d bytes does not fit into a frame", len(message))
	}
	b := make([]byte, 2, 2+len(message))
	binary.BigEndian.PutUint16(b, uint16(len(message)))
	_, err := w.Write(append(b, message...))
	return err
}
