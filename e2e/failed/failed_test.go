package failed

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	rows := []struct{ name, in, want string }{
		{"all is well", "=== RUN   TestA\n    a_test.go:1: fine\n--- PASS: TestA (0.01s)\nPASS\nok  \tx/y\t0.1s\n", ""},
		{"among others that run beside it, with -v", `=== RUN   TestA
    a_test.go:1: begins
=== RUN   TestA/x
=== PAUSE TestA/x
=== RUN   TestA/y
=== PAUSE TestA/y
=== CONT  TestA/x
=== CONT  TestA/y
=== NAME  TestA/x
    a_test.go:2: not within 1m: it is
        still so
          and so
W1121 something else
    that nobody asked for
=== NAME  TestA/y
    a_test.go:3: fine
--- FAIL: TestA (1.00s)
    --- PASS: TestA/y (1.00s)
    --- FAIL: TestA/x (0.50s)
=== RUN   TestB
    b_test.go:9: fine
--- PASS: TestB (0.00s)
FAIL

==== a dump
    long
FAIL	x/y	12.3s
ok  	x/z	0.1s
FAIL
make[1]: *** [Makefile:63: e2e] Error 1
`, `x/y 12.3s
TestA
    a_test.go:1: begins
TestA/x
    a_test.go:2: not within 1m: it is
        still so
          and so
make[1]: *** [Makefile:63: e2e] Error 1
`},
		{"without -v", `ok  	x/w	0.1s
--- FAIL: TestA (0.00s)
    --- FAIL: TestA/x (0.00s)
        a_test.go:2: got 1,
            want 2
FAIL
FAIL	x/y	0.1s
--- FAIL: TestA (0.00s)
    a_test.go:7: also
FAIL
FAIL	x/z	0.1s
`, `x/y 0.1s
TestA
TestA/x
    a_test.go:2: got 1,
        want 2
x/z 0.1s
TestA
    a_test.go:7: also
`},
		{"out of time", `=== RUN   TestA
panic: test timed out after 45m0s
	running tests:
		TestA (3m)

goroutine 1 [running]:
	/x/y.go:1 +0x1
FAIL	x/y	2700.1s
`, `x/y 2700.1s
panic
    panic: test timed out after 45m0s
    running tests:
    TestA (3m)
`},
		{"not compiled", "# x/y\ny/a.go:3:4: undefined: b\nFAIL\tx/y [build failed]\n", "y/a.go:3:4: undefined: b\nx/y [build failed]\n"},
		{"not formatted", "y/a.go\nmake[1]: *** [Makefile:43: lint] Error 1\n", "y/a.go\nmake[1]: *** [Makefile:43: lint] Error 1\n"},
		{"something else", "fetch: no route\nmake[1]: *** [Makefile:43: lint] Error 1\n", "the last lines:\nfetch: no route\nmake[1]: *** [Makefile:43: lint] Error 1\n"},
		{"not yet ended", "=== RUN   TestA\n    a_test.go:1: bad\n--- FAIL: TestA (0.01s)\nFAIL\n", "TestA\n    a_test.go:1: bad\n"},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			var log Log
			// By single bytes: what is written comes in any parts.
			for b := range strings.SplitSeq(r.in, "") {
				fmt.Fprint(&log, b)
			}
			var got bytes.Buffer
			if err := log.Report(&got, "title"); err != nil {
				t.Fatal(err)
			}
			want := ""
			if r.want != "" {
				want = "title\n  | " + strings.ReplaceAll(strings.TrimSuffix(r.want, "\n"), "\n", "\n  | ") + "\n"
			}
			if got.String() != want {
				t.Errorf("got\n%swant\n%s", &got, want)
			}
			var again Log
			got.WriteTo(&again)
			if err := again.Report(&got, "title"); err != nil || got.Len() > 0 {
				t.Errorf("read from a report, %v:\n%s", err, &got)
			}
		})
	}
}

func TestReportIsBounded(t *testing.T) {
	var log Log
	for i := range 2 * maxTests {
		fmt.Fprintf(&log, "=== RUN   Test%d\n", i)
		for j := range 2 * maxLines {
			fmt.Fprintf(&log, "    a_test.go:%d: %s\n", j+1, strings.Repeat("x", 2*maxLine))
		}
		fmt.Fprintf(&log, "--- FAIL: Test%d (0.00s)\n", i)
	}
	var got bytes.Buffer
	log.Report(&got, "title")
	if n := bytes.Count(got.Bytes(), []byte("\n")); n > 2+maxTests*(maxLines+1) || got.Len() > n*(maxLine+20) {
		t.Errorf("got %d lines, %d bytes", n, got.Len())
	}
	for _, want := range []string{"a_test.go:1: ", "a_test.go:2: ", "\n  |     ...\n", fmt.Sprintf("a_test.go:%d: ", 2*maxLines)} {
		if strings.Count(got.String(), want) != maxTests {
			t.Errorf("%q is not said of each test", want)
		}
	}
	if !strings.HasSuffix(got.String(), fmt.Sprintf("and %d more\n", maxTests)) {
		t.Error("what is left out is not counted")
	}
}

// What the go command says, and what Watch passes on and sees, of a test that
// fails.
func TestWatch(t *testing.T) {
	if os.Getenv("FAILED_TEST_INNER") != "" {
		inner(t)
		return
	}
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^TestWatch$", "-test.v", "-test.count=1")
	cmd.Env = append(os.Environ(), "FAILED_TEST_INNER="+dir)
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Fatalf("it passed:\n%s", out)
	}
	for _, want := range []string{"--- FAIL: TestWatch", "    --- FAIL: TestWatch/part", "failed_test.go", "written by itself", "\nFAIL\n"} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("%q was not passed on:\n%s", want, out)
		}
	}
	report, err := os.ReadFile(filepath.Join(dir, "report"))
	if err != nil {
		t.Fatal(err)
	}
	want := "title\n  | TestWatch\n  | TestWatch/part\n  |     failed_test.go:"
	if !strings.HasPrefix(string(report), want) || !strings.HasSuffix(string(report), ": this is why\n") {
		t.Errorf("got\n%s, want it to begin with\n%s", report, want)
	}
}

func inner(t *testing.T) {
	fmt.Println("written by itself")
	t.Run("part", func(t *testing.T) { t.Error("this is why") })
}

func TestMain(m *testing.M) {
	dir := os.Getenv("FAILED_TEST_INNER")
	if dir == "" {
		os.Exit(m.Run())
	}
	code, log, err := Watch(m.Run)
	if err != nil {
		panic(err)
	}
	var report bytes.Buffer
	if err := log.Report(&report, "title"); err != nil {
		panic(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "report"), report.Bytes(), 0o644); err != nil {
		panic(err)
	}
	os.Exit(code)
}

// A process that a test leaves behind does not keep Watch from its end.
func TestWatchEnds(t *testing.T) {
	var left *exec.Cmd
	code, _, err := Watch(func() int {
		left = exec.Command("sleep", "600")
		left.Stdout = os.Stdout
		if err := left.Start(); err != nil {
			t.Error(err)
		}
		return 7
	})
	defer left.Wait()
	defer left.Process.Kill()
	if code != 7 || err != nil {
		t.Errorf("got %d, %v", code, err)
	}
}
