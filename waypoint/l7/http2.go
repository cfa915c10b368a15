package l7

import (
	"context"
	"errors"
)

// serveHTTP2 serves the requests of one HTTP/2 connection.
func (e *Engine) serveHTTP2(ctx context.Context, c *conn) error {
	return errors.New("HTTP/2 is not served yet")
}

// newHTTP2Transport returns the transport of HTTP/2 to an endpoint.
func newHTTP2Transport(e *Engine, ep *Endpoint) transport {
	return &http1Pool{e: e, ep: ep}
}
