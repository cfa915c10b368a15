package view

import (
	"encoding/json"
	"fmt"
	"slices"

	"github.com/weft-mesh/weft/mesh"
)

// MarshalJSON writes the dump that FromJSON reads: an object of version and of
// lists of all kinds, each sorted. What only proxies of requests know is left
// out where there is none.
func (v *View) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Version         string                `json:"version"`
		Workloads       []*mesh.Workload      `json:"workloads"`
		Services        []*mesh.Service       `json:"services"`
		Policies        []*mesh.Policy        `json:"policies"`
		Routes          []*mesh.Route         `json:"routes,omitempty"`
		TrafficPolicies []*mesh.TrafficPolicy `json:"trafficPolicies,omitempty"`
		Waypoints       []*mesh.Waypoint      `json:"waypoints,omitempty"`
	}{v.version, v.workloads, v.services, v.policies, v.routes, v.traffic, v.waypoints})
}

// FromJSON makes a View of a dump, so that what happened in one place can be
// replayed in another. It does not validate the objects: a proxy may have held
// invalid ones, and then its refusals are what is to be replayed.
func FromJSON(data []byte) (*View, error) {
	var dump struct {
		Version         string
		Workloads       []*mesh.Workload
		Services        []*mesh.Service
		Policies        []*mesh.Policy
		Routes          []*mesh.Route
		TrafficPolicies []*mesh.TrafficPolicy
		Waypoints       []*mesh.Waypoint
	}
	if err := json.Unmarshal(data, &dump); err != nil {
		return nil, fmt.Errorf("read view: %w", err)
	}
	return WithL7(dump.Version, present(dump.Workloads), present(dump.Services), present(dump.Policies),
		L7{present(dump.Routes), present(dump.TrafficPolicies), present(dump.Waypoints)}), nil
}

// present returns list without the nulls that a dump may hold.
func present[T any](list []*T) []*T {
	return slices.DeleteFunc(list, func(t *T) bool { return t == nil })
}
