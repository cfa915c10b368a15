package mesh

// A Waypoint is a proxy in front of services, workloads or both, as a Gateway
// object asks for it.
type Waypoint struct {
	Name    Name        `json:"name"`    // of the Gateway
	Service ServiceName `json:"service"` // at which it is reached
	// Identity is who its replicas are.
	Identity Identity `json:"identity"`
	// For is what traffic goes through it: "service", "workload", "all" or
	// "none".
	For string `json:"for"`
	// AccessLog is "", off, "text" in Envoy's default format, or "json".
	AccessLog string `json:"accessLog,omitempty"`
}
