// Score makes one table of what the tests have recorded about reliability. It
// prints it, writes it to out/reliability.json, and fails when rows are missing
// or break a promise: `make test` ends with it.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/weft-mesh/weft/e2e/score"
)

func main() {
	if err := program(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "score:", err)
		os.Exit(1)
	}
}

// expected lists the groups that a whole run of the tests records.
func expected() []string {
	want := []string{"attack.", "cni.", "netpol.", "churn.", "enrol.", "lifecycle.", "reboot.", "handover.mixed", "handover.changing.", "waypoint.move.", "waypoint.attack.", "waypoint.kill", "waypoint.change.", "example.", "fault.both.away."}
	for _, component := range []string{"ztunnel", "agent", "both", "control", "all"} {
		for _, fault := range []string{"kill", "pause", "restart", "cut"} {
			want = append(want, "fault."+component+"."+fault+".")
		}
	}
	return want
}

func program(args []string, out io.Writer) error {
	fs := flag.NewFlagSet("score", flag.ContinueOnError)
	partial := fs.Bool("partial", false, "do not ask for the rows of every group: only some tests were run")
	if err := fs.Parse(args); err != nil {
		return err
	}
	root, err := score.Root()
	if err != nil {
		return err
	}
	rows, err := score.Merge(os.DirFS(filepath.Join(root, "out", "reliability")))
	if err != nil {
		return fmt.Errorf("read out/reliability: %w", err)
	}
	if len(rows) == 0 {
		return fmt.Errorf("no test has recorded anything in out/reliability: run `make test`")
	}
	if err := score.Write(filepath.Join(root, "out", "reliability.json"), rows); err != nil {
		return err
	}
	fmt.Fprintln(out, "== reliability (out/reliability.json)")
	if err := score.Table(out, rows); err != nil {
		return err
	}
	var wrong []string
	for _, r := range rows {
		for _, w := range score.Judge(r) {
			wrong = append(wrong, r.Name+": "+w)
		}
	}
	if !*partial {
		for _, prefix := range score.Missing(rows, expected()...) {
			wrong = append(wrong, "no row "+prefix+"*: its test did not run, or did not record what it showed")
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("%d promises are not kept or not shown:\n  %s", len(wrong), strings.Join(wrong, "\n  "))
	}
	fmt.Fprintf(out, "all %d rows keep what is promised\n", len(rows))
	return nil
}
