package kube

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/client-go/kubernetes/fake"

	"github.com/weft-mesh/weft/internal/run"
)

// TestLeader proves that one process at a time works, that another takes over
// when it stops, and that one whose work fails stands again.
func TestLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset()
		var working atomic.Int32
		terms := make(chan string, 10)
		stand := func(ctx context.Context, name string, work run.Task) <-chan error {
			done := make(chan error, 1)
			go func() {
				done <- RunLeader(ctx, LeaderConfig{Client: client, Namespace: "weft-system", Identity: name, Log: quiet(), Tasks: []run.Task{
					func(ctx context.Context) error {
						if n := working.Add(1); n != 1 {
							t.Errorf("%d leaders", n)
						}
						defer working.Add(-1)
						terms <- name
						return work(ctx)
					},
				}})
			}()
			return done
		}
		untilEnd := func(ctx context.Context) error { <-ctx.Done(); return nil }

		first, stopFirst := context.WithCancel(t.Context())
		doneFirst := stand(first, "first", untilEnd)
		if got := <-terms; got != "first" {
			t.Fatalf("%s leads, want first", got)
		}
		second, stopSecond := context.WithCancel(t.Context())
		doneSecond := stand(second, "second", untilEnd)
		time.Sleep(time.Minute)
		if len(terms) != 0 {
			t.Fatalf("%s leads too", <-terms)
		}
		stopFirst()
		if err := <-doneFirst; err != nil {
			t.Errorf("first: %v", err)
		}
		if got := <-terms; got != "second" {
			t.Fatalf("%s leads, want second", got)
		}
		stopSecond()
		if err := <-doneSecond; err != nil {
			t.Errorf("second: %v", err)
		}

		third, stopThird := context.WithCancel(t.Context())
		failed := false
		doneThird := stand(third, "third", func(ctx context.Context) error {
			if !failed {
				failed = true
				return errors.New("broken")
			}
			return untilEnd(ctx)
		})
		<-terms
		<-terms // again, after the failure
		stopThird()
		if err := <-doneThird; err != nil {
			t.Errorf("third: %v", err)
		}
	})
}
