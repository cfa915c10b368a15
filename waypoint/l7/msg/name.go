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

// known are the names of the known fields, by length. It is read only.
var known = byLength(map[string]ID{
	"accept": Accept, "authorization": Authorization, "baggage": Baggage, "connection": Connection,
	"content-length": ContentLength, "content-type": ContentType, "cookie": Cookie, "date": Date,
	"expect": Expect, "forwarded": Forwarded, "grpc-message": GRPCMessage, "grpc-status": GRPCStatus,
	"grpc-timeout": GRPCTimeout, "host": Host, "http2-settings": HTTP2Settings, "keep-alive": KeepAlive,
	"location": Location, "origin": Origin, "proxy-authenticate": ProxyAuthenticate,
	"proxy-authorization": ProxyAuthorization, "proxy-connection": ProxyConnection, "referer": Referer,
	"server": Server, "set-cookie": SetCookie, "te": TE, "traceparent": Traceparent, "tracestate": Tracestate,
	"trailer": Trailer, "transfer-encoding": TransferEncoding, "upgrade": Upgrade, "user-agent": UserAgent,
	"via": Via, "x-envoy-attempt-count": XEnvoyAttemptCount, "x-envoy-original-path": XEnvoyOriginalPath,
	"x-envoy-overloaded": XEnvoyOverloaded, "x-envoy-peer-metadata": XEnvoyPeerMetadata,
	"x-envoy-peer-metadata-id":      XEnvoyPeerMetadataID,
	"x-envoy-upstream-service-time": XEnvoyUpstreamServiceTime,
	"x-forwarded-client-cert":       XForwardedClientCert,
	"x-forwarded-for":               XForwardedFor,
	"x-forwarded-host":              XForwardedHost,
	"x-forwarded-port":              XForwardedPort,
	"x-forwarded-proto":             XForwardedProto,
	"x-request-id":                  XRequestID,
})

type knownName struct {
	name string
	id   ID
}

func byLength(m map[string]ID) (table [32][]knownName) {
	for name, id := range m {
		table[len(name)] = append(table[len(name)], knownName{name, id})
	}
	return table
}

// Identify returns which known field has that name, in any case.
func Identify[T text](name T) ID {
	if len(name) >= len(known) {
		return Other
	}
	for _, k := range known[len(name)] {
		if lower[name[0]] == k.name[0] && EqualFold(name, k.name) {
			return k.id
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
	for i := range len(b) {
		if lower[b[i]] != want[i] {
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
func ValidValue[T text](value T) bool {
	for i := range len(value) {
		if !IsValue(value[i]) {
			return false
		}
	}
	return true
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
