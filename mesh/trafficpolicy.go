package mesh

import "fmt"

// A TrafficPolicy says how requests reach the endpoints of a service: which of
// them, by what balance, over how many connections. What overrides what is
// resolved: a proxy applies the one of (service, subset, port), else that of
// (service, subset, 0), and never mixes two. The zero TrafficPolicy has the
// defaults.
type TrafficPolicy struct {
	Service ServiceName `json:"service"`
	Subset  string      `json:"subset,omitempty"` // "" is the whole service
	Port    uint16      `json:"port,omitempty"`   // of the service; 0 is every port without one of its own
	// From is the object it comes from: "DestinationRule/shop/cart".
	From string `json:"from,omitempty"`
	// Labels select the endpoints of the subset: those workloads that have
	// them all. Empty selects every endpoint.
	Labels map[string]string `json:"labels,omitempty"`

	Balance     Balance      `json:"balance,omitzero"`
	Connections Connections  `json:"connections,omitzero"`
	Outlier     *Outlier     `json:"outlier,omitempty"`
	TLS         *UpstreamTLS `json:"tls,omitempty"`
	// RetryBudget bounds retries to a share of the requests; nil does not.
	RetryBudget *RetryBudget `json:"retryBudget,omitempty"`
	Session     *Session     `json:"session,omitempty"`
	// Broken says why the policy could not be understood. Requests are answered
	// with 503, NC.
	Broken string `json:"broken,omitempty"`
}

// Key returns "namespace/host|subset|port", the key used on the wire.
func (p TrafficPolicy) Key() string { return fmt.Sprintf("%s|%s|%d", p.Service, p.Subset, p.Port) }

// Algorithm is how an endpoint is chosen.
type Algorithm string

// The algorithms. The zero value is least request.
const (
	LeastRequest Algorithm = ""            // the less busy of two drawn by chance
	RoundRobin   Algorithm = "round_robin" // in turn
	Random       Algorithm = "random"
	Passthrough  Algorithm = "passthrough" // the address that the client asked for
	RingHash     Algorithm = "ring_hash"
	Maglev       Algorithm = "maglev"
)

// Balance says which endpoint takes a request.
type Balance struct {
	Algorithm Algorithm `json:"algorithm,omitempty"`
	Hash      *HashKey  `json:"hash,omitempty"`      // of ring hash and Maglev
	RingSize  uint64    `json:"ringSize,omitempty"`  // at least; 0 is 1024
	TableSize uint64    `json:"tableSize,omitempty"` // of Maglev, a prime; 0 is 65537
	Warmup    *Warmup   `json:"warmup,omitempty"`
	Locality  *Nearness `json:"locality,omitempty"` // nil: the nearest first, failing over if Outlier is set
}

// A HashKey is what of a request decides its endpoint. Exactly one is set.
type HashKey struct {
	Header   string      `json:"header,omitempty"` // in lower case
	Cookie   *HashCookie `json:"cookie,omitempty"`
	SourceIP bool        `json:"sourceIP,omitempty"`
	Query    string      `json:"query,omitempty"`
}

// A HashCookie is made by the proxy when the client has none.
type HashCookie struct {
	Name string   `json:"name"`
	Path string   `json:"path,omitempty"`
	TTL  Duration `json:"ttl,omitempty"` // 0 ends it with the browser
	// Generate: without it, a request without the cookie goes anywhere.
	Generate   bool         `json:"generate,omitempty"`
	Attributes []HeaderPair `json:"attributes,omitempty"`
}

// Warmup raises the share of a new endpoint over Duration from MinimumPercent
// of its share to all of it. Aggression bends the curve; 1 (and 0) is a line.
type Warmup struct {
	Duration       Duration `json:"duration"`
	MinimumPercent uint32   `json:"minimumPercent"`
	Aggression     float64  `json:"aggression,omitempty"`
}

// Nearness says what distance means.
type Nearness struct {
	Disabled bool `json:"disabled,omitempty"`
	// Distribute gives each locality its share, by the locality of the client.
	// Localities are written "region/zone/subzone", with "*" for the rest.
	Distribute []LocalityShares `json:"distribute,omitempty"`
	// Failover says to which region to go from which.
	Failover []LocalityFailover `json:"failover,omitempty"`
	// Priority are labels in the order of their weight: endpoints that share
	// more of the first ones with the client go first.
	Priority []string `json:"priority,omitempty"`
}

// LocalityShares are the shares of a client's requests.
type LocalityShares struct {
	From string            `json:"from"`
	To   map[string]uint32 `json:"to"`
}

// A LocalityFailover sends the requests of a region to another when its own
// endpoints have failed.
type LocalityFailover struct {
	From string `json:"from"`
	To   string `json:"to"`
}

// Connections bound connections and requests to a service. 0 is no bound,
// except where it says otherwise.
type Connections struct {
	Max         uint32     `json:"max,omitempty"`
	ConnectFor  Duration   `json:"connectFor,omitempty"`  // at most; 0 is 10 s
	MaxDuration Duration   `json:"maxDuration,omitempty"` // of one connection
	IdleTCP     Duration   `json:"idleTCP,omitempty"`     // 0 is 1 h
	Keepalive   *Keepalive `json:"keepalive,omitempty"`

	MaxPending          uint32   `json:"maxPending,omitempty"`  // requests that wait for a connection
	MaxRequests         uint32   `json:"maxRequests,omitempty"` // at once
	MaxRequestsPerConn  uint32   `json:"maxRequestsPerConn,omitempty"`
	MaxRetries          uint32   `json:"maxRetries,omitempty"` // at once
	IdleHTTP            Duration `json:"idleHTTP,omitempty"`   // 0 is 1 h
	MaxConcurrentStream uint32   `json:"maxConcurrentStreams,omitempty"`
	// HTTP2 is "upgrade" to speak HTTP/2 to endpoints of ports that are HTTP/1,
	// "client" to speak what the client speaks, and else what the port says.
	HTTP2 string `json:"http2,omitempty"`
}

// Keepalive are the settings of TCP keepalive. 0 is the system's.
type Keepalive struct {
	Probes   uint32   `json:"probes,omitempty"`
	Time     Duration `json:"time,omitempty"`
	Interval Duration `json:"interval,omitempty"`
}

// An Outlier policy takes endpoints that fail out of the choice for a while.
type Outlier struct {
	Consecutive5xx     uint32 `json:"consecutive5xx"`               // 0 is never
	ConsecutiveGateway uint32 `json:"consecutiveGateway,omitempty"` // 502, 503, 504; 0 is never
	// SplitLocal counts failures to connect apart from answers, as
	// ConsecutiveLocal; without it they count as a 5xx.
	SplitLocal       bool     `json:"splitLocal,omitempty"`
	ConsecutiveLocal uint32   `json:"consecutiveLocal,omitempty"`
	Interval         Duration `json:"interval"`         // between looks
	BaseEjection     Duration `json:"baseEjection"`     // times how often it was ejected
	MaxEjected       uint32   `json:"maxEjected"`       // percent of the endpoints; at least one may be
	MinHealthPercent uint32   `json:"minHealthPercent"` // below it, all endpoints count again
}

// TLSMode says how the proxy speaks to endpoints outside the mesh. The mesh's
// own endpoints are reached through their tunnels whatever it says.
type TLSMode string

// The modes.
const (
	TLSDisable TLSMode = "disable"
	TLSSimple  TLSMode = "simple"
	TLSMutual  TLSMode = "mutual"
	TLSMesh    TLSMode = "mesh"
)

// UpstreamTLS is how TLS to an endpoint is made and checked.
type UpstreamTLS struct {
	Mode TLSMode `json:"mode"`
	SNI  string  `json:"sni,omitempty"` // "" is the request's host
	// SubjectAltNames: the certificate must have one; none is the SNI.
	SubjectAltNames []string `json:"subjectAltNames,omitempty"`
	// Roots are certificates in PEM; "" are the system's.
	Roots string `json:"roots,omitempty"`
	// Certificate names the Secret of the client's certificate.
	Certificate Name `json:"certificate,omitzero"`
}

// RetryBudget bounds retries to a share of the running requests.
type RetryBudget struct {
	Percent uint32 `json:"percent"`
	Min     uint32 `json:"min"` // retries that are always allowed
}
