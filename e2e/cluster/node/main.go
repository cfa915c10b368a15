// Node is the part of the cluster tool that stays: it starts the cluster's
// processes in their namespaces and cgroups, is the first process of a node,
// stands between containerd and runc, and forwards the API server's port.
//
// It is a program of its own, and not a mode of weft-cluster, because it runs
// several times for each pod: it imports nothing heavy and starts in a
// millisecond.
package main

import (
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	if filepath.Base(os.Args[0]) == runcName {
		fail(runc(os.Args[1:]))
	}
	if len(os.Args) < 2 {
		fail(fmt.Errorf("want a mode: launch, init or forward"))
	}
	args := os.Args[2:]
	switch os.Args[1] {
	case "launch":
		fail(launch(args))
	case "init":
		fail(initNode(args))
	case "forward":
		fail(forward(args))
	default:
		fail(fmt.Errorf("no mode %q: want launch, init or forward", os.Args[1]))
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "weft-cluster node:", err)
		os.Exit(1)
	}
	os.Exit(0)
}
