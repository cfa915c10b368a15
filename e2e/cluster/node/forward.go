package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/weft-mesh/weft/e2e/cluster/internal/enter"
)

// forward listens on an address of the machine and carries each connection to
// an address inside a network namespace:
//
//	forward -listen 127.0.0.1:PORT -netns FILE -to ADDR:PORT -address FILE
//
// The address it listens on is written to the address file, for port 0.
func forward(args []string) error {
	fs := flag.NewFlagSet("forward", flag.ContinueOnError)
	listen := fs.String("listen", "127.0.0.1:0", "where to listen")
	netns := fs.String("netns", "", "network namespace to connect in")
	to := fs.String("to", "", "where to connect to")
	address := fs.String("address", "", "file for the address listened on")
	if err := fs.Parse(args); err != nil {
		return err
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	if err := os.WriteFile(*address+".next", []byte(l.Addr().String()), 0o644); err != nil {
		return err
	}
	if err := os.Rename(*address+".next", *address); err != nil {
		return err
	}
	dial := enter.Dialer(*netns)
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go carry(c, *to, dial)
	}
}

// carry joins c to a new connection until both directions have ended.
func carry(c net.Conn, to string, dial func(context.Context, string, string) (net.Conn, error)) {
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	d, err := dial(ctx, "tcp", to)
	if err != nil {
		fmt.Fprintln(os.Stderr, "forward:", err)
		return
	}
	defer d.Close()
	var both sync.WaitGroup
	half := func(dst, src net.Conn) {
		io.Copy(dst, src)
		dst.(*net.TCPConn).CloseWrite()
	}
	both.Go(func() { half(d, c) })
	both.Go(func() { half(c, d) })
	both.Wait()
}
