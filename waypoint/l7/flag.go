package l7

import "strings"

// Flags say in which way an exchange did not go as it should, in the letters
// that access logs and metrics use. The zero Flags are none.
type Flags uint32

// The flags.
const (
	FlagDelay              Flags = 1 << iota // DI: a fault delayed it
	FlagAbort                                // FI: a fault answered it
	FlagNoHealthy                            // UH: no endpoint may take it
	FlagConnectFailed                        // UF: no connection to the endpoint
	FlagOverflow                             // UO: a circuit breaker was open
	FlagUpstreamClosed                       // UC: the endpoint closed before it answered
	FlagUpstreamReset                        // UR: the endpoint reset the stream
	FlagLocalReset                           // LR: we reset the stream
	FlagNoRoute                              // NR
	FlagNoCluster                            // NC: the backend does not exist
	FlagTimeout                              // UT: the route's timeout
	FlagRetriesExhausted                     // URX
	FlagDownstreamClosed                     // DC: the client went away
	FlagIdle                                 // SI: nothing moved for too long
	FlagDownstreamProtocol                   // DPE: the client broke the protocol
	FlagUpstreamProtocol                     // UPE: the endpoint did
	FlagMaxDuration                          // UMSDR
	FlagOverload                             // OM: this proxy has too much to do
	FlagRateLimited                          // RL
	FlagUnauthorized                         // UAEX: an external check said no
)

// flagNames are the letters of each flag, from the lowest on.
var flagNames = [...]string{"DI", "FI", "UH", "UF", "UO", "UC", "UR", "LR", "NR", "NC", "UT", "URX", "DC", "SI", "DPE", "UPE", "UMSDR", "OM", "RL", "UAEX"}

// Append appends the letters of the flags, separated by commas, or "-" if there
// are none.
func (f Flags) Append(dst []byte) []byte {
	if f == 0 {
		return append(dst, '-')
	}
	first := true
	for i, name := range flagNames {
		if f&(1<<i) == 0 {
			continue
		}
		if !first {
			dst = append(dst, ',')
		}
		first = false
		dst = append(dst, name...)
	}
	return dst
}

// String returns what Append appends.
func (f Flags) String() string {
	if f != 0 && f&(f-1) == 0 { // one flag: no allocation
		for i, name := range flagNames {
			if f == 1<<i {
				return name
			}
		}
	}
	var b strings.Builder
	b.Write(f.Append(nil))
	return b.String()
}
