package failed

import (
	"io"
	"os"
	"time"
)

// Watch runs the tests, with os.Stdout passed on and read by a Log, which it
// returns with the code that run has returned.
func Watch(run func() int) (code int, log *Log, err error) {
	log = new(Log)
	r, w, err := os.Pipe()
	if err != nil {
		return 1, log, err
	}
	stdout := os.Stdout
	copied := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.MultiWriter(stdout, log), r)
		r.Close() // whoever writes on must not wait for us
		copied <- err
	}()
	os.Stdout = w
	code = run()
	os.Stdout = stdout
	w.Close()
	// A process that a test has left behind may hold the other end open.
	r.SetReadDeadline(time.Now().Add(5 * time.Second))
	if err = <-copied; os.IsTimeout(err) {
		err = nil
	}
	return code, log, err
}
