// Package l7 is the engine of waypoints and gateways: it takes connections,
// reads requests from them, decides on each, sends it to an endpoint, and
// passes the answer on.
//
// It is neutral of versions: the codecs of HTTP/1 and HTTP/2 turn bytes into
// Exchanges, a list of filters (chain.go) decides on an Exchange, and a
// transport carries it to an endpoint. It knows nothing of tunnels and TLS: who
// called and for what arrives as Facts, and connections to endpoints are made
// by a Dialer. So it runs in tests on net.Pipe and in fake time.
package l7
