package hbone

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"

	"github.com/weft-mesh/weft/internal/http2"
	"golang.org/x/net/http2/hpack"
)

// A Header is what travels beside the target of a connection. Every part may
// be empty.
type Header struct {
	Forwarded   string // RFC 7239: who asked, as the sender says; not verified
	Baggage     string // W3C baggage: the sender's workload, for telemetry only
	Traceparent string // W3C trace context
	Network     string // x-forwarded-network, on the inner hop between networks
}

// errNotConnect is a well-formed request for something else than a tunnel. It
// is answered 400.
var errNotConnect = errors.New("request is not CONNECT")

// requestOf reads the header list of a request. The error is errNotConnect or
// a *http2.MalformedError.
func requestOf(fields []http2.Field) (authority string, h Header, err error) {
	var method, scheme, path, host string
	var hasScheme, hasPath, hasAuthority bool
	for _, f := range fields {
		switch f.Name {
		case ":method":
			method = f.Value
		case ":authority":
			authority, hasAuthority = f.Value, true
		case ":scheme":
			scheme, hasScheme = f.Value, true
		case ":path":
			path, hasPath = f.Value, true
		case "host":
			host = f.Value
		case "content-length":
			// The DATA of a tunnel is not content (RFC 9110 9.3.6): a length
			// could only mislead whoever believes it.
			return "", Header{}, malformedf("content-length on a tunnel")
		default:
			if f.IsPseudo() {
				return "", Header{}, malformedf("unknown %q", f.Name)
			}
			h.set(f)
		}
	}
	switch {
	case method == "":
		return "", Header{}, malformedf("no :method")
	case method != "CONNECT":
		if scheme == "" || path == "" {
			return "", Header{}, malformedf("%q without :scheme or :path", method) // RFC 9113 8.3.1
		}
		return "", Header{}, errNotConnect
	case hasScheme, hasPath:
		return "", Header{}, malformedf("CONNECT with :scheme or :path") // RFC 9113 8.5
	case !hasAuthority:
		return "", Header{}, malformedf("CONNECT without :authority")
	case host != "" && host != authority:
		return "", Header{}, malformedf("host and :authority differ") // RFC 9113 8.3.1
	}
	return authority, h, nil
}

// responseOf reads the header list of a response.
func responseOf(fields []http2.Field) (status int, h Header, err error) {
	for _, f := range fields {
		switch {
		case f.Name == ":status":
			n, err := strconv.Atoi(f.Value)
			if err != nil || len(f.Value) != 3 || n < 100 {
				return 0, Header{}, malformedf(":status is %q", f.Value)
			}
			status = n
		case f.IsPseudo():
			return 0, Header{}, malformedf("%q in a response", f.Name)
		default:
			h.set(f)
		}
	}
	if status == 0 {
		return 0, Header{}, malformedf("no :status")
	}
	return status, h, nil
}

func malformedf(format string, args ...any) error {
	return &http2.MalformedError{Reason: fmt.Sprintf(format, args...)}
}

// set takes the fields that a Header knows and passes over the others. Of a
// field that comes twice the last counts, as nothing but telemetry reads them.
func (h *Header) set(f http2.Field) {
	switch f.Name {
	case "forwarded":
		h.Forwarded = f.Value
	case "baggage":
		h.Baggage = f.Value
	case "traceparent":
		h.Traceparent = f.Value
	case "x-forwarded-network":
		h.Network = f.Value
	}
}

// A headerWriter encodes the header blocks of one connection, in order.
type headerWriter struct {
	enc   *hpack.Encoder
	buf   bytes.Buffer
	known bool // peerTable was called
}

func newHeaderWriter() *headerWriter {
	w := &headerWriter{}
	w.enc = hpack.NewEncoder(&w.buf)
	w.enc.SetMaxDynamicTableSizeLimit(http2.DefaultTableLen)
	// Until its SETTINGS have come the peer has a table of 4096 bytes
	// (RFC 7541 4.2), but some have the size they are about to announce.
	w.enc.SetMaxDynamicTableSize(0)
	return w
}

// peerTable notes the size of the table that the peer has announced, or
// DefaultTableLen if it did not.
func (w *headerWriter) peerTable(n uint32) {
	w.known = true
	w.enc.SetMaxDynamicTableSize(min(n, http2.DefaultTableLen))
}

// request encodes a CONNECT. The block is valid until the next call.
func (w *headerWriter) request(authority string, h Header) []byte {
	w.buf.Reset()
	w.field(":method", "CONNECT", false)
	w.field(":authority", authority, false)
	w.header(h)
	return w.buf.Bytes()
}

// response encodes an answer. The block is valid until the next call.
func (w *headerWriter) response(status int, h Header) []byte {
	w.buf.Reset()
	w.field(":status", strconv.Itoa(status), false)
	w.header(h)
	return w.buf.Bytes()
}

func (w *headerWriter) header(h Header) {
	w.field("baggage", h.Baggage, false)
	// These differ with each connection: they would only push the others out
	// of the table.
	w.field("forwarded", h.Forwarded, true)
	w.field("traceparent", h.Traceparent, true)
	w.field("x-forwarded-network", h.Network, false)
}

func (w *headerWriter) field(name, value string, unique bool) {
	if value == "" {
		return
	}
	// Writing to a bytes.Buffer does not fail.
	_ = w.enc.WriteField(hpack.HeaderField{Name: name, Value: value, Sensitive: unique})
}
