package l7

import (
	"bytes"
	"strconv"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/route"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// direct answers what a rule answers by itself: a redirect, or a text.
type direct struct{ Pass }

// OnRequest answers.
func (direct) OnRequest(x *Exchange) Verdict {
	r := x.Matched.Rule
	if r == nil {
		return Continue
	}
	redirect := r.Spec.Redirect
	if redirect == nil && x.Drawn != nil {
		redirect = x.Drawn.Spec.Redirect
	}
	switch {
	case redirect != nil:
		target := appendRedirect(nil, redirect, x)
		if target == nil {
			return x.Answer(400, "", 0, "redirect_refused")
		}
		status := redirect.Status
		if status == 0 {
			status = 302
		}
		v := x.Answer(status, "", 0, "direct_response")
		msg.Set(&x.Response, "location", target)
		return v
	case r.Spec.Direct != nil:
		return x.Answer(r.Spec.Direct.Status, r.Spec.Direct.Body, 0, "direct_response")
	}
	return Continue
}

// appendRedirect appends where a request is redirected to, or returns nil if
// that cannot be told.
func appendRedirect(dst []byte, r *mesh.Redirect, x *Exchange) []byte {
	was := string(x.Request.Scheme)
	scheme := r.Scheme
	if scheme == "" {
		scheme = was
	}
	authority := x.Request.Authority
	if r.Authority != "" {
		authority = []byte(r.Authority)
	}
	if len(authority) > 0 { // else relative: HTTP/1.0 need not say a host
		dst = append(append(dst, scheme...), "://"...)
		dst = appendRedirectHost(dst, r, authority, was, scheme, x.Port)
	}
	path, query := cutQuery(x.Request.Path)
	var to []byte
	switch {
	case r.Path != nil:
		to = []byte(*r.Path)
		if len(to) == 0 || to[0] != '/' {
			to = append([]byte{'/'}, to...)
		}
	case r.Prefix != nil:
		to = route.AppendPrefix(nil, path, &x.Matched, *r.Prefix)
	default:
		to = path
	}
	dst = append(dst, to...)
	if query != nil && bytes.IndexByte(to, '?') < 0 {
		dst = append(append(dst, '?'), query...)
	}
	if !msg.ValidValue(dst) {
		return nil
	}
	return dst
}

// appendRedirectHost appends the authority of a redirect's target.
func appendRedirectHost(dst []byte, r *mesh.Redirect, authority []byte, was, scheme string, asked uint16) []byte {
	host := hostOf(authority)
	port := r.Port
	switch {
	case port != 0:
	case r.DerivePort == "scheme":
		return append(dst, host...) // its own port goes without saying
	case r.DerivePort == "request":
		port = asked
	case r.Authority != "":
		return append(dst, authority...)
	default:
		// The port stays, but not one that stood for the scheme.
		if p := string(authority[len(host):]); p == ":"+wellKnown(scheme) || scheme != was && p == ":"+wellKnown(was) {
			return append(dst, host...)
		}
		return append(dst, authority...)
	}
	dst = append(dst, host...)
	if p := strconv.Itoa(int(port)); port != 0 && p != wellKnown(scheme) {
		dst = append(append(dst, ':'), p...)
	}
	return dst
}

// wellKnown returns the port that goes without saying.
func wellKnown(scheme string) string {
	switch scheme {
	case "http":
		return "80"
	case "https":
		return "443"
	}
	return ""
}
