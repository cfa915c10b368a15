package l7

import (
	"bytes"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

const (
	logTime = "2006-01-02T15:04:05.000Z"
	// maxLogged bounds what clients can put into one field of a line.
	maxLogged = 2 << 10
)

// A stamp is the second of the last line: most others are of the same one. It may
// be used by many goroutines.
type stamp struct{ last atomic.Pointer[second] }

type second struct {
	unix int64
	text string // up to the point before the milliseconds
}

// append appends t in the form logTime.
func (s *stamp) append(b []byte, t time.Time) []byte {
	at := s.last.Load()
	if unix := t.Unix(); at == nil || at.unix != unix {
		at = &second{unix, t.UTC().Format("2006-01-02T15:04:05.")}
		s.last.Store(at)
	}
	ms := t.Nanosecond() / 1e6
	b = append(b, at.text...)
	return append(b, '0'+byte(ms/100), '0'+byte(ms/10%10), '0'+byte(ms%10), 'Z')
}

// appendTextLine appends a line in the format that Envoy has by default in a
// mesh: parsers count its fields. What has no value is "-".
func appendTextLine(b []byte, x *Exchange, s *stamp) []byte {
	h := &x.Request
	b = append(b, '[')
	b = s.append(b, x.Start)
	b = append(b, `] "`...)
	b = appendText(b, h.Method)
	b = append(b, ' ')
	b = appendText(b, x.OriginalPath)
	b = append(b, ' ')
	b = append(b, x.Version.String()...)
	b = append(b, `" `...)
	b = strconv.AppendInt(b, int64(x.Response.Status), 10)
	b = append(b, ' ')
	b = x.Flags.Append(b)
	b = append(b, ' ')
	response, connection := detailsOf(x)
	b = appendWord(b, response)
	b = append(b, ' ')
	b = appendWord(b, connection)
	b = append(b, ` "`...)
	b = appendText(b, x.Failure)
	b = append(b, `" `...)
	b = strconv.AppendInt(b, x.RequestBytes, 10)
	b = append(b, ' ')
	b = strconv.AppendInt(b, x.ResponseBytes, 10)
	b = append(b, ' ')
	b = strconv.AppendInt(b, x.End.Sub(x.Start).Milliseconds(), 10)
	b = append(b, ' ')
	b = appendServiceTime(b, x, "-")
	b = append(b, ` "`...)
	b = appendText(b, h.Get(msg.XForwardedFor))
	b = append(b, `" "`...)
	b = appendText(b, h.Get(msg.UserAgent))
	b = append(b, `" "`...)
	b = appendText(b, x.RequestID)
	b = append(b, `" "`...)
	b = appendText(b, h.Authority)
	b = append(b, `" "`...)
	b = appendUpstream(b, x, "-")
	b = append(b, `" `...)
	b = appendCluster(b, x, "-")
	b = append(b, " - "...) // our end of the connection to the endpoint is one of a tunnel
	b = append(b, x.known.ends...)
	b = append(b, " - "...) // the server's name is that of a tunnel
	b = appendWord(b, x.Matched.Name)
	return append(b, '\n')
}

// detailsOf returns the details of a response, or of how a connection ended.
func detailsOf(x *Exchange) (response, connection string) {
	if x.Version == NotHTTP {
		return "", x.Details
	}
	return x.Details, ""
}

// appendText appends a value that stands between quotes. What would end them is
// escaped, and so is what cannot be shown.
func appendText[T string | []byte](b []byte, s T) []byte {
	if len(s) == 0 {
		return append(b, '-')
	}
	from := 0
	s = s[:min(len(s), maxLogged)]
	for i := msg.PlainLen(s); i < len(s); i++ {
		if c := s[i]; c < ' ' || c == 0x7f || c == '"' {
			b = append(append(b, s[from:i]...), '\\', 'x', hexDigits[c>>4], hexDigits[c&15])
			from = i + 1
		}
	}
	return append(b, s[from:]...)
}

// appendWord appends a value that has no spaces.
func appendWord(b []byte, s string) []byte {
	if s == "" {
		return append(b, '-')
	}
	from := len(b)
	b = appendText(b, s)
	for i := bytes.IndexByte(b[from:], ' '); i >= 0; i = bytes.IndexByte(b[from:], ' ') {
		from += i
		b[from] = '_'
	}
	return b
}

// appendServiceTime appends how long the endpoint took to answer, in ms.
func appendServiceTime(b []byte, x *Exchange, none string) []byte {
	if x.Answered.IsZero() || x.Sent.IsZero() {
		return append(b, none...)
	}
	return strconv.AppendInt(b, max(0, x.Answered.Sub(x.Sent).Milliseconds()), 10)
}

func appendUpstream(b []byte, x *Exchange, none string) []byte {
	if x.Endpoint == nil || x.Endpoint.logged == "" {
		return append(b, none...)
	}
	return append(b, x.Endpoint.logged...)
}

// appendEndpoint appends where an endpoint is, and nothing if that is not known.
func appendEndpoint(b []byte, w *mesh.Workload, a netip.AddrPort) []byte {
	if w != nil && w.Host != "" && (!a.IsValid() || a.Addr().IsUnspecified()) {
		b = append(append(b, w.Host...), ':')
		return strconv.AppendUint(b, uint64(a.Port()), 10)
	}
	return appendAddress(b, a, "")
}

// appendEnds appends the addresses of a connection: whom the client asked for,
// and its own.
func appendEnds(b []byte, f *Facts) []byte {
	b = appendAddress(b, f.Destination, "-")
	return appendAddress(append(b, ' '), f.Source, "-")
}

func appendAddress(b []byte, a netip.AddrPort, none string) []byte {
	if !a.IsValid() {
		return append(b, none...)
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()).AppendTo(b)
}

// appendCluster appends what tools know the backend by:
// inbound-vip|port|http/subset|host.
func appendCluster(b []byte, x *Exchange, none string) []byte {
	switch {
	case x.BackendService == nil:
		return append(b, none...)
	case x.cluster != nil && x.Version != NotHTTP:
		return append(b, x.cluster.logged...)
	}
	k := clusterKey{service: x.BackendService.Name, port: x.BackendPort}
	if x.Drawn != nil {
		k.subset = x.Drawn.Spec.Subset
	}
	return appendKey(b, k, x.Version)
}

// appendKey appends the same for the endpoints of a service that are k's.
func appendKey(b []byte, k clusterKey, v Version) []byte {
	b = append(b, "inbound-vip|"...)
	b = strconv.AppendUint(b, uint64(k.port), 10)
	if v == NotHTTP {
		b = append(b, "|tcp"...)
	} else {
		b = append(b, "|http"...)
	}
	if k.subset != "" {
		b = append(append(b, '/'), k.subset...)
	}
	return append(append(b, '|'), k.service.Host...)
}

// appendJSONLine appends the same as one object of JSON, with the names that
// Istio gives them. What has no value is null.
func appendJSONLine(b []byte, x *Exchange, s *stamp) []byte {
	h := &x.Request
	b = append(b, `{"start_time":"`...)
	b = s.append(b, x.Start)
	b = append(b, '"')
	b = appendField(b, "method", h.Method)
	b = appendField(b, "path", x.OriginalPath)
	b = appendField(b, "protocol", x.Version.String())
	b = appendNumber(b, "response_code", int64(x.Response.Status))
	b = append(b, `,"response_flags":"`...)
	b = append(x.Flags.Append(b), '"')
	response, connection := detailsOf(x)
	b = appendField(b, "response_code_details", response)
	b = appendField(b, "connection_termination_details", connection)
	b = appendField(b, "upstream_transport_failure_reason", x.Failure)
	b = appendNumber(b, "bytes_received", x.RequestBytes)
	b = appendNumber(b, "bytes_sent", x.ResponseBytes)
	b = appendNumber(b, "duration", int64(x.End.Sub(x.Start)/time.Millisecond))
	b = append(b, `,"upstream_service_time":`...)
	b = appendServiceTime(b, x, "null")
	b = appendField(b, "x_forwarded_for", h.Get(msg.XForwardedFor))
	b = appendField(b, "user_agent", h.Get(msg.UserAgent))
	b = appendField(b, "request_id", x.RequestID)
	b = appendField(b, "authority", h.Authority)
	var room [128]byte
	b = appendField(b, "upstream_host", appendUpstream(room[:0], x, ""))
	var cluster [320]byte
	b = appendField(b, "upstream_cluster", appendCluster(cluster[:0], x, ""))
	b = append(b, `,"upstream_local_address":null`...)
	b = appendField(b, "downstream_local_address", appendAddress(room[:0], x.Facts.Destination, ""))
	b = appendField(b, "downstream_remote_address", appendAddress(room[:0], x.Facts.Source, ""))
	b = append(b, `,"requested_server_name":null`...)
	b = appendField(b, "route_name", x.Matched.Name)
	if x.Facts.Peer != (mesh.Identity{}) {
		b = append(b, `,"downstream_peer":"spiffe://`...)
		b = append(append(b, x.Facts.Peer.TrustDomain...), "/ns/"...)
		b = append(append(b, x.Facts.Peer.Namespace...), "/sa/"...)
		b = append(append(b, x.Facts.Peer.ServiceAccount...), '"')
	}
	return append(b, "}\n"...)
}

func appendNumber(b []byte, name string, n int64) []byte {
	b = append(append(append(b, `,"`...), name...), `":`...)
	return strconv.AppendInt(b, n, 10)
}

// appendField appends a text as JSON, which is always valid UTF-8.
func appendField[T string | []byte](b []byte, name string, s T) []byte {
	b = append(append(append(b, `,"`...), name...), `":`...)
	if len(s) == 0 {
		return append(b, "null"...)
	}
	s = s[:min(len(s), maxLogged)]
	b = append(b, '"')
	for i := 0; i < len(s); {
		c := s[i]
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c < ' ' || c == 0x7f:
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		case c < utf8.RuneSelf:
			b = append(b, c)
		default:
			r, n := decodeRune(s[i:])
			b = utf8.AppendRune(b, r)
			i += n
			continue
		}
		i++
	}
	return append(b, '"')
}

// decodeRune returns the first rune of s, which is not ASCII, and its length.
func decodeRune[T string | []byte](s T) (rune, int) {
	var room [utf8.UTFMax]byte
	return utf8.DecodeRune(room[:copy(room[:], s)])
}
