package ztunnel

import (
	"crypto/rand"
	"encoding/hex"
	"net/netip"
	"net/url"
	"strings"

	"github.com/weft-mesh/weft/mesh"
)

// forwarded is the Forwarded header of RFC 7239 for a client at src.
func forwarded(src netip.AddrPort) string {
	b := append(make([]byte, 0, 64), `for="`...) // which is enough without a zone
	return string(append(src.AppendTo(b), '"'))
}

// baggage says which workload opened a connection, for the telemetry of the
// other end. It proves nothing. w may be nil.
func baggage(w *mesh.Workload, cluster string) string {
	if w == nil {
		return ""
	}
	kind := w.Owner.Kind
	name := w.Owner.Name
	if kind == "" || name == "" {
		kind, name = "pod", w.Name.Name
	}
	if w.Cluster != "" {
		cluster = w.Cluster
	}
	var b strings.Builder
	for _, m := range [][2]string{
		{"k8s.cluster.name", cluster},
		{"k8s.namespace.name", w.Name.Namespace},
		{"k8s." + kind + ".name", name},
		{"service.name", w.CanonicalName},
		{"service.version", w.CanonicalRevision},
		{"cloud.region", w.Locality.Region},
		{"cloud.availability_zone", w.Locality.Zone},
	} {
		if m[1] == "" {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(m[0] + "=" + url.PathEscape(m[1])) // W3C baggage 3.3.1.3: percent-encoded
	}
	return b.String()
}

// traceparent begins a new trace (W3C trace context, version 00, not sampled).
func traceparent() string {
	var id [24]byte
	rand.Read(id[:]) // never fails
	return "00-" + hex.EncodeToString(id[:16]) + "-" + hex.EncodeToString(id[16:]) + "-00"
}
