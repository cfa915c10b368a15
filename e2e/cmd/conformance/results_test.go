package main

import (
	"bytes"
	"io"
	"strings"
	"testing"
)

func TestFollow(t *testing.T) {
	const out = `=== RUN   TestMesh/MeshBasic
    result MeshFake is what a log line says

result MeshBasic pass MESH-HTTP:core,MESH-GRPC:core

result MeshPorts fail none
--- FAIL: TestMesh (1.00s)`
	var said bytes.Buffer
	got, err := follow(strings.NewReader(out), &said)
	if err != nil || len(got) != 2 || got["MeshBasic"].result != "pass" || got["MeshPorts"].result != "fail" || got["MeshPorts"].levels != "none" {
		t.Errorf("got %v, %v", got, err)
	}
	if n := strings.Count(said.String(), "\n"); n != 2 {
		t.Errorf("%d lines of progress, want 2:\n%s", n, &said)
	}
	if _, err := follow(io.MultiReader(strings.NewReader(out), broken{}), io.Discard); err == nil {
		t.Error("a broken pipe is no error")
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestJudge(t *testing.T) {
	pass, fail, skip := tested{result: "pass"}, tested{result: "fail"}, tested{result: "skip"}
	for _, r := range []struct {
		name          string
		without, with results
		baseline      string // part of the complaint; empty: none
		mesh          string
	}{
		{"good", results{"MeshBasic": pass, "A": fail}, results{"MeshBasic": pass, "A": pass}, "", ""},
		{"no baseline", nil, results{"MeshBasic": pass}, "", ""},
		{"luck", results{"MeshBasic": pass, "A": pass}, results{"MeshBasic": pass, "A": pass}, "A pass, so they prove nothing", ""},
		{"broken cluster", results{"MeshBasic": fail, "A": fail}, results{"MeshBasic": pass, "A": pass}, "MeshBasic should pass", ""},
		{"failure", results{"MeshBasic": pass, "A": fail}, results{"MeshBasic": pass, "A": fail}, "", "A: fail"},
		{"left out", results{"MeshBasic": pass, "A": fail}, results{"MeshBasic": pass, "A": skip}, "", "A: skip"},
		{"not run", results{"MeshBasic": pass, "A": fail}, results{"MeshBasic": pass}, "", "A did not run"},
	} {
		t.Run(r.name, func(t *testing.T) {
			check(t, judgeBaseline(r.without), r.baseline)
			check(t, judgeMesh(r.with, r.without), r.mesh)
		})
	}
}

func check(t *testing.T, err error, want string) {
	t.Helper()
	if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
		t.Errorf("the judge says %v, want %q", err, want)
	}
}

func TestTable(t *testing.T) {
	var out bytes.Buffer
	table(&out, results{"B": {result: "fail", levels: "none"}},
		results{"B": {result: "pass", levels: "none"}, "A": {result: "pass", levels: "MESH-HTTP:core,MESH-GRPC:extended"}})
	want := strings.TrimLeft(`
test  MESH-HTTP  MESH-GRPC  without Weft  with Weft
A     core       extended   -             pass
B     -          -          fail          pass
`, "\n")
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", &out, want)
	}
}
