package observe

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/observe/bpf"
)

// reason is why a group is not observed; "": it is, all of it.
func reason(list []Unobserved, group string) string {
	for _, u := range list {
		if u.What == group {
			return u.Reason
		}
	}
	return ""
}

// confined runs f on a thread with no other capabilities than these.
func confined(t *testing.T, f func(), keep ...int) {
	t.Helper()
	thread(t, func(int) {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		for _, c := range keep {
			data[c/32].Effective |= 1 << (c % 32)
			data[c/32].Permitted |= 1 << (c % 32)
		}
		if err := unix.Capset(&header, &data[0]); err != nil {
			t.Error(err)
			return
		}
		f()
	})()
}

func TestMissingCapabilitiesAreNamed(t *testing.T) {
	testenv.RequireRoot(t)
	for _, tt := range []struct {
		keep []int
		want string
	}{
		{nil, "CAP_BPF and CAP_PERFMON are missing"},
		{[]int{unix.CAP_BPF}, "CAP_PERFMON is missing"},
		{[]int{unix.CAP_PERFMON}, "CAP_BPF is missing"},
	} {
		confined(t, func() {
			o, err := Start(Config{Log: slog.New(slog.DiscardHandler), Threads: []int{unix.Gettid()}, Disks: []Number{{8, 0}}})
			if err != nil {
				t.Error(err)
				return
			}
			for _, g := range []string{GroupDisks, GroupReactors, GroupRings, GroupNBD} {
				if got := reason(o.Unobserved(), g); !strings.Contains(got, tt.want) {
					t.Errorf("%s: %q, want %q", g, got, tt.want)
				}
			}
			s := o.Snapshot()
			if len(s.Disks)+len(s.Threads)+len(s.Rings)+len(s.NBD) > 0 || len(s.Unobserved) != 5 {
				t.Errorf("a snapshot of nothing: %+v", s)
			}
			if _, ok := o.ServiceTime(8, 0); ok {
				t.Error("a service time that nobody saw")
			}
			if err := errors.Join(o.SetThreads([]int{1}), o.SetDisks([]Number{{8, 0}}), o.Close()); err != nil {
				t.Error(err)
			}
		}, tt.keep...)
	}
}

func TestTwoCapabilitiesAreEnough(t *testing.T) {
	testenv.RequireRoot(t)
	testenv.RequireBPF(t)
	f, number := loopDevice(t, 1<<20)
	b := aligned(t, 4096)
	confined(t, func() {
		o, err := Start(Config{Log: slog.New(slog.DiscardHandler), Threads: []int{unix.Gettid()}})
		if err != nil {
			t.Error(err)
			return
		}
		for _, g := range []string{GroupDisks, GroupReactors, GroupRings} {
			if got := reason(o.Unobserved(), g); got != "" {
				t.Errorf("%s: %s", g, got)
			}
		}
		if _, err := f.WriteAt(b, 0); err != nil {
			t.Error(err)
		}
		if n := disk(o.Snapshot(), number).operation("write").Count; n != 1 {
			t.Errorf("%d writes", n)
		}
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	}, unix.CAP_BPF, unix.CAP_PERFMON)
}

func TestAKernelWithoutBTF(t *testing.T) {
	testenv.RequireBPF(t)
	o := with(t, Config{}, kernel{root: "/", types: func() (*btf.Spec, error) { return nil, os.ErrNotExist }})
	for _, g := range []string{GroupDisks, GroupReactors, GroupRings, GroupNBD} {
		if got := reason(o.Unobserved(), g); !strings.Contains(got, "no BTF") {
			t.Errorf("%s: %q", g, got)
		}
	}
}

// rename has a program of a group ask for a tracepoint that no kernel has.
func renaming(group string, programs ...string) func(string, *ebpf.CollectionSpec) {
	return func(g string, spec *ebpf.CollectionSpec) {
		for _, p := range programs {
			if g == group {
				spec.Programs[p].AttachTo += "_of_tomorrow"
			}
		}
	}
}

func TestAbsentTracepoints(t *testing.T) {
	testenv.RequireBPF(t)
	for _, tt := range []struct {
		group    string
		programs []string
		partial  bool
	}{
		{GroupDisks, []string{bpf.DisksProgBlockRqIssue}, false},
		{GroupDisks, []string{bpf.DisksProgBlockRqComplete}, false},
		{GroupDisks, []string{bpf.DisksProgBlockRqInsert}, true},
		{GroupDisks, []string{bpf.DisksProgBlockRqMerge, bpf.DisksProgBlockBioBackmerge}, true},
		{GroupReactors, []string{bpf.ReactorsProgSchedSwitch}, false},
		{GroupRings, []string{bpf.RingsProgIoUringSubmitReq, bpf.RingsProgIoUringSubmitSqe}, false},
	} {
		k := real()
		k.edit = renaming(tt.group, tt.programs...)
		o := with(t, Config{Groups: []string{GroupDisks, GroupReactors, GroupRings}}, k)
		for _, g := range []string{GroupDisks, GroupReactors, GroupRings} {
			loaded := o.group(g).collection != nil
			got := reason(o.Unobserved(), g)
			switch {
			case g != tt.group && (got != "" || !loaded):
				t.Errorf("without %v, %s: %q", tt.programs, g, got)
			case g == tt.group && (loaded != tt.partial || !strings.Contains(got, "no tracepoint "+tt.programs[0]) && !strings.Contains(got, "no tracepoint "+tt.programs[len(tt.programs)-1])):
				t.Errorf("without %v, %s: loaded %v, %q", tt.programs, g, loaded, got)
			}
		}
	}
}

func TestWhatTheKernelRefuses(t *testing.T) {
	testenv.RequireBPF(t)
	for _, tt := range []struct {
		what string
		edit func(*ebpf.CollectionSpec)
		want string
	}{
		{"a program", func(s *ebpf.CollectionSpec) {
			s.Programs[bpf.DisksProgBlockRqIssue].Instructions = asm.Instructions{asm.Mov.Reg(asm.R0, asm.R7), asm.Return()}
		}, "verifier"},
		{"a map", func(s *ebpf.CollectionSpec) { s.Maps[bpf.DisksMapOperations].MaxEntries = 0 }, bpf.DisksMapOperations},
		{"too large a map", func(s *ebpf.CollectionSpec) { s.Maps[bpf.DisksMapFlights].MaxEntries = 1 << 31 }, ""},
		{"a kind of program", func(s *ebpf.CollectionSpec) {
			s.Programs[bpf.DisksProgBlockRqIssue].AttachType = ebpf.AttachTraceFEntry
		}, ""},
	} {
		k := real()
		k.edit = func(g string, s *ebpf.CollectionSpec) {
			if g == GroupDisks {
				tt.edit(s)
			}
		}
		o := with(t, Config{Groups: []string{GroupDisks, GroupReactors}}, k)
		if got := reason(o.Unobserved(), GroupDisks); got == "" || !strings.Contains(got, tt.want) || strings.Contains(got, "\n") {
			t.Errorf("%s: %q", tt.what, got)
		} else {
			t.Logf("%s: %s", tt.what, got)
		}
		if got := reason(o.Unobserved(), GroupReactors); got != "" {
			t.Errorf("%s of disks is refused, and %q of reactors", tt.what, got)
		}
		if g := o.group(GroupDisks); g.collection != nil || g.links != nil {
			t.Errorf("%s: parts of the group are left", tt.what)
		}
	}
}

func TestSpecificationsThatFail(t *testing.T) {
	testenv.RequireBPF(t)
	types, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	o := with(t, Config{Groups: []string{GroupDisks}}, real())
	broken := errors.New("broken")
	for _, g := range []*group{
		{name: "x", spec: func() (*ebpf.CollectionSpec, error) { return nil, broken }},
		{name: "x", spec: bpf.LoadSelf, prepare: func(*ebpf.CollectionSpec) error { return broken }},
	} {
		o.load(g, types)
		if g.reason != "broken" {
			t.Errorf("%q", g.reason)
		}
	}
	g := &group{name: "x", spec: bpf.LoadSelf, prepare: func(s *ebpf.CollectionSpec) error {
		s.Programs[bpf.SelfProgSelf].AttachTo = "block_rq_issue" // it is there, and for programs of another type
		return nil
	}}
	o.load(g, types)
	if !strings.Contains(g.reason, "program") {
		t.Errorf("attaching a program of another type: %q", g.reason)
	}
}

func TestReasonsAreForPeople(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("load: %w", unix.EPERM), "does not allow"},
		{unix.EACCES, "does not allow"},
		{unix.ENOSYS, "no eBPF"},
		{unix.ENOMEM, "no memory"},
		{errors.New("something else"), "something else"},
	} {
		if got := reasonOf(tt.err); !strings.Contains(got, tt.want) && !strings.Contains(got, "locked down") {
			t.Errorf("%v: %q", tt.err, got)
		}
	}
}

func TestInsertionsAreWatchedWhereTheKernelKeepsNoTimes(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  bool
	}{
		{"all disks have statistics", map[string]string{"vda": "1", "vdb": "1"}, true},
		{"one has none", map[string]string{"vda": "1", "vdb": "0"}, false},
		{"one of no size has none", map[string]string{"vda": "1", "loop7": "0"}, true},
		{"one without requests has none", map[string]string{"vda": "1", "zram0": "0"}, true},
		{"nothing is known", nil, false},
	} {
		k := kernel{root: t.TempDir()}
		for disk, text := range tt.files {
			dir := filepath.Join(k.root, "sys/block", disk)
			size := "2048\n"
			if disk == "loop7" {
				size = "0\n"
			}
			below := []string{"queue", "mq"}
			if disk == "zram0" {
				below = below[:1]
			}
			for _, name := range below {
				if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(os.WriteFile(filepath.Join(dir, "size"), []byte(size), 0o644),
				os.WriteFile(filepath.Join(dir, "queue/iostats"), []byte(text+"\n"), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		spec := &ebpf.CollectionSpec{Programs: map[string]*ebpf.ProgramSpec{bpf.DisksProgBlockRqInsert: {}, bpf.DisksProgBlockRqIssue: {}}}
		(&Observer{}).disksGroup().spare(spec, k)
		if _, there := spec.Programs[bpf.DisksProgBlockRqInsert]; k.timesRequests() != tt.want || there == tt.want || len(spec.Programs) == 0 {
			t.Errorf("%s: the kernel's times serve: %v, insertions are watched: %v", tt.name, k.timesRequests(), there)
		}
	}
}

func TestMoreDisksThanCounters(t *testing.T) {
	f, number := loopDevice(t, 1<<20)
	testenv.RequireBPF(t)
	k := real()
	k.edit = func(g string, s *ebpf.CollectionSpec) {
		if g == GroupDisks {
			s.Maps[bpf.DisksMapOperations].MaxEntries = 1
		}
	}
	o := with(t, Config{Groups: []string{GroupDisks}, Disks: []Number{number}}, k)
	b := aligned(t, 4096)
	wait(t, "a full map", func() bool { // the kernel may give a map some entries more
		_, _ = f.WriteAt(b, 0) // what is counted is the point
		_, _ = f.ReadAt(b, 0)
		_ = f.Sync()
		_ = discard(f, 0, 4096)
		return strings.Contains(reason(o.Snapshot().Unobserved, GroupDisks), "more disks than counters")
	})
}

func TestCountersThatCannotBeRead(t *testing.T) {
	f, number := loopDevice(t, 1<<20)
	o := observing(t, Config{Groups: []string{GroupDisks, GroupReactors, GroupRings}, Threads: []int{unix.Gettid()}})
	if _, err := f.WriteAt(aligned(t, 4096), 0); err != nil {
		t.Fatal(err)
	}
	for group, m := range map[string]string{GroupDisks: bpf.DisksMapOperations, GroupReactors: bpf.ReactorsMapThreads, GroupRings: bpf.RingsMapKinds} {
		if err := o.group(group).collection.Maps[m].Close(); err != nil {
			t.Fatal(err)
		}
		if got := reason(o.Snapshot().Unobserved, group); !strings.Contains(got, "cannot be read") {
			t.Errorf("%s: %q", group, got)
		}
	}
	if _, ok := o.ServiceTime(number.Major, number.Minor); ok {
		t.Error("a service time without counters")
	}
	if err := o.SetThreads([]int{1}); err == nil {
		t.Error("threads were set without a map")
	}
	for _, m := range []string{bpf.DisksMapNames, bpf.DisksMapWatched} {
		if err := o.group(GroupDisks).collection.Maps[m].Close(); err != nil {
			t.Fatal(err)
		}
	}
	if got := reason(o.Snapshot().Unobserved, GroupDisks); !strings.Contains(got, "cannot be read") {
		t.Errorf("disks: %q", got)
	}
	if err := o.SetDisks([]Number{number}); err == nil {
		t.Error("disks were set without a map")
	}
}

func TestADriverThatComesLaterIsObserved(t *testing.T) {
	testenv.RequireBPF(t)
	root := t.TempDir()
	k := real()
	k.root = root
	o := with(t, Config{}, k)
	if got := reason(o.Unobserved(), GroupNBD); !strings.Contains(got, "not loaded") {
		t.Fatalf("nbd: %q", got)
	}
	if err := os.MkdirAll(root+"/sys/module/nbd", 0o755); err != nil {
		t.Fatal(err)
	}
	o.lastRetry = time.Now()
	o.Snapshot()
	if got := reason(o.Unobserved(), GroupNBD); !strings.Contains(got, "not loaded") {
		t.Errorf("nbd, looked for again at once: %q", got)
	}
	o.lastRetry = time.Time{}
	o.Snapshot()
	if got := reason(o.Unobserved(), GroupNBD); strings.Contains(got, "not loaded") {
		t.Errorf("nbd: %q", got)
	}
}

func TestClosingTakesEverythingAway(t *testing.T) {
	testenv.CheckFDs(t)
	o := observing(t, Config{Groups: []string{GroupDisks, GroupReactors}})
	before, ours := programs(t), len(o.group(GroupDisks).links)+len(o.group(GroupReactors).links)
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if before < ours || ours < 8 {
		t.Errorf("%d of %d programs were found", before, ours)
	}
	wait(t, "the programs to go", func() bool { return programs(t) <= before-ours })
	if err := errors.Join(o.Close(), o.SetThreads([]int{1}), o.SetDisks(nil)); err != nil {
		t.Errorf("after Close: %v", err)
	}
	s := o.Snapshot()
	if len(s.Disks) > 0 || len(s.Unobserved) != len(groupNames) || reason(s.Unobserved, GroupDisks) != "the observer is closed" {
		t.Errorf("after Close: %+v", s)
	}
}

// programs counts ours in the kernel, by name: the kernel's own records keep 15 bytes.
func programs(t *testing.T) (n int) {
	t.Helper()
	ours := []string{"block_rq_insert", "block_rq_issue", "block_rq_requeu", "block_rq_comple", "block_bio_backm", "block_bio_front", "block_rq_merge", "sched_switch", "sched_wakeup"}
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if err != nil {
			return n
		}
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // it went meanwhile
		}
		if info, err := p.Info(); err == nil && slices.ContainsFunc(ours, func(o string) bool { return strings.HasPrefix(info.Name, o) }) {
			n++
		}
		_ = p.Close() // a descriptor
		runtime.KeepAlive(p)
	}
}

func TestGroupsThatAreNotWanted(t *testing.T) {
	o := observing(t, Config{Groups: []string{GroupReactors}})
	for _, g := range []string{GroupDisks, GroupRings, GroupNBD} {
		if got := reason(o.Unobserved(), g); got != "it is switched off" {
			t.Errorf("%s: %q", g, got)
		}
	}
	if got := reason(o.Unobserved(), GroupReactors); got != "" {
		t.Errorf("reactors: %q", got)
	}
}
