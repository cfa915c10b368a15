package main

import (
	"encoding/json"
	"testing"
)

func TestBundle(t *testing.T) {
	for _, r := range []struct {
		args []string
		want string
	}{
		{[]string{"--root", "/r", "create", "--bundle", "/b", "id"}, "/b"},
		{[]string{"create", "--bundle=/b", "id"}, "/b"},
		{[]string{"create", "-b", "/b", "id"}, "/b"},
		{[]string{"create", "id"}, "."},
	} {
		if got := bundle(r.args); got != r.want {
			t.Errorf("%v: got %q, want %q", r.args, got, r.want)
		}
	}
}

func TestWithoutLimits(t *testing.T) {
	for _, r := range []struct{ name, in, want string }{
		{
			"limits go, devices and all else stay",
			`{"ociVersion":"1.0","linux":{"resources":{"memory":{"limit":9007199254740993},"devices":[{"allow":false,"major":9007199254740993}]},"cgroupsPath":"/x"},"process":{"user":{"uid":0}}}`,
			`{"linux":{"cgroupsPath":"/x","resources":{"devices":[{"allow":false,"major":9007199254740993}]}},"ociVersion":"1.0","process":{"user":{"uid":0}}}`,
		},
		{"no resources", `{"linux":{"cgroupsPath":"/x"}}`, `{"linux":{"cgroupsPath":"/x"}}`},
		{"no linux", `{"ociVersion":"1.0"}`, `{"ociVersion":"1.0"}`},
	} {
		t.Run(r.name, func(t *testing.T) {
			got, err := withoutLimits([]byte(r.in))
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != r.want {
				t.Errorf("got  %s\nwant %s", got, r.want)
			}
			if !json.Valid(got) {
				t.Error("not JSON")
			}
		})
	}
	if _, err := withoutLimits([]byte("{")); err == nil {
		t.Error("a broken description was accepted")
	}
}
