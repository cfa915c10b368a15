// Testapp is the one program that runs in the pods of Weft's tests and demo:
// servers and clients of the kinds that real applications are, and the pause
// program of every pod. It is static and needs nothing else in its image.
//
// The verbs that try something print one JSON object for each try, and the
// program's status is 0 only if all went well.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"sort"
	"syscall"
)

// A command runs until it is done or ctx ends. Its error ends the program with
// status 1.
type command struct {
	usage string
	run   func(ctx context.Context, args []string, out io.Writer) error
}

func commands() map[string]command {
	return map[string]command{
		"pause":      {"pause: hold a pod's namespaces, as process 1 of the pod", pause},
		"server":     {"server [flags]: HTTP 8080, gRPC health 9090, TCP echo 9000, banner 9001, bulk 9002", server},
		"client":     {"client -url URL [flags]: steady requests, each accounted for; counters at :8081/stats", client},
		"stats":      {"stats [-addr HOST:PORT]: the counters of the client in this pod", showStats},
		"get":        {"get [flags] URL...: request each", get},
		"ask":        {"ask [flags] URL: requests, with all that is to be said of the answers", ask},
		"raw":        {"raw -addr HOST:PORT -send BYTES: send bytes, and print the answer", raw},
		"grpc":       {"grpc -addr HOST:PORT: ask the gRPC health service", callGRPC},
		"upgrade":    {"upgrade -addr HOST:PORT: change the protocol, as WebSockets do, and echo", upgradeOnce},
		"echo":       {"echo -addr HOST:PORT [-bytes N]: send, half-close, compare what comes back", verb(echoOnce)},
		"source":     {"source -addr HOST:PORT [-bytes N]: receive a stream and check every byte", verb(sourceOnce)},
		"sink":       {"sink -addr HOST:PORT [-bytes N]: send a stream and check what arrived", verb(sinkOnce)},
		"banner":     {"banner -addr HOST:PORT: wait for the server to speak first", verb(bannerOnce)},
		"connect":    {"connect -addr HOST:PORT: open a connection and close it", verb(connectOnce)},
		"hold":       {"hold -addr HOST:PORT [-for DURATION]: one connection, an echo every 50 ms", verb(holdOn)},
		"crowd":      {"crowd -addr HOST:PORT [-n N]: hold as many connections at once as are answered", crowd},
		"load":       {"load -to ADDRESS,...: idle, long-lived, new and bulk connections at once, until the input ends", load},
		"mixed":      {"mixed -to ADDRESS [-n N]: many connections of all kinds, held until the input ends", mixed},
		"press":      {"press -to HOST:PORT [flags]: HTTP requests at a fixed rate on kept connections, until the input ends", pressOn},
		"lookup":     {"lookup [flags] NAME...: resolve names", lookup},
		"exec-probe": {"exec-probe [URL]: fails unless the URL answers 200", probe},
		"sleep":      {"sleep [DURATION]: do nothing", sleep},
		"cat":        {"cat FILE...: write files to the output", cat},
		"ls":         {"ls DIRECTORY...: list names", ls},
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	name, args := filepath.Base(os.Args[0]), os.Args[1:]
	cmds := commands()
	if _, ok := cmds[name]; !ok && len(args) > 0 {
		name, args = args[0], args[1:]
	}
	cmd, ok := cmds[name]
	if !ok {
		usage(cmds)
		os.Exit(2)
	}
	if err := cmd.run(ctx, args, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "testapp %s: %v\n", name, err)
		os.Exit(1)
	}
}

func usage(cmds map[string]command) {
	var lines []string
	for _, c := range cmds {
		lines = append(lines, "  testapp "+c.usage)
	}
	sort.Strings(lines)
	fmt.Fprintln(os.Stderr, "usage:")
	for _, l := range lines {
		fmt.Fprintln(os.Stderr, l)
	}
}
