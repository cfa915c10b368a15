package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// errAway means that nobody answers on the agent's socket.
var errAway = errors.New("no answer from the agent")

// dialRetry is how long a call waits for an agent that is being replaced, or
// that starts with its node, so that neither shows as failed pods: the kubelet
// would try those again only after 10 to 15 seconds.
const (
	dialRetry    = 15 * time.Second
	dialInterval = 100 * time.Millisecond
)

// A Client asks the agent. It keeps no connection.
type Client struct {
	socket string
	wait   time.Duration
}

// NewClient returns a client of the agent at the unix socket path.
func NewClient(socket string) *Client { return &Client{socket: socket, wait: dialRetry} }

// Add asks the agent to capture a pod if it belongs to the mesh, and returns
// when that is done.
func (c *Client) Add(ctx context.Context, r Request) (Response, error) {
	var res Response
	err := c.call(ctx, addPath, r, &res)
	return res, err
}

// Check asks whether the pod is as it should be.
func (c *Client) Check(ctx context.Context, r Request) error {
	return c.call(ctx, checkPath, r, nil)
}

// Del tells the agent that a sandbox goes away. It does not wait for an agent
// that is not there: the next one sees by itself that the sandbox is gone.
func (c *Client) Del(ctx context.Context, r Request) error {
	once := Client{socket: c.socket}
	return once.call(ctx, delPath, r, nil)
}

func (c *Client) call(ctx context.Context, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("write the request: %v", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	tr := &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		DisableKeepAlives: true,
	}
	res, err := tr.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("%w at %s: %v", errAway, c.socket, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxBody))
	if err != nil {
		return fmt.Errorf("%w at %s: %v", errAway, c.socket, err)
	}
	if res.StatusCode != http.StatusOK {
		var no refusal
		if json.Unmarshal(b, &no) != nil || no.Message == "" {
			return fmt.Errorf("the agent answered %s", res.Status)
		}
		return errors.New(no.Message)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("read the agent's answer: %v", err)
	}
	return nil
}

// dial connects, and tries again for a while when nobody listens yet.
func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	end := time.Now().Add(c.wait)
	for {
		conn, err := d.DialContext(ctx, "unix", c.socket)
		if err == nil || time.Now().After(end) {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(dialInterval):
		}
	}
}
