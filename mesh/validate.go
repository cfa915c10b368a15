package mesh

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Validate returns everything that is wrong with w, joined, or nil.
func (w Workload) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if w.UID == "" {
		bad("uid is empty")
	}
	if w.Name.Namespace == "" || w.Name.Name == "" {
		bad("name %q lacks a part", w.Name)
	}
	for _, a := range w.Addresses {
		if err := validAddress(a); err != nil {
			bad("address: %w", err)
		}
	}
	if w.Transport > HBONE {
		bad("transport %v is not known", w.Transport)
	}
	if w.Transport == HBONE && w.Identity.IsZero() {
		bad("transport is hbone, but the identity is empty: nobody could be verified")
	}
	if w.AppTunnel.Port != 0 && !w.AppTunnel.Proxy {
		bad("the application tunnel has port %d and no protocol", w.AppTunnel.Port)
	}
	if err := w.Waypoint.validate(); err != nil {
		bad("waypoint: %w", err)
	}
	for _, m := range w.Services {
		if m.Service.Namespace == "" || m.Service.Host == "" {
			bad("service %q lacks a part", m.Service)
		}
		for _, p := range m.Ports {
			if p.Service == 0 || p.Target == 0 {
				bad("service %q: port %d to %d: 0 is not a port of an endpoint", m.Service, p.Service, p.Target)
			}
		}
	}
	return wrap("workload", string(w.UID), errs)
}

// Validate returns everything that is wrong with s, joined, or nil.
func (s Service) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if s.Name.Namespace == "" || s.Name.Host == "" {
		bad("name %q lacks a part", s.Name)
	}
	for _, v := range s.VIPs {
		if !v.Prefix.IsValid() || v.Prefix.Addr().Is4In6() || v.Prefix != v.Prefix.Masked() {
			bad("virtual address %v is not a network prefix", v.Prefix)
		}
	}
	for _, a := range s.ExternalAddresses {
		if err := validAddress(a); err != nil {
			bad("external address: %w", err)
		}
	}
	for _, p := range s.Ports {
		if p.Service == 0 {
			bad("port 0 is not a port")
		}
	}
	if err := s.Waypoint.validate(); err != nil {
		bad("waypoint: %w", err)
	}
	for _, p := range s.Preferences {
		if !slices.Contains([]Preference{PreferNetwork, PreferRegion, PreferZone, PreferSubzone, PreferNode, PreferCluster}, p) {
			bad("preference %q is not known", p)
		}
	}
	if !slices.Contains([]BalanceMode{BalanceAny, BalanceStrict, BalanceFailover, BalancePassthrough}, s.Mode) {
		bad("balance mode %q is not known", s.Mode)
	}
	if !slices.Contains([]string{"", "ipv4", "ipv6", "dual"}, s.IPFamilies) {
		bad("ip families %q are not known", s.IPFamilies)
	}
	return wrap("service", s.Name.String(), errs)
}

// Validate returns everything that is wrong with p, joined, or nil. A policy
// that does not pass still denies where it applies.
func (p Policy) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if p.Name.Namespace == "" || p.Name.Name == "" {
		bad("name %q lacks a part", p.Name)
	}
	if !slices.Contains([]Scope{ScopeGlobal, ScopeNamespace, ScopeSelector, ScopeTarget}, p.Scope) {
		bad("scope %q is not known", p.Scope)
	}
	if p.Scope == ScopeTarget && len(p.Targets) == 0 {
		bad("scope is target, but there are none")
	}
	if p.Scope != ScopeTarget && len(p.Targets) > 0 {
		bad("there are targets, but the scope is %q", p.Scope)
	}
	for i, t := range p.Targets {
		if err := t.validate(); err != nil {
			bad("target %d: %w", i, err)
		}
	}
	if p.Action != Allow && p.Action != Deny {
		bad("action %v is neither allow nor deny", p.Action)
	}
	for g, group := range p.Groups {
		for c, clause := range group.Clauses {
			for i, m := range clause.Matches {
				if err := m.validate(); err != nil {
					bad("group %d, clause %d, match %d: %w", g, c, i, err)
				}
			}
		}
	}
	return wrap("policy", p.Name.String(), errs)
}

// validate checks that r names one gateway, or none.
func (r GatewayRef) validate() error {
	named := r.Service != ServiceName{}
	switch {
	case r.IsZero():
		return nil
	case named && r.Address.IsValid():
		return fmt.Errorf("both service %q and address %v name it", r.Service, r.Address)
	case named && (r.Service.Namespace == "" || r.Service.Host == ""):
		return fmt.Errorf("service %q lacks a part", r.Service)
	case !named:
		return validAddress(r.Address)
	}
	return nil
}

// validAddress refuses addresses that would be looked up under another key
// than they are stored: mapped ones and those with a zone.
func validAddress(a netip.Addr) error {
	if !a.IsValid() || a.Is4In6() || a.Zone() != "" {
		return fmt.Errorf("%v is not a plain IPv4 or IPv6 address", a)
	}
	return nil
}

// wrap joins errs and says what they are about.
func wrap(kind, name string, errs []error) error {
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("%s %q: %w", kind, name, errors.Join(errs...))
}
