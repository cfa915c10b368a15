// Package hbone is the tunnel protocol of the mesh: mutual TLS 1.3 between two
// workload identities, and in it HTTP/2 whose every stream is one CONNECT and
// carries one TCP connection.
//
// Its core, Tunnel, is a state machine without I/O. Server and Pool drive it
// with goroutines and give the streams out as net.Conn.
package hbone

// Port is where workloads and waypoints take HBONE.
const Port = 15008
