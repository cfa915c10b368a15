// Package blackbox has the tests and the benchmark of the ztunnel program as it
// is built, from outside: two of its processes on two nodes of network
// namespaces, with captured pods, a control service, authorization, telemetry
// and access logs. For the benchmark, which `make bench` runs, other proxies
// stand in the same places.
package blackbox
