package node

import (
	"bufio"
	"os"
	"slices"
	"strings"
	"testing"
)

func TestCleanMappings(t *testing.T) {
	const smaps = `00400000-013ae000 r-xp 00000000 00:129 12132982                          /bin/x
Rss:               13048 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
013ae000-02449000 r--p 00fae000 00:129 12132982                          /bin/x
Anonymous:             4 kB
02449000-024fc000 rw-p 02049000 00:129 12132982                          /bin/x
Anonymous:             0 kB
03449000-034fc000 r--p 02049000 00:129 12132982                          /bin/y
Anonymous:             0 kB
04449000-044fc000 r--s 02049000 00:129 12132982                          /bin/x
Anonymous:             0 kB
c000000000-c000400000 rw-p 00000000 00:00 0
Anonymous:           100 kB
`
	got := cleanMappings(bufio.NewScanner(strings.NewReader(smaps)), "/bin/x")
	if !slices.Equal(got, []mapping{{0x400000, 0x13ae000}}) {
		t.Errorf("got %x", got)
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if got := cleanMappings(bufio.NewScanner(f), exe); len(got) == 0 {
		t.Error("this program has no text")
	}
}

// The program goes on as if nothing was.
func TestDropProgramText(t *testing.T) {
	for range 3 {
		dropProgramText()
		if got := strings.Repeat("x", 3); got != "xxx" {
			t.Fatal(got)
		}
	}
}
