package mesh

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Validate returns everything that is wrong with r, joined, or nil. Regular
// expressions are not compiled: what cannot be understood breaks its own rule.
func (r Route) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if r.Service.Namespace == "" || r.Service.Host == "" {
		bad("service %q lacks a part", r.Service)
	}
	if !slices.Contains([]RouteProtocol{RouteHTTP, RouteTLS, RouteTCP}, r.Protocol) {
		bad("protocol %q is not known", r.Protocol)
	}
	for i, rule := range r.Rules {
		if rule.Broken != "" {
			continue // whatever else it says is not followed
		}
		if err := rule.validate(r.Protocol); err != nil {
			bad("rule %d: %w", i, err)
		}
	}
	return wrap("route", r.RouteKey.String(), errs)
}

func (r Rule) validate(p RouteProtocol) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for i, m := range r.Matches {
		if err := m.validate(p); err != nil {
			bad("match %d: %w", i, err)
		}
	}
	if r.Redirect != nil && r.Direct != nil {
		bad("both a redirect and a direct response")
	}
	if d := r.Direct; d != nil && (d.Status < 200 || d.Status > 599) {
		bad("direct response: status %d", d.Status)
	}
	errs = append(errs, r.Redirect.validate(), r.Rewrite.validate(), r.Fault.validate(), r.Session.validate(),
		r.RequestHeaders.validate(), r.ResponseHeaders.validate())
	if r.Timeout < 0 {
		bad("timeout %v is negative", r.Timeout)
	}
	if t := r.Retry; t != nil && (t.Attempts < 0 || t.PerTryTimeout < 0 || t.Backoff < 0 || t.MaxBackoff < 0) {
		bad("retry: a number is negative")
	}
	for i, b := range r.Backends {
		if err := b.validate(); err != nil {
			bad("backend %d: %w", i, err)
		}
	}
	for i, m := range r.Mirrors {
		if err := m.validate(); err != nil {
			bad("mirror %d: %w", i, err)
		}
	}
	return errors.Join(errs...)
}

func (m RequestMatch) validate(p RouteProtocol) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	ofRequest := m.Path != nil || m.Method != nil || m.Scheme != nil || m.Authority != nil || len(m.Headers)+len(m.Query) > 0
	if p != RouteHTTP && ofRequest {
		bad("a connection has no request to compare")
	}
	if p != RouteTLS && len(m.SNI) > 0 {
		bad("only a TLS route can compare server names")
	}
	if p == RouteHTTP && len(m.DestinationSubnets) > 0 {
		bad("only a route of connections can compare destinations")
	}
	if m.Path != nil && !slices.Contains([]PathKind{PathExact, PathPrefix, PathSegment, PathRegex}, m.Path.Kind) {
		bad("path match of kind %q is not known", m.Path.Kind)
	}
	for _, t := range []*TextMatch{m.Method, m.Scheme, m.Authority} {
		if t != nil {
			errs = append(errs, t.validate())
		}
	}
	for _, f := range m.Headers {
		errs = append(errs, validFieldName(f.Name), f.TextMatch.validate())
	}
	for _, f := range m.Query {
		if f.Name == "" {
			bad("a query parameter has no name")
		}
		errs = append(errs, f.TextMatch.validate())
	}
	if slices.ContainsFunc(m.DestinationSubnets, func(s netip.Prefix) bool { return !s.IsValid() }) {
		bad("an address range is empty")
	}
	return errors.Join(errs...)
}

func (t TextMatch) validate() error {
	if !slices.Contains([]TextKind{TextExact, TextPrefix, TextSuffix, TextRegex, TextPresence}, t.Kind) {
		return fmt.Errorf("text match of kind %q is not known", t.Kind)
	}
	return nil
}

func (b Backend) validate() error {
	var errs []error
	if b.Service != (ServiceName{}) && (b.Service.Namespace == "" || b.Service.Host == "") {
		errs = append(errs, fmt.Errorf("service %q lacks a part", b.Service))
	}
	if b.Status != 0 && (b.Status < 400 || b.Status > 599) {
		errs = append(errs, fmt.Errorf("status %d is no error", b.Status))
	}
	for i, m := range b.Mirrors {
		if err := m.validate(); err != nil {
			errs = append(errs, fmt.Errorf("mirror %d: %w", i, err))
		}
	}
	return errors.Join(append(errs, b.Rewrite.validate(), b.Redirect.validate(), b.RequestHeaders.validate(), b.ResponseHeaders.validate())...)
}

func (m Mirror) validate() error {
	if len(m.Backend.Mirrors) > 0 {
		return errors.New("a copy is not copied again")
	}
	return errors.Join(m.Backend.validate(), perMillion(m.PerMillion))
}

func perMillion(n uint32) error {
	if n > 1_000_000 {
		return fmt.Errorf("%d of a million", n)
	}
	return nil
}

func (f *Fault) validate() error {
	if f == nil {
		return nil
	}
	var errs []error
	if d := f.Delay; d != nil {
		errs = append(errs, perMillion(d.PerMillion))
		if d.For < 0 {
			errs = append(errs, fmt.Errorf("fault: delay %v is negative", d.For))
		}
	}
	if a := f.Abort; a != nil {
		errs = append(errs, perMillion(a.PerMillion))
		switch {
		case a.GRPCStatus != nil && (*a.GRPCStatus < 0 || *a.GRPCStatus > 16):
			errs = append(errs, fmt.Errorf("fault: grpc status %d", *a.GRPCStatus))
		case a.GRPCStatus == nil && (a.Status < 200 || a.Status > 599):
			errs = append(errs, fmt.Errorf("fault: status %d", a.Status))
		}
	}
	return errors.Join(errs...)
}

func (r *Rewrite) validate() error {
	if r == nil {
		return nil
	}
	n := 0
	for _, set := range []bool{r.Path != nil, r.Prefix != nil, r.Regex != nil} {
		if set {
			n++
		}
	}
	if n > 1 {
		return errors.New("rewrite: more than one way to change the path")
	}
	return nil
}

func (r *Redirect) validate() error {
	switch {
	case r == nil:
		return nil
	case r.Path != nil && r.Prefix != nil:
		return errors.New("redirect: both a path and a prefix")
	case !slices.Contains([]int{301, 302, 303, 307, 308}, r.Status):
		return fmt.Errorf("redirect: status %d", r.Status)
	case !slices.Contains([]string{"", "scheme", "request"}, r.DerivePort):
		return fmt.Errorf("redirect: port derived from %q", r.DerivePort)
	}
	return nil
}

func (s *Session) validate() error {
	if s != nil && (s.Cookie == "") == (s.Header == "") {
		return errors.New("session: want either a cookie or a header")
	}
	return nil
}

func (e HeaderEdit) validate() error {
	var errs []error
	for _, name := range e.Remove {
		errs = append(errs, validFieldName(name))
	}
	for _, p := range slices.Concat(e.Set, e.Append) {
		errs = append(errs, validFieldName(p.Name))
	}
	return errors.Join(errs...)
}

// Validate returns everything that is wrong with p, joined, or nil.
func (p TrafficPolicy) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if p.Service.Namespace == "" || p.Service.Host == "" {
		bad("service %q lacks a part", p.Service)
	}
	b := p.Balance
	if !slices.Contains([]Algorithm{LeastRequest, RoundRobin, Random, Passthrough, RingHash, Maglev}, b.Algorithm) {
		bad("algorithm %q is not known", b.Algorithm)
	}
	if k := b.Hash; k != nil {
		n := 0
		for _, set := range []bool{k.Header != "", k.Cookie != nil, k.SourceIP, k.Query != ""} {
			if set {
				n++
			}
		}
		if n != 1 {
			bad("hash: want one thing to hash, not %d", n)
		}
	}
	if !slices.Contains([]string{"", "upgrade", "client"}, p.Connections.HTTP2) {
		bad("http2 %q is not known", p.Connections.HTTP2)
	}
	if o := p.Outlier; o != nil && (o.MaxEjected > 100 || o.MinHealthPercent > 100) {
		bad("outlier: more than 100 percent")
	}
	if t := p.TLS; t != nil && !slices.Contains([]TLSMode{TLSDisable, TLSSimple, TLSMutual, TLSMesh}, t.Mode) {
		bad("tls mode %q is not known", t.Mode)
	}
	errs = append(errs, p.Session.validate())
	return wrap("traffic policy", p.Key(), slices.DeleteFunc(errs, func(err error) bool { return err == nil }))
}

// Validate returns everything that is wrong with w, joined, or nil.
func (w Waypoint) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if w.Name.Namespace == "" || w.Name.Name == "" {
		bad("name %q lacks a part", w.Name)
	}
	if w.Service.Namespace == "" || w.Service.Host == "" {
		bad("service %q lacks a part", w.Service)
	}
	if w.Identity.IsZero() {
		bad("the identity is empty: nobody could be verified")
	}
	if !slices.Contains([]string{"service", "workload", "all", "none"}, w.For) {
		bad("traffic for %q is not known", w.For)
	}
	if !slices.Contains([]string{"", "text", "json"}, w.AccessLog) {
		bad("access log %q is not known", w.AccessLog)
	}
	return wrap("waypoint", w.Name.String(), errs)
}
