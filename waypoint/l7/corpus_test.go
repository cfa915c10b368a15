package l7

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// recorded is a backend that keeps the bytes that it gets, and answers each
// head that ends. It knows nothing of framing: what a proxy forwards is what
// counts.
type recorded struct {
	mu  sync.Mutex
	got strings.Builder
}

func (r *recorded) serve(c net.Conn) {
	b := make([]byte, 128<<10)
	for {
		n, err := c.Read(b)
		r.mu.Lock()
		r.got.Write(b[:n])
		r.mu.Unlock()
		if err != nil {
			return
		}
		if strings.Contains(string(b[:n]), "\r\n\r\n") {
			go io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	}
}

// The corpus holds what has been used to make two servers see different
// requests in the same bytes. A request is refused and its connection closed,
// or exactly want reaches the endpoint.
func TestSmuggling(t *testing.T) {
	const h = "Host: cart\r\n"
	const fields = "x-forwarded-for: 10.0.9.9\r\nx-forwarded-proto: http\r\nx-envoy-attempt-count: 1\r\n"
	get := func(path string) string { return "GET " + path + " HTTP/1.1\r\nhost: cart\r\n" + fields + "\r\n" }
	chunked := func(body string) string {
		return "POST / HTTP/1.1\r\nhost: cart\r\n" + fields + "transfer-encoding: chunked\r\n\r\n" + body
	}
	post := func(line, body string) string {
		return "POST / HTTP/1.1\r\nhost: cart\r\n" + line + fields + fmt.Sprintf("content-length: %d\r\n\r\n%s", len(body), body)
	}
	many := strings.Repeat("x: y\r\n", 101)
	tests := []struct {
		name, in string
		status   int
		want     string // "" is nothing
	}{
		{"ok GET", "GET / HTTP/1.1\r\n" + h + "\r\n", 200, get("/")},
		{"CL+TE", "POST / HTTP/1.1\r\n" + h + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, ""},
		{"TE+CL", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400, ""},
		{"CL twice, different", "POST / HTTP/1.1\r\n" + h + "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400, ""},
		{"CL twice, equal", "POST / HTTP/1.1\r\n" + h + "Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400, ""},
		{"CL list", "POST / HTTP/1.1\r\n" + h + "Content-Length: 3,3\r\n\r\nabc", 400, ""},
		{"CL +3", "POST / HTTP/1.1\r\n" + h + "Content-Length: +3\r\n\r\nabc", 400, ""},
		{"CL 0x3", "POST / HTTP/1.1\r\n" + h + "Content-Length: 0x3\r\n\r\nabc", 400, ""},
		{"CL -1", "POST / HTTP/1.1\r\n" + h + "Content-Length: -1\r\n\r\nabc", 400, ""},
		{"CL of nothing", "POST / HTTP/1.1\r\n" + h + "Content-Length: \r\n\r\nabc", 400, ""},
		{"CL overflow", "POST / HTTP/1.1\r\n" + h + "Content-Length: 18446744073709551619\r\n\r\nabc", 400, ""},
		{"CL with leading zeros", "POST / HTTP/1.1\r\n" + h + "Content-Length: 003\r\n\r\nabc", 200, post("", "abc")},
		{"space before the colon of CL", "POST / HTTP/1.1\r\n" + h + "Content-Length : 3\r\n\r\nabc", 400, ""},
		{"space before the colon of TE", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400, ""},
		{"TE xchunked", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400, ""},
		{"TE chunked, identity", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400, ""},
		{"TE gzip, chunked", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400, ""},
		{"TE twice", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, ""},
		{"TE with a vertical tab", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", 400, ""},
		{"TE empty", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding:\r\n\r\n0\r\n\r\n", 400, ""},
		{"TE in HTTP/1.0", "POST / HTTP/1.0\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, ""},
		{"TE in upper case", "POST / HTTP/1.1\r\n" + h + "TRANSFER-ENCODING: CHUNKED\r\n\r\n0\r\n\r\n", 200, chunked("0\r\n\r\n")},
		{"Transfer_Encoding", "POST / HTTP/1.1\r\n" + h + "Transfer_Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc", 400, ""},
		{"Content_Length", "POST / HTTP/1.1\r\n" + h + "Content_Length: 30\r\nContent-Length: 3\r\n\r\nabc", 400, ""},
		{"folded field", "GET / HTTP/1.1\r\n" + h + "X: a\r\n b\r\n\r\n", 400, ""},
		{"folded TE", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400, ""},
		{"lines that end with LF", "GET / HTTP/1.1\nHost: cart\n\n", 400, ""},
		{"a field that ends with LF", "GET / HTTP/1.1\r\n" + h + "X: a\nY: b\r\n\r\n", 400, ""},
		{"CR in a value", "GET / HTTP/1.1\r\n" + h + "X: a\rb\r\n\r\n", 400, ""},
		{"NUL in a value", "GET / HTTP/1.1\r\n" + h + "X: a\x00b\r\n\r\n", 400, ""},
		{"NUL in a name", "GET / HTTP/1.1\r\n" + h + "X\x00: a\r\n\r\n", 400, ""},
		{"0x01 in a value", "GET / HTTP/1.1\r\n" + h + "X: a\x01b\r\n\r\n", 400, ""},
		{"0x80 in a value", "GET / HTTP/1.1\r\n" + h + "X: a\x80b\r\n\r\n", 200, "GET / HTTP/1.1\r\nhost: cart\r\nX: a\x80b\r\n" + fields + "\r\n"},
		{"no Host", "GET / HTTP/1.1\r\n\r\n", 400, ""},
		{"two Hosts", "GET / HTTP/1.1\r\n" + h + "Host: evil\r\n\r\n", 400, ""},
		{"two equal Hosts", "GET / HTTP/1.1\r\n" + h + h + "\r\n", 400, ""},
		{"empty Host", "GET / HTTP/1.1\r\nHost:\r\n\r\n", 400, ""},
		{"Host with a path", "GET / HTTP/1.1\r\nHost: cart/x\r\n\r\n", 400, ""},
		{"Host with user information", "GET / HTTP/1.1\r\nHost: cart@evil\r\n\r\n", 400, ""},
		{"Host with two ports", "GET / HTTP/1.1\r\nHost: cart:80:81\r\n\r\n", 400, ""},
		{"absolute target of another host", "GET http://evil/ HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"absolute target with user information", "GET http://x@cart/ HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"absolute target of another scheme", "GET ftp://cart/ HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"absolute target", "GET http://cart/x HTTP/1.1\r\n" + h + "\r\n", 200, get("/x")},
		{"asterisk of a GET", "GET * HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"authority of a GET", "GET cart:80 HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"two spaces in the line", "GET  / HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"tab in the line", "GET\t/ HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"space in the target", "GET /a b HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"space behind the line", "GET / HTTP/1.1 \r\n" + h + "\r\n", 400, ""},
		{"HTTP/1.2", "GET / HTTP/1.2\r\n" + h + "\r\n", 400, ""},
		{"HTTP/0.9", "GET /\r\n\r\n", 400, ""},
		{"HTTP/2.0", "GET / HTTP/2.0\r\n" + h + "\r\n", 400, ""},
		{"http/1.1", "GET / http/1.1\r\n" + h + "\r\n", 400, ""},
		{"CRLF before the line", "\r\nGET / HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"field without a colon", "GET / HTTP/1.1\r\n" + h + "X\r\n\r\n", 400, ""},
		{"field without a name", "GET / HTTP/1.1\r\n" + h + ": x\r\n\r\n", 400, ""},
		{"space before the first field", "GET / HTTP/1.1\r\n X: y\r\n" + h + "\r\n", 400, ""},
		{"fragment in the target", "GET /a#b HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"0x80 in the target", "GET /\xe9 HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"Connection: content-length", "POST / HTTP/1.1\r\n" + h + "Connection: content-length\r\nContent-Length: 3\r\n\r\nabc", 400, ""},
		{"Connection: host", "GET / HTTP/1.1\r\n" + h + "Connection: Host\r\n\r\n", 400, ""},
		{"Connection: x-forwarded-for", "GET / HTTP/1.1\r\n" + h + "Connection: close, X-Forwarded-For\r\n\r\n", 400, ""},
		{"Connection: authorization", "GET / HTTP/1.1\r\n" + h + "Connection: authorization\r\nAuthorization: x\r\n\r\n", 400, ""},
		{"chunk size 0x3", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n", 400, ""},
		{"chunk size +3", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n", 400, ""},
		{"chunk size with a space", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n3 \r\nabc\r\n0\r\n\r\n", 400, ""},
		{"chunk size overflow", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n10000000000000003\r\nabc\r\n0\r\n\r\n", 400, ""},
		{"chunk size that ends with LF", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n", 400, ""},
		{"extension that ends with LF", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n3;x\nabc\r\n0\r\n\r\n", 400, ""},
		{"extensions are dropped", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n3;x=\"y\"\r\nabc\r\n0;z\r\n\r\n", 200, chunked("3\r\nabc\r\n0\r\n\r\n")},
		{"chunk without its CRLF", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n", 400, ""},
		{"chunk size of nothing", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n\r\nabc\r\n0\r\n\r\n", 400, ""},
		{"trailers that frame are dropped", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nContent-Length: 5\r\nX-Sum: 1\r\nHost: evil\r\n\r\n", 200, chunked("3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n")},
		{"trailer without a colon", "POST / HTTP/1.1\r\n" + h + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n000\r\n\r\n", 400, ""},
		{"unknown expectation", "POST / HTTP/1.1\r\n" + h + "Expect: magic\r\nContent-Length: 3\r\n\r\nabc", 417, ""},
		{"GET with a body", "GET / HTTP/1.1\r\n" + h + "Content-Length: 3\r\n\r\nabc", 200, "GET / HTTP/1.1\r\nhost: cart\r\n" + fields + "content-length: 3\r\n\r\nabc"},
		{"101 fields", "GET / HTTP/1.1\r\n" + h + many + "\r\n", 431, ""},
		{"70 KiB of head", "GET / HTTP/1.1\r\n" + h + "X: " + strings.Repeat("a", 70<<10) + "\r\n\r\n", 431, ""},
		{"9 KiB of target", "GET /" + strings.Repeat("a", 9<<10) + " HTTP/1.1\r\n" + h + "\r\n", 414, ""},
		{"%2e%2e", "GET /a/%2e%2e/admin HTTP/1.1\r\n" + h + "\r\n", 200, get("/admin")},
		{"%2e%2e above the root", "GET /%2e%2e/%2e%2e/admin HTTP/1.1\r\n" + h + "\r\n", 200, get("/admin")},
		{"two slashes", "GET //admin HTTP/1.1\r\n" + h + "\r\n", 200, get("/admin")},
		{"%2f stays, and is one form", "GET /a%2fadmin HTTP/1.1\r\n" + h + "\r\n", 200, get("/a%2Fadmin")},
		{"backslash", "GET /a\\..\\admin HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"%00", "GET /a%00b HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"broken encoding", "GET /a%4 HTTP/1.1\r\n" + h + "\r\n", 400, ""},
		{"upgrade to h2c is not passed on", "GET / HTTP/1.1\r\n" + h + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n", 200, get("/")},
		{"Upgrade that Connection does not name", "GET / HTTP/1.1\r\n" + h + "Upgrade: websocket\r\n\r\n", 200, get("/")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				var rec recorded
				w.everywhere(rec.serve)
				c := w.client(80)
				c.say(tt.in)
				r, _ := c.answer("POST")
				if r.StatusCode != tt.status {
					t.Errorf("answered %d, want %d", r.StatusCode, tt.status)
				}
				if tt.status != 200 {
					if !r.Close {
						t.Error("the answer does not say close")
					}
					c.closed()
				}
				synctest.Wait()
				rec.mu.Lock()
				got := rec.got.String()
				rec.mu.Unlock()
				if i := strings.Index(got, "x-request-id"); i >= 0 {
					end := strings.Index(got[i:], "\r\n")
					got = got[:i] + got[i+end+2:]
				}
				if got != tt.want {
					t.Errorf("forwarded %q,\nwant      %q", got, tt.want)
				}
			})
		})
	}
}

// A chunked body that goes bad after its head was forwarded must end the try,
// and the client must hear of it.
func TestBadChunkLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.everywhere(func(c net.Conn) { io.Copy(io.Discard, c) })
		c := w.client(80)
		go func() {
			io.WriteString(c.Conn, "POST / HTTP/1.1\r\nHost: cart\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
			time.Sleep(time.Second)
			io.WriteString(c.Conn, "zz\r\n")
		}()
		if r, _ := c.answer("POST"); r.StatusCode != 400 || !r.Close {
			t.Errorf("got %v", r)
		}
		c.closed()
		if x := w.last(); x.Flags != FlagDownstreamProtocol {
			t.Errorf("flags are %v", x.Flags)
		}
	})
}
