// Failed reads the output of tests and says once more what in it has failed:
//
//	go run ./cmd/failed FILE
//
// It says nothing if nothing has. `make test` ends with it.
package main

import (
	"fmt"
	"io"
	"os"

	"github.com/weft-mesh/weft/e2e/failed"
)

func main() {
	if err := program(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "failed:", err)
		os.Exit(1)
	}
}

func program(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("want the name of a file with the output of tests, got %q", args)
	}
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	var log failed.Log
	if _, err := io.Copy(&log, f); err != nil {
		return err
	}
	return log.Report(os.Stdout, "== what failed")
}
