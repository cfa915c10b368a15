package l7

import (
	"github.com/weft-mesh/weft/mesh/route"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// rewrite changes what the endpoint is asked for: as the backend says, else as
// the rule does.
type rewrite struct{ Pass }

// OnRequest rewrites.
func (rewrite) OnRequest(x *Exchange) Verdict {
	if x.Matched.Rule == nil {
		return Continue
	}
	w := x.Matched.Rule.Rewrite
	if x.Drawn != nil && x.Drawn.Rewrite != nil {
		w = x.Drawn.Rewrite
	}
	if w == nil {
		return Continue
	}
	if a := w.Spec.Authority; validHost(a) {
		msg.SetAuthority(&x.Request, a)
	}
	if w.Spec.Path == nil && w.Spec.Prefix == nil && w.Spec.Regex == nil {
		return Continue
	}
	return rewritePath(x, w)
}

// rewritePath gives the request another path. It is made of what the client has
// sent, and was authorized before: one that leaves the place where it was put
// ("/b../x" with /b replaced by /a/) is refused.
func rewritePath(x *Exchange, w *route.Rewrite) Verdict {
	if len(x.Request.Path) == 0 || x.Request.Path[0] != '/' {
		return Continue // OPTIONS *, CONNECT
	}
	path, query := cutQuery(x.Request.Path)
	to := w.AppendPath(make([]byte, 0, len(x.Request.Path)+64), path, &x.Matched)
	if hasDots(to) {
		return x.Answer(400, "", FlagDownstreamProtocol, "path_rewrite_refused")
	}
	if query != nil {
		to = append(append(to, '?'), query...)
	}
	to, ok := normalizePath(to, nil)
	if !ok {
		return x.Answer(400, "", FlagDownstreamProtocol, "path_rewrite_refused")
	}
	msg.Set(&x.Request, "x-envoy-original-path", x.Request.Path)
	x.Request.Path = to // nobody else's: it needs no copy
	return Continue
}

// hasDots reports whether a path has a segment "." or "..".
func hasDots(path []byte) bool {
	from := 0
	for i := range len(path) + 1 {
		if i < len(path) && path[i] != '/' {
			continue
		}
		if s := string(path[from:i]); s == "." || s == ".." {
			return true
		}
		from = i + 1
	}
	return false
}
