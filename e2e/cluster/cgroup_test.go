package cluster

import (
	"slices"
	"testing"

	"github.com/weft-mesh/weft/e2e/cluster/internal/nodespec"
)

func TestParseHierarchies(t *testing.T) {
	for _, r := range []struct {
		name, mountinfo string
		want            []nodespec.Hierarchy
	}{
		{
			"version 2 alone",
			"30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n",
			[]nodespec.Hierarchy{{Mount: "unified", Dir: "/sys/fs/cgroup"}},
		},
		{
			"hybrid, with controllers together and a named hierarchy",
			"30 23 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n" +
				"31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n" +
				"32 30 0:28 / /sys/fs/cgroup/systemd rw shared:11 master:3 - cgroup cgroup rw,xattr,release_agent=/x,name=systemd\n" +
				"33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n",
			[]nodespec.Hierarchy{
				{Mount: "unified", Dir: "/sys/fs/cgroup/unified"},
				{Options: "none,name=systemd", Mount: "systemd", Dir: "/sys/fs/cgroup/systemd"},
				{Options: "cpu,cpuacct", Mount: "cpu,cpuacct", Dir: "/sys/fs/cgroup/cpu,cpuacct"},
			},
		},
		{
			"a second mount of a hierarchy does not count",
			"31 30 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n" +
				"99 30 0:27 / /mnt/elsewhere rw - cgroup2 cgroup2 rw\n",
			[]nodespec.Hierarchy{{Mount: "unified", Dir: "/sys/fs/cgroup"}},
		},
		{"other file systems and broken lines", "1 2 3\n22 1 254:0 / / rw - ext4 /dev/vda rw\n\n", nil},
	} {
		t.Run(r.name, func(t *testing.T) {
			if got := parseHierarchies(r.mountinfo); !slices.Equal(got, r.want) {
				t.Errorf("got %+v\nwant %+v", got, r.want)
			}
		})
	}
}
