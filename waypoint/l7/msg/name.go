package msg

// An ID names a field that the engine knows. The zero ID is Other.
type ID uint8

// The known fields.
const (
	Other ID = iota
	Accept
	Authorization
	Baggage
	Connection
	ContentLength
	ContentType
	Cookie
	Date
	Expect
	Forwarded
	GRPCMessage
	GRPCStatus
	GRPCTimeout
	Host
	HTTP2Settings
	KeepAlive
	Location
	Origin
	ProxyAuthenticate
	ProxyAuthorization
	ProxyConnection
	Referer
	Server
	SetCookie
	TE
	Traceparent
	Tracestate
	Trailer
	TransferEncoding
	Upgrade
	UserAgent
	Via
	XEnvoyAttemptCount
	XEnvoyOriginalPath
	XEnvoyOverloaded
	XEnvoyPeerMetadata
	XEnvoyPeerMetadataID
	XEnvoyUpstreamServiceTime
	XForwardedClientCert
	XForwardedFor
	XForwardedHost
	XForwardedPort
	XForwardedProto
	XRequestID
)

// names are those of the known fields. It is read only.
var names = [...]string{
	Accept: "accept", Authorization: "authorization", Baggage: "baggage", Connection: "connection",
	ContentLength: "content-length", ContentType: "content-type", Cookie: "cookie", Date: "date",
	Expect: "expect", Forwarded: "forwarded", GRPCMessage: "grpc-message", GRPCStatus: "grpc-status",
	GRPCTimeout: "grpc-timeout", Host: "host", HTTP2Settings: "http2-settings", KeepAlive: "keep-alive",
	Location: "location", Origin: "origin", ProxyAuthenticate: "proxy-authenticate",
	ProxyAuthorization: "proxy-authorization", ProxyConnection: "proxy-connection", Referer: "referer",
	Server: "server", SetCookie: "set-cookie", TE: "te", Traceparent: "traceparent", Tracestate: "tracestate",
	Trailer: "trailer", TransferEncoding: "transfer-encoding", Upgrade: "upgrade", UserAgent: "user-agent",
	Via: "via", XEnvoyAttemptCount: "x-envoy-attempt-count", XEnvoyOriginalPath: "x-envoy-original-path",
	XEnvoyOverloaded: "x-envoy-overloaded", XEnvoyPeerMetadata: "x-envoy-peer-metadata",
	XEnvoyPeerMetadataID:      "x-envoy-peer-metadata-id",
	XEnvoyUpstreamServiceTime: "x-envoy-upstream-service-time",
	XForwardedClientCert:      "x-forwarded-client-cert",
	XForwardedFor:             "x-forwarded-for",
	XForwardedHost:            "x-forwarded-host",
	XForwardedPort:            "x-forwarded-port",
	XForwardedProto:           "x-forwarded-proto",
	XRequestID:                "x-request-id",
}

// known are the known fields by the lengths of their names. It is read only.
var known = byLength()

func byLength() (table [32][]ID) {
	for id := Other + 1; int(id) < len(names); id++ {
		n := len(names[id])
		table[n] = append(table[n], id)
	}
	return table
}

// Identify returns which known field has that name, in any case.
func Identify[T text](name T) ID {
	if len(name) >= len(known) {
		return Other
	}
	for _, id := range known[len(name)] {
		if want := names[id]; lower[name[0]] == want[0] && EqualFold(name, want) {
			return id
		}
	}
	return Other
}

// EqualFold reports whether b is want, which is in lower case, without regard
// to the case of ASCII letters.
func EqualFold[T text](b T, want string) bool {
	if len(b) != len(want) {
		return false
	}
	if len(want) < 8 {
		for i := range len(want) {
			if lower[b[i]] != want[i] {
				return false
			}
		}
		return true
	}
	for i := 0; i < len(want); i += 8 {
		at := min(i, len(want)-8) // the last word begins within the one before
		if lowerWord(word(b[at:])) != word(want[at:]) {
			return false
		}
	}
	return true
}

// Lower returns the lower case of an ASCII byte.
func Lower(c byte) byte { return lower[c] }

// IsToken reports whether c may be in a token: a method, or the name of a field
// (RFC 9110 5.6.2).
func IsToken(c byte) bool { return token[c] }

// IsValue reports whether c may be in the value of a field: no control
// character but the tab (RFC 9110 5.5).
func IsValue(c byte) bool { return c == '\t' || c >= 0x20 && c != 0x7f }

// ValidName reports whether name can be the name of a field.
func ValidName[T text](name T) bool {
	if len(name) == 0 || len(name) > 1<<15 {
		return false
	}
	for i := range len(name) {
		if !token[name[i]] {
			return false
		}
	}
	return true
}

// ValidValue reports whether value can be the value of a field.
func ValidValue[T text](value T) bool { return ValueLen(value) == len(value) }

// ValueLen returns how many bytes s begins with that may be in the value of a
// field.
func ValueLen[T text](s T) int {
	i := 0
	for ; len(s)-i >= 8; i += 8 {
		if w := controls(word(s[i:])); w != 0 {
			i += place(w) // perhaps a tab
			break
		}
	}
	for i < len(s) && IsValue(s[i]) {
		i++
	}
	return i
}

// PlainLen returns how many bytes s begins with that are no control characters
// and no quotes: eight at once, so it may stop a little early.
func PlainLen[T text](s T) int {
	i := 0
	for len(s)-i >= 8 {
		if w := word(s[i:]); controls(w)|equal(w, '"') != 0 {
			break
		}
		i += 8
	}
	return i
}

// lower and token are tables, read only.
var (
	lower = table(func(c byte) byte {
		if c >= 'A' && c <= 'Z' {
			return c + 'a' - 'A'
		}
		return c
	})
	token = table(func(c byte) bool {
		switch c {
		case '!', '#', '$', '%', '&', '\'', '*', '+', '-', '.', '^', '_', '`', '|', '~':
			return true
		}
		return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
	})
)

func table[T any](f func(byte) T) (t [256]T) {
	for c := range t {
		t[c] = f(byte(c))
	}
	return t
}
