package feed

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/weft-mesh/weft/api/meshv1"
	"github.com/weft-mesh/weft/mesh"
)

// encodeObject makes a resource of one of the types whose content is the
// noun's JSON.
func encodeObject(typeURL, name string, noun any) (*resource, error) {
	b, err := json.Marshal(noun)
	if err != nil {
		return nil, fmt.Errorf("encode %s %q: %w", typeURL, name, err)
	}
	return encode(typeURL, name, nil, &meshv1.Object{Json: b})
}

func encodeRoute(r mesh.Route) (*resource, error) {
	return encodeObject(TypeRoute, r.String(), r)
}

func encodeTrafficPolicy(p mesh.TrafficPolicy) (*resource, error) {
	return encodeObject(TypeTrafficPolicy, p.Key(), p)
}

func encodeTargeted(p mesh.Policy) (*resource, error) {
	return encodeObject(TypePolicy, p.Name.String(), p)
}

func encodeWaypoint(w mesh.Waypoint) (*resource, error) {
	return encodeObject(TypeWaypoint, w.Name.String(), w)
}

// setObject reads one object of the types that carry JSON.
func (c *cache) setObject(url, name string, b []byte) error {
	var m meshv1.Object
	err := proto.Unmarshal(b, &m)
	switch url {
	case TypeRoute:
		return read(c.routes, name, m.GetJson(), err, func(r *mesh.Route) string { return r.String() }, brokenRoute)
	case TypeTrafficPolicy:
		return read(c.traffic, name, m.GetJson(), err, func(p *mesh.TrafficPolicy) string { return p.Key() }, brokenTrafficPolicy)
	case TypePolicy:
		return read(c.targeted, name, m.GetJson(), err, func(p *mesh.Policy) string { return p.Name.String() }, brokenPolicy)
	case TypeWaypoint:
		// A waypoint that is not known serves nobody.
		return read(c.waypoints, name, m.GetJson(), err, func(w *mesh.Waypoint) string { return w.Name.String() }, nil)
	}
	return fmt.Errorf("type %q is not known", url)
}

// read puts into set the object that b is, or, if it cannot be understood
// wholly, what broken makes of its name, of what could be read, and of why. An
// object that is as it was stays the same pointer.
func read[T any](set map[string]*T, name string, b []byte, err error, key func(*T) string, broken func(name string, read *T, why error) *T) error {
	t := new(T)
	if err == nil {
		err = strict(b, t)
	}
	if err == nil && key(t) != name {
		err = fmt.Errorf("its content is %q", key(t))
	}
	if err == nil {
		if old, ok := set[name]; !ok || !equalJSON(old, b) {
			set[name] = t
		}
		return nil
	}
	delete(set, name)
	if broken != nil {
		loose := new(T)
		_ = json.Unmarshal(b, loose) // as much as there is
		if stand := broken(name, loose, err); stand != nil {
			set[name] = stand
		}
	}
	return err
}

// equalJSON reports whether b is what v's JSON is.
func equalJSON(v any, b []byte) bool {
	have, err := json.Marshal(v)
	return err == nil && bytes.Equal(have, b)
}

// strict reads one JSON value. A field that v does not have is an error.
func strict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is something behind its end")
	}
	return nil
}

// brokenRoute answers 500 at the key that the name is.
func brokenRoute(name string, _ *mesh.Route, why error) *mesh.Route {
	service, rest, ok := cutService(name, ":")
	port, protocol, ok2 := strings.Cut(rest, "/")
	n, err := strconv.ParseUint(port, 10, 16)
	key := mesh.RouteKey{Service: service, Port: uint16(n), Protocol: mesh.RouteProtocol(protocol)}
	if !ok || !ok2 || err != nil || key.String() != name {
		return nil // no route has such a name: port "08" must not stand in for 8
	}
	return &mesh.Route{RouteKey: key, Broken: "this proxy does not understand the route: " + why.Error()}
}

// brokenTrafficPolicy answers 503 at the key that the name is.
func brokenTrafficPolicy(name string, _ *mesh.TrafficPolicy, why error) *mesh.TrafficPolicy {
	service, rest, ok := cutService(name, "|")
	subset, port, ok2 := strings.Cut(rest, "|")
	n, err := strconv.ParseUint(port, 10, 16)
	p := &mesh.TrafficPolicy{
		Service: service, Subset: subset, Port: uint16(n),
		Broken: "this proxy does not understand the traffic policy: " + why.Error(),
	}
	if !ok || !ok2 || err != nil || p.Key() != name {
		return nil
	}
	return p
}

// cutService cuts "namespace/host" off the start of a key.
func cutService(key, sep string) (service mesh.ServiceName, rest string, ok bool) {
	head, rest, ok := strings.Cut(key, sep)
	service, err := mesh.ParseServiceName(head)
	return service, rest, ok && err == nil
}

// brokenPolicy denies at the targets that could be read; everywhere, if there
// are none.
func brokenPolicy(name string, read *mesh.Policy, _ error) *mesh.Policy {
	n, err := mesh.ParseName(name)
	if err != nil {
		n = mesh.Name{Name: name}
	}
	p := &mesh.Policy{Name: n, Scope: mesh.ScopeTarget, Targets: read.Targets}
	if len(p.Targets) == 0 {
		p.Targets = []mesh.Target{{}}
	}
	return p
}
