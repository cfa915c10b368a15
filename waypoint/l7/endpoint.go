package l7

import (
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/balance"
)

// An Endpoint is where a request may be sent: a workload at one of its ports,
// or, without a workload, the address that the client asked for.
type Endpoint struct {
	Workload *mesh.Workload // nil if it is not known
	// Address has only a port if the workload is reached by its host name.
	Address netip.AddrPort

	logged  string            // what lines of the log call it
	balance *balance.Endpoint // nil if it was not chosen
	cluster *cluster
	links   *links
}

// newEndpoint returns an Endpoint that nobody has chosen yet.
func newEndpoint(w *mesh.Workload, a netip.AddrPort) *Endpoint {
	return &Endpoint{Workload: w, Address: a, logged: string(appendEndpoint(nil, w, a))}
}

// links are the transports to one endpoint. They outlive the Endpoint, which is
// another one when its workload has changed.
type links struct {
	mu           sync.Mutex
	http1, http2 transport // guarded by mu; made on demand
}

// over returns the transport for a version.
func (ep *Endpoint) over(v Version) transport {
	l := ep.links
	l.mu.Lock()
	defer l.mu.Unlock()
	if v == HTTP2 {
		if l.http2 == nil {
			l.http2 = newHTTP2Transport(ep.cluster.e, ep)
		}
		return l.http2
	}
	if l.http1 == nil {
		l.http1 = &http1Pool{e: ep.cluster.e, ep: ep}
	}
	return l.http1
}

// each calls f for each transport that was made.
func (l *links) each(f func(transport)) {
	l.mu.Lock()
	h1, h2 := l.http1, l.http2
	l.mu.Unlock()
	if h1 != nil {
		f(h1)
	}
	if h2 != nil {
		f(h2)
	}
}

// A way is how the other end of a connection was verified. What was meant for
// one way may not take another: a connection that was made in clear, or to
// somebody with a certificate for another name. The zero way is in clear, or a
// tunnel of the mesh.
type way struct {
	tls  *mesh.UpstreamTLS
	name string // that the other end was expected to have
}

// wayOf returns the way that an exchange takes. The name is that of the policy,
// or the host that is asked for; a connection that asks for none is for the
// service's.
func wayOf(x *Exchange) way {
	tls := x.Policy.TLS
	if tls == nil || tls.Mode != mesh.TLSSimple && tls.Mode != mesh.TLSMutual {
		return way{}
	}
	w := way{tls, tls.SNI}
	if w.name == "" {
		w.name = string(hostOf(x.Request.Authority))
	}
	if w.name == "" && x.BackendService != nil && !strings.HasPrefix(string(x.BackendService.Name.Host), "*") {
		w.name = string(x.BackendService.Name.Host)
	}
	return w
}

// is reports whether a connection that was made by o is as good as one by w.
func (w way) is(o way) bool {
	if w.tls == o.tls {
		return w.name == o.name
	}
	return w.tls != nil && o.tls != nil && w.name == o.name && w.tls.Mode == o.tls.Mode && w.tls.Roots == o.tls.Roots &&
		w.tls.Certificate == o.tls.Certificate && slices.Equal(w.tls.SubjectAltNames, o.tls.SubjectAltNames)
}

// target returns what the Dialer is told.
func (ep *Endpoint) target(x *Exchange) Target {
	t := Target{Workload: ep.Workload, Address: ep.Address, Keepalive: x.Policy.Connections.Keepalive}
	if x.BackendService != nil {
		t.Service = x.BackendService.Name
	}
	if w := wayOf(x); w.tls != nil {
		t.TLS, t.ServerName = w.tls, w.name
		t.ALPN = []string{"http/1.1"}
		if x.upstream == HTTP2 {
			t.ALPN = []string{"h2"}
		}
	}
	return t
}
