package compile

import (
	"fmt"
	"maps"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/weft-mesh/weft/mesh"
)

// A vsCompiler compiles the rules of one VirtualService, and notes what it
// finds in them.
type vsCompiler struct {
	settings  Settings
	namespace string // of short host names
	from      string
	gateways  []string // of the whole object
	found     *findings
}

// http compiles one rule. It returns its path, where errors in it are noted.
func (c vsCompiler) http(path string, r *networking.HTTPRoute) (vsRule, string) {
	out := vsRule{protocol: mesh.RouteHTTP, rule: mesh.Rule{Name: r.GetName(), From: c.from}}
	c.httpMatches(path, r, &out)
	c.checkActions(path, r)
	c.redirect(path+".redirect", r.GetRedirect(), &out.rule)
	c.direct(path+".directResponse", r.GetDirectResponse(), &out.rule)
	c.rewrite(path+".rewrite", r.GetRewrite(), &out.rule)
	out.rule.Timeout = c.timeout(path+".timeout", r.GetTimeout())
	c.fault(path+".fault", r.GetFault(), &out.rule)
	c.cors(path+".corsPolicy", r.GetCorsPolicy(), &out.rule)
	c.mirrors(path, r, &out)
	rewrite := c.headers(path+".headers", r.GetHeaders(), &out.rule.RequestHeaders, &out.rule.ResponseHeaders)
	if rewrite != "" && (out.rule.Rewrite == nil || out.rule.Rewrite.Authority == "") {
		rw := mesh.Rewrite{Authority: rewrite}
		if out.rule.Rewrite != nil {
			rw = *out.rule.Rewrite
			rw.Authority = rewrite
		}
		out.rule.Rewrite = &rw
	}
	if len(r.GetRoute()) > 0 {
		out.rule.Retry = c.retry(path+".retries", r.GetRetries())
	}
	weights := make([]int32, 0, len(r.GetRoute()))
	for i, d := range r.GetRoute() {
		at := fmt.Sprintf("%s.route[%d]", path, i)
		weights = append(weights, d.GetWeight())
		b := c.destination(at+".destination", d.GetDestination())
		if rewrite := c.headers(at+".headers", d.GetHeaders(), &b.backend.RequestHeaders, &b.backend.ResponseHeaders); rewrite != "" {
			b.backend.Rewrite = &mesh.Rewrite{Authority: rewrite}
		}
		out.backends = append(out.backends, b)
	}
	out.backends = c.weigh(path+".route", weights, out.backends)
	return out, path
}

// checkActions complains unless the rule says exactly one thing to do.
func (c vsCompiler) checkActions(path string, r *networking.HTTPRoute) {
	var has []string
	if len(r.GetRoute()) > 0 {
		has = append(has, "route")
	}
	if r.GetRedirect() != nil {
		has = append(has, "redirect")
	}
	if r.GetDirectResponse() != nil {
		has = append(has, "directResponse")
	}
	if r.GetDelegate() != nil {
		has = append(has, "delegate")
	}
	switch len(has) {
	case 0:
		c.found.bad(path, "says nothing to do: give it a route, redirect, directResponse or delegate")
		return
	case 1:
	default:
		c.found.bad(path, "has %s, which exclude each other: keep one", strings.Join(has, " and "))
		return
	}
	if has[0] != "redirect" && has[0] != "directResponse" {
		return
	}
	if r.GetFault() != nil {
		c.found.bad(path+".fault", "cannot be together with %s: the proxy answers by itself, so there is nothing to put a fault before", has[0])
	}
	if r.GetRewrite() != nil {
		c.found.bad(path+".rewrite", "cannot be together with %s: nothing is sent on", has[0])
	}
	if r.GetRetries() != nil || r.GetTimeout() != nil || r.GetMirror() != nil || len(r.GetMirrors()) > 0 {
		c.found.warn(path, "has timeout, retries or mirrors beside %s, where they mean nothing: nothing is sent on", has[0])
	}
}

// weigh gives backends their shares. One alone gets everything, whatever its
// weight, and of several those without a share are left out.
func (c vsCompiler) weigh(path string, weights []int32, bs []vsBackend) []vsBackend {
	var out []vsBackend
	sum := int64(0)
	for i, wt := range weights {
		if wt < 0 {
			c.found.bad(fmt.Sprintf("%s[%d].weight", path, i), "is %d, want 0 or more", wt)
			return nil
		}
		sum += int64(wt)
		if len(bs) == 1 {
			bs[i].backend.Weight = 1
		} else if wt == 0 {
			continue
		} else {
			bs[i].backend.Weight = uint32(wt)
		}
		out = append(out, bs[i])
	}
	switch {
	case len(bs) > 1 && sum == 0:
		c.found.bad(path, "has several destinations whose weights add up to 0: give each its share, as 90 and 10")
	case sum > math.MaxUint32:
		c.found.bad(path, "has weights that add up to %d, want at most %d", sum, uint32(math.MaxUint32))
	}
	return out
}

// destination compiles where requests go. The host is looked up later.
func (c vsCompiler) destination(path string, d *networking.Destination) vsBackend {
	out := vsBackend{path: path, subset: d.GetSubset()}
	if d.GetHost() == "" {
		c.found.bad(path+".host", "is empty: name the service to send to")
		return out
	}
	if why := badHost(d.GetHost(), false); why != "" {
		c.found.bad(path+".host", "is %q, %s", d.GetHost(), why)
		return out
	}
	out.host = c.settings.fullHost(d.GetHost(), c.namespace)
	if p := d.GetPort(); p != nil {
		if n := p.GetNumber(); n == 0 || n > 65535 {
			c.found.bad(path+".port.number", "is %d, want 1 to 65535", n)
		}
		out.port = uint16(p.GetNumber())
	}
	return out
}

// redirectCodes are those that a redirect may have.
func validRedirect(code uint32) bool {
	switch code {
	case 301, 302, 303, 307, 308:
		return true
	}
	return false
}

func (c vsCompiler) redirect(path string, r *networking.HTTPRedirect, out *mesh.Rule) {
	if r == nil {
		return
	}
	to := &mesh.Redirect{Status: 301, Scheme: r.GetScheme(), Authority: r.GetAuthority()}
	if code := r.GetRedirectCode(); code != 0 {
		to.Status = int(code)
		if !validRedirect(code) {
			c.found.bad(path+".redirectCode", "is %d, want 301, 302, 303, 307 or 308", code)
		}
	}
	if s := r.GetScheme(); s != "" && s != "http" && s != "https" {
		c.found.bad(path+".scheme", "is %q, want http or https", s)
	}
	switch p := r.GetRedirectPort().(type) {
	case *networking.HTTPRedirect_Port:
		if p.Port == 0 || p.Port > 65535 {
			c.found.bad(path+".port", "is %d, want 1 to 65535", p.Port)
		}
		to.Port = uint16(p.Port)
	case *networking.HTTPRedirect_DerivePort:
		to.DerivePort = "scheme"
		if p.DerivePort == networking.HTTPRedirect_FROM_REQUEST_PORT {
			to.DerivePort = "request"
		}
	}
	if to.Authority != "" {
		c.found.authority(path+".authority", to.Authority)
	}
	uri, prefix := r.GetUri(), r.GetPrefixRewrite()
	c.found.location(path+".uri", uri)
	c.found.location(path+".prefixRewrite", prefix)
	switch {
	case uri != "" && prefix != "":
		c.found.bad(path, "has both uri and prefixRewrite, of which it can have one")
	case uri != "":
		to.Path = &uri
	case prefix != "":
		to.Prefix = &prefix
	}
	if *to == (mesh.Redirect{Status: to.Status}) {
		c.found.bad(path, "changes nothing, and would send clients around in a circle: give it a uri, prefixRewrite, authority, scheme or port")
	}
	out.Redirect = to
}

// longestBody is how much a direct response may say.
const longestBody = 1 << 20

func (c vsCompiler) direct(path string, d *networking.HTTPDirectResponse, out *mesh.Rule) {
	if d == nil {
		return
	}
	if s := d.GetStatus(); s < 200 || s > 599 {
		c.found.bad(path+".status", "is %d, want 200 to 599", s)
	}
	out.Direct = &mesh.DirectResponse{Status: int(d.GetStatus()), Body: d.GetBody().GetString_()}
	if b := d.GetBody().GetBytes(); len(b) > 0 {
		out.Direct.Body = string(b)
	}
	if !utf8.ValidString(out.Direct.Body) {
		c.found.bad(path+".body.bytes", "is not UTF-8 text, which is all that this version of Weft answers with")
	}
	if n := len(out.Direct.Body); n > longestBody {
		c.found.bad(path+".body", "has %d bytes, want at most %d", n, longestBody)
	} else if n > 100<<10 {
		c.found.warn(path+".body", "has %d bytes, all of which every waypoint keeps in memory", n)
	}
}

func (c vsCompiler) rewrite(path string, r *networking.HTTPRewrite, out *mesh.Rule) {
	if r == nil {
		return
	}
	to := &mesh.Rewrite{Authority: r.GetAuthority()}
	if to.Authority != "" {
		c.found.authority(path+".authority", to.Authority)
	}
	rx := r.GetUriRegexRewrite()
	uri := r.GetUri()
	c.found.target(path+".uri", uri)
	switch {
	case uri != "" && rx != nil:
		c.found.bad(path, "has both uri and uriRegexRewrite, of which it can have one")
	case uri != "":
		to.Prefix = &uri
	case rx != nil:
		to.Regex = &mesh.RegexChange{Match: rx.GetMatch(), Replacement: rx.GetRewrite()}
		c.regexRewrite(path+".uriRegexRewrite", rx)
	case to.Authority == "":
		c.found.bad(path, "changes nothing: give it a uri, uriRegexRewrite or authority")
	}
	out.Rewrite = to
}

// groupRef is a reference to a group of a regular expression, or a backslash,
// or what a backslash cannot stand before.
var groupRef = regexp.MustCompile(`(?s)\\(.|$)`)

func (c vsCompiler) regexRewrite(path string, rx *networking.RegexRewrite) {
	if rx.GetMatch() == "" {
		c.found.bad(path+".match", "is empty, want a regular expression")
		return
	}
	re, err := regexp.Compile(rx.GetMatch())
	if err != nil {
		c.found.bad(path+".match", "is no RE2 expression: %v", err)
		return
	}
	for _, m := range groupRef.FindAllStringSubmatch(rx.GetRewrite(), -1) {
		switch n, err := strconv.Atoi(m[1]); {
		case m[1] == `\`:
		case err != nil:
			c.found.bad(path+".rewrite", "has %q, where a backslash stands before the number of a group, or another backslash", m[0])
		case n > re.NumSubexp():
			c.found.bad(path+".rewrite", "names group \\%d, and the expression has %d", n, re.NumSubexp())
		}
	}
}

// timeout reads a bound that may be 0 for none.
func (c vsCompiler) timeout(path string, d *durationpb.Duration) mesh.Duration {
	if d == nil || d.AsDuration() == 0 {
		return 0
	}
	return atLeastMilli(c.found, path, d)
}

// atLeastMilli reads a duration of at least a millisecond; nil is 0.
func atLeastMilli(f *findings, path string, d *durationpb.Duration) mesh.Duration {
	if d == nil {
		return 0
	}
	t := d.AsDuration()
	if t < time.Millisecond {
		f.bad(path, "is %s, want at least 1ms", t)
		return 0
	}
	return mesh.Duration(t)
}

// defaultRetries is the policy of rules that say nothing: what certainly never
// reached the application, or what it has refused by itself.
func defaultRetries() *mesh.Retry {
	return &mesh.Retry{Attempts: 2, On: []string{"connect-failure", "refused-stream", "unavailable", "cancelled"}}
}

// knownRetryOn are the conditions that mesh.Retry lists.
var knownRetryOn = []string{"5xx", "gateway-error", "reset", "reset-before-request", "connect-failure", "refused-stream",
	"retriable-4xx", "retriable-status-codes", "cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable"}

// unsupportedRetryOn are conditions of Envoy that name things which waypoints
// do not have.
var unsupportedRetryOn = []string{"envoy-ratelimited", "retriable-headers", "http3-post-connect-failure"}

func (c vsCompiler) retry(path string, r *networking.HTTPRetry) *mesh.Retry {
	if r == nil {
		return defaultRetries()
	}
	if r.GetAttempts() < 0 {
		c.found.bad(path+".attempts", "is %d, want 0 (never) or more", r.GetAttempts())
		return nil
	}
	if r.GetAttempts() == 0 {
		if r.GetPerTryTimeout() != nil || r.GetRetryOn() != "" || r.GetBackoff() != nil {
			c.found.bad(path, "has attempts of 0, which turns retries off, and says how to retry: raise attempts, or leave out the rest")
		}
		return nil
	}
	out := defaultRetries()
	out.Attempts = int(r.GetAttempts())
	out.PerTryTimeout = atLeastMilli(c.found, path+".perTryTimeout", r.GetPerTryTimeout())
	out.Backoff = atLeastMilli(c.found, path+".backoff", r.GetBackoff())
	out.MaxBackoff = 10 * out.Backoff
	out.RemoteLocalities = r.GetRetryRemoteLocalities().GetValue()
	if ignore := r.GetRetryIgnorePreviousHosts(); ignore != nil && !ignore.GetValue() {
		out.PreviousHosts = true
	}
	if r.GetRetryOn() != "" {
		c.retryOn(path+".retryOn", r.GetRetryOn(), out)
	}
	return out
}

func (c vsCompiler) retryOn(path, text string, out *mesh.Retry) {
	out.On = nil
	for on := range strings.SplitSeq(text, ",") {
		on = strings.TrimSpace(on)
		if code, err := strconv.Atoi(on); err == nil {
			if code < 100 || code > 599 {
				c.found.bad(path, "lists %d, which is no HTTP status", code)
			}
			out.Codes = append(out.Codes, code)
			continue
		}
		switch {
		case slices.Contains(knownRetryOn, on):
			if !slices.Contains(out.On, on) {
				out.On = append(out.On, on)
			}
		case on == "connect-failure-only" || slices.Contains(unsupportedRetryOn, on):
			c.found.warn(path, "lists %q, which Weft does not support and passes over", on)
		default:
			c.found.bad(path, "lists %q, which is not known: want HTTP statuses and %s", on, strings.Join(knownRetryOn, ", "))
		}
	}
	if len(out.Codes) > 0 && !slices.Contains(out.On, "retriable-status-codes") {
		out.On = append(out.On, "retriable-status-codes")
	}
}

// perMillion reads a share in percent. Absent is nothing.
func perMillion(f *findings, path string, p *networking.Percent, absent uint32) uint32 {
	if p == nil {
		return absent
	}
	v := p.GetValue()
	if !(v >= 0 && v <= 100) {
		f.bad(path, "is %v, want 0 to 100", v)
		return 0
	}
	return uint32(math.Round(v * 10_000))
}

const wholeMillion = 1_000_000

func (c vsCompiler) fault(path string, in *networking.HTTPFaultInjection, out *mesh.Rule) {
	if in == nil {
		return
	}
	if in.GetDelay() == nil && in.GetAbort() == nil {
		c.found.bad(path, "has neither a delay nor an abort: give it one")
		return
	}
	out.Fault = &mesh.Fault{}
	if d := in.GetDelay(); d != nil {
		out.Fault.Delay = c.faultDelay(path+".delay", d)
	}
	if a := in.GetAbort(); a != nil {
		out.Fault.Abort = c.faultAbort(path+".abort", a)
	}
}

func (c vsCompiler) faultDelay(path string, d *networking.HTTPFaultInjection_Delay) *mesh.FaultDelay {
	out := &mesh.FaultDelay{}
	//lint:ignore SA1019 users still write the older form
	percent := d.GetPercent()
	switch {
	case d.GetPercentage() != nil:
		out.PerMillion = perMillion(c.found, path+".percentage.value", d.GetPercentage(), 0)
	case percent < 0 || percent > 100:
		c.found.bad(path+".percent", "is %d, want 0 to 100", percent)
	case percent == 0:
		c.found.warn(path, "has no percentage, which is 0: no request is held")
	default:
		out.PerMillion = uint32(percent) * 10_000
	}
	switch t := d.GetHttpDelayType().(type) {
	case *networking.HTTPFaultInjection_Delay_FixedDelay:
		out.For = atLeastMilli(c.found, path+".fixedDelay", t.FixedDelay)
	case *networking.HTTPFaultInjection_Delay_ExponentialDelay:
		c.found.bad(path+".exponentialDelay", "is not supported: use fixedDelay")
	default:
		c.found.bad(path, "has no fixedDelay: say how long requests are held")
	}
	return out
}

// grpcCodes are the names of gRPC's statuses, by number.
var grpcCodes = []string{"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
	"PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL",
	"UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"}

func (c vsCompiler) faultAbort(path string, a *networking.HTTPFaultInjection_Abort) *mesh.FaultAbort {
	out := &mesh.FaultAbort{PerMillion: perMillion(c.found, path+".percentage.value", a.GetPercentage(), 0)}
	if a.GetPercentage() == nil {
		c.found.warn(path, "has no percentage, which is 0: no request is aborted")
	}
	switch t := a.GetErrorType().(type) {
	case *networking.HTTPFaultInjection_Abort_HttpStatus:
		if t.HttpStatus < 200 || t.HttpStatus > 599 {
			c.found.bad(path+".httpStatus", "is %d, want 200 to 599", t.HttpStatus)
		}
		out.Status = int(t.HttpStatus)
	case *networking.HTTPFaultInjection_Abort_GrpcStatus:
		code := slices.Index(grpcCodes, strings.ToUpper(t.GrpcStatus))
		if n, err := strconv.Atoi(t.GrpcStatus); err == nil && n >= 0 && n < len(grpcCodes) {
			code = n
		}
		if code < 0 {
			c.found.bad(path+".grpcStatus", "is %q, want the name of a gRPC status, as UNAVAILABLE", t.GrpcStatus)
			break
		}
		out.GRPCStatus = &code
	case *networking.HTTPFaultInjection_Abort_Http2Error:
		c.found.bad(path+".http2Error", "is not supported: use httpStatus or grpcStatus")
	default:
		c.found.bad(path, "has no httpStatus or grpcStatus: say what to answer")
	}
	return out
}

func (c vsCompiler) cors(path string, in *networking.CorsPolicy, out *mesh.Rule) {
	if in == nil {
		return
	}
	to := &mesh.CORS{AllowHeaders: in.GetAllowHeaders(), ExposeHeaders: in.GetExposeHeaders(), AllowMethods: in.GetAllowMethods(),
		AllowCredentials: in.GetAllowCredentials().GetValue(),
		IgnoreUnmatched:  in.GetUnmatchedPreflights() == networking.CorsPolicy_IGNORE}
	for i, o := range in.GetAllowOrigins() {
		at := fmt.Sprintf("%s.allowOrigins[%d]", path, i)
		m := c.text(at, o)
		if m.Kind == mesh.TextPresence {
			c.found.bad(at, "is empty: use exact, prefix or regex")
		}
		if m.Kind == mesh.TextExact && m.Value == "*" {
			m = mesh.TextMatch{Kind: mesh.TextPresence}
		}
		to.AllowOrigins = append(to.AllowOrigins, m)
	}
	//lint:ignore SA1019 users still write the older form
	old := in.GetAllowOrigin()
	if len(old) > 0 && len(to.AllowOrigins) == 0 {
		for _, o := range old {
			m := mesh.TextMatch{Kind: mesh.TextExact, Value: o}
			if o == "*" {
				m = mesh.TextMatch{Kind: mesh.TextPresence}
			}
			to.AllowOrigins = append(to.AllowOrigins, m)
		}
	} else if len(old) > 0 {
		c.found.warn(path+".allowOrigin", "is passed over, since there is allowOrigins")
	}
	for i, m := range in.GetAllowMethods() {
		if m != "*" && !validToken(m) {
			c.found.bad(fmt.Sprintf("%s.allowMethods[%d]", path, i), "is %q, want an HTTP method", m)
		}
	}
	c.tokens(path+".allowHeaders", in.GetAllowHeaders())
	c.tokens(path+".exposeHeaders", in.GetExposeHeaders())
	if d := in.GetMaxAge(); d != nil {
		age := mesh.Duration(d.AsDuration())
		if age < 0 || d.GetNanos() != 0 {
			c.found.bad(path+".maxAge", "is %s, want whole seconds", d.AsDuration())
		}
		to.MaxAge = &age
	}
	out.CORS = to
}

func (c vsCompiler) tokens(path string, names []string) {
	for i, n := range names {
		if n != "*" && !validToken(n) {
			c.found.bad(fmt.Sprintf("%s[%d]", path, i), "is %q, want the name of a header", n)
		}
	}
}

func (c vsCompiler) mirrors(path string, r *networking.HTTPRoute, out *vsRule) {
	if r.GetMirror() != nil && len(r.GetMirrors()) > 0 {
		c.found.bad(path, "has both mirror and mirrors, of which it can have one")
		return
	}
	add := func(at string, d *networking.Destination, share uint32) {
		if b := c.destination(at, d); share > 0 {
			b.backend.Weight = 1
			out.mirrors = append(out.mirrors, vsMirror{b, share})
		}
	}
	if m := r.GetMirror(); m != nil {
		share := perMillion(c.found, path+".mirrorPercentage.value", r.GetMirrorPercentage(), wholeMillion)
		//lint:ignore SA1019 users still write the older form
		if p := r.GetMirrorPercent(); p != nil && r.GetMirrorPercentage() == nil {
			if p.GetValue() > 100 {
				c.found.bad(path+".mirrorPercent", "is %d, want 0 to 100", p.GetValue())
			}
			share = min(p.GetValue(), 100) * 10_000
		}
		add(path+".mirror", m, share)
	} else if r.GetMirrorPercentage() != nil {
		c.found.warn(path+".mirrorPercentage", "means nothing without mirror")
	}
	for i, m := range r.GetMirrors() {
		at := fmt.Sprintf("%s.mirrors[%d]", path, i)
		if m.GetDestination() == nil {
			c.found.bad(at+".destination", "is missing: say where the copies go")
			continue
		}
		add(at+".destination", m.GetDestination(), perMillion(c.found, at+".percentage.value", m.GetPercentage(), wholeMillion))
	}
}

// headers compiles header operations, and returns the authority that they set,
// if they do.
func (c vsCompiler) headers(path string, h *networking.Headers, request, response *mesh.HeaderEdit) (authority string) {
	authority = c.headerEdit(path+".request", h.GetRequest(), request, true)
	c.headerEdit(path+".response", h.GetResponse(), response, false)
	return authority
}

// operator is how Envoy writes what it fills in.
var operator = regexp.MustCompile(`%[A-Z_0-9]+(\([^)]*\))?(:\d+)?%`)

func (c vsCompiler) headerEdit(path string, in *networking.Headers_HeaderOperations, out *mesh.HeaderEdit, request bool) (authority string) {
	pairs := func(kind string, m map[string]string) (ps []mesh.HeaderPair) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			at := fmt.Sprintf("%s.%s[%s]", path, kind, k)
			name := strings.ToLower(k)
			if name == "host" || name == ":authority" {
				if request {
					authority = m[k]
					c.found.authority(at, m[k])
				} else {
					c.found.bad(at, "cannot be changed in a response, which has none")
				}
				continue
			}
			if !validToken(name) {
				c.found.bad(at, "is no name of a header")
				continue
			}
			if !validFieldValue(m[k]) {
				c.found.bad(at, "is %q, and a header's value has no line ends or control characters", m[k])
				continue
			}
			if slices.Contains(framing, name) {
				c.found.warn(at, notEdited)
				continue
			}
			if operator.MatchString(m[k]) {
				c.found.warn(at, "is %q, which is sent as it is written: Weft does not fill in Envoy's command operators", m[k])
			}
			ps = append(ps, mesh.HeaderPair{Name: name, Value: m[k]})
		}
		return ps
	}
	out.Set = pairs("set", in.GetSet())
	out.Append = pairs("add", in.GetAdd())
	for i, k := range in.GetRemove() {
		name := strings.ToLower(k)
		if !validToken(name) || name == "host" {
			c.found.bad(fmt.Sprintf("%s.remove[%d]", path, i), "is %q, which cannot be removed", k)
			continue
		}
		out.Remove = append(out.Remove, name)
	}
	return authority
}
