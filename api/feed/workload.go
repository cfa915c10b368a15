package feed

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/wrapperspb"

	pb "github.com/weft-mesh/weft/api/workload"
	"github.com/weft-mesh/weft/mesh"
)

// What the wire means when it leaves a part of an identity out.
const (
	defaultTrustDomain    = "cluster.local"
	defaultServiceAccount = "default"
)

// FromWorkload translates a workload for the wire. The wire has one namespace
// for name and identity, that of the name. An unset transport goes out as the
// legacy one, which no proxy speaks.
func FromWorkload(w mesh.Workload) *pb.Workload {
	m := &pb.Workload{
		Uid:                   string(w.UID),
		Name:                  w.Name.Name,
		Namespace:             w.Name.Namespace,
		Hostname:              string(w.Host),
		Network:               w.Network,
		TunnelProtocol:        pb.TunnelProtocol_LEGACY_ISTIO_MTLS,
		TrustDomain:           w.Identity.TrustDomain,
		ServiceAccount:        w.Identity.ServiceAccount,
		Waypoint:              fromGateway(w.Waypoint),
		Node:                  w.Node,
		CanonicalName:         w.CanonicalName,
		CanonicalRevision:     w.CanonicalRevision,
		WorkloadName:          w.Owner.Name,
		ClusterId:             w.Cluster,
		Services:              make(map[string]*pb.PortList, len(w.Services)),
		AuthorizationPolicies: make([]string, 0, len(w.Policies)),
		Status:                pb.WorkloadStatus_UNHEALTHY,
		Direct:                w.Direct,
		Labels:                w.Labels,
	}
	switch w.Transport {
	case mesh.HBONE:
		m.TunnelProtocol = pb.TunnelProtocol_HBONE
	case mesh.PlainTCP:
		m.TunnelProtocol = pb.TunnelProtocol_NONE
	}
	if i := slices.Index(ownerKinds(), w.Owner.Kind); i >= 0 {
		m.WorkloadType = pb.WorkloadType(i)
	}
	if w.Healthy {
		m.Status = pb.WorkloadStatus_HEALTHY
	}
	if w.AppTunnel.Proxy {
		m.ApplicationTunnel = &pb.ApplicationTunnel{Protocol: pb.ApplicationTunnel_PROXY, Port: uint32(w.AppTunnel.Port)}
	}
	if w.HostNetwork {
		m.NetworkMode = pb.NetworkMode_HOST_NETWORK
	}
	if l := w.Locality; l != (mesh.Locality{}) {
		m.Locality = &pb.Locality{Region: l.Region, Zone: l.Zone, Subzone: l.Subzone}
	}
	if w.Capacity != nil {
		m.Capacity = wrapperspb.UInt32(*w.Capacity)
	}
	for _, a := range w.Addresses {
		m.Addresses = append(m.Addresses, a.Unmap().AsSlice())
	}
	for _, s := range w.Services {
		m.Services[s.Service.String()] = &pb.PortList{Ports: fromPorts(s.Ports)}
	}
	for _, n := range w.Policies {
		m.AuthorizationPolicies = append(m.AuthorizationPolicies, n.String())
	}
	return m
}

// ownerKinds are the words for the values of pb.WorkloadType, in their order.
func ownerKinds() []string { return []string{"deployment", "cronjob", "pod", "job"} }

// ToWorkload reads a workload from the wire. With an error it returns a
// stand-in that has what could be read, an unset transport and a policy that
// never arrives: a proxy that uses it refuses all traffic to the workload.
func ToWorkload(m *pb.Workload) (mesh.Workload, error) {
	var errs []error
	w := mesh.Workload{
		UID:     mesh.UID(m.GetUid()),
		Name:    mesh.Name{Namespace: m.GetNamespace(), Name: m.GetName()},
		Host:    mesh.Host(m.GetHostname()),
		Network: m.GetNetwork(),
		Cluster: m.GetClusterId(),
		Node:    m.GetNode(),
		Identity: mesh.Identity{
			TrustDomain:    cmp.Or(m.GetTrustDomain(), defaultTrustDomain),
			Namespace:      m.GetNamespace(),
			ServiceAccount: cmp.Or(m.GetServiceAccount(), defaultServiceAccount),
		},
		HostNetwork:       m.GetNetworkMode() == pb.NetworkMode_HOST_NETWORK,
		Healthy:           m.GetStatus() == pb.WorkloadStatus_HEALTHY,
		CanonicalName:     m.GetCanonicalName(),
		CanonicalRevision: m.GetCanonicalRevision(),
		Direct:            m.GetDirect(),
		Labels:            m.GetLabels(),
	}
	if c := m.GetCapacity(); c != nil {
		value := c.GetValue()
		w.Capacity = &value
	}
	if l := m.GetLocality(); l != nil {
		w.Locality = mesh.Locality{Region: l.GetRegion(), Zone: l.GetZone(), Subzone: l.GetSubzone()}
	}
	if n := m.GetWorkloadName(); n != "" {
		w.Owner.Name = n
		if i := int(m.GetWorkloadType()); i >= 0 && i < len(ownerKinds()) {
			w.Owner.Kind = ownerKinds()[i]
		}
	}
	if w.UID == "" || w.Name.Namespace == "" || w.Name.Name == "" {
		errs = append(errs, fmt.Errorf("uid %q or name %q lacks a part", w.UID, w.Name))
	}
	for _, b := range m.GetAddresses() {
		a, err := toAddr(b)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		w.Addresses = append(w.Addresses, a)
	}
	var err error
	if w.Waypoint, err = toGateway(m.GetWaypoint()); err != nil {
		errs = append(errs, fmt.Errorf("waypoint: %w", err))
	}
	if w.Services, err = toMemberships(m.GetServices()); err != nil {
		errs = append(errs, err)
	}
	if w.AppTunnel, err = toAppTunnel(m.GetApplicationTunnel()); err != nil {
		errs = append(errs, err)
	}
	w.Transport, err = toTransport(m)
	if err != nil {
		errs = append(errs, err)
	}
	for _, s := range m.GetAuthorizationPolicies() {
		n, err := mesh.ParseName(s)
		if err != nil {
			n = mesh.Name{Name: s} // names no policy there can be, so it denies
		}
		w.Policies = append(w.Policies, n)
	}
	if err := errors.Join(errs...); err != nil {
		w.Transport = mesh.TransportUnset
		w.Policies = append(w.Policies, mesh.Name{})
		return w, fmt.Errorf("workload %q: %w", w.UID, err)
	}
	return w, nil
}

// toAppTunnel reads what the workload wants to be told about connections.
func toAppTunnel(m *pb.ApplicationTunnel) (mesh.AppTunnel, error) {
	switch {
	case m.GetPort() > math.MaxUint16:
		return mesh.AppTunnel{}, fmt.Errorf("application tunnel: port %d is out of range", m.GetPort())
	case m.GetProtocol() == pb.ApplicationTunnel_NONE:
		return mesh.AppTunnel{}, nil // the port of nothing means nothing
	case m.GetProtocol() == pb.ApplicationTunnel_PROXY:
		return mesh.AppTunnel{Proxy: true, Port: uint16(m.GetPort())}, nil
	}
	return mesh.AppTunnel{}, fmt.Errorf("application tunnel %v is not supported", m.GetProtocol())
}

// toTransport reads how the workload is reached.
func toTransport(m *pb.Workload) (mesh.Transport, error) {
	switch m.GetTunnelProtocol() {
	case pb.TunnelProtocol_NONE:
		return mesh.PlainTCP, nil
	case pb.TunnelProtocol_HBONE:
		return mesh.HBONE, nil
	}
	return mesh.TransportUnset, nil
}

// toMemberships reads the services of a workload, sorted by name.
func toMemberships(m map[string]*pb.PortList) ([]mesh.Membership, error) {
	var (
		list []mesh.Membership
		errs []error
	)
	for key, ports := range m {
		n, err := mesh.ParseServiceName(key)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		ps, err := toPorts(ports.GetPorts())
		if err != nil {
			errs = append(errs, fmt.Errorf("service %q: %w", key, err))
			continue
		}
		list = append(list, mesh.Membership{Service: n, Ports: ps})
	}
	slices.SortFunc(list, func(a, b mesh.Membership) int {
		return strings.Compare(a.Service.String(), b.Service.String())
	})
	return list, errors.Join(errs...)
}

// appProtocols are the words for the values of pb.AppProtocol, in their order.
func appProtocols() []string { return []string{"", "http", "http2", "grpc", "tcp", "tls"} }

func fromPorts(ps []mesh.Port) []*pb.Port {
	list := make([]*pb.Port, 0, len(ps))
	for _, p := range ps {
		m := &pb.Port{ServicePort: uint32(p.Service), TargetPort: uint32(p.Target)}
		if i := slices.Index(appProtocols(), p.AppProtocol); i > 0 {
			m.AppProtocol = pb.AppProtocol(i)
		}
		list = append(list, m)
	}
	return list
}

// toPorts reads ports. A protocol of a later version is none: it only tells
// proxies what to report.
func toPorts(ms []*pb.Port) ([]mesh.Port, error) {
	var list []mesh.Port
	for _, m := range ms {
		if m.GetServicePort() > math.MaxUint16 || m.GetTargetPort() > math.MaxUint16 {
			return nil, fmt.Errorf("port %d to %d is out of range", m.GetServicePort(), m.GetTargetPort())
		}
		p := mesh.Port{Service: uint16(m.GetServicePort()), Target: uint16(m.GetTargetPort())}
		if i := int(m.GetAppProtocol()); i >= 0 && i < len(appProtocols()) {
			p.AppProtocol = appProtocols()[i]
		}
		list = append(list, p)
	}
	return list, nil
}

func fromGateway(r mesh.GatewayRef) *pb.GatewayAddress {
	switch {
	case r.IsZero():
		return nil
	case r.Address.IsValid():
		return &pb.GatewayAddress{
			Destination:   &pb.GatewayAddress_Address{Address: &pb.NetworkAddress{Network: r.Network, Address: r.Address.Unmap().AsSlice()}},
			HboneMtlsPort: uint32(r.Port),
		}
	}
	return &pb.GatewayAddress{
		Destination:   &pb.GatewayAddress_Hostname{Hostname: &pb.NamespacedHostname{Namespace: r.Service.Namespace, Hostname: string(r.Service.Host)}},
		HboneMtlsPort: uint32(r.Port),
	}
}

// toGateway reads a reference to a gateway. One that is there but names none
// is an error: traffic must go through something, and nobody knows what.
func toGateway(m *pb.GatewayAddress) (mesh.GatewayRef, error) {
	if m == nil {
		return mesh.GatewayRef{}, nil
	}
	if m.GetHboneMtlsPort() > math.MaxUint16 {
		return mesh.GatewayRef{}, fmt.Errorf("port %d is out of range", m.GetHboneMtlsPort())
	}
	r := mesh.GatewayRef{Port: uint16(m.GetHboneMtlsPort())}
	switch d := m.GetDestination().(type) {
	case *pb.GatewayAddress_Hostname:
		r.Service = mesh.ServiceName{Namespace: d.Hostname.GetNamespace(), Host: mesh.Host(d.Hostname.GetHostname())}
		if r.Service.Namespace == "" || r.Service.Host == "" {
			return mesh.GatewayRef{}, fmt.Errorf("service %q lacks a part", r.Service)
		}
	case *pb.GatewayAddress_Address:
		a, err := toAddr(d.Address.GetAddress())
		if err != nil {
			return mesh.GatewayRef{}, err
		}
		r.Network, r.Address = d.Address.GetNetwork(), a
	default:
		return mesh.GatewayRef{}, errors.New("it names neither a service nor an address")
	}
	return r, nil
}

// toAddr reads an address of 4 or 16 bytes.
func toAddr(b []byte) (netip.Addr, error) {
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.Addr{}, fmt.Errorf("address of %d bytes: want 4 or 16", len(b))
	}
	return a.Unmap(), nil
}

// toPrefix reads a range of addresses; one in IPv6-mapped form becomes IPv4.
func toPrefix(b []byte, length uint32) (netip.Prefix, error) {
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.Prefix{}, fmt.Errorf("address of %d bytes: want 4 or 16", len(b))
	}
	if length > uint32(a.BitLen()) {
		return netip.Prefix{}, fmt.Errorf("range %v/%d is longer than its address", a, length)
	}
	bits := int(length)
	if a.Is4In6() {
		if bits < 96 {
			return netip.Prefix{}, fmt.Errorf("range %v/%d mixes IPv4 and IPv6", a, length)
		}
		a, bits = a.Unmap(), bits-96
	}
	return a.Prefix(bits)
}
