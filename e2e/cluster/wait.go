package cluster

import (
	"context"
	"errors"
	"fmt"
)

// hopeless is an error that more waiting cannot mend.
type hopeless struct{ error }

func (h hopeless) Unwrap() error { return h.error }

func stopWaiting(err error) error { return hopeless{err} }

// waitFor calls look until it returns nil. An error made by stopWaiting ends
// the wait; the end of ctx is reported together with what look last said.
func (c *Cluster) waitFor(ctx context.Context, look func(context.Context) error) error {
	for {
		err := look(ctx)
		if err == nil {
			return nil
		}
		if h := (hopeless{}); errors.As(err, &h) {
			return h.error
		}
		if cause := pause(ctx); cause != nil {
			return fmt.Errorf("%w; last: %v", cause, err)
		}
	}
}
