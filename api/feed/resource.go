package feed

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	pb "github.com/weft-mesh/weft/api/workload"
	"github.com/weft-mesh/weft/mesh"
)

// Resources is everything a Server tells.
type Resources struct {
	Workloads []mesh.Workload
	Services  []mesh.Service
	Policies  []mesh.Policy

	// Only waypoints are told these, and the policies of ScopeTarget.
	Routes          []mesh.Route
	TrafficPolicies []mesh.TrafficPolicy
	Waypoints       []mesh.Waypoint
}

// A resource is one object, ready to be sent. It is immutable.
type resource struct {
	message *discovery.Resource
	size    int // of message on the wire, about

	// For subscribers that ask by address or service; empty for policies.
	ranges   []mesh.VIP         // those of a service that are wider than one address
	services []mesh.ServiceName // those a workload is an endpoint of
	service  mesh.ServiceName   // set if it is a service
}

// encode makes a resource of a message. Its version is a hash of its content,
// so that it means the same to every replica and after every restart.
func encode(typeURL, name string, aliases []string, m proto.Message) (*resource, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s %q: %w", typeURL, name, err)
	}
	sum := sha256.Sum256(b)
	r := &discovery.Resource{
		Name:     name,
		Aliases:  aliases,
		Version:  hex.EncodeToString(sum[:8]),
		Resource: &anypb.Any{TypeUrl: typeURL, Value: b},
	}
	return &resource{message: r, size: len(b) + len(name) + 128}, nil
}

func encodeWorkload(w mesh.Workload) (*resource, error) {
	var aliases []string
	for _, a := range w.Addresses {
		aliases = append(aliases, alias(w.Network, a))
	}
	m := &pb.Address{Type: &pb.Address_Workload{Workload: FromWorkload(w)}}
	r, err := encode(TypeAddress, string(w.UID), aliases, m)
	if err != nil {
		return nil, err
	}
	for _, s := range w.Services {
		r.services = append(r.services, s.Service)
	}
	return r, nil
}

func encodeService(s mesh.Service) (*resource, error) {
	var (
		aliases []string
		ranges  []mesh.VIP
	)
	for _, v := range s.VIPs {
		if v.Prefix.IsSingleIP() {
			aliases = append(aliases, alias(v.Network, v.Prefix.Addr()))
		} else {
			ranges = append(ranges, v)
		}
	}
	m := &pb.Address{Type: &pb.Address_Service{Service: FromService(s)}}
	r, err := encode(TypeAddress, s.Name.String(), aliases, m)
	if err != nil {
		return nil, err
	}
	r.ranges, r.service = ranges, s.Name
	return r, nil
}

func encodePolicy(p mesh.Policy) (*resource, error) {
	return encode(TypeAuthorization, p.Name.String(), nil, FromPolicy(p))
}

// alias is the other name of what has an address: "network/address".
func alias(network string, a netip.Addr) string { return network + "/" + a.Unmap().String() }

func (r *resource) name() string    { return r.message.GetName() }
func (r *resource) version() string { return r.message.GetVersion() }
