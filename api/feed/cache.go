package feed

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	pb "github.com/weft-mesh/weft/api/workload"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
)

// A cache is what a Client has received, by resource name. One goroutine owns
// it; the objects in it are shared with Views and never change.
type cache struct {
	workloads map[string]*mesh.Workload
	services  map[string]*mesh.Service
	policies  map[string]*mesh.Policy
	targeted  map[string]*mesh.Policy // those of ScopeTarget
	routes    map[string]*mesh.Route
	traffic   map[string]*mesh.TrafficPolicy
	waypoints map[string]*mesh.Waypoint
	types     []string                     // that are subscribed to, in the order to ask for them
	versions  map[string]map[string]string // by type and name: what was accepted
	answered  map[string]bool              // by type: there has been a response
	views     uint64                       // how many were made
	doubts    []error                      // about what was accepted; the owner logs and clears them
}

// newCache returns an empty cache for what a proxy of the role subscribes to.
func newCache(role string) *cache {
	c := &cache{
		workloads: map[string]*mesh.Workload{},
		services:  map[string]*mesh.Service{},
		policies:  map[string]*mesh.Policy{},
		targeted:  map[string]*mesh.Policy{},
		routes:    map[string]*mesh.Route{},
		traffic:   map[string]*mesh.TrafficPolicy{},
		waypoints: map[string]*mesh.Waypoint{},
		types:     []string{TypeAuthorization, TypeAddress},
		versions:  map[string]map[string]string{},
		answered:  map[string]bool{},
	}
	if role == RoleWaypoint {
		c.types = sending()
	}
	for _, url := range c.types {
		c.versions[url] = map[string]string{}
	}
	return c
}

// complete reports whether all types have been answered, so that what is not
// here is not in the mesh.
func (c *cache) complete() bool {
	return !slices.ContainsFunc(c.types, func(url string) bool { return !c.answered[url] })
}

// view makes the View of what is here now.
func (c *cache) view() *view.View {
	c.views++
	return view.WithL7(strconv.FormatUint(c.views, 10),
		values(c.workloads), values(c.services), slices.Concat(values(c.policies), values(c.targeted)),
		view.L7{Routes: values(c.routes), TrafficPolicies: values(c.traffic), Waypoints: values(c.waypoints)})
}

func values[T any](m map[string]*T) []*T {
	return slices.AppendSeq(make([]*T, 0, len(m)), maps.Values(m))
}

// apply takes in a response. Resources that cannot be read are refused by the
// error, which names them; all others count.
//
// What is refused does not replace what was there. If nothing was there, a
// stand-in takes the place that refuses traffic: silence would be read as
// "not in the mesh" or "no policy". A stand-in has no version, so the resource
// is sent again on the next connection.
func (c *cache) apply(r *discovery.DeltaDiscoveryResponse) error {
	versions := c.versions[r.GetTypeUrl()]
	if versions == nil {
		return fmt.Errorf("type %q was not asked for", r.GetTypeUrl())
	}
	for _, name := range r.GetRemovedResources() {
		c.remove(r.GetTypeUrl(), name)
	}
	var errs []error
	for _, x := range r.GetResources() {
		var err error
		switch {
		case x.GetResource().GetTypeUrl() != r.GetTypeUrl():
			err = fmt.Errorf("its content is a %q", x.GetResource().GetTypeUrl())
			c.standIn(r.GetTypeUrl(), x.GetName())
		case r.GetTypeUrl() == TypeAddress:
			err = c.setAddress(x.GetName(), x.GetResource().GetValue())
		case r.GetTypeUrl() == TypeAuthorization:
			err = c.setPolicy(x.GetName(), x.GetResource().GetValue())
		default:
			err = c.setObject(r.GetTypeUrl(), x.GetName(), x.GetResource().GetValue())
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("resource %q: %w", x.GetName(), err))
			if slices.Contains(ofRequests(), r.GetTypeUrl()) {
				delete(versions, x.GetName()) // what was known of it is in force no more
			}
			continue
		}
		versions[x.GetName()] = x.GetVersion()
	}
	c.answered[r.GetTypeUrl()] = true
	return errors.Join(errs...)
}

func (c *cache) remove(url, name string) {
	delete(c.versions[url], name)
	switch url {
	case TypeAddress:
		delete(c.workloads, name)
		delete(c.services, name)
	case TypeAuthorization:
		delete(c.policies, name)
	case TypePolicy:
		delete(c.targeted, name)
	case TypeRoute:
		delete(c.routes, name)
	case TypeTrafficPolicy:
		delete(c.traffic, name)
	case TypeWaypoint:
		delete(c.waypoints, name)
	}
}

// setAddress reads a workload or service.
func (c *cache) setAddress(name string, b []byte) error {
	var m pb.Address
	if err := proto.Unmarshal(b, &m); err != nil {
		return err // nothing is known of it, not even an address to refuse
	}
	switch t := m.GetType().(type) {
	case *pb.Address_Workload:
		w, err := ToWorkload(t.Workload)
		if err == nil && string(w.UID) != name {
			err = fmt.Errorf("its content is workload %q", w.UID)
		}
		if _, known := c.workloads[name]; err != nil && (known || string(w.UID) != name) {
			return err
		}
		c.workloads[name] = &w
		delete(c.services, name)
		if err == nil {
			c.doubt(w.Validate())
		}
		return err
	case *pb.Address_Service:
		s, err := ToService(t.Service)
		if err == nil && s.Name.String() != name {
			err = fmt.Errorf("its content is service %q", s.Name)
		}
		if _, known := c.services[name]; err != nil && (known || s.Name.String() != name) {
			return err
		}
		c.services[name] = &s
		delete(c.workloads, name)
		if err == nil {
			c.doubt(s.Validate())
		}
		return err
	}
	return errors.New("it is neither a workload nor a service")
}

// setPolicy reads a policy.
func (c *cache) setPolicy(name string, b []byte) error {
	var m pb.Authorization
	if err := proto.Unmarshal(b, &m); err != nil {
		c.standIn(TypeAuthorization, name)
		return err
	}
	p, err := ToPolicy(&m)
	if err == nil && p.Name.String() != name {
		err = fmt.Errorf("its content is policy %q", p.Name)
	}
	if err != nil {
		c.standIn(TypeAuthorization, name)
		return err
	}
	c.policies[name] = &p
	c.doubt(p.Validate())
	return nil
}

// doubt notes what is wrong with something that was accepted all the same.
func (c *cache) doubt(err error) {
	if err != nil {
		c.doubts = append(c.doubts, err)
	}
}

// standIn puts a policy that denies in its whole namespace where one could not
// be read and none was known.
func (c *cache) standIn(url, name string) {
	if slices.Contains(ofRequests(), url) {
		_ = c.setObject(url, name, nil) // nothing is never understood
		return
	}
	if _, known := c.policies[name]; url != TypeAuthorization || known {
		return
	}
	n, err := mesh.ParseName(name)
	if err != nil {
		ns, _, _ := strings.Cut(name, "/")
		n = mesh.Name{Namespace: ns, Name: name}
	}
	c.policies[name] = &mesh.Policy{Name: n, Scope: mesh.ScopeNamespace}
}
