package view

import (
	"encoding/json"
	"fmt"

	"github.com/weft-mesh/weft/mesh"
)

// MarshalJSON writes the dump that FromJSON reads: an object of version,
// workloads, services and policies, each sorted.
func (v *View) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Version   string           `json:"version"`
		Workloads []*mesh.Workload `json:"workloads"`
		Services  []*mesh.Service  `json:"services"`
		Policies  []*mesh.Policy   `json:"policies"`
	}{v.version, v.workloads, v.services, v.policies})
}

// FromJSON makes a View of a dump, so that what happened in one place can be
// replayed in another. It does not validate the objects: a proxy may have held
// invalid ones, and then its refusals are what is to be replayed.
func FromJSON(data []byte) (*View, error) {
	var dump struct {
		Version   string
		Workloads []mesh.Workload
		Services  []mesh.Service
		Policies  []mesh.Policy
	}
	if err := json.Unmarshal(data, &dump); err != nil {
		return nil, fmt.Errorf("read view: %w", err)
	}
	return New(dump.Version, dump.Workloads, dump.Services, dump.Policies), nil
}
