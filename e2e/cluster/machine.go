package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// tools are the programs the cluster takes from the machine's distribution,
// with the Debian and Ubuntu package of each.
func tools() map[string]string {
	return map[string]string{
		"containerd": "containerd", "ctr": "containerd", "runc": "runc",
		"ip": "iproute2", "nft": "nftables", "iptables": "iptables", "ip6tables": "iptables",
		"conntrack": "conntrack", "tcpdump": "tcpdump", "ethtool": "ethtool", "sysctl": "procps",
		"nsenter": "util-linux", "mount": "mount",
	}
}

// pluginDirs is where distributions put the CNI plugins.
func pluginDirs() []string { return []string{"/usr/lib/cni", "/usr/libexec/cni", "/opt/cni/bin"} }

// checkMachine makes sure that the machine can hold a cluster: it installs the
// packages that are missing and refuses, with a reason, what cannot be mended.
func checkMachine(ctx context.Context, p *progress) error {
	if os.Geteuid() != 0 {
		return errors.New("a cluster makes namespaces, mounts and cgroups: run as root")
	}
	if err := installPackages(ctx, p); err != nil {
		return err
	}
	if _, err := hierarchies(); err != nil {
		return err
	}
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return err
	}
	known := strings.Fields(string(b))
	for _, kind := range []string{"overlay", "cgroup2", "bpf", "tmpfs"} {
		if !slices.Contains(known, kind) && exec.CommandContext(ctx, "modprobe", kind).Run() != nil {
			return fmt.Errorf("the kernel has no file system %q, which the nodes need (try: modprobe %s)", kind, kind)
		}
	}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
		return errors.New("the kernel has IPv6 disabled, and the cluster is dual stack: boot without ipv6.disable=1")
	}
	return nil
}

// findProgram finds a program also where a user's PATH does not lead.
func findProgram(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, d := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin"} {
		if path, err := exec.LookPath(filepath.Join(d, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not installed", name)
}

// findPlugins returns the directory of the machine's CNI plugins.
func findPlugins() (string, error) {
	for _, d := range pluginDirs() {
		if _, err := os.Stat(filepath.Join(d, "host-local")); err == nil {
			return d, nil
		}
	}
	return "", fmt.Errorf("the CNI plugins are not installed: none in %s", strings.Join(pluginDirs(), ", "))
}

// missingPackages lists the packages of what is not there.
func missingPackages() []string {
	var missing []string
	for program, pkg := range tools() {
		if _, err := findProgram(program); err != nil && !slices.Contains(missing, pkg) {
			missing = append(missing, pkg)
		}
	}
	if _, err := findPlugins(); err != nil {
		missing = append(missing, "containernetworking-plugins")
	}
	slices.Sort(missing)
	return missing
}

func installPackages(ctx context.Context, p *progress) error {
	missing := missingPackages()
	if len(missing) == 0 {
		return nil
	}
	list := strings.Join(missing, " ")
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("not installed: %s (names of Debian packages): install them with your package manager", list)
	}
	p.note("install with apt-get: %s", list)
	if err := aptGet(ctx, append([]string{"install", "-y", "--no-install-recommends"}, missing...)...); err == nil {
		return nil
	}
	if err := aptGet(ctx, "update"); err != nil { // the lists may be old or empty
		return err
	}
	return aptGet(ctx, append([]string{"install", "-y", "--no-install-recommends"}, missing...)...)
}

func aptGet(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "apt-get", args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	out, err := cmd.CombinedOutput()
	if err != nil {
		lines := strings.Split(string(bytes.TrimSpace(out)), "\n")
		return fmt.Errorf("apt-get %s: %w: %s", strings.Join(args, " "), err, strings.Join(lines[max(0, len(lines)-3):], "; "))
	}
	return nil
}
