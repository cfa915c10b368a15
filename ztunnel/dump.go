package ztunnel

import (
	"net/netip"
	"strconv"

	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// A Dump is the state of a Proxy in the shape that tools for ambient meshes
// read at /config_dump. It holds no keys. Marshal it as JSON.
type Dump struct {
	Workloads    []dumpWorkload        `json:"workloads"`
	Services     []dumpService         `json:"services"`
	Policies     []dumpPolicy          `json:"policies"`
	Certificates []identity.State      `json:"certificates"`
	States       map[string]*dumpState `json:"workloadState"` // by pod UID
	Config       dumpConfig            `json:"config"`
}

type dumpConfig struct {
	TrustDomain  string `json:"trustDomain"`
	Network      string `json:"network"`
	ClusterID    string `json:"clusterId"`
	SameNode     bool   `json:"sameNode"`
	DrainTimeout string `json:"drainTimeout"`
}

type dumpWorkload struct {
	UID               mesh.UID       `json:"uid"`
	IPs               []netip.Addr   `json:"workloadIps"`
	Waypoint          *dumpGateway   `json:"waypoint,omitempty"`
	Protocol          string         `json:"protocol"`
	Name              string         `json:"name"`
	Namespace         string         `json:"namespace"`
	ServiceAccount    string         `json:"serviceAccount"`
	WorkloadName      string         `json:"workloadName"`
	WorkloadType      string         `json:"workloadType"`
	CanonicalName     string         `json:"canonicalName"`
	CanonicalRevision string         `json:"canonicalRevision"`
	ClusterID         string         `json:"clusterId"`
	TrustDomain       string         `json:"trustDomain,omitempty"`
	Locality          mesh.Locality  `json:"locality,omitzero"`
	Node              string         `json:"node,omitempty"`
	Network           string         `json:"network,omitempty"`
	NetworkMode       string         `json:"networkMode"` // Standard or HostNetwork
	Status            string         `json:"status"`
	Hostname          mesh.Host      `json:"hostname,omitempty"`
	Capacity          uint32         `json:"capacity"`
	AppTunnel         *dumpAppTunnel `json:"applicationTunnel,omitempty"`
	Services          []string       `json:"services,omitempty"` // namespace/host name
	Policies          []string       `json:"authorizationPolicies,omitempty"`
}

type dumpAppTunnel struct {
	Protocol string `json:"protocol"` // PROXY
	Port     uint16 `json:"port,omitempty"`
}

type dumpGateway struct {
	Destination string `json:"destination"` // network/address, or namespace/host name
	Port        uint16 `json:"hboneMtlsPort,omitempty"`
}

type dumpService struct {
	Name            string                     `json:"name"`
	Namespace       string                     `json:"namespace"`
	Hostname        mesh.Host                  `json:"hostname"`
	VIPs            []string                   `json:"vips"`
	CIDRs           []string                   `json:"cidrVips,omitempty"`
	Ports           map[string]uint16          `json:"ports"`
	LoadBalancer    *dumpBalance               `json:"loadBalancer,omitempty"`
	Waypoint        *dumpGateway               `json:"waypoint,omitempty"`
	Endpoints       map[mesh.UID]*dumpEndpoint `json:"endpoints"`
	SubjectAltNames []string                   `json:"subjectAltNames"`
	IPFamilies      string                     `json:"ipFamilies,omitempty"` // IPv4, IPv6 or Dual
	Canonical       bool                       `json:"canonical"`
	Visibility      string                     `json:"visibility"` // Public or Namespace
}

type dumpBalance struct {
	Mode         string   `json:"mode"`               // Standard, Strict, Failover or Passthrough
	Preferences  []string `json:"routingPreferences"` // Network, Region, Zone, Subzone, Node or Cluster
	HealthPolicy string   `json:"healthPolicy"`       // OnlyHealthy or AllowAll
}

type dumpEndpoint struct {
	UID     mesh.UID          `json:"workloadUid"`
	Service string            `json:"service"`
	Ports   map[string]uint16 `json:"port"`
}

type dumpState struct {
	State       string `json:"state"`
	Connections struct {
		Inbound  []dumpConnection `json:"inbound"`
		Outbound []dumpConnection `json:"outbound"`
	} `json:"connections"`
	Info struct {
		Name           string `json:"name"`
		Namespace      string `json:"namespace"`
		TrustDomain    string `json:"trustDomain"`
		ServiceAccount string `json:"serviceAccount"`
	} `json:"info"`
}

type dumpConnection struct {
	Src         string `json:"src"`
	OriginalDst string `json:"originalDst"`
	ActualDst   string `json:"actualDst"`
	Protocol    string `json:"protocol"` // HBONE or TCP
}

// Dump returns the state as it is now.
func (p *Proxy) Dump() Dump {
	v := p.cfg.View.Load()
	d := Dump{
		Workloads: []dumpWorkload{}, Services: []dumpService{}, Policies: []dumpPolicy{},
		Certificates: p.cfg.Identity.Dump(),
		States:       p.dumpStates(),
		Config: dumpConfig{
			TrustDomain: p.cfg.TrustDomain, Network: p.cfg.Network, ClusterID: p.cfg.Cluster,
			SameNode: p.cfg.SameNode, DrainTimeout: p.cfg.DrainTimeout.String(),
		},
	}
	for w := range v.Workloads() {
		d.Workloads = append(d.Workloads, workloadDump(w))
	}
	for s := range v.Services() {
		d.Services = append(d.Services, serviceDump(v, s))
	}
	for pol := range v.Policies() {
		d.Policies = append(d.Policies, policyDump(pol))
	}
	return d
}

func workloadDump(w *mesh.Workload) dumpWorkload {
	d := dumpWorkload{
		UID: w.UID, IPs: append([]netip.Addr{}, w.Addresses...), Waypoint: gatewayDump(w.Waypoint), Protocol: "TCP",
		Name: w.Name.Name, Namespace: w.Name.Namespace, ServiceAccount: w.Identity.ServiceAccount,
		WorkloadName: w.Owner.Name, WorkloadType: w.Owner.Kind,
		CanonicalName: w.CanonicalName, CanonicalRevision: w.CanonicalRevision,
		ClusterID: w.Cluster, TrustDomain: w.Identity.TrustDomain, Locality: w.Locality, Node: w.Node, Network: w.Network,
		NetworkMode: "Standard", Status: "Unhealthy", Hostname: w.Host, Capacity: 1,
	}
	if w.Transport == mesh.HBONE {
		d.Protocol = "HBONE"
	}
	if w.Healthy {
		d.Status = "Healthy"
	}
	if w.HostNetwork {
		d.NetworkMode = "HostNetwork"
	}
	if w.Capacity != nil {
		d.Capacity = *w.Capacity
	}
	if w.AppTunnel.Proxy {
		d.AppTunnel = &dumpAppTunnel{Protocol: "PROXY", Port: w.AppTunnel.Port}
	}
	for _, m := range w.Services {
		d.Services = append(d.Services, m.Service.String())
	}
	for _, n := range w.Policies {
		d.Policies = append(d.Policies, n.String())
	}
	return d
}

func gatewayDump(g mesh.GatewayRef) *dumpGateway {
	switch {
	case g.IsZero():
		return nil
	case g.Address.IsValid():
		return &dumpGateway{Destination: g.Network + "/" + g.Address.String(), Port: g.Port}
	}
	return &dumpGateway{Destination: g.Service.String(), Port: g.Port}
}

func serviceDump(v *view.View, s *mesh.Service) dumpService {
	d := dumpService{
		Name: s.ShortName, Namespace: s.Name.Namespace, Hostname: s.Name.Host, VIPs: []string{},
		Ports: portsDump(s.Ports), Waypoint: gatewayDump(s.Waypoint), Endpoints: map[mesh.UID]*dumpEndpoint{},
		SubjectAltNames: append([]string{}, s.SubjectAltNames...), Canonical: s.Canonical, Visibility: "Public",
		IPFamilies: map[string]string{"ipv4": "IPv4", "ipv6": "IPv6", "dual": "Dual"}[s.IPFamilies],
	}
	if s.Private {
		d.Visibility = "Namespace"
	}
	for _, vip := range s.VIPs {
		if vip.Prefix.IsSingleIP() {
			d.VIPs = append(d.VIPs, vip.Network+"/"+vip.Prefix.Addr().String())
		} else {
			d.CIDRs = append(d.CIDRs, vip.Network+"/"+vip.Prefix.String())
		}
	}
	d.LoadBalancer = balanceDump(s)
	for _, e := range v.Endpoints(s.Name) {
		d.Endpoints[e.Workload.UID] = &dumpEndpoint{UID: e.Workload.UID, Service: s.Name.String(), Ports: portsDump(e.Ports)}
	}
	return d
}

// balanceDump returns nil for a service whose endpoints are all alike.
func balanceDump(s *mesh.Service) *dumpBalance {
	if s.Mode == mesh.BalanceAny && !s.AllowUnhealthy {
		return nil
	}
	d := &dumpBalance{Preferences: []string{}, HealthPolicy: "OnlyHealthy"}
	d.Mode = map[mesh.BalanceMode]string{
		mesh.BalanceAny: "Standard", mesh.BalanceStrict: "Strict", mesh.BalanceFailover: "Failover", mesh.BalancePassthrough: "Passthrough",
	}[s.Mode]
	for _, p := range s.Preferences {
		d.Preferences = append(d.Preferences, map[mesh.Preference]string{
			mesh.PreferNetwork: "Network", mesh.PreferRegion: "Region", mesh.PreferZone: "Zone",
			mesh.PreferSubzone: "Subzone", mesh.PreferNode: "Node", mesh.PreferCluster: "Cluster",
		}[p])
	}
	if s.AllowUnhealthy {
		d.HealthPolicy = "AllowAll"
	}
	return d
}

func portsDump(ports []mesh.Port) map[string]uint16 {
	m := make(map[string]uint16, len(ports))
	for _, p := range ports {
		m[strconv.Itoa(int(p.Service))] = p.Target
	}
	return m
}

// dumpStates returns the local pods with their open connections.
func (p *Proxy) dumpStates() map[string]*dumpState {
	states := make(map[string]*dumpState)
	p.mu.Lock()
	for _, q := range p.owners {
		info := q.info.Load()
		s := states[info.UID]
		if s == nil {
			s = &dumpState{State: "Draining"}
			s.Connections.Inbound, s.Connections.Outbound = []dumpConnection{}, []dumpConnection{}
			s.Info.Name, s.Info.Namespace = info.Name, info.Namespace
			s.Info.TrustDomain, s.Info.ServiceAccount = q.id.TrustDomain, q.id.ServiceAccount
			states[info.UID] = s
		}
		if p.pods[info.UID] == q {
			s.State = "Up"
		}
	}
	p.mu.Unlock()
	for _, f := range p.flows.all() {
		p := f.who.Value()
		s := states[p.pod.info.Load().UID]
		if s == nil {
			continue // it ended meanwhile
		}
		dst := p.dst.String()
		c := dumpConnection{Src: f.src().String(), OriginalDst: dst, ActualDst: dst, Protocol: "TCP"}
		if f.mutualTLS {
			c.Protocol = "HBONE"
			if p.target.IsValid() {
				c.OriginalDst = p.target.String()
			}
		}
		if f.direction == inbound {
			s.Connections.Inbound = append(s.Connections.Inbound, c)
		} else {
			s.Connections.Outbound = append(s.Connections.Outbound, c)
		}
	}
	return states
}
