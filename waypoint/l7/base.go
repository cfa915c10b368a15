package l7

import (
	"errors"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/route"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// sanitize takes out what a client may not say, and adds who it is.
type sanitize struct{ Pass }

// OnRequest edits the head.
func (sanitize) OnRequest(x *Exchange) Verdict {
	h := &x.Request
	// Said by proxies of the mesh to each other, and to nobody else.
	h.RemoveID(msg.XEnvoyPeerMetadata)
	h.RemoveID(msg.XEnvoyPeerMetadataID)
	h.RemoveID(msg.XEnvoyAttemptCount)
	forwarded(x)
	return Continue
}

// OnResponse takes out the same of the answer.
func (sanitize) OnResponse(x *Exchange) {
	x.Response.RemoveID(msg.XEnvoyPeerMetadata)
	x.Response.RemoveID(msg.XEnvoyPeerMetadataID)
}

// forwarded adds the client to X-Forwarded-For, and says how it came unless a
// gateway has done so.
func forwarded(x *Exchange) {
	h := &x.Request
	if a := x.Facts.Source.Addr(); a.IsValid() {
		var room [256]byte
		b := room[:0]
		if was, ok := h.Joined("x-forwarded-for", nil); ok && len(was) > 0 {
			b = append(append(b, was...), ", "...)
			h.RemoveID(msg.XForwardedFor)
		}
		msg.AppendID(h, msg.XForwardedFor, a.Unmap().AppendTo(b))
	}
	if !h.Has(msg.XForwardedProto) {
		msg.AppendID(h, msg.XForwardedProto, h.Scheme)
	}
}

// match finds the rule that a request meets, and draws one of its backends.
type match struct {
	Pass
	e *Engine
}

// OnRequest matches.
func (m *match) OnRequest(x *Exchange) Verdict {
	x.Policy = &noPolicy
	if x.Facts.Workload != "" {
		return m.workload(x)
	}
	x.Service = x.known.service
	if x.Service == nil {
		return x.Answer(503, "", FlagNoCluster, "cluster_not_found")
	}
	t := x.known.table
	if t.Broken != "" {
		x.Failure = t.Broken
		return x.Answer(500, "", 0, "route_broken")
	}
	query, _ := x.Query()
	r := route.Request{Method: x.Request.Method, Scheme: x.Request.Scheme, Authority: x.Request.Authority, Path: x.Path(), Query: query,
		Fields: &x.Request, SourceNamespace: x.Facts.Peer.Namespace}
	res, ok := t.Match(&r)
	if !ok {
		return x.Answer(404, "", FlagNoRoute, "route_not_found")
	}
	x.Matched = res
	if res.Rule.Broken != "" {
		x.Failure = res.Rule.Broken
		return x.Answer(500, "", 0, "route_broken")
	}
	s := res.Rule.Spec
	if s.Redirect != nil || s.Direct != nil {
		return Continue // a filter answers
	}
	x.Drawn = res.Rule.Pick(m.e.rand())
	x.marks.refused = m.backend(x)
	return Continue
}

// routable answers requests that cannot go anywhere: after filters have answered
// that would do so whatever the backend is.
type routable struct{ Pass }

// OnRequest answers.
func (routable) OnRequest(x *Exchange) Verdict {
	if r := x.marks.refused; r.status != 0 {
		return x.Answer(r.status, "", r.flags, r.details)
	}
	return Continue
}

// workload is for requests to the address of a workload, which no route is for.
func (m *match) workload(x *Exchange) Verdict {
	x.Matched = route.Result{Rule: m.e.direct, Index: -1, Name: m.e.direct.Spec.Name}
	x.BackendPort = x.Port
	x.cluster = m.e.cluster(clusterKey{port: x.Port, workload: x.Facts.Workload}, x.View)
	x.Policy = x.cluster.policy.Load()
	x.upstream = m.e.version(x, "")
	return Continue
}

// backend finds what the drawn backend names, or why it cannot be had.
func (m *match) backend(x *Exchange) refusal {
	if x.Drawn == nil {
		return refusal{500, 0, "no_backend"}
	}
	b := x.Drawn.Spec
	k := clusterKey{service: b.Service, subset: b.Subset, port: b.Port}
	if k.service == (mesh.ServiceName{}) {
		k.service = x.Facts.Service
	}
	if k.port == 0 {
		k.port = x.Port
	}
	x.BackendPort = k.port
	x.BackendService = x.known.service
	if k.service != x.Facts.Service {
		x.BackendService = x.View.ServiceByName(k.service)
	}
	if b.Unroutable != "" {
		x.Failure = b.Unroutable
		status, flag := b.Status, Flags(0)
		if status == 0 || status == 503 {
			status, flag = 503, FlagNoCluster
		}
		return refusal{status, flag, "cluster_not_found"}
	}
	if x.BackendService == nil || k.subset != "" && x.View.TrafficPolicy(k.service, k.subset, k.port) == nil {
		return refusal{503, FlagNoCluster, "cluster_not_found"}
	}
	x.cluster = m.e.cluster(k, x.View)
	x.Policy = x.cluster.policy.Load()
	x.upstream = m.e.version(x, appProtocol(x.BackendService, k.port))
	return refusal{}
}

// noPolicy is what applies where there is none. It is read only.
var noPolicy mesh.TrafficPolicy

// appProtocol returns what the service says of its port.
func appProtocol(s *mesh.Service, port uint16) string {
	for i := range s.Ports {
		if s.Ports[i].Service == port {
			return s.Ports[i].AppProtocol
		}
	}
	return ""
}

// version decides what the endpoint is spoken to in.
func (e *Engine) version(x *Exchange, protocol string) Version {
	client := HTTP11
	if x.Version == HTTP2 {
		client = HTTP2
	}
	switch x.Policy.Connections.HTTP2 {
	case "upgrade":
		return HTTP2
	case "client":
		return client
	}
	switch protocol {
	case "http2", "grpc", "grpc-web", "h2c", "kubernetes.io/h2c":
		return HTTP2
	case "http", "https":
		return HTTP11
	}
	return client // nobody has said, and the client has found out
}

// table returns the table of a route, nil for the one of services without.
func (e *Engine) table(r *mesh.Route) *route.Table {
	if r == nil {
		return e.noRoute
	}
	if t, ok := e.tables.Load(r); ok {
		return t.(*route.Table)
	}
	t, _ := e.tables.LoadOrStore(r, route.Compile(r))
	return t.(*route.Table)
}

// errNotServed is of connections for what is not there.
var errNotServed = errors.New("no such service or workload behind this waypoint")

// hostOf returns an authority without its port.
func hostOf(authority []byte) []byte {
	for i := len(authority) - 1; i >= 0; i-- {
		if c := authority[i]; c == ':' {
			return authority[:i]
		} else if c < '0' || c > '9' {
			break
		}
	}
	return authority
}
