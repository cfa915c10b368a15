package mesh

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// validate checks that t names one thing.
func (t Target) validate() error {
	service, waypoint := t.Service != ServiceName{}, t.Waypoint != Name{}
	switch {
	case service == waypoint:
		return errors.New("want either a service or a waypoint")
	case service && (t.Service.Namespace == "" || t.Service.Host == ""):
		return fmt.Errorf("service %q lacks a part", t.Service)
	case waypoint && (t.Waypoint.Namespace == "" || t.Waypoint.Name == ""):
		return fmt.Errorf("waypoint %q lacks a part", t.Waypoint)
	}
	return nil
}

// validate returns what is wrong with m, joined, or nil.
func (m Match) validate() error {
	var errs []error
	for _, s := range slices.Concat(m.Namespaces, m.NotNamespaces, m.Principals, m.NotPrincipals,
		m.Methods, m.NotMethods, m.Hosts, m.NotHosts) {
		errs = append(errs, s.validate())
	}
	for _, s := range slices.Concat(m.Paths, m.NotPaths) {
		if s.Kind == MatchTemplate {
			errs = append(errs, ValidTemplate(s.Value))
			continue
		}
		errs = append(errs, s.validate())
	}
	for _, h := range m.Headers {
		if err := validFieldName(h.Name); err != nil {
			errs = append(errs, err)
		}
		if strings.HasPrefix(h.Name, ":") && h.Name != ":authority" && h.Name != ":method" {
			errs = append(errs, fmt.Errorf("header %q cannot be compared", h.Name))
		}
		if len(h.Values)+len(h.NotValues) == 0 {
			errs = append(errs, fmt.Errorf("header %q is compared with nothing", h.Name))
		}
		for _, s := range slices.Concat(h.Values, h.NotValues) {
			errs = append(errs, s.validate())
		}
	}
	for _, p := range slices.Concat(m.SourceIPs, m.NotSourceIPs, m.DestinationIPs, m.NotDestinationIPs, m.RemoteIPs, m.NotRemoteIPs) {
		if !p.IsValid() {
			errs = append(errs, errors.New("an address range is empty"))
		}
	}
	for _, a := range slices.Concat(m.ServiceAccounts, m.NotServiceAccounts) {
		if a.Namespace == "" || a.ServiceAccount == "" {
			errs = append(errs, fmt.Errorf("service account %q/%q lacks a part", a.Namespace, a.ServiceAccount))
		}
	}
	for _, p := range slices.Concat(m.DestinationPorts, m.NotDestPorts) {
		if p == 0 {
			errs = append(errs, errors.New("port 0 is not a port"))
		}
	}
	return errors.Join(errs...)
}

// validate checks that s is of a kind that compares any text.
func (s StringMatch) validate() error {
	if s.Kind == MatchUnset || s.Kind > MatchPresence {
		return fmt.Errorf("string match %v is not known", s.Kind)
	}
	return nil
}

// ValidTemplate returns what is wrong with a template of paths, or nil. A
// segment is literal, {*} or {**}; and after {**} all are literal.
func ValidTemplate(s string) error {
	if !strings.HasPrefix(s, "/") {
		return fmt.Errorf("path template %q does not begin with a slash", s)
	}
	rest := false
	for segment := range strings.SplitSeq(s[1:], "/") {
		operator := segment == "{*}" || segment == "{**}"
		switch {
		case operator && rest:
			return fmt.Errorf("path template %q has %s after {**}", s, segment)
		case !operator && strings.ContainsAny(segment, "{}*"):
			return fmt.Errorf("path template %q: %q is neither literal nor {*} nor {**}", s, segment)
		}
		rest = rest || segment == "{**}"
	}
	return nil
}

// validFieldName checks that a name can be that of a header field, in lower
// case, or a pseudo field's.
func validFieldName(name string) error {
	rest := strings.TrimPrefix(name, ":")
	if rest == "" || strings.ContainsFunc(rest, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || strings.ContainsRune("!#$%&'*+-.^_`|~", r))
	}) {
		return fmt.Errorf("header name %q is not one in lower case", name)
	}
	return nil
}
