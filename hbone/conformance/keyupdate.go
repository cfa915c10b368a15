package conformance

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/weft-mesh/weft/hbone/record"
)

// A rekeyConn is a TLS connection of crypto/tls whose records are made by
// package record from the end of the handshake on, because crypto/tls cannot
// be asked for a KeyUpdate. It changes our key with every record, in the middle
// of frames too, and asks the peer to change its own with every other.
type rekeyConn struct {
	net.Conn
	mu    sync.Mutex // one write at a time
	seal  *record.Sealer
	open  *record.Opener
	in    []byte // received and not yet opened
	data  []byte // opened and not yet read
	wrote int
}

// rekey shakes hands and takes over.
func (s *suite) rekey() (*rekeyConn, error) {
	raw, err := s.Dial(s.ctx, "tcp", s.Address)
	if err != nil {
		return nil, err
	}
	keys := &keyLog{}
	cfg := s.tls()
	cfg.KeyLogWriter = keys
	t := tls.Client(&recordConn{Conn: raw}, cfg)
	_ = raw.SetDeadline(time.Now().Add(s.Timeout))
	if err := t.HandshakeContext(s.ctx); err != nil {
		_ = raw.Close() // the handshake's error says more
		return nil, err
	}
	_ = raw.SetDeadline(time.Time{})
	suite := t.ConnectionState().CipherSuite
	c := &rekeyConn{Conn: raw}
	var errSeal, errOpen error
	c.seal, errSeal = record.NewSealer(suite, keys.client)
	c.open, errOpen = record.NewOpener(suite, keys.server, true)
	if err := errors.Join(errSeal, errOpen); err != nil {
		_ = raw.Close() // as above
		return nil, err
	}
	return c, nil
}

func (c *rekeyConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []byte
	for p := range slices.Chunk(b, 1111) {
		var err error
		if out, err = c.seal.Update(out, c.wrote%2 == 0); err != nil {
			return 0, err
		}
		if out, err = c.seal.Seal(out, p); err != nil {
			return 0, err
		}
		c.wrote++
	}
	if _, err := c.Conn.Write(out); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (c *rekeyConn) Read(b []byte) (int, error) {
	for len(c.data) == 0 {
		data, rest, used, err := c.open.Open(c.in)
		if err != nil {
			return 0, err
		}
		if used {
			c.data, c.in = bytes.Clone(data), rest
			continue
		}
		more := make([]byte, 32<<10)
		n, err := c.Conn.Read(more)
		c.in = append(bytes.Clone(c.in), more[:n]...)
		if n == 0 && err != nil {
			return 0, err
		}
	}
	n := copy(b, c.data)
	c.data = c.data[n:]
	return n, nil
}

// recordConn hands out one TLS record at a time, so that crypto/tls reads
// nothing beyond the handshake.
type recordConn struct {
	net.Conn
	rec []byte
}

func (c *recordConn) Read(b []byte) (int, error) {
	if len(c.rec) == 0 {
		head := make([]byte, 5)
		if _, err := io.ReadFull(c.Conn, head); err != nil {
			return 0, err
		}
		c.rec = append(head, make([]byte, binary.BigEndian.Uint16(head[3:]))...)
		if _, err := io.ReadFull(c.Conn, c.rec[5:]); err != nil {
			return 0, err
		}
	}
	n := copy(b, c.rec)
	c.rec = c.rec[n:]
	return n, nil
}

// keyLog picks the traffic secrets out of the key log of crypto/tls.
type keyLog struct{ client, server []byte }

func (k *keyLog) Write(line []byte) (int, error) {
	f := bytes.Fields(line)
	if len(f) != 3 {
		return len(line), nil
	}
	secret, err := hex.DecodeString(string(f[2]))
	switch string(f[0]) {
	case "CLIENT_TRAFFIC_SECRET_0":
		k.client = secret
	case "SERVER_TRAFFIC_SECRET_0":
		k.server = secret
	}
	return len(line), err
}

// followsKeyUpdates changes keys all the time and wants to be understood.
func (s *suite) followsKeyUpdates() error {
	c, err := s.rekey()
	if err != nil {
		return err
	}
	p, err := s.greetOver(c)
	if err != nil {
		return err
	}
	defer p.close()
	for range 5 {
		if err := p.alive(); err != nil {
			return err
		}
	}
	if s.Target == "" {
		return nil
	}
	st, err := p.open(s.Target)
	if err != nil {
		return err
	}
	return p.echo(st, pattern(200_000), 4096)
}
