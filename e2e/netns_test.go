package e2e

import (
	"context"
	"net"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// dialIn connects from inside the network namespace at path.
func dialIn(ctx context.Context, path, addr string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	c := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := os.Open(path)
		if err != nil {
			c <- result{nil, err}
			return
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			c <- result{nil, err}
			return
		}
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
		c <- result{conn, err}
	}()
	r := <-c
	return r.conn, r.err
}

// countEstablished counts the established connections of a /proc/net/tcp
// table whose local port is the given one, written ":HEX".
func countEstablished(table, port string) int {
	n := 0
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) > 3 && strings.HasSuffix(f[1], port) && f[3] == "01" {
			n++
		}
	}
	return n
}
