package bench

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// roleEnv is set in processes that a benchmark starts of its own program.
const roleEnv = "WEFT_BENCH_ROLE"

// Role returns what this process was started for by Start, with its argument,
// or two empty strings.
func Role() (role, arg string) {
	role = os.Getenv(roleEnv)
	return role, os.Getenv(roleEnv + "_ARG")
}

// Play does the role of a load generator if this process was started as one,
// and then does not return. A test calls it first thing; other roles are the
// caller's.
func Play() {
	role, arg := Role()
	var err error
	switch role {
	case "server":
		EndWithParent()
		var at [2]netip.AddrPort
		if err = json.Unmarshal([]byte(arg), &at); err == nil {
			err = Serve(at[0], at[1], Ready)
		}
	case "client":
		err = obey(os.Stdin, os.Stdout)
	default:
		return
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", role, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// EndWithParent ends this process when the one that has started it is gone. A
// client needs no such thing.
func EndWithParent() {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // its end is what matters
		os.Exit(1)
	}()
}

// Ready tells the process that called Start that this one is.
func Ready() { fmt.Println("ready") }

// A Process is one that a benchmark has started.
type Process struct {
	Name string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
}

// Start runs this program again in a role. test is the name of the test that
// calls Play. inside runs its argument where the process is to be born, in a
// network namespace for example; nil is here. Start waits until the role is
// ready, but for a client's, which is at once.
func Start(test, role string, arg any, inside func(func() error) error, files ...*os.File) (*Process, error) {
	return StartOf("/proc/self/exe", test, role, arg, inside, files...)
}

// StartOf is Start with another build of this program.
func StartOf(program, test, role string, arg any, inside func(func() error) error, files ...*os.File) (*Process, error) {
	b, err := json.Marshal(arg)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program, "-test.run=^"+test+"$", "-test.timeout=0")
	cmd.Env = append(os.Environ(), roleEnv+"="+role, roleEnv+"_ARG="+string(b))
	cmd.ExtraFiles = files
	p := &Process{Name: role, cmd: cmd}
	if err := p.start(inside); err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	if role == "client" {
		return p, nil
	}
	line, err := p.out.ReadString('\n')
	if err != nil || line != "ready\n" {
		p.Stop()
		return nil, fmt.Errorf("start %s: it says %q: %v", role, line, err)
	}
	return p, nil
}

// Exec starts another program, whose output goes to log.
func Exec(name string, args []string, inside func(func() error) error, log io.Writer) (*Process, error) {
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = log, log
	p := &Process{Name: name, cmd: cmd}
	if err := p.start(inside); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return p, nil
}

func (p *Process) start(inside func(func() error) error) error {
	if p.cmd.Stdout == nil {
		p.cmd.Stderr = os.Stderr
		in, err := p.cmd.StdinPipe()
		if err != nil {
			return err
		}
		out, err := p.cmd.StdoutPipe()
		if err != nil {
			return err
		}
		p.in, p.out = in, bufio.NewReader(out)
	}
	if inside == nil {
		return p.cmd.Start()
	}
	return inside(p.cmd.Start)
}

// Stop kills the process and waits for its end.
func (p *Process) Stop() {
	_ = p.cmd.Process.Kill() // it may have ended
	_ = p.cmd.Wait()         // by our signal
}

// PID is the number of the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// CPU returns the time that the process, all threads of it, has run so far.
func (p *Process) CPU() (time.Duration, error) {
	// clock_getcpuclockid(3): the clock of another process, in nanoseconds,
	// where /proc/PID/stat has ticks of ten milliseconds.
	const sched = 2
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^p.PID()<<3|sched), &t); err != nil {
		return 0, fmt.Errorf("CPU time of %s: %w", p.Name, err)
	}
	return time.Duration(t.Nano()), nil
}

// OwnCPU returns how long this process has run so far.
func OwnCPU() (time.Duration, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t); err != nil {
		return 0, err
	}
	return time.Duration(t.Nano()), nil
}

// CPU returns what all the processes have used together.
func CPU(ps ...*Process) (time.Duration, error) {
	var sum time.Duration
	for _, p := range ps {
		d, err := p.CPU()
		if err != nil {
			return 0, err
		}
		sum += d
	}
	return sum, nil
}

// RSS returns the anonymous memory of the process that is in use, in bytes.
func (p *Process) RSS() (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		return 0, err
	}
	var kb int64
	for line := range splitLines(string(b)) {
		if _, err := fmt.Sscanf(line, "RssAnon: %d kB", &kb); err == nil {
			return kb << 10, nil
		}
	}
	return 0, errors.New("no RssAnon in /proc")
}

// A command is what a client is told.
type command struct {
	Op       string
	To       netip.AddrPort
	Conns    int
	Size     int
	Duration time.Duration
}

type reply struct {
	Load
	Error string
}

// obey does what comes in, one command a line, and answers each.
func obey(in io.Reader, out io.Writer) error {
	runtime.LockOSThread()
	var c client
	dec, enc := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var cmd command
		if err := dec.Decode(&cmd); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		var r reply
		var err error
		switch cmd.Op {
		case "open":
			err = c.open(cmd.To, cmd.Conns, cmd.Size)
		case "close":
			c.close()
		case "requests":
			r.Load, err = c.requests(cmd.Duration)
		case "connects":
			r.Load, err = c.connects(cmd.To, cmd.Conns, cmd.Size, cmd.Duration)
		case "bulk":
			r.Load, err = c.bulk(cmd.Duration)
		default:
			err = fmt.Errorf("command %q is not known", cmd.Op)
		}
		if err != nil {
			r.Error = err.Error()
		}
		if err := enc.Encode(r); err != nil {
			return err
		}
	}
}

// tell gives a client a command and waits for the answer.
func (p *Process) tell(c command) (Load, error) {
	if err := json.NewEncoder(p.in).Encode(c); err != nil {
		return Load{}, err
	}
	line, err := p.out.ReadBytes('\n')
	if err != nil {
		return Load{}, fmt.Errorf("the client has ended: %w", err)
	}
	var r reply
	if err := json.Unmarshal(line, &r); err != nil {
		return Load{}, fmt.Errorf("the client says %q: %w", line, err)
	}
	if r.Error != "" {
		return Load{}, errors.New(r.Error)
	}
	return r.Load, nil
}

// Open makes a client open connections and use each once with size bytes, or
// with one towards a sink.
func (p *Process) Open(to netip.AddrPort, conns, size int) error {
	_, err := p.tell(command{Op: "open", To: to, Conns: conns, Size: size})
	return err
}

// CloseAll makes a client close its connections.
func (p *Process) CloseAll() error {
	_, err := p.tell(command{Op: "close"})
	return err
}

// Requests makes a client send requests on all its connections for d.
func (p *Process) Requests(d time.Duration) (Load, error) {
	return p.tell(command{Op: "requests", Duration: d})
}

// Connects makes a client connect, send size bytes there and back and close,
// so many at a time, for d.
func (p *Process) Connects(to netip.AddrPort, atOnce, size int, d time.Duration) (Load, error) {
	return p.tell(command{Op: "connects", To: to, Conns: atOnce, Size: size, Duration: d})
}

// Bulk makes a client write to the sink on all its connections for d, and end
// them.
func (p *Process) Bulk(d time.Duration) (Load, error) {
	return p.tell(command{Op: "bulk", Duration: d})
}
