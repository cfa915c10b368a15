package mesh

import (
	"fmt"
	"net/netip"
	"time"
)

// RouteProtocol says what kind of traffic a Route is for. The zero value is
// none, and such a Route is never looked up.
type RouteProtocol string

// The protocols of routes.
const (
	RouteHTTP RouteProtocol = "http" // requests: HTTP/1, HTTP/2, gRPC
	RouteTLS  RouteProtocol = "tls"  // connections whose ClientHello is read and passed on
	RouteTCP  RouteProtocol = "tcp"  // connections
)

// A RouteKey names a Route.
type RouteKey struct {
	Service  ServiceName   `json:"service"`
	Port     uint16        `json:"port,omitempty"` // of the service; 0 is every port without a Route of its own
	Protocol RouteProtocol `json:"protocol"`
}

// String returns "namespace/host:port/protocol", the key used on the wire.
func (k RouteKey) String() string {
	return fmt.Sprintf("%s:%d/%s", k.Service, k.Port, k.Protocol)
}

// A Route says what becomes of requests (or connections) to a service. Its
// rules are in order, and the first that matches counts: all precedence between
// the objects it was made from is resolved. When none matches, a request is
// answered with 404 and a connection is closed. A service without a Route is
// served as if by one rule that sends everything to the service itself.
type Route struct {
	RouteKey
	Rules []Rule `json:"rules,omitempty"`
	// Broken says, if the whole Route could not be understood, why. Requests
	// are answered with 500 then, and connections are closed.
	Broken string `json:"broken,omitempty"`
}

// A Rule is one way that a request may go. If Broken is set it is answered with
// 500; else if Redirect or Direct is set the proxy answers by itself; else it
// goes to one of the Backends, and a rule without any answers 500 (or 503 with
// flag NC, as its Unroutable says).
type Rule struct {
	// Name is for logs and metrics: of the rule, and after a dot of the match.
	Name string `json:"name,omitempty"`
	// From is the object that the rule comes from: "HTTPRoute/shop/cart".
	From string `json:"from,omitempty"`
	// Matches: one must hold. None matches everything.
	Matches []RequestMatch `json:"matches,omitempty"`
	Broken  string         `json:"broken,omitempty"`

	Redirect *Redirect       `json:"redirect,omitempty"`
	Direct   *DirectResponse `json:"direct,omitempty"`
	Backends []Backend       `json:"backends,omitempty"`

	Rewrite         *Rewrite   `json:"rewrite,omitempty"`
	RequestHeaders  HeaderEdit `json:"requestHeaders,omitzero"`
	ResponseHeaders HeaderEdit `json:"responseHeaders,omitzero"`
	// Timeout bounds the whole request, retries included, from its last byte
	// to the response's last byte. 0 is no bound.
	Timeout Duration `json:"timeout,omitempty"`
	Retry   *Retry   `json:"retry,omitempty"` // nil: nothing is tried twice
	Fault   *Fault   `json:"fault,omitempty"`
	Mirrors []Mirror `json:"mirrors,omitempty"`
	CORS    *CORS    `json:"cors,omitempty"`
	// Session keeps the requests of one session at one endpoint.
	Session *Session `json:"session,omitempty"`
}

// A RequestMatch holds when every field that is set holds. For connections only
// the fields that say so count.
type RequestMatch struct {
	Name      string       `json:"name,omitempty"` // for logs and metrics
	Path      *PathMatch   `json:"path,omitempty"` // without the query
	Method    *TextMatch   `json:"method,omitempty"`
	Scheme    *TextMatch   `json:"scheme,omitempty"`
	Authority *TextMatch   `json:"authority,omitempty"` // without a port, in lower case
	Headers   []FieldMatch `json:"headers,omitempty"`
	Query     []FieldMatch `json:"query,omitempty"`
	// SourceNamespaces: the caller's identity is of one of them. Also for
	// connections.
	SourceNamespaces []string `json:"sourceNamespaces,omitempty"`
	// SNI holds for a TLS connection to one of these names; "*.example.com"
	// is every name below it. For RouteTLS only.
	SNI []string `json:"sni,omitempty"`
	// DestinationSubnets hold the address that the client asked for. For
	// connections only.
	DestinationSubnets []netip.Prefix `json:"destinationSubnets,omitempty"`
	// Never marks a match with a condition that cannot be known here: it never
	// holds.
	Never bool `json:"never,omitempty"`
}

// TextKind says how a TextMatch compares. The zero value matches nothing.
type TextKind string

// The kinds of text matches.
const (
	TextExact    TextKind = "exact"
	TextPrefix   TextKind = "prefix"
	TextSuffix   TextKind = "suffix"
	TextRegex    TextKind = "regex"   // RE2, the whole text
	TextPresence TextKind = "present" // is there, whatever its value
)

// A TextMatch compares one text.
type TextMatch struct {
	Kind       TextKind `json:"kind"`
	Value      string   `json:"value,omitempty"`
	IgnoreCase bool     `json:"ignoreCase,omitempty"`
}

// A FieldMatch compares a header field (its name in lower case) or a query
// parameter. With Not it holds when the rest does not. Several values of a
// field are one text, joined with commas.
type FieldMatch struct {
	Name string `json:"name"`
	TextMatch
	Not bool `json:"not,omitempty"`
}

// PathKind says how a PathMatch compares. The zero value matches nothing.
type PathKind string

// The kinds of path matches.
const (
	PathExact   PathKind = "exact"
	PathPrefix  PathKind = "prefix"  // of the text: /a matches /ab
	PathSegment PathKind = "segment" // of whole segments: /a matches /a and /a/b, and not /ab
	PathRegex   PathKind = "regex"   // RE2, the whole path
)

// A PathMatch compares the path of a request without its query.
type PathMatch struct {
	Kind       PathKind `json:"kind"`
	Value      string   `json:"value"`
	IgnoreCase bool     `json:"ignoreCase,omitempty"`
}

// A Backend is where requests may go. Of several of one rule each gets its
// share of the sum of weights.
type Backend struct {
	Service ServiceName `json:"service,omitzero"`
	// Subset of the service's endpoints, as a TrafficPolicy of that name has
	// it; "" is all. One that there is no TrafficPolicy for answers 503, NC.
	Subset string `json:"subset,omitempty"`
	Port   uint16 `json:"port,omitempty"` // of the service; 0 is the port that was asked for
	Weight uint32 `json:"weight"`
	// Unroutable is set when requests cannot go there, and says why. They are
	// answered with Status then: 500 for Gateway API, 503 (flag NC) for Istio.
	Unroutable string `json:"unroutable,omitempty"`
	Status     int    `json:"status,omitempty"`

	Rewrite         *Rewrite   `json:"rewrite,omitempty"`
	RequestHeaders  HeaderEdit `json:"requestHeaders,omitzero"`
	ResponseHeaders HeaderEdit `json:"responseHeaders,omitzero"`
	Mirrors         []Mirror   `json:"mirrors,omitempty"`
	Redirect        *Redirect  `json:"redirect,omitempty"`
	// Timeout bounds each try at this backend. 0 is no bound.
	Timeout Duration `json:"timeout,omitempty"`
}

// A HeaderEdit changes header fields, in the order remove, set, append. Names
// are in lower case. The zero HeaderEdit changes nothing.
type HeaderEdit struct {
	Remove []string     `json:"remove,omitempty"`
	Set    []HeaderPair `json:"set,omitempty"`
	Append []HeaderPair `json:"append,omitempty"`
}

// A HeaderPair is a header field and its value.
type HeaderPair struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// A Rewrite changes what the backend is asked for. At most one of Path, Prefix
// and Regex is set.
type Rewrite struct {
	Authority string  `json:"authority,omitempty"`
	Path      *string `json:"path,omitempty"` // the whole path
	// Prefix replaces what the match's path (exact, prefix or segment) has
	// matched.
	Prefix *string      `json:"prefix,omitempty"`
	Regex  *RegexChange `json:"regex,omitempty"`
}

// A RegexChange replaces every match of an RE2 expression. In Replacement \1 to
// \9 are its groups.
type RegexChange struct {
	Match       string `json:"match"`
	Replacement string `json:"replacement"`
}

// A Redirect is answered by the proxy. What is empty stays as in the request.
type Redirect struct {
	Status    int     `json:"status"` // 301, 302, 303, 307 or 308
	Scheme    string  `json:"scheme,omitempty"`
	Authority string  `json:"authority,omitempty"`
	Port      uint16  `json:"port,omitempty"` // 0: as DerivePort says
	Path      *string `json:"path,omitempty"`
	Prefix    *string `json:"prefix,omitempty"` // as in Rewrite
	// DerivePort, if Port is 0: "scheme" takes the well-known port of the
	// scheme, "request" that of the request (the listener's), and "" leaves
	// out a port that the new scheme does not need.
	DerivePort string `json:"derivePort,omitempty"`
}

// A DirectResponse is answered by the proxy.
type DirectResponse struct {
	Status int    `json:"status"`
	Body   string `json:"body,omitempty"`
}

// Retry says when and how often a request is tried again.
type Retry struct {
	Attempts      int      `json:"attempts"` // after the first
	PerTryTimeout Duration `json:"perTryTimeout,omitempty"`
	// On are conditions by their Envoy names: 5xx, gateway-error, reset,
	// reset-before-request, connect-failure, refused-stream, retriable-4xx,
	// retriable-status-codes, and for gRPC cancelled, deadline-exceeded,
	// internal, resource-exhausted, unavailable.
	On []string `json:"on,omitempty"`
	// Codes are the statuses of retriable-status-codes.
	Codes []int `json:"codes,omitempty"`
	// Backoff is the base of the pause before a try, random between 0 and
	// (2^tries - 1) times it, at most MaxBackoff. 0 is 25 ms, and 10 times
	// Backoff.
	Backoff    Duration `json:"backoff,omitempty"`
	MaxBackoff Duration `json:"maxBackoff,omitempty"`
	// PreviousHosts allows a try at an endpoint that has failed before. Without
	// it others are looked for up to five times.
	PreviousHosts bool `json:"previousHosts,omitempty"`
	// RemoteLocalities lets tries leave the nearest locality.
	RemoteLocalities bool `json:"remoteLocalities,omitempty"`
}

// A Fault is put between for tests of resilience. Delay comes first; the two
// are drawn independently.
type Fault struct {
	Delay *FaultDelay `json:"delay,omitempty"`
	Abort *FaultAbort `json:"abort,omitempty"`
}

// A FaultDelay holds a share of the requests.
type FaultDelay struct {
	PerMillion uint32   `json:"perMillion"`
	For        Duration `json:"for"`
}

// A FaultAbort answers a share of the requests: with Status, or with GRPCStatus
// (a code's number) for gRPC.
type FaultAbort struct {
	PerMillion uint32 `json:"perMillion"`
	Status     int    `json:"status,omitempty"`
	GRPCStatus *int   `json:"grpcStatus,omitempty"`
}

// A Mirror gets a copy of a share of the requests; what it answers is thrown
// away.
type Mirror struct {
	Backend    Backend `json:"backend"`
	PerMillion uint32  `json:"perMillion"`
	// PlainHost leaves out the suffix "-shadow" of the copy's host.
	PlainHost bool `json:"plainHost,omitempty"`
}

// CORS answers preflight requests and adds its fields to responses.
type CORS struct {
	AllowOrigins     []TextMatch `json:"allowOrigins,omitempty"`
	AllowMethods     []string    `json:"allowMethods,omitempty"`
	AllowHeaders     []string    `json:"allowHeaders,omitempty"`
	ExposeHeaders    []string    `json:"exposeHeaders,omitempty"`
	MaxAge           *Duration   `json:"maxAge,omitempty"`
	AllowCredentials bool        `json:"allowCredentials,omitempty"`
	// IgnoreUnmatched answers preflights of origins that are not allowed by
	// itself; else they go to the backend.
	IgnoreUnmatched bool `json:"ignoreUnmatched,omitempty"`
}

// A Session names the cookie or header that carries the session. The proxy
// makes its value, which names the endpoint.
type Session struct {
	Cookie string `json:"cookie,omitempty"`
	Header string `json:"header,omitempty"`
	Path   string `json:"path,omitempty"` // of the cookie
	// Lifetime of the cookie; 0 ends it with the browser.
	Lifetime Duration `json:"lifetime,omitempty"`
	Idle     Duration `json:"idle,omitempty"`
}

// A Duration is a time.Duration whose text is like "1.5s".
type Duration time.Duration

// String returns the text that time.Duration has.
func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText writes String's text.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads String's text.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("parse duration: %w", err)
	}
	*d = Duration(v)
	return nil
}
