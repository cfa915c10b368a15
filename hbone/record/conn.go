package record

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// readLen is the memory for what was received: several records, so that
	// one read(2) serves them all.
	readLen = 64 << 10
	// sealLen is how much is sealed before it is written.
	sealLen = 256 << 10
	// closePatience is how long Close waits for the peer to take our
	// close_notify.
	closePatience = time.Second
)

// A Conn is a TLS 1.3 connection after its handshake. It is a net.Conn, safe
// for one reader, one writer and any number of others at a time.
type Conn struct {
	conn  net.Conn
	state tls.ConnectionState

	readMu sync.Mutex
	open   *Opener
	in     []byte // memory
	r, w   int    // in[r:w] is received and not yet opened
	data   []byte // opened and not yet read; a part of in
	err    error  // of reading; final

	writeMu  sync.Mutex
	seal     *Sealer
	small    []byte // memory for sealing a record or less
	writeErr error  // final: a record may have gone out in part

	owed   atomic.Bool // the peer has asked us to change our key
	closed atomic.Bool
}

// Client runs the handshake over c as a client and takes over from crypto/tls.
// It does not close c if it fails.
func Client(ctx context.Context, c net.Conn, cfg *tls.Config) (*Conn, error) {
	return shake(ctx, c, cfg, true)
}

// Server is Client for the other side.
func Server(ctx context.Context, c net.Conn, cfg *tls.Config) (*Conn, error) {
	return shake(ctx, c, cfg, false)
}

func shake(ctx context.Context, c net.Conn, cfg *tls.Config, client bool) (*Conn, error) {
	if cfg == nil {
		return nil, errors.New("TLS handshake: no configuration")
	}
	if cfg.GetConfigForClient != nil {
		// It could hand out a configuration without our key log.
		return nil, errors.New("TLS handshake: GetConfigForClient is not supported")
	}
	keys := &secrets{}
	defer keys.wipe()
	cfg = cfg.Clone()
	cfg.KeyLogWriter = keys
	cfg.MinVersion = tls.VersionTLS13
	// A ticket of ours would be record 0 of the keys that we take over.
	cfg.SessionTicketsDisabled = true
	cfg.ClientSessionCache = nil
	exact := &exactConn{Conn: c}
	t := tls.Client(exact, cfg)
	if !client {
		t = tls.Server(exact, cfg)
	}
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	state := t.ConnectionState()
	ours, theirs := keys.server, keys.client
	if client {
		ours, theirs = theirs, ours
	}
	seal, err := NewSealer(state.CipherSuite, ours)
	if err != nil {
		return nil, fmt.Errorf("TLS handshake: take over our keys: %w", err)
	}
	open, err := NewOpener(state.CipherSuite, theirs, client)
	if err != nil {
		seal.Wipe()
		return nil, fmt.Errorf("TLS handshake: take over the peer's keys: %w", err)
	}
	r := &Conn{conn: c, state: state, open: open, seal: seal}
	if rest := exact.unread(); len(rest) > 0 {
		r.in = make([]byte, readLen)
		r.w = copy(r.in, rest) // exactConn holds less
	}
	return r, nil
}

// ConnectionState returns what the handshake has agreed on.
func (c *Conn) ConnectionState() tls.ConnectionState { return c.state }

// NetConn returns the connection below.
func (c *Conn) NetConn() net.Conn { return c.conn }

// Detach gives up the connection to a driver that does its own I/O: what seals
// and what opens, and what was received and not yet opened. Nothing was read or
// written but the handshake, or Detach panics. c is of no use after it, and the
// connection below is the caller's.
func (c *Conn) Detach() (*Sealer, *Opener, []byte) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if c.err != nil || c.writeErr != nil || c.r > 0 || len(c.data) > 0 || c.closed.Load() {
		panic("record: Detach of a connection that is in use")
	}
	s, o, unread := c.seal, c.open, c.in[:c.w]
	c.err, c.writeErr = net.ErrClosed, net.ErrClosed
	c.in, c.w = nil, 0
	return s, o, unread
}

// LocalAddr returns our address.
func (c *Conn) LocalAddr() net.Addr { return c.conn.LocalAddr() }

// RemoteAddr returns the peer's address.
func (c *Conn) RemoteAddr() net.Addr { return c.conn.RemoteAddr() }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error { return c.conn.SetDeadline(t) }

// SetReadDeadline sets the deadline of Read and Next.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.conn.SetReadDeadline(t) }

// SetWriteDeadline sets the deadline of Write. A Write that meets it ends the
// connection, as a record may have gone out in part.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.conn.SetWriteDeadline(t) }

// Read reads application data. It returns io.EOF after the peer's
// close_notify, and io.ErrUnexpectedEOF if the connection ends without one:
// that may be an attacker's doing (RFC 8446 6.1).
func (c *Conn) Read(p []byte) (int, error) {
	c.readMu.Lock()
	defer c.doneReading()
	if len(p) == 0 {
		return 0, nil
	}
	for len(c.data) == 0 {
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, c.data)
	c.data = c.data[n:]
	return n, nil
}

// Next is Read without a copy: it returns all data that is at hand of one
// record, or waits for the next. It is valid until the next call of Read or
// Next. Errors are those of Read.
func (c *Conn) Next() ([]byte, error) {
	c.readMu.Lock()
	defer c.doneReading()
	for len(c.data) == 0 {
		if err := c.fill(); err != nil {
			return nil, err
		}
	}
	p := c.data
	c.data = nil
	return p, nil
}

// fill opens the next record, and receives it first if need be. It returns nil
// also if the record had no data.
func (c *Conn) fill() error {
	if c.err != nil {
		return c.err
	}
	for {
		data, rest, used, err := c.open.Open(c.in[c.r:c.w])
		if err != nil {
			return c.failRead(err)
		}
		if used {
			c.r = c.w - len(rest)
			c.data = data
			if c.open.KeyUpdateOwed() {
				c.owed.Store(true) // Write pays: it is due before data, not now
			}
			return nil
		}
		if err := c.receive(); err != nil {
			return err
		}
	}
}

// receive reads from the connection below behind what is there.
func (c *Conn) receive() error {
	if c.in == nil {
		c.in = make([]byte, readLen)
	}
	if c.r == c.w {
		c.r, c.w = 0, 0
	} else if len(c.in)-c.r < maxRecord {
		c.w = copy(c.in, c.in[c.r:c.w])
		c.r = 0
	}
	n, err := c.conn.Read(c.in[c.w:])
	c.w += n
	var ne net.Error
	switch {
	case n > 0:
		return nil // an error will come again
	case err == nil:
		return io.ErrNoProgress
	case errors.As(err, &ne) && ne.Timeout():
		return err // not final
	case errors.Is(err, io.EOF):
		return c.failRead(io.ErrUnexpectedEOF)
	}
	return c.failRead(err)
}

// failRead makes err final, and tells the peer if it is to blame.
func (c *Conn) failRead(err error) error {
	c.err = err
	c.open.Wipe()
	var bad *Error
	if errors.As(err, &bad) {
		c.say(bad.Alert)
	}
	return err
}

// say sends an alert, if nobody is writing and the peer takes it in time.
func (c *Conn) say(alert uint8) {
	if !c.writeMu.TryLock() {
		return
	}
	defer c.writeMu.Unlock()
	if c.writeErr != nil {
		return
	}
	b, err := c.seal.Alert(nil, alert)
	c.writeErr = net.ErrClosed // nothing follows an alert
	c.seal.Wipe()
	if err != nil {
		return
	}
	// The connection is over: whether the peer hears it changes nothing.
	_ = c.conn.SetWriteDeadline(time.Now().Add(closePatience))
	_, _ = c.conn.Write(b)
}

// Write sends p as application data, in as few writes as it can.
func (c *Conn) Write(p []byte) (int, error) {
	c.writeMu.Lock()
	defer c.doneWriting()
	if c.writeErr != nil {
		return 0, c.writeErr
	}
	sent := 0
	for sent < len(p) {
		n := min(len(p)-sent, sealLen)
		err := c.send(p[sent : sent+n])
		if err != nil {
			c.writeErr = err
			c.seal.Wipe()
			return sent, err
		}
		sent += n
	}
	return sent, nil
}

// send seals p and writes it. The caller holds writeMu.
func (c *Conn) send(p []byte) error {
	out := c.small[:0]
	if len(p) > MaxPlaintext {
		// Many connections are idle at a time, and few send much.
		buf := sealBuffers.Get().(*sealBuffer)
		defer sealBuffers.Put(buf)
		out = buf[:0]
	}
	var err error
	if c.owed.Swap(false) {
		if out, err = c.seal.Update(out, false); err != nil {
			return err
		}
	}
	if out, err = c.seal.Seal(out, p); err != nil {
		return err
	}
	if len(p) <= MaxPlaintext {
		c.small = out
	}
	_, err = c.conn.Write(out)
	return err
}

// sealBuffer has room for sealLen bytes, sealed, and two KeyUpdates.
type sealBuffer [sealLen + (sealLen/MaxPlaintext+3)*64]byte

// sealBuffers caches memory between connections. It holds only ciphertext.
var sealBuffers = sync.Pool{New: func() any { return new(sealBuffer) }}

// Close says so to the peer, unless a Write is under way, which it ends, and
// closes the connection below.
func (c *Conn) Close() error {
	if c.closed.Swap(true) {
		return net.ErrClosed
	}
	c.say(alertCloseNotify)
	err := c.conn.Close()
	c.forgetTheirs()
	return err
}

// CloseWrite says to the peer that nothing more comes, as Close does, and ends
// our direction of the connection below. Read goes on. It fails if the connection
// below has no half-close.
func (c *Conn) CloseWrite() error {
	half, ok := c.conn.(interface{ CloseWrite() error })
	if !ok {
		return errors.ErrUnsupported
	}
	c.say(alertCloseNotify)
	return half.CloseWrite()
}

// forgetTheirs and forgetOurs forget the secrets of a direction. Who is at it
// just now does so itself when he is done.
func (c *Conn) forgetTheirs() {
	if c.readMu.TryLock() {
		c.open.Wipe()
		c.readMu.Unlock()
	}
}

func (c *Conn) forgetOurs() {
	if c.writeMu.TryLock() {
		c.seal.Wipe()
		c.writeMu.Unlock()
	}
}

func (c *Conn) doneReading() {
	c.readMu.Unlock()
	if c.closed.Load() {
		c.forgetTheirs()
	}
}

func (c *Conn) doneWriting() {
	c.writeMu.Unlock()
	if c.closed.Load() {
		c.forgetOurs()
	}
}

// Wipe forgets the secrets of a connection that nobody uses, without a word to
// the peer. The connection below is the caller's.
func (c *Conn) Wipe() {
	c.forgetTheirs()
	c.forgetOurs()
}

// exactConn gives crypto/tls one record at a time, so that it never holds a
// byte of what follows the handshake.
type exactConn struct {
	net.Conn
	buf  []byte
	r, w int
	left int // bytes of the record at hand that were not given out
}

// Read gives out at most the rest of one record.
func (c *exactConn) Read(p []byte) (int, error) {
	for c.left == 0 {
		if c.w-c.r >= headerLen {
			// An absurd length is for crypto/tls to refuse.
			c.left = headerLen + int(binary.BigEndian.Uint16(c.buf[c.r+3:]))
			break
		}
		if err := c.more(); err != nil {
			return 0, err
		}
	}
	if c.r == c.w {
		if err := c.more(); err != nil {
			return 0, err
		}
	}
	n := copy(p, c.buf[c.r:min(c.w, c.r+c.left)])
	c.r, c.left = c.r+n, c.left-n
	return n, nil
}

// more receives what comes.
func (c *exactConn) more() error {
	if c.buf == nil {
		c.buf = make([]byte, 4096)
	}
	if c.r > 0 {
		c.w = copy(c.buf, c.buf[c.r:c.w])
		c.r = 0
	}
	n, err := c.Conn.Read(c.buf[c.w:])
	c.w += n
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// unread returns what was received beyond the handshake.
func (c *exactConn) unread() []byte { return c.buf[c.r:c.w] }

// secrets takes the traffic secrets out of the key log of crypto/tls. They are
// in memory only, and never written anywhere.
type secrets struct{ client, server []byte }

// Write reads one line of the log: a label, the client's random, the secret.
func (s *secrets) Write(line []byte) (int, error) {
	f := bytes.Fields(line)
	if len(f) != 3 {
		return len(line), nil
	}
	var to *[]byte
	switch string(f[0]) {
	case "CLIENT_TRAFFIC_SECRET_0":
		to = &s.client
	case "SERVER_TRAFFIC_SECRET_0":
		to = &s.server
	default:
		return len(line), nil
	}
	secret := make([]byte, hex.DecodedLen(len(f[2])))
	if _, err := hex.Decode(secret, f[2]); err != nil {
		return 0, errors.New("the key log of crypto/tls cannot be read")
	}
	*to = secret
	return len(line), nil
}

// wipe forgets our copies. Those of crypto/tls are left to the garbage
// collector.
func (s *secrets) wipe() {
	clear(s.client)
	clear(s.server)
}
