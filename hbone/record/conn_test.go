package record

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/mesh"
)

var someone = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"}

// configs returns what both ends of a connection with mutual TLS need.
func configs(t testing.TB) (client, server *tls.Config) {
	ca := testca.New(t, "cluster.local")
	pool := x509.NewCertPool()
	pool.AddCert(ca.Certificate())
	leaf := ca.IssueAs(someone, func(c *x509.Certificate) { c.DNSNames = []string{"cart"} })
	client = &tls.Config{RootCAs: pool, ServerName: "cart", Certificates: []tls.Certificate{leaf}, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}
	server = &tls.Config{ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, Certificates: []tls.Certificate{leaf}, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}
	return client, server
}

func sockets(t testing.TB) (net.Conn, net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	a, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// choppy passes bytes on in random pieces, so that records come split and
// joined in every way.
type choppy struct {
	net.Conn
	rnd *rand.Rand
	mu  sync.Mutex
}

func (c *choppy) Read(p []byte) (int, error) {
	c.mu.Lock()
	n := 1 + c.rnd.IntN(40000)
	if c.rnd.IntN(3) == 0 {
		n = 1 + c.rnd.IntN(12)
	}
	c.mu.Unlock()
	return c.Conn.Read(p[:min(len(p), n)])
}

// ends makes the two ends of a connection; ours is a Conn, the other one of
// crypto/tls, or a Conn too.
func ends(t testing.TB, weAreClient, bothOurs bool, seed uint64) (ours *Conn, theirs net.Conn) {
	t.Helper()
	cc, sc := configs(t)
	a, b := sockets(t)
	a = &choppy{Conn: a, rnd: rand.New(rand.NewPCG(seed, 1))}
	b = &choppy{Conn: b, rnd: rand.New(rand.NewPCG(seed, 2))}
	done := make(chan error, 1)
	go func() {
		var err error
		switch {
		case bothOurs:
			theirs, err = Server(context.Background(), b, sc)
		case weAreClient:
			// Tickets are on, as many servers have them.
			s := tls.Server(b, sc)
			theirs, err = s, s.Handshake()
		default:
			c := tls.Client(b, cc)
			theirs, err = c, c.Handshake()
		}
		done <- err
	}()
	var err error
	if weAreClient || bothOurs {
		ours, err = Client(t.Context(), a, cc)
	} else {
		ours, err = Server(t.Context(), a, sc)
	}
	if err := errors.Join(err, <-done); err != nil {
		t.Fatal(err)
	}
	return ours, theirs
}

// pump sends random bytes in random pieces and closes.
func pump(c net.Conn, n int, seed uint64, between func(i int)) error {
	r := rand.New(rand.NewPCG(seed, 3))
	src := rand.NewChaCha8([32]byte{byte(seed)})
	buf := make([]byte, 300_000)
	for i := 0; n > 0; i++ {
		k := min(n, 1+r.IntN(len(buf)))
		if r.IntN(2) == 0 {
			k = min(n, 1+r.IntN(100))
		}
		_, _ = src.Read(buf[:k])
		if _, err := c.Write(buf[:k]); err != nil {
			return err
		}
		n -= k
		if between != nil {
			between(i)
		}
	}
	return nil
}

// check reads n bytes and compares them with those of pump.
func check(c net.Conn, n int, seed uint64) error {
	r := rand.New(rand.NewPCG(seed, 3))
	src := rand.NewChaCha8([32]byte{byte(seed)})
	want, got := make([]byte, 300_000), make([]byte, 300_000)
	for n > 0 {
		k := min(n, 1+r.IntN(len(want)))
		if r.IntN(2) == 0 {
			k = min(n, 1+r.IntN(100))
		}
		_, _ = src.Read(want[:k])
		if _, err := io.ReadFull(c, got[:k]); err != nil {
			return fmt.Errorf("with %d bytes to come: %w", n, err)
		}
		if !bytes.Equal(want[:k], got[:k]) {
			return fmt.Errorf("with %d bytes to come: differ", n)
		}
		n -= k
	}
	return nil
}

// TestAgainstCryptoTLS sends both ways at once between a Conn and crypto/tls
// in both roles, and between two Conns that change keys all the time.
func TestAgainstCryptoTLS(t *testing.T) {
	for _, tt := range []struct {
		name             string
		client, bothOurs bool
	}{{"client", true, false}, {"server", false, false}, {"both", true, true}} {
		t.Run(tt.name, func(t *testing.T) {
			const n = 8 << 20
			ours, theirs := ends(t, tt.client, tt.bothOurs, 42)
			if p := ours.ConnectionState(); p.NegotiatedProtocol != "h2" || len(p.PeerCertificates) != 1 {
				t.Errorf("state %+v", p)
			}
			rekey := func(i int) {
				if i%5 == 0 {
					ours.writeMu.Lock()
					out, err := ours.seal.Update(nil, i%2 == 0)
					if err == nil {
						_, err = ours.conn.Write(out)
					}
					ours.writeMu.Unlock()
					if err != nil {
						t.Error(err)
					}
				}
			}
			var wg sync.WaitGroup
			errs := make(chan error, 4)
			wg.Go(func() { errs <- pump(ours, n, 1, rekey) })
			wg.Go(func() { errs <- pump(theirs, n, 2, nil) })
			wg.Go(func() { errs <- check(ours, n, 2) })
			wg.Go(func() { errs <- check(theirs, n, 1) })
			wg.Wait()
			for range 4 {
				if err := <-errs; err != nil {
					t.Error(err)
				}
			}
			// An orderly end, from their side and from ours.
			if err := theirs.Close(); err != nil {
				t.Error(err)
			}
			if _, err := ours.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("after their close: %v", err)
			}
			if err := ours.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestOurCloseIsTheirEOF(t *testing.T) {
	for _, client := range []bool{true, false} {
		ours, theirs := ends(t, client, false, 7)
		if _, err := ours.Write([]byte("bye")); err != nil {
			t.Fatal(err)
		}
		if err := ours.Close(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(theirs); err != nil || string(got) != "bye" {
			t.Errorf("%q, %v", got, err)
		}
		if _, err := ours.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write after close: %v", err)
		}
	}
}

// The secrets of a connection are forgotten when it closes, also if somebody
// reads or writes at that moment, and when it is given up.
func TestConnForgetsItsSecrets(t *testing.T) {
	for name, end := range map[string]func(c *Conn){
		"closed": func(c *Conn) { _ = c.Close() },
		"closed while others are at it": func(c *Conn) {
			c.readMu.Lock()
			c.writeMu.Lock()
			_ = c.Close()
			c.doneReading()
			c.doneWriting()
		},
		"given up": (*Conn).Wipe,
	} {
		t.Run(name, func(t *testing.T) {
			c, peer := ends(t, true, true, 1)
			defer peer.Close()
			defer c.conn.Close()
			for _, secret := range [][]byte{c.seal.half.secret, c.open.half.secret} {
				defer func() {
					if !bytes.Equal(secret, make([]byte, len(secret))) {
						t.Error("a secret is still there")
					}
				}()
			}
			end(c)
			if _, err := c.Write([]byte("x")); err == nil {
				t.Error("written without a key")
			}
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("read without a key")
			}
		})
	}
}

func TestTruncationIsNotAnEnd(t *testing.T) {
	ours, theirs := ends(t, true, false, 9)
	if _, err := theirs.Write([]byte("half of a sen")); err != nil {
		t.Fatal(err)
	}
	_ = theirs.(*tls.Conn).NetConn().Close()
	if got, err := io.ReadAll(ours); string(got) != "half of a sen" || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%q, %v", got, err)
	}
}

// tamper changes what passes through it once it is armed.
type tamper struct {
	net.Conn
	mu     sync.Mutex
	change func([]byte) []byte
}

func (c *tamper) Write(p []byte) (int, error) {
	c.mu.Lock()
	f := c.change
	c.mu.Unlock()
	if f == nil {
		return c.Conn.Write(p)
	}
	if _, err := c.Conn.Write(f(bytes.Clone(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}

func TestTamperingEndsTheConnection(t *testing.T) {
	for name, change := range map[string]func([]byte) []byte{
		"a bit":          func(p []byte) []byte { p[len(p)/2] ^= 4; return p },
		"repeated":       func(p []byte) []byte { return append(p, p...) },
		"oversize":       func(p []byte) []byte { p[3] = 0xff; return p },
		"another record": func(p []byte) []byte { return append([]byte{20, 3, 3, 0, 1, 1}, p...) },
	} {
		t.Run(name, func(t *testing.T) {
			cc, sc := configs(t)
			a, b := sockets(t)
			m := &tamper{Conn: b}
			theirs := tls.Server(m, sc)
			go func() { _ = theirs.Handshake() }()
			ours, err := Client(t.Context(), a, cc)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(ours, "x"); err != nil {
				t.Fatal(err)
			}
			if _, err := theirs.Read(make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			m.mu.Lock()
			m.change = change
			m.mu.Unlock()
			if _, err := io.WriteString(theirs, "a secret"); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(ours)
			var bad *Error
			if !errors.As(err, &bad) || len(got) != 0 && name != "repeated" {
				t.Errorf("%q, %v", got, err)
			}
			// The peer hears why.
			_, err = theirs.Read(make([]byte, 1))
			if err == nil || !strings.Contains(err.Error(), "remote error: tls:") {
				t.Errorf("the peer hears %v", err)
			}
		})
	}
}

func TestPeerAlertIsReported(t *testing.T) {
	// With TLS 1.3 a client learns that its certificate was refused when it
	// first reads.
	cc, sc := configs(t)
	sc.VerifyConnection = func(tls.ConnectionState) error { return errors.New("not you") }
	a, b := sockets(t)
	go func() { _, _ = Server(context.Background(), b, sc) }()
	c, err := Client(t.Context(), a, cc)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Read(make([]byte, 1))
	var alert tls.AlertError
	if !errors.As(err, &alert) {
		t.Errorf("%v, want an alert", err)
	}
}

func TestReadDeadlineIsNotFinal(t *testing.T) {
	ours, theirs := ends(t, false, false, 3)
	_ = ours.SetReadDeadline(time.Now())
	if _, err := ours.Next(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Next: %v", err)
	}
	_ = ours.SetReadDeadline(time.Time{})
	if _, err := io.WriteString(theirs, "still here"); err != nil {
		t.Fatal(err)
	}
	if p, err := ours.Next(); err != nil || string(p) != "still here" {
		t.Errorf("%q, %v", p, err)
	}
}

// A ticket or data right behind the handshake, in the same packet, is not lost.
func TestDataBehindTheHandshake(t *testing.T) {
	for seed := range uint64(20) {
		cc, sc := configs(t)
		a, b := net.Pipe()
		go func() {
			c := tls.Client(a, cc)
			_, _ = io.WriteString(c, "early")
		}()
		got := make([]byte, 5)
		c, err := Server(t.Context(), &gather{Conn: b}, sc)
		if err == nil {
			_, err = io.ReadFull(c, got)
		}
		if err != nil || string(got) != "early" {
			t.Errorf("seed %d: %q, %v", seed, got, err)
		}
		_ = a.Close()
	}
}

// gather waits for more than one write of the peer, so that what belongs to
// the handshake and what does not come in one read.
type gather struct {
	net.Conn
	reads int
}

func (g *gather) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	for g.reads++; err == nil && g.reads > 1 && n < len(p); {
		_ = g.Conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		k, kerr := g.Conn.Read(p[n:])
		_ = g.Conn.SetReadDeadline(time.Time{})
		if n += k; kerr != nil {
			break
		}
	}
	return n, err
}

func TestHandshakeRefusesWhatItCannotTakeOver(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, err := Server(t.Context(), a, nil); err == nil {
		t.Error("no configuration was taken")
	}
	cfg := &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return nil, nil }}
	if _, err := Server(t.Context(), a, cfg); err == nil {
		t.Error("GetConfigForClient was taken")
	}
}

// TestAgainstOpenSSL checks the suites that crypto/tls cannot be made to
// choose, in both roles.
func TestAgainstOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("the openssl program is missing")
	}
	cc, sc := configs(t)
	sc.ClientAuth = tls.NoClientCert
	dir := t.TempDir()
	cert, key := writePair(t, dir, sc.Certificates[0])
	for _, name := range []string{"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"} {
		t.Run("client "+name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			addr := ln.Addr().String()
			_ = ln.Close()
			cmd := exec.CommandContext(t.Context(), openssl, "s_server", "-accept", addr, "-cert", cert, "-key", key,
				"-tls1_3", "-ciphersuites", name, "-alpn", "h2", "-rev", "-quiet")
			start(t, cmd)
			var tcp net.Conn
			for deadline := time.Now().Add(10 * time.Second); ; {
				if tcp, err = net.Dial("tcp", addr); err == nil {
					break
				}
				if time.Now().After(deadline) {
					t.Fatal(err)
				}
			}
			c, err := Client(t.Context(), tcp, cc)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			echoBackwards(t, c, name)
		})
		t.Run("server "+name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			cmd := exec.CommandContext(t.Context(), openssl, "s_client", "-connect", ln.Addr().String(),
				"-tls1_3", "-ciphersuites", name, "-alpn", "h2", "-quiet")
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			start(t, cmd)
			tcp, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			c, err := Server(t.Context(), tcp, sc)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if got := tls.CipherSuiteName(c.ConnectionState().CipherSuite); got != name {
				t.Fatalf("suite %s", got)
			}
			p := strings.Repeat("0123456789abcdef", 10000)
			go func() { _, _ = io.WriteString(in, p); _ = in.Close() }()
			got := make([]byte, len(p))
			if _, err := io.ReadFull(c, got); err != nil || string(got) != p {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
}

// echoBackwards sends lines to "openssl s_server -rev" and reads them reversed.
func echoBackwards(t *testing.T, c *Conn, suite string) {
	t.Helper()
	if got := tls.CipherSuiteName(c.ConnectionState().CipherSuite); got != suite {
		t.Fatalf("suite %s", got)
	}
	for range 3 {
		if _, err := io.WriteString(c, "hello weft\n"); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 11)
		if _, err := io.ReadFull(c, got); err != nil || string(got) != "tfew olleh\n" {
			t.Errorf("%q, %v", got, err)
		}
		// The next exchange is under a new key of ours, and one that we ask for.
		c.writeMu.Lock()
		out, err := c.seal.Update(nil, true)
		if err == nil {
			_, err = c.conn.Write(out)
		}
		c.writeMu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
	}
}

func start(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

func writePair(t *testing.T, dir string, c tls.Certificate) (cert, key string) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if err := errors.Join(os.WriteFile(cert, pemOf("CERTIFICATE", c.Certificate[0]), 0o600), os.WriteFile(key, pemOf("PRIVATE KEY", der), 0o600)); err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func BenchmarkSeal(b *testing.B) {
	s, _ := pair(b, tls.TLS_AES_128_GCM_SHA256)
	p := make([]byte, 128<<10)
	buf := make([]byte, 0, 140<<10)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		if _, err := s.Seal(buf, p); err != nil {
			b.Fatal(err)
		}
	}
}
