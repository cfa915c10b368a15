package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"time"
)

// crowd opens many connections to an echo server, one after the other, and
// holds all that answer: it tells how many did, and how many were ended in place
// of an answer.
func crowd(ctx context.Context, args []string, out io.Writer) error {
	fs := flag.NewFlagSet("crowd", flag.ContinueOnError)
	addr := fs.String("addr", "", "HOST:PORT of an echo server")
	n := fs.Int("n", 10, "connections")
	timeout := fs.Duration("timeout", 10*time.Second, "for each of them")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *addr == "" || fs.NArg() != 0 || *n <= 0 {
		return errors.New("want -addr HOST:PORT and a number of connections")
	}
	var sum struct {
		Answered int    `json:"answered"`
		Ended    int    `json:"ended"`
		Error    string `json:"error,omitempty"` // of the first that ended
	}
	for range *n {
		c, err := greeted(ctx, *addr, *timeout)
		if err != nil {
			if sum.Ended++; sum.Ended == 1 {
				sum.Error = err.Error()
			}
			continue
		}
		defer c.Close()
		sum.Answered++
	}
	return json.NewEncoder(out).Encode(sum)
}

// greeted returns a connection on which a line has come back.
func greeted(ctx context.Context, addr string, timeout time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: timeout}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	if err = c.SetDeadline(time.Now().Add(timeout)); err == nil {
		_, err = io.WriteString(c, "hello\n")
	}
	if err == nil {
		var got string
		if got, err = bufio.NewReader(c).ReadString('\n'); err == nil && got != "hello\n" {
			err = fmt.Errorf("received %q", got)
		}
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}
