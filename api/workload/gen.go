// Package workload is the wire between control and proxies: the messages of
// the workload discovery service, generated from the .proto files beside it.
// Translate with api/feed; nothing else should read these types.
package workload

//go:generate sh ../generate.sh workload
