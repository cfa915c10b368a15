package h1

import (
	"bufio"
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// FuzzDiffRequest holds the parser against net/http: whatever we take, it takes
// too, with the same method, target, host, framing, body and end.
func FuzzDiffRequest(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST /x?y=1 HTTP/1.1\r\nHost: a.b:80\r\nContent-Length: 3\r\n\r\nabc",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;e=1\r\nabc\r\n0\r\nX: y\r\n\r\n",
		"GET http://h/p HTTP/1.1\r\nHost: h\r\nConnection: close, x-a\r\nX-A: 1\r\n\r\n",
		"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
		"GET /ws HTTP/1.1\r\nHost: [::1]:8\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 0\r\n\r\n",
		"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		var p Parser
		var h msg.Head
		n, err := p.Request(&h, in)
		whole(t, in, n, err, func(p *Parser, h *msg.Head, b []byte) (int, error) { return p.Request(h, b) })
		if err != nil || n == 0 {
			return
		}
		rd := bytes.NewReader(in)
		br := bufio.NewReaderSize(rd, 1<<16)
		r, err := http.ReadRequest(br)
		if err != nil {
			if s := err.Error(); strings.Contains(s, "parse ") || strings.Contains(s, "invalid URI") {
				t.Skip() // percent-encoding is for who normalizes the path
			}
			t.Fatalf("taken, but net/http says %v: %q", err, in)
		}
		if r.Method != string(h.Method) {
			t.Fatalf("method %q, net/http %q: %q", h.Method, r.Method, in)
		}
		if r.Method != "CONNECT" && strings.HasPrefix(r.RequestURI, "/") && r.RequestURI != string(h.Path) {
			t.Fatalf("path %q, net/http %q: %q", h.Path, r.RequestURI, in)
		}
		if !strings.EqualFold(r.Host, string(h.Authority)) {
			t.Fatalf("host %q, net/http %q: %q", h.Authority, r.Host, in)
		}
		if p.Minor == 1 && r.Close != p.Close {
			t.Fatalf("close %v, net/http %v: %q", p.Close, r.Close, in)
		}
		if chunked := len(r.TransferEncoding) == 1; chunked != (h.Body == msg.Streamed) {
			t.Fatalf("chunked %v, net/http %v: %q", h.Body, chunked, in)
		}
		reparse(t, &h, in)
		if h.Body != msg.Streamed {
			if want := max(h.Length, 0); r.ContentLength != want {
				t.Fatalf("length %d, net/http %d: %q", h.Length, r.ContentLength, in)
			}
			return
		}
		diffChunks(t, in[n:], r.Body, func() int { return br.Buffered() + rd.Len() })
	})
}

// whole checks that what comes in two parts is read like what comes in one.
func whole(t *testing.T, in []byte, n int, err error, parse func(*Parser, *msg.Head, []byte) (int, error)) {
	var p Parser
	var h msg.Head
	cut := len(in) / 2
	n2, err2 := parse(&p, &h, in[:cut])
	if n2 == 0 && err2 == nil {
		n2, err2 = parse(&p, &h, in)
	}
	if n2 != n || (err2 == nil) != (err == nil) {
		t.Fatalf("in one %d, %v; in two %d, %v: %q", n, err, n2, err2, in)
	}
}

// reparse checks that what we write says what we have read.
func reparse(t *testing.T, h *msg.Head, in []byte) {
	if len(h.Authority) == 0 {
		return // of HTTP/1.0: there is no such request in HTTP/1.1
	}
	out := AppendRequest(nil, h)
	var p Parser
	var again msg.Head
	n, err := p.Request(&again, out)
	if err != nil || n != len(out) {
		t.Fatalf("wrote %q for %q, and read %d of it, %v", out, in, n, err)
	}
	if !bytes.Equal(h.Method, again.Method) || !bytes.Equal(h.Path, again.Path) || !bytes.Equal(h.Authority, again.Authority) ||
		h.Body != again.Body || max(h.Length, 0) != max(again.Length, 0) || !bytes.Equal(h.Protocol, again.Protocol) {
		t.Fatalf("wrote %q for %q", out, in)
	}
	if !bytes.Equal(h.AppendLines(nil), again.AppendLines(nil)) {
		t.Fatalf("fields are %q, then %q", h.AppendLines(nil), again.AppendLines(nil))
	}
}

// diffChunks holds the decoder against net/http's.
func diffChunks(t *testing.T, b []byte, theirs io.Reader, rest func() int) {
	var c Chunks
	var body []byte
	for in := b; len(b) > 0 && !c.Done; {
		n, data, err := c.Next(b)
		if err != nil {
			return
		}
		body = append(body, data...)
		if b = b[n:]; n == 0 {
			t.Fatalf("stands still in %q", in)
		}
	}
	if !c.Done {
		return
	}
	got, err := io.ReadAll(theirs)
	if err != nil {
		t.Fatalf("chunks are taken, but net/http says %v", err)
	}
	if !bytes.Equal(got, body) {
		t.Fatalf("body %q, net/http %q", body, got)
	}
	if r := rest(); r != len(b) {
		t.Fatalf("%d bytes left, net/http %d", len(b), r)
	}
}

// FuzzDiffResponse is the same for responses.
func FuzzDiffResponse(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"), true)
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX: y\r\n\r\n0\r\n\r\n"), false)
	f.Add([]byte("HTTP/1.0 304 \r\nConnection: close\r\n\r\n"), false)
	f.Add([]byte("HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"), false)
	f.Add([]byte("HTTP/1.1 204\r\n\r\n"), false)
	f.Fuzz(func(t *testing.T, in []byte, head bool) {
		method := "GET"
		if head {
			method = "HEAD"
		}
		var p Parser
		var h msg.Head
		n, err := p.Response(&h, in, []byte(method))
		whole(t, in, n, err, func(p *Parser, h *msg.Head, b []byte) (int, error) { return p.Response(h, b, []byte(method)) })
		if err != nil || n == 0 {
			return
		}
		rd := bytes.NewReader(in)
		br := bufio.NewReaderSize(rd, 1<<16)
		r, err := http.ReadResponse(br, &http.Request{Method: method})
		if err != nil {
			t.Fatalf("taken, but net/http says %v: %q", err, in)
		}
		if r.StatusCode != h.Status {
			t.Fatalf("status %d, net/http %d: %q", h.Status, r.StatusCode, in)
		}
		if head || h.Status < 200 || h.Status == 204 || h.Status == 304 {
			if h.Body != msg.NoBody {
				t.Fatalf("a body where there is none: %q", in)
			}
			return
		}
		if chunked := len(r.TransferEncoding) == 1; chunked != (h.Body == msg.Streamed && !p.UntilClose) {
			t.Fatalf("chunked %v, net/http %v: %q", h.Body, chunked, in)
		} else if chunked {
			diffChunks(t, in[n:], r.Body, func() int { return br.Buffered() + rd.Len() })
		} else if r.ContentLength != h.Length {
			t.Fatalf("length %d, net/http %d: %q", h.Length, r.ContentLength, in)
		}
	})
}

// FuzzChunksSplit checks that how a chunked body arrives changes nothing.
func FuzzChunksSplit(f *testing.F) {
	f.Add([]byte("3\r\nabc\r\n0\r\nX: y\r\n\r\n"), 4)
	f.Fuzz(func(t *testing.T, in []byte, step int) {
		if step <= 0 {
			return
		}
		read := func(step int) (body []byte, used int, done, bad bool) {
			var c Chunks
			for used < len(in) && !c.Done {
				part := in[used:min(used+step, len(in))]
				n, data, err := c.Next(part)
				if err != nil {
					return nil, 0, false, true
				}
				body = append(body, data...)
				used += n
			}
			return body, used, c.Done, false
		}
		a, n, done, bad := read(len(in) + 1)
		b, m, done2, bad2 := read(step)
		if !bytes.Equal(a, b) || n != m || done != done2 || bad != bad2 {
			t.Fatalf("in one %q %d %v %v, in steps of %d %q %d %v %v", a, n, done, bad, step, b, m, done2, bad2)
		}
	})
}
