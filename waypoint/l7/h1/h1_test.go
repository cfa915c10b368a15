package h1

import (
	"strings"
	"testing"

	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

const twelve = "GET /path/to/it?q=1 HTTP/1.1\r\nHost: cart.shop.svc.cluster.local:80\r\nUser-Agent: wrk/4.1\r\nAccept: */*\r\n" +
	"Accept-Encoding: gzip, br\r\nAccept-Language: en\r\nCookie: a=b; c=d\r\nX-Request-Id: 0d8f\r\nTraceparent: 00-1-2-01\r\n" +
	"Cache-Control: no-cache\r\nX-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: https\r\nConnection: keep-alive\r\n\r\n"

const answer = "HTTP/1.1 200 OK\r\nServer: x\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\n\r\n"

// Reading and writing heads must not allocate: it is done for every request.
func TestAllocations(t *testing.T) {
	var p Parser
	var h msg.Head
	in, back := []byte(twelve), []byte(answer)
	out := make([]byte, 0, 4096)
	n := testing.AllocsPerRun(1000, func() {
		if n, err := p.Request(&h, in); n != len(in) || err != nil {
			t.Fatal(n, err)
		}
		msg.Set(&h, "x-envoy-attempt-count", "1")
		AppendRequest(out, &h)
		if n, err := p.Response(&h, back, []byte("GET")); n != len(back) || err != nil {
			t.Fatal(n, err)
		}
		AppendResponse(out, &h, Reader{Minor: 1})
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// A line that does not end with CRLF is refused as soon as it is there, not
// when the head's end does not come.
func TestBareLineFeedAtOnce(t *testing.T) {
	var p Parser
	var h msg.Head
	if _, err := p.Request(&h, []byte("GET / HTTP/1.1\nHost:")); err != errLineEnd {
		t.Errorf("got %v", err)
	}
}

// A head is refused when it cannot become small enough any more.
func TestLimits(t *testing.T) {
	p := Parser{Limits: Limits{Head: 100, Fields: 3, Target: 10}}
	var h msg.Head
	for _, tt := range []struct {
		in   string
		want error
	}{
		{"GET /" + strings.Repeat("a", 10) + " HTTP/1.1\r\nHost: a\r\n\r\n", errLongTarget},
		{"GET / HTTP/1.1\r\nHost: a\r\na: b\r\nc: d\r\ne: f\r\n\r\n", errLarge},
		{"GET / HTTP/1.1\r\nHost: a\r\na: " + strings.Repeat("b", 80), errLarge},
		{"GET / HTTP/1.1\r\nHost: a\r\na: b\r\nc: d\r\n\r\n", nil},
	} {
		p.scanned = 0
		if _, err := p.Request(&h, []byte(tt.in)); err != tt.want {
			t.Errorf("%q: %v, want %v", tt.in, err, tt.want)
		}
	}
}

// An answer that cannot be told from the next one ends its connection.
func TestAmbiguousAnswers(t *testing.T) {
	for _, tt := range []struct {
		name, in, method string
		closes           bool
		refused          bool
	}{
		{"204 that announces a body", "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", "GET", true, false},
		{"204 in chunks", "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", "GET", true, false},
		{"204", "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", "GET", false, false},
		{"100 that announces a body", "HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\n", "GET", true, false},
		{"without a length", "HTTP/1.1 200 OK\r\n\r\n", "GET", true, false},
		{"HEAD without a length", "HTTP/1.1 200 OK\r\n\r\n", "HEAD", false, false},
		{"HTTP/1.0", "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", "GET", true, false},
		{"HTTP/1.0 that keeps", "HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\n", "GET", false, false},
		{"both framings", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", "GET", false, true},
		{"chunks in HTTP/1.0", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "GET", false, true},
		{"two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", "GET", false, true},
		{"another coding", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "GET", false, true},
		{"status 999", "HTTP/1.1 999 X\r\n\r\n", "GET", false, true},
		{"status 20", "HTTP/1.1 20 X\r\n\r\n", "GET", false, true},
		{"NUL in the reason", "HTTP/1.1 200 O\x00K\r\n\r\n", "GET", false, true},
		{"bare LF", "HTTP/1.1 200 OK\nContent-Length: 5\r\n\r\n", "GET", false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var p Parser
			var h msg.Head
			_, err := p.Response(&h, []byte(tt.in), []byte(tt.method))
			if (err != nil) != tt.refused {
				t.Fatalf("got %v", err)
			}
			if err == nil && p.Close != tt.closes {
				t.Errorf("close is %v", p.Close)
			}
		})
	}
}

func BenchmarkRequest(b *testing.B) {
	var p Parser
	var h msg.Head
	in := []byte(twelve)
	b.ReportAllocs()
	for b.Loop() {
		p.Request(&h, in)
	}
}

func BenchmarkForward(b *testing.B) {
	var p Parser
	var h msg.Head
	in := []byte(twelve)
	out := make([]byte, 0, 4096)
	b.ReportAllocs()
	for b.Loop() {
		p.Request(&h, in)
		AppendRequest(out, &h)
	}
}

// A line of trailers that begins like the end is none.
func TestTrailers(t *testing.T) {
	for in, want := range map[string]string{
		"0\r\n\r\n":                       "",
		"0\r\nA: b\r\n\r\n":               "A: b\r\n",
		"0\r\nContent-Length: 1\r\n\r\n":  "",
		"0\r\n\r\r\n\r\n":                 "refused",
		"0\r\nA: b\r\n\rX: y\r\n\r\n":     "refused",
		"0\r\n A: b\r\n\r\n":              "refused",
		"0\r\nA\r\n\r\n":                  "refused",
		"0\r\nA: b\r\n folded: c\r\n\r\n": "refused",
	} {
		var c Chunks
		got := ""
		n, _, err := c.Next([]byte(in))
		if h := c.Trailer(); err != nil {
			got = "refused"
		} else if !c.Done || n != len(in) {
			t.Errorf("%q: done %v after %d", in, c.Done, n)
		} else if h != nil {
			got = string(h.AppendLines(nil))
		}
		if got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestReason(t *testing.T) {
	for status, want := range map[int]string{100: "Continue", 200: "OK", 511: "Network Authentication Required", 299: "Unknown", 599: "Unknown", 0: "Unknown", -1: "Unknown"} {
		if got := Reason(status); got != want {
			t.Errorf("%d is %q, want %q", status, got, want)
		}
	}
}
