package node

import "testing"

func TestPodUID(t *testing.T) {
	const uid = "3f2a4b5c-1d2e-4f3a-8b9c-0d1e2f3a4b5c"
	const other = "00000000-1d2e-4f3a-8b9c-0d1e2f3a4b5c"
	const static = "0123456789abcdef0123456789abcdef"
	tests := []struct {
		name, in string
		want     string
	}{
		{"cgroupfs driver, v2", "0::/kubepods/besteffort/pod" + uid + "/5d3c\n", uid},
		{"systemd driver, v2", "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod3f2a4b5c_1d2e_4f3a_8b9c_0d1e2f3a4b5c.slice/cri-containerd-5d3c.scope\n", uid},
		{"systemd driver, guaranteed", "0::/kubepods.slice/kubepods-pod3f2a4b5c_1d2e_4f3a_8b9c_0d1e2f3a4b5c.slice/crio-5d3c.scope\n", uid},
		{"v1: once, though on each line", "12:memory:/kubepods/pod" + uid + "/5d3c\n3:cpu,cpuacct:/kubepods/pod" + uid + "/5d3c\n1:name=systemd:/kubepods/pod" + uid + "/5d3c\n", uid},
		{"seen from another cgroup namespace", "0::/../../pod" + uid + "/5d3c\n", uid},
		{"below a node's own cgroup", "0::/nodes/n1/kubepods/pod" + uid + "/5d3c", uid},
		{"static pod", "0::/kubepods/besteffort/pod" + static + "/5d3c\n", static},
		{"a process of the node", "0::/system.slice/containerd.service\n", ""},
		{"a name that only looks like it", "0::/kubepods/podium/podxyz/pod\n", ""},
		{"too long", "0::/kubepods/pod" + uid + "0/x\n", ""},
		{"wrong characters", "0::/kubepods/pod3F2a4b5c-1d2e-4f3a-8b9c-0d1e2f3a4b5c/x\n", ""},
		{"dashes in the wrong place", "0::/kubepods/pod3f2a4b5c1-d2e-4f3a-8b9c-0d1e2f3a4b5c/x\n", ""},
		{"a pod that makes a cgroup with the name of another is still itself", "0::/kubepods/pod" + uid + "/pod" + other + "\n", uid},
		{"hierarchies that disagree are nobody", "2:cpu:/kubepods/pod" + uid + "/x\n1:pids:/kubepods/pod" + other + "/x\n", ""},
		{"hierarchies without pods do not count", "2:cpu:/\n1:pids:/kubepods/pod" + uid + "/x\n", uid},
		{"not a cgroup file", "hello\n::\n\n", ""},
		{"empty", "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got, ok := podUID(tt.in); got != tt.want || ok != (tt.want != "") {
				t.Errorf("got %q, %v, want %q", got, ok, tt.want)
			}
		})
	}
}

func FuzzPodUID(f *testing.F) {
	f.Add("0::/kubepods/besteffort/pod3f2a4b5c-1d2e-4f3a-8b9c-0d1e2f3a4b5c/x\n")
	f.Add("1:a:/kubepods-pod3f2a4b5c_1d2e_4f3a_8b9c_0d1e2f3a4b5c.slice/x")
	f.Fuzz(func(t *testing.T, in string) {
		uid, ok := podUID(in)
		if !ok {
			if uid != "" {
				t.Errorf("not a UID and yet %q", uid)
			}
			return
		}
		if len(uid) != uidLength && len(uid) != staticUIDLength {
			t.Errorf("%q is not a UID", uid)
		}
		for _, c := range []byte(uid) {
			if !isHex(c) && c != '-' {
				t.Errorf("%q is not a UID", uid)
			}
		}
	})
}
