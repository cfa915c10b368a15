package node

import "strings"

// uidLength is the length of a Kubernetes UID, an RFC 4122 UUID in text form.
const uidLength = 36

// staticUIDLength is the length of the UID that the kubelet gives to a static
// pod: an MD5 sum in hexadecimal, without dashes.
const staticUIDLength = 32

// podUID returns the UID of the pod that a process belongs to, in the form of
// Kubernetes (with dashes), given the text of its /proc/PID/cgroup. The
// kubelet names a pod's cgroup "pod" and the UID, below its parents; its
// systemd driver writes underscores for the dashes, puts the parents' names
// before, and adds ".slice". cgroup v1 has a line per controller, v2 one line.
//
// A process with rights on cgroups can make and enter further directories
// below its pod's, with any name. So in each line the outermost counts, and
// lines that disagree count for nothing.
func podUID(cgroup string) (uid string, ok bool) {
	for line := range strings.Lines(cgroup) {
		// hierarchy-ID:controller-list:cgroup-path, cgroups(7)
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 {
			continue
		}
		u, found := outermostUID(parts[2])
		if found && uid != "" && u != uid {
			return "", false
		}
		if found {
			uid = u
		}
	}
	return uid, uid != ""
}

func outermostUID(path string) (string, bool) {
	for dir := range strings.SplitSeq(path, "/") {
		if uid, ok := dirUID(dir); ok {
			return uid, true
		}
	}
	return "", false
}

// dirUID reads the UID out of one directory name, such as
// "pod3f2a…-…" or "kubepods-burstable-pod3f2a…_….slice".
func dirUID(dir string) (string, bool) {
	dir, slice := strings.CutSuffix(dir, ".slice")
	name := dir
	if slice {
		i := strings.LastIndexByte(dir, '-')
		if i < 0 {
			return "", false
		}
		name = dir[i+1:]
	}
	raw, ok := strings.CutPrefix(name, "pod")
	if !ok {
		return "", false
	}
	if slice {
		raw = strings.ReplaceAll(raw, "_", "-")
	}
	switch len(raw) {
	case uidLength:
		for i, c := range []byte(raw) {
			dash := i == 8 || i == 13 || i == 18 || i == 23
			if dash != (c == '-') || !dash && !isHex(c) {
				return "", false
			}
		}
	case staticUIDLength:
		for _, c := range []byte(raw) {
			if !isHex(c) {
				return "", false
			}
		}
	default:
		return "", false
	}
	return raw, true
}

func isHex(c byte) bool { return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' }
