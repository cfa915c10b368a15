package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// runcName is the name under which containerd runs this program as runc. The
// real one is in the same directory, as runcReal.
const (
	runcName = "runc-without-limits"
	runcReal = "runc"
)

// runc runs the real runc after taking the resource limits out of the
// container's description: a node that shows only a version 2 hierarchy
// without controllers cannot grant any, and runc fails rather than go without.
func runc(args []string) error {
	self, err := os.Readlink("/run/weft-node/" + runcReal)
	if err != nil {
		return fmt.Errorf("find runc: %w", err)
	}
	switch {
	case slices.Contains(args, "update"):
		return nil // nothing but limits can be updated
	case slices.Contains(args, "create"), slices.Contains(args, "run"):
		if err := dropLimits(bundle(args)); err != nil {
			return err
		}
	}
	return fmt.Errorf("run %s: %w", self, syscall.Exec(self, append([]string{runcReal}, args...), os.Environ()))
}

// bundle returns the bundle directory that runc's arguments name; runc's
// default is the current directory.
func bundle(args []string) string {
	for i, a := range args {
		if v, ok := strings.CutPrefix(a, "--bundle="); ok {
			return v
		}
		if (a == "--bundle" || a == "-b") && i+1 < len(args) {
			return args[i+1]
		}
	}
	return "."
}

// dropLimits removes linux.resources from the bundle's description, except the
// device rules, which version 2 enforces without a controller.
func dropLimits(bundle string) error {
	path := filepath.Join(bundle, "config.json")
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read container description: %w", err)
	}
	b, err = withoutLimits(b)
	if err != nil {
		return fmt.Errorf("read container description %s: %w", path, err)
	}
	return os.WriteFile(path, b, 0o600)
}

// withoutLimits is dropLimits on the description's text.
func withoutLimits(b []byte) ([]byte, error) {
	var spec, linux, resources map[string]json.RawMessage
	if err := json.Unmarshal(b, &spec); err != nil {
		return nil, err
	}
	if spec["linux"] == nil {
		return b, nil
	}
	if err := json.Unmarshal(spec["linux"], &linux); err != nil {
		return nil, err
	}
	if linux["resources"] == nil {
		return b, nil
	}
	if err := json.Unmarshal(linux["resources"], &resources); err != nil {
		return nil, err
	}
	kept := map[string]json.RawMessage{}
	if d, ok := resources["devices"]; ok {
		kept["devices"] = d
	}
	var err error
	if linux["resources"], err = json.Marshal(kept); err != nil {
		return nil, err
	}
	if spec["linux"], err = json.Marshal(linux); err != nil {
		return nil, err
	}
	return json.Marshal(spec)
}
