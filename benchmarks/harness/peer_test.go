package harness

import (
	"strings"
	"testing"
)

func TestPeerCommandLines(t *testing.T) {
	site := Site{Dir: "/t", Port: 4000, Ashlar: "/b/ashlar", CPUs: []int{2, 3}}
	file := Backing{Kind: BackingFile, Path: "/d/f", Size: 1 << 30}
	null := Backing{Kind: BackingNull, Size: 1 << 20}
	memory := Backing{Kind: BackingMemory, Size: 1 << 20}
	for _, c := range []struct {
		peer    string
		backing Backing
		want    string // empty: refused
	}{
		{"ashlar", file, "/b/ashlar export --socket /t/s --pid-file /t/pid /d/f"},
		{"ashlar", null, "/b/ashlar export --socket /t/s --pid-file /t/pid --null 1048576"},
		{"ashlar", memory, "/b/ashlar export --socket /t/s --pid-file /t/pid --mem 1048576"},
		{"ashlar-r2", file, "/b/ashlar export --socket /t/s --pid-file /t/pid --reactors 2 /d/f"},
		{"ashlar-busy", file, "/b/ashlar export --socket /t/s --pid-file /t/pid --poll busy --pin 2,3 /d/f"},
		{"nbdkit-1", file, "nbdkit -f -U /t/s --threads 1 file /d/f cache=none"},
		{"nbdkit-16", null, "nbdkit -f -U /t/s --threads 16 null size=1048576"},
		{"nbdkit-16", memory, "nbdkit -f -U /t/s --threads 16 memory size=1048576"},
		{"qemu-nbd-native", file, "qemu-nbd -k /t/s -t -e 16 -f raw --cache=none --aio=native /d/f"},
		{"qemu-nbd-io_uring", file, "qemu-nbd -k /t/s -t -e 16 -f raw --cache=none --aio=io_uring /d/f"},
		{"qemu-nbd-threads", file, "qemu-nbd -k /t/s -t -e 16 -f raw --cache=writeback --aio=threads /d/f"},
		{"qemu-nbd-native", null, "qemu-nbd -k /t/s -t -e 16 --image-opts driver=null-co,read-zeroes=on,size=1048576"},
		{"qemu-nbd-native", memory, ""},
		{"nbd-server", file, "nbd-server -C /t/conf -p /t/pid"},
		{"nbd-server", null, ""},
		{"tgt", file, "tgtd -f -C 2000 --iscsi portal=127.0.0.1:4000 --pid-file /t/pid"},
		{"raw", null, ""},
	} {
		found, err := FindPeers(c.peer)
		if err != nil {
			t.Fatal(err)
		}
		site.Backing = c.backing
		plan, err := found[0].Plan(site)
		if (err != nil) != (c.want == "") {
			t.Errorf("%s on %s: %v", c.peer, c.backing, err)
			continue
		}
		if got := strings.Join(plan.Argv, " "); got != c.want {
			t.Errorf("%s on %s:\n%s\nwant\n%s", c.peer, c.backing, got, c.want)
		}
	}
}

func TestOptionsOfTheSiteReachAshlar(t *testing.T) {
	found, err := FindPeers("ashlar")
	if err != nil {
		t.Fatal(err)
	}
	plan, err := found[0].Plan(Site{Dir: "/t", Ashlar: "a", Poll: "off", Reactor: 3, Backing: Backing{Kind: BackingFile, Path: "f"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(plan.Argv, " "); !strings.HasSuffix(got, "--reactors 3 --poll off f") {
		t.Error(got)
	}
	if _, err := found[0].Plan(Site{Dir: "/t", Backing: Backing{Kind: BackingFile, Path: "f"}}); err == nil {
		t.Error("planned without a binary")
	}
}

func TestGroupsStandForTheirMembersOnce(t *testing.T) {
	found, err := FindPeers("nbdkit-16", "nbdkit", "raw")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range found {
		names = append(names, p.Name())
	}
	if got := strings.Join(names, " "); got != "nbdkit-16 nbdkit-1 raw" {
		t.Errorf("peers %s", got)
	}
	if _, err := FindPeers("nfs"); err == nil || !strings.Contains(err.Error(), "qemu-nbd") {
		t.Errorf("an unknown peer: %v, want the known ones named", err)
	}
}

func TestClientsRefuseWhatTheyCannotReach(t *testing.T) {
	p, err := LoadProfile("quick")
	if err != nil {
		t.Fatal(err)
	}
	if err := (fio{}).Check(p.Cases[0], Target{Engine: "iscsi"}); err == nil || !strings.Contains(err.Error(), "--client qemu-img") {
		t.Errorf("fio on iSCSI: %v", err)
	}
	if err := new(devperf).Check(p.Cases[0], Target{Engine: "io_uring"}); err == nil {
		t.Error("devperf took a file")
	}
	bars, err := LoadProfile("bars")
	if err != nil {
		t.Fatal(err)
	}
	c, err := bars.Find("randread-4k-qd32-jobs4")
	if err != nil {
		t.Fatal(err)
	}
	if err := (qemuImg{}).Check(c, Target{Engine: "nbd"}); err == nil {
		t.Error("qemu-img took four connections")
	}
}

func TestClientCommandLines(t *testing.T) {
	if got := strings.Join(fioArgs(Target{Engine: "nbd", URI: "nbd://h"}), " "); got != "--ioengine=nbd --uri=nbd://h" {
		t.Error(got)
	}
	if got := strings.Join(fioArgs(Target{Engine: "io_uring", Path: "/a:b"}), " "); got != `--ioengine=io_uring --filename=/a\:b` {
		t.Error(got)
	}
	l := Load{RW: "randwrite", BlockBytes: 4096, Depth: 8, FlushEvery: 2}
	want := "qemu-img bench -f raw -t none -c 100 -d 8 -s 4096 -w --flush-interval=2 --no-drain nbd://h"
	if got := strings.Join(qemuArgs(l, Target{URI: "nbd://h"}, 100), " "); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if s, err := parseQemuBench("Sending 1 read requests\nRun completed in 0.250 seconds.\n"); err != nil || s != 0.25 {
		t.Errorf("%v, %v", s, err)
	}
	for _, text := range []string{"", "Run completed in 0.000 seconds."} {
		if _, err := parseQemuBench(text); err == nil {
			t.Errorf("%q accepted", text)
		}
	}
}
