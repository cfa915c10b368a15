package run

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestAll(t *testing.T) {
	boom := errors.New("boom")
	late := errors.New("late")
	wait := func(err error) Task {
		return func(ctx context.Context) error { <-ctx.Done(); return err }
	}
	give := func(err error) Task {
		return func(context.Context) error { return err }
	}
	for _, tc := range []struct {
		name  string
		tasks []Task
		want  error
	}{
		{"no tasks end at once", nil, nil},
		{"the first error is the cause", []Task{give(boom), wait(late)}, boom},
		{"a clean return stops the rest and is no error", []Task{wait(late), give(nil)}, nil},
		{"later errors do not replace the cause", []Task{wait(late), wait(late), give(boom)}, boom},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := All(t.Context(), tc.tasks...); got != tc.want {
				t.Errorf("All = %v, want %v", got, tc.want)
			}
		})
	}
}

func TestAllEndOfContextIsClean(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := All(ctx, func(ctx context.Context) error { return ctx.Err() })
	if err != nil {
		t.Errorf("All = %v, want nil", err)
	}
}

func TestAllWaitsForEveryTask(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		done := false
		All(t.Context(),
			func(context.Context) error { return nil },
			func(ctx context.Context) error {
				<-ctx.Done()
				time.Sleep(time.Minute)
				done = true
				return nil
			})
		if !done {
			t.Error("All returned before its slowest task")
		}
	})
}

func TestBackoffDelay(t *testing.T) {
	b := Backoff{Min: 10 * time.Millisecond, Max: 15 * time.Second}
	for _, tc := range []struct {
		failures int
		rnd      float64
		want     time.Duration
	}{
		{1, 0, 5 * time.Millisecond},
		{1, 0.5, 7500 * time.Microsecond},
		{2, 0, 10 * time.Millisecond},
		{5, 0, 80 * time.Millisecond},
		{12, 0, 7500 * time.Millisecond},
		{1 << 30, 0, 7500 * time.Millisecond},
	} {
		if got := b.delay(tc.failures, tc.rnd); got != tc.want {
			t.Errorf("delay(%d, %v) = %v, want %v", tc.failures, tc.rnd, got, tc.want)
		}
	}
	if got := (Backoff{}).delay(100, 0.999999); got > defaultMax || got < defaultMax*9/10 {
		t.Errorf("zero Backoff waits %v at most, want just under %v", got, defaultMax)
	}
	if got := (Backoff{Min: time.Hour, Max: time.Second}).delay(1, 0.99); got > time.Second {
		t.Errorf("Min above Max waits %v, want at most Max", got)
	}
}

func TestRetry(t *testing.T) {
	boom := errors.New("boom")
	t.Run("ends with the first success", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			calls := 0
			err := Retry(t.Context(), Backoff{}, func(context.Context) error {
				if calls++; calls < 4 {
					return boom
				}
				return nil
			})
			if err != nil || calls != 4 {
				t.Errorf("Retry = %v after %d calls, want nil after 4", err, calls)
			}
		})
	})
	t.Run("ends with its context, while waiting", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			err := Retry(ctx, Backoff{Min: time.Hour, Max: time.Hour}, func(context.Context) error { return boom })
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Retry = %v, want the end of the context", err)
			}
		})
	})
	t.Run("starts over after a long success", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := Backoff{Min: time.Second, Max: time.Minute}
			var last time.Time
			var gaps []time.Duration
			Retry(t.Context(), b, func(context.Context) error {
				if !last.IsZero() {
					gaps = append(gaps, time.Since(last))
				}
				if len(gaps) == 8 {
					time.Sleep(2 * time.Minute)
				}
				last = time.Now()
				if len(gaps) == 9 {
					return nil
				}
				return boom
			})
			if gaps[7] < 30*time.Second {
				t.Errorf("waited %v after eight failures, want at least 30s", gaps[7])
			}
			if gaps[8] > time.Second {
				t.Errorf("waited %v after a long success, want at most 1s", gaps[8])
			}
		})
	})
}

func TestUntilSignal(t *testing.T) {
	ctx, stop := UntilSignal(t.Context())
	defer stop()
	if err := syscall.Kill(syscall.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done() // or the test times out
}

func TestUntilDrained(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	drained := make(chan struct{})
	var early bool
	err := UntilDrained(ctx, stop,
		func(ctx context.Context) error {
			<-ctx.Done()
			close(drained)
			return nil
		},
		func(ctx context.Context) error {
			<-ctx.Done()
			select {
			case <-drained:
			default:
				early = true
			}
			return nil
		},
		func(context.Context) error {
			stop() // as a signal does
			<-drained
			return nil
		})
	if err != nil || early {
		t.Errorf("UntilDrained = %v; another task ended before the server: %v", err, early)
	}
}

func TestUntilDrainedEndsWhenATaskFails(t *testing.T) {
	boom := errors.New("boom")
	ctx, stop := context.WithCancel(t.Context())
	err := UntilDrained(ctx, stop, func(ctx context.Context) error { <-ctx.Done(); return nil },
		func(context.Context) error { return boom })
	if err != boom {
		t.Errorf("UntilDrained = %v, want %v", err, boom)
	}
}
