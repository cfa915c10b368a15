package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	env := func(k string) string { return map[string]string{"NODE_NAME": "n1", "POD_NAMESPACE": "mesh"}[k] }
	c, err := parse([]string{"-exclude-namespaces", "a, b,", "-existing-connections=reset", "-uncaptured=restart", "-startup-taints=x.dev/a,y.dev/b", "-disable-features=tcx"}, env, &bytes.Buffer{})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.validate(); err != nil {
		t.Error(err)
	}
	if a := c.agent; a.Node != "n1" || a.Namespace != "mesh" || strings.Join(a.ExcludeNamespaces, " ") != "a b" || a.Existing != "reset" || a.Uncaptured != "restart" || strings.Join(a.DisableFeatures, " ") != "tcx" || strings.Join(a.StartupTaints, " ") != "x.dev/a y.dev/b" || a.Address != ":15022" {
		t.Errorf("got %+v", a)
	}
}

func TestBadConfigSaysAllThatIsWrong(t *testing.T) {
	c, err := parse([]string{"-leave-grace=1h", "-uncaptured=ignore", "-startup-taints=a=b:NoSchedule", "-existing-connections=drop", "-log-level=loud", "-log-format=xml", "-cni-plugin="}, func(string) string { return "" }, &bytes.Buffer{})
	if err != nil {
		t.Fatal(err)
	}
	err = c.validate()
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"NODE_NAME", `"ignore"`, "a=b:NoSchedule", "1h0m0s", `"drop"`, "loud", `"xml"`, "CNI plugin"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("lacks %q: %v", want, err)
		}
	}
	if _, err := parse([]string{"stray"}, func(string) string { return "" }, &bytes.Buffer{}); err == nil {
		t.Error("took a stray argument")
	}
}
