package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// pause waits for the end of the pod and collects orphans, for pods whose
// containers share a process namespace.
func pause(ctx context.Context, _ []string, _ io.Writer) error {
	child := make(chan os.Signal, 1)
	signal.Notify(child, syscall.SIGCHLD)
	for {
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-child:
		}
	}
}

func sleep(ctx context.Context, args []string, _ io.Writer) error {
	if len(args) == 0 {
		<-ctx.Done()
		return nil
	}
	d, err := time.ParseDuration(args[0])
	if err != nil {
		return err
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
	return nil
}

func cat(_ context.Context, args []string, out io.Writer) error {
	for _, name := range args {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		_, err = io.Copy(out, f)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func ls(_ context.Context, args []string, out io.Writer) error {
	for _, dir := range args {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			fmt.Fprintln(out, e.Name())
		}
	}
	return nil
}

// probe is for exec probes: quiet, and short of patience.
func probe(ctx context.Context, args []string, _ io.Writer) error {
	url := "http://127.0.0.1:8080/healthz"
	if len(args) > 0 {
		url = args[0]
	}
	c := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	status, _, err := request(ctx, &c, url, "")
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("%s answered %d", url, status)
	}
	return err
}

// lookup resolves names by the system's resolver or by one server.
func lookup(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("lookup", flag.ContinueOnError)
	server := fs.String("server", "", "address of the DNS server; empty for /etc/resolv.conf")
	network := fs.String("network", "ip", "ip, ip4 or ip6")
	tcp := fs.Bool("tcp", false, "ask over TCP")
	timeout := fs.Duration("timeout", 4*time.Second, "for one name")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() == 0 {
		return errors.New("want a name")
	}
	r := &net.Resolver{PreferGo: true}
	if *tcp && *server == "" {
		return errors.New("-tcp wants a -server")
	}
	if *server != "" {
		to := *server
		if _, _, err := net.SplitHostPort(to); err != nil {
			to = net.JoinHostPort(to, "53")
		}
		r.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
			if *tcp {
				network = "tcp"
			}
			return new(net.Dialer).DialContext(ctx, network, to)
		}
	}
	for _, name := range fs.Args() {
		if err := lookupOne(ctx, r, *network, name, *timeout, out); err != nil {
			return err
		}
	}
	return nil
}

func lookupOne(ctx context.Context, r *net.Resolver, network, name string, timeout time.Duration, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	ips, err := r.LookupIP(ctx, network, name)
	if err != nil {
		return err
	}
	for _, ip := range ips {
		fmt.Fprintln(out, ip)
	}
	return nil
}
