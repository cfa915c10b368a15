package l7

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weft-mesh/weft/mesh/route"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// cors answers the questions that browsers ask before a request (Fetch
// standard, CORS protocol), and tells them whether scripts may read the answer.
type cors struct{ Pass }

// OnRequest answers preflights.
func (cors) OnRequest(x *Exchange) Verdict {
	if x.Matched.Rule == nil || x.Matched.Rule.CORS == nil {
		return Continue
	}
	c, origin := x.Matched.Rule.CORS, x.Request.Get(msg.Origin)
	if len(origin) == 0 {
		return Continue
	}
	allowed := c.Allows(origin)
	if allowed {
		// Kept apart: later filters may edit the request.
		x.marks.origin = append(x.marks.origin[:0], origin...)
	}
	method := x.Request.Lookup("access-control-request-method")
	if string(x.Request.Method) != "OPTIONS" || len(method) == 0 {
		return Continue
	}
	if !allowed {
		if c.Spec.IgnoreUnmatched {
			return x.Answer(200, "", 0, "cors_response")
		}
		return Continue
	}
	headers, _ := x.Request.Joined("access-control-request-headers", nil)
	v := x.Answer(200, "", 0, "cors_response")
	h := &x.Response
	setList(h, "access-control-allow-methods", c.Spec.AllowMethods, method)
	setList(h, "access-control-allow-headers", c.Spec.AllowHeaders, headers)
	if age := c.Spec.MaxAge; age != nil {
		msg.Set(h, "access-control-max-age", strconv.FormatInt(int64(time.Duration(*age)/time.Second), 10))
	}
	return v
}

// OnResponse tells the browser. What the endpoint says of it does not count.
func (cors) OnResponse(x *Exchange) {
	if len(x.marks.origin) == 0 {
		return
	}
	allow(&x.Response, x.Matched.Rule.CORS, x.marks.origin, x.Details == "cors_response")
}

func allow(h *msg.Head, c *route.CORS, origin []byte, preflight bool) {
	msg.Set(h, "access-control-allow-origin", origin)
	h.Remove("access-control-allow-credentials")
	if c.Spec.AllowCredentials {
		msg.Append(h, "access-control-allow-credentials", "true")
	}
	if len(c.Spec.ExposeHeaders) > 0 && !preflight {
		msg.Set(h, "access-control-expose-headers", strings.Join(c.Spec.ExposeHeaders, ","))
	}
	// The answer differs by origin: caches have to know (RFC 9110 12.5.5).
	msg.Append(h, "vary", "origin")
}

// setList sets a list of what is allowed. "*" allows what was asked for: as
// itself it would not count for requests with credentials.
func setList(h *msg.Head, name string, list []string, asked []byte) {
	switch {
	case slices.Contains(list, "*"):
		if len(asked) > 0 {
			msg.Set(h, name, asked)
		}
	case len(list) > 0:
		msg.Set(h, name, strings.Join(list, ","))
	}
}
