// Package bench has the benchmark of the ztunnel program as it is built, from
// outside: two of its processes on two nodes of network namespaces, with
// captured pods, a control service, authorization, telemetry and access logs;
// and other proxies in the same places. It is a test that `make bench` runs.
package bench
