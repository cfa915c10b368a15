package l7

import (
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// edit changes header fields as the rule says, and then as its backend does.
type edit struct{ Pass }

// OnRequest edits the request.
func (edit) OnRequest(x *Exchange) Verdict {
	if r := x.Matched.Rule; r != nil {
		editHead(&x.Request, &r.Spec.RequestHeaders)
	}
	if x.Drawn != nil {
		editHead(&x.Request, &x.Drawn.Spec.RequestHeaders)
	}
	return Continue
}

// OnResponse edits the response.
func (edit) OnResponse(x *Exchange) {
	if x.Drawn != nil {
		editHead(&x.Response, &x.Drawn.Spec.ResponseHeaders)
	}
	if r := x.Matched.Rule; r != nil {
		editHead(&x.Response, &r.Spec.ResponseHeaders)
	}
}

// editHead applies one edit. Framing is not a matter of fields: what would
// change it is passed over.
func editHead(h *msg.Head, e *mesh.HeaderEdit) {
	for _, name := range e.Remove {
		h.Remove(name)
	}
	for i := range e.Set {
		p := &e.Set[i]
		switch {
		case p.Name == "host" || p.Name == ":authority":
			if validHost(p.Value) {
				msg.SetAuthority(h, p.Value)
			}
		case editable(p.Name):
			msg.Set(h, p.Name, p.Value)
		}
	}
	for i := range e.Append {
		if p := &e.Append[i]; editable(p.Name) {
			msg.Append(h, p.Name, p.Value)
		}
	}
}

// editable reports whether a field may be set: those of the framing and of the
// connection belong to the codecs.
func editable(name string) bool {
	switch msg.Identify(name) {
	case msg.Host, msg.ContentLength, msg.TransferEncoding, msg.Connection, msg.Upgrade, msg.KeepAlive, msg.ProxyConnection,
		msg.TE, msg.Trailer, msg.HTTP2Settings, msg.Expect:
		return false
	}
	return true
}

// validHost reports whether an authority from configuration can be one.
func validHost(s string) bool {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || c == '/' || c == '@' || c == '?' || c == '#' || c == '\\' {
			return false
		}
	}
	return s != ""
}
