package feed

import (
	"errors"
	"fmt"
	"slices"

	pb "github.com/weft-mesh/weft/api/workload"
	"github.com/weft-mesh/weft/mesh"
)

// Words for the values of pb.LoadBalancing_Scope, pb.LoadBalancing_Mode and
// pb.IPFamilies, in their order.
func scopes() []mesh.Preference {
	return []mesh.Preference{"", mesh.PreferRegion, mesh.PreferZone, mesh.PreferSubzone, mesh.PreferNode, mesh.PreferCluster, mesh.PreferNetwork}
}

func modes() []mesh.BalanceMode {
	return []mesh.BalanceMode{mesh.BalanceAny, mesh.BalanceStrict, mesh.BalanceFailover, mesh.BalancePassthrough}
}

func families() []string { return []string{"", "ipv4", "ipv6", "dual"} }

// FromService translates a service for the wire.
func FromService(s mesh.Service) *pb.Service {
	m := &pb.Service{
		Name:            s.ShortName,
		Namespace:       s.Name.Namespace,
		Hostname:        string(s.Name.Host),
		Ports:           fromPorts(s.Ports),
		SubjectAltNames: s.SubjectAltNames,
		Waypoint:        fromGateway(s.Waypoint),
		IpFamilies:      pb.IPFamilies(max(0, slices.Index(families(), s.IPFamilies))),
		Canonical:       s.Canonical,
	}
	if s.Private {
		m.Visibility = pb.ServiceVisibility_NAMESPACE
	}
	for _, a := range s.ExternalAddresses {
		m.ExternalAddresses = append(m.ExternalAddresses, a.Unmap().AsSlice())
	}
	for _, v := range s.VIPs {
		a := &pb.NetworkAddress{Network: v.Network, Address: v.Prefix.Addr().AsSlice()}
		if !v.Prefix.IsSingleIP() {
			bits := uint32(v.Prefix.Bits())
			a.Length = &bits
		}
		m.Addresses = append(m.Addresses, a)
	}
	if s.Mode == mesh.BalanceAny && len(s.Preferences) == 0 && !s.AllowUnhealthy {
		return m
	}
	m.LoadBalancing = &pb.LoadBalancing{Mode: pb.LoadBalancing_Mode(slices.Index(modes(), s.Mode))}
	for _, p := range s.Preferences {
		m.LoadBalancing.RoutingPreference = append(m.LoadBalancing.RoutingPreference, pb.LoadBalancing_Scope(slices.Index(scopes(), p)))
	}
	if s.AllowUnhealthy {
		m.LoadBalancing.HealthPolicy = pb.LoadBalancing_ALLOW_ALL
	}
	return m
}

// ToService reads a service from the wire. A balance mode or a preference of a
// later version becomes one that balance does not know and never meets. With
// an error it returns a stand-in that has what could be read and a mode in
// which no endpoint is chosen, so that traffic to it is refused.
func ToService(m *pb.Service) (mesh.Service, error) {
	var errs []error
	s := mesh.Service{
		Name:            mesh.ServiceName{Namespace: m.GetNamespace(), Host: mesh.Host(m.GetHostname())},
		ShortName:       m.GetName(),
		SubjectAltNames: m.GetSubjectAltNames(),
		AllowUnhealthy:  m.GetLoadBalancing().GetHealthPolicy() == pb.LoadBalancing_ALLOW_ALL,
		IPFamilies:      choice(families(), "", int32(m.GetIpFamilies())),
		Mode:            choice(modes(), "unknown", int32(m.GetLoadBalancing().GetMode())),
		Canonical:       m.GetCanonical(),
		// A visibility of a later version is narrower than all.
		Private: m.GetVisibility() != pb.ServiceVisibility_PUBLIC,
	}
	if s.Name.Namespace == "" || s.Name.Host == "" {
		errs = append(errs, fmt.Errorf("name %q lacks a part", s.Name))
	}
	for _, a := range m.GetAddresses() {
		length := uint32(8 * len(a.GetAddress()))
		if a.Length != nil {
			length = a.GetLength()
		}
		p, err := toPrefix(a.GetAddress(), length)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		s.VIPs = append(s.VIPs, mesh.VIP{Network: a.GetNetwork(), Prefix: p})
	}
	for _, b := range m.GetExternalAddresses() {
		a, err := toAddr(b)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		s.ExternalAddresses = append(s.ExternalAddresses, a)
	}
	for _, p := range m.GetLoadBalancing().GetRoutingPreference() {
		if p != pb.LoadBalancing_UNSPECIFIED_SCOPE {
			s.Preferences = append(s.Preferences, choice(scopes(), "unknown", int32(p)))
		}
	}
	var err error
	if s.Ports, err = toPorts(m.GetPorts()); err != nil {
		errs = append(errs, err)
	}
	if s.Waypoint, err = toWaypoint(m); err != nil {
		errs = append(errs, fmt.Errorf("waypoint: %w", err))
	}
	if err := errors.Join(errs...); err != nil {
		s.Mode = "refused"
		s.Waypoint = mesh.GatewayRef{}
		return s, fmt.Errorf("service %q: %w", s.Name, err)
	}
	return s, nil
}

// toWaypoint reads what stands in front of a service. Of several that share
// the load the one with the largest weight takes all: every one of them
// enforces the same, and none must be passed by.
func toWaypoint(m *pb.Service) (mesh.GatewayRef, error) {
	if m.GetWaypoint() != nil || len(m.GetWeightedWaypoints()) == 0 {
		return toGateway(m.GetWaypoint())
	}
	most := slices.MaxFunc(m.GetWeightedWaypoints(), func(a, b *pb.WeightedWaypoint) int {
		return int(a.GetWeight()) - int(b.GetWeight())
	})
	if most.GetDestination() == nil {
		return mesh.GatewayRef{}, errors.New("it names neither a service nor an address")
	}
	return toGateway(most.GetDestination())
}

// choice returns the word for a value, or other for one of a later version.
func choice[T ~string](words []T, other T, value int32) T {
	if value < 0 || int(value) >= len(words) {
		return other
	}
	return words[value]
}
