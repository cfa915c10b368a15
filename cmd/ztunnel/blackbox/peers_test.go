//lint:file-ignore SA1019 one of the peers is golang.org/x/net/http2

package blackbox

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/net/http2"

	"github.com/weft-mesh/weft/internal/bench"
	"github.com/weft-mesh/weft/internal/testca"
	"github.com/weft-mesh/weft/internal/testnet"
)

// A hop is a port of a peer and where it leads.
type hop struct{ Listen, To netip.AddrPort }

// setup is what a peer's process is told: its hops, its side and its keys.
type setup struct {
	Server           bool // it takes TLS, where the other makes it
	Hops             []hop
	Cert, Key, Roots string // PEM files; both sides have a certificate for localPeer
}

// localPeer is the host name in the peers' certificate: they know no SPIFFE.
const localPeer = "peer.bench"

// writeKeys makes the peers' keys.
func writeKeys(t *testing.T, ca *testca.CA) setup {
	t.Helper()
	dir := t.TempDir()
	cert := ca.IssueAs(identityOf("peer"), func(c *x509.Certificate) { c.DNSNames = []string{localPeer} })
	der, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	chain := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	s := setup{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem"), Roots: filepath.Join(dir, "roots.pem")}
	// haproxy wants both in one file; the others take what they need of it.
	for path, b := range map[string][]byte{s.Cert: append(chain, key...), s.Key: key, s.Roots: ca.PEM()} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// peerKinds are the proxies that Weft is compared with, and how each is
// started. The error says that it is not installed.
var peerKinds = []struct {
	name  string
	start func(t *testing.T, s setup, at *testnet.Host) (*bench.Process, error)
}{
	{"plain", func(t *testing.T, s setup, at *testnet.Host) (*bench.Process, error) {
		return bench.Start(benchTest, "plain", s, at.Do)
	}},
	{"xnet", func(t *testing.T, s setup, at *testnet.Host) (*bench.Process, error) {
		return bench.Start(benchTest, "xnet", s, at.Do)
	}},
	{"haproxy", func(t *testing.T, s setup, at *testnet.Host) (*bench.Process, error) {
		return configured(t, at, haproxyConfig(s), "haproxy", "-db", "-q", "-f")
	}},
	{"nginx", func(t *testing.T, s setup, at *testnet.Host) (*bench.Process, error) {
		return configured(t, at, nginxConfig(s), "nginx", "-c")
	}},
	{"stunnel", func(t *testing.T, s setup, at *testnet.Host) (*bench.Process, error) {
		return configured(t, at, stunnelConfig(s), "stunnel4")
	}},
}

// configured starts a program with its configuration in a file.
func configured(t *testing.T, at *testnet.Host, config string, name string, args ...string) (*bench.Process, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	return bench.Exec(path, append(args, file), at.Do, t.Output())
}

func haproxyConfig(s setup) string {
	c := `global
  nbthread 1
  maxconn 9000
defaults
  mode tcp
  timeout connect 10s
  timeout client 1h
  timeout server 1h
`
	for i, h := range s.Hops {
		bind, server := "", fmt.Sprintf("ssl crt %s ca-file %s verify required verifyhost %s ssl-min-ver TLSv1.3 ciphersuites TLS_AES_128_GCM_SHA256", s.Cert, s.Roots, localPeer)
		if s.Server {
			bind, server = fmt.Sprintf("ssl crt %s ca-file %s verify required ssl-min-ver TLSv1.3 ciphersuites TLS_AES_128_GCM_SHA256", s.Cert, s.Roots), ""
		}
		c += fmt.Sprintf("listen l%d\n  bind %v %s\n  server s %v %s\n", i, h.Listen, bind, h.To, server)
	}
	return c
}

func nginxConfig(s setup) string {
	c := `daemon off;
master_process off;
error_log stderr error;
pid /dev/null;
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
events { worker_connections 9000; }
stream {
  tcp_nodelay on;
  proxy_timeout 1h;
  proxy_buffer_size 64k;
`
	for _, h := range s.Hops {
		listen, ssl := "", fmt.Sprintf(`proxy_ssl on; proxy_ssl_protocols TLSv1.3; proxy_ssl_verify on; proxy_ssl_name %s;
    proxy_ssl_certificate %s; proxy_ssl_certificate_key %s; proxy_ssl_trusted_certificate %s; proxy_ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;`, localPeer, s.Cert, s.Key, s.Roots)
		if s.Server {
			listen, ssl = "ssl", fmt.Sprintf(`ssl_protocols TLSv1.3; ssl_verify_client on; ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
    ssl_certificate %s; ssl_certificate_key %s; ssl_client_certificate %s;`, s.Cert, s.Key, s.Roots)
		}
		c += fmt.Sprintf("  server { listen %v %s backlog=4096; proxy_pass %v; %s }\n", h.Listen, listen, h.To, ssl)
	}
	return c + "}\n"
}

func stunnelConfig(s setup) string {
	c := fmt.Sprintf(`foreground = yes
debug = err
pid =
cert = %s
key = %s
CAfile = %s
verifyChain = yes
requireCert = yes
sslVersionMin = TLSv1.3
ciphersuites = TLS_AES_128_GCM_SHA256
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
TIMEOUTidle = 3600
`, s.Cert, s.Key, s.Roots)
	for i, h := range s.Hops {
		client := "yes"
		if s.Server {
			client = "no"
		}
		c += fmt.Sprintf("[h%d]\nclient = %s\naccept = %v\nconnect = %v\n", i, client, h.Listen, h.To)
	}
	return c
}

// playPeer is a peer that is written here. It returns only if it fails, or at
// once if the process has no such role.
func playPeer() error {
	role, arg := bench.Role()
	if role != "plain" && role != "xnet" && role != "shake" {
		return nil
	}
	bench.EndWithParent()
	if role == "shake" {
		return playShake(arg)
	}
	var s setup
	if err := json.Unmarshal([]byte(arg), &s); err != nil {
		return err
	}
	failed := make(chan error)
	for _, h := range s.Hops {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false) // as the others
		l, err := lc.Listen(context.Background(), "tcp", h.Listen.String())
		if err != nil {
			return err
		}
		go func() { failed <- serveHop(s, role, l.(*net.TCPListener), h.To) }()
	}
	bench.Ready()
	return <-failed
}

func serveHop(s setup, role string, l *net.TCPListener, to netip.AddrPort) error {
	onward := func() (*net.TCPConn, error) {
		c, err := net.Dial("tcp", to.String())
		if err != nil {
			return nil, err
		}
		return c.(*net.TCPConn), nil
	}
	if role == "plain" {
		return bench.Copy(l, func(*net.TCPConn) (*net.TCPConn, error) { return onward() })
	}
	cert, err := tls.LoadX509KeyPair(s.Cert, s.Key)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(s.Roots)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(b)
	cfg := &tls.Config{
		Certificates: []tls.Certificate{cert}, RootCAs: roots, ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert,
		ServerName: localPeer, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13, DynamicRecordSizingDisabled: true,
	}
	if s.Server {
		return xnetServer(l, cfg, onward)
	}
	return xnetClient(l, cfg, to)
}

// xnetServer takes CONNECT with golang.org/x/net/http2, with large frames and
// windows.
func xnetServer(l *net.TCPListener, cfg *tls.Config, onward func() (*net.TCPConn, error)) error {
	srv := &http2.Server{MaxReadFrameSize: 1 << 20, MaxUploadBufferPerStream: 4 << 20, MaxUploadBufferPerConnection: 16 << 20, MaxConcurrentStreams: 2000}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		up, err := onward()
		if err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		defer up.Close()
		rc := http.NewResponseController(w)
		_ = rc.Flush() // the headers
		bench.Join(handled{r.Body, w, rc}, up)
	})
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			t := tls.Server(c, cfg)
			if t.Handshake() != nil {
				_ = t.Close() // the client is at fault, and hears of it
				return
			}
			srv.ServeConn(t, &http2.ServeConnOpts{Handler: handler, BaseConfig: &http.Server{ErrorLog: log.New(io.Discard, "", 0)}})
		}()
	}
}

// handled is the server's side of a CONNECT. Its end is the handler's return.
type handled struct {
	io.Reader
	w  io.Writer
	rc *http.ResponseController
}

func (h handled) Write(b []byte) (int, error) {
	n, err := h.w.Write(b)
	return n, errors.Join(err, h.rc.Flush())
}
func (handled) CloseWrite() error { return nil }

// xnetClient makes a CONNECT for each connection, all on one of HTTP/2.
func xnetClient(l *net.TCPListener, cfg *tls.Config, to netip.AddrPort) error {
	tr := &http2.Transport{MaxReadFrameSize: 1 << 20, TLSClientConfig: cfg, StrictMaxConcurrentStreams: true, DialTLSContext: func(ctx context.Context, network, _ string, cfg *tls.Config) (net.Conn, error) {
		return (&tls.Dialer{Config: cfg}).DialContext(ctx, network, to.String())
	}}
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			body, feed := io.Pipe()
			r, err := http.NewRequest(http.MethodConnect, "https://"+localPeer+":443", body)
			if err != nil {
				return
			}
			resp, err := tr.RoundTrip(r)
			if err != nil {
				return
			}
			defer resp.Body.Close()
			bench.Join(asked{resp.Body, feed}, c)
		}()
	}
}

// asked is the client's side of a CONNECT.
type asked struct {
	io.Reader
	feed *io.PipeWriter
}

func (a asked) Write(b []byte) (int, error) { return a.feed.Write(b) }
func (a asked) CloseWrite() error           { return a.feed.Close() }

// shaken says what playShake is to do: keep so many connections to a server of
// HBONE, made one after the other.
type shaken struct {
	setup
	To     netip.AddrPort
	Conns  int
	Result string // file for the nanoseconds of CPU that they cost this end
}

// playShake opens tunnels, says so, and keeps them.
func playShake(arg string) error {
	var s shaken
	if err := json.Unmarshal([]byte(arg), &s); err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(s.Cert, s.Key)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(s.Roots)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(b)
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{cert},
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768},
		// The server has a SPIFFE ID and no host name.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots})
			return err
		},
	}
	var open []*tls.Conn // kept: what nobody refers to is closed
	one := func() error {
		c, err := tls.Dial("tcp", s.To.String(), cfg)
		if err != nil {
			return err
		}
		fr := http2.NewFramer(c, c)
		if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
			return err
		}
		if err := fr.WriteSettings(); err != nil {
			return err
		}
		open = append(open, c)
		_, err = fr.ReadFrame() // the server has taken our certificate
		return err
	}
	if err := one(); err != nil { // what is done once is not counted
		return err
	}
	before, err := bench.OwnCPU()
	if err != nil {
		return err
	}
	for range s.Conns {
		if err := one(); err != nil {
			return err
		}
	}
	after, err := bench.OwnCPU()
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.Result, []byte(fmt.Sprint((after - before).Nanoseconds())), 0o600); err != nil {
		return err
	}
	bench.Ready()
	select {} // open is kept until this process is killed
}
