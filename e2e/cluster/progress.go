package cluster

import (
	"fmt"
	"io"
	"time"
)

// progress tells a person what is going on, one line for each step:
//
//	[ 3/12] start etcd ... 1.2s
type progress struct {
	out    io.Writer
	total  int
	done   int
	broken bool // the step's line has been interrupted by notes
}

// step runs f as the next step.
func (p *progress) step(name string, f func() error) error {
	p.done++
	p.broken = false
	fmt.Fprintf(p.out, "[%2d/%d] %s ...", p.done, p.total, name)
	start := time.Now()
	err := f()
	took := time.Since(start).Round(100 * time.Millisecond)
	lead := " "
	if p.broken {
		lead = "        "
	}
	if err != nil {
		fmt.Fprintf(p.out, "%sFAILED after %s\n", lead, took)
		return fmt.Errorf("%s: %w", name, err)
	}
	if p.broken {
		lead += "done in "
	}
	fmt.Fprintf(p.out, "%s%s\n", lead, took)
	return nil
}

// note adds a line below the current step.
func (p *progress) note(format string, args ...any) {
	if !p.broken {
		fmt.Fprintln(p.out)
		p.broken = true
	}
	fmt.Fprintf(p.out, "        %s\n", fmt.Sprintf(format, args...))
}
