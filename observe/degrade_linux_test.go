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
		k := keeping(t, "1", "0") // which all these programs are loaded for
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
		{name: "x", spec: bpf.LoadSelf, prepare: func(*ebpf.CollectionSpec) error { return nil }, spare: func(*ebpf.CollectionSpec, kernel) error { return broken }},
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

// TestProgramsThatCannotBeLoadedAnew has requests without times seen, and the programs
// that are to keep them refused.
func TestProgramsThatCannotBeLoadedAnew(t *testing.T) {
	testenv.RequireBPF(t)
	for _, tt := range []struct {
		what string
		harm func(*kernel)
		want string
	}{
		{"the types are gone", func(k *kernel) { k.types = func() (*btf.Spec, error) { return nil, errors.New("gone") } }, "BTF"},
		{"a counter has another size", func(k *kernel) {
			k.edit = func(_ string, s *ebpf.CollectionSpec) { s.Maps[bpf.DisksMapOperations].ValueSize *= 2 }
		}, bpf.DisksMapOperations},
	} {
		o := with(t, Config{Groups: []string{GroupDisks}}, keeping(t, "1", "2000"))
		if err := o.group(GroupDisks).collection.Variables[bpf.DisksVarUntimed].Set(uint32(1)); err != nil {
			t.Fatal(err)
		}
		tt.harm(&o.kernel)
		if _, ok := o.ServiceTime(1, 1); ok {
			t.Errorf("%s: there is a service time", tt.what)
		}
		if s := o.Snapshot(); !strings.Contains(reason(s.Unobserved, GroupDisks), tt.want) || len(s.Disks) > 0 {
			t.Errorf("%s: %q", tt.what, reason(s.Unobserved, GroupDisks))
		}
		if g := o.group(GroupDisks); g.collection != nil || g.links != nil {
			t.Errorf("%s: parts of the group are left", tt.what)
		}
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

func TestWhatIsWatchedWhereTheKernelKeepsTimes(t *testing.T) {
	type disk struct{ iostats, throttling string }
	both := disk{"1", "75000"}
	for _, tt := range []struct {
		name          string
		disks         map[string]disk
		insert, issue bool
	}{
		{"both times of all disks are kept", map[string]disk{"vda": both, "vdb": {"1", "2000"}}, false, false},
		{"one has no statistics", map[string]disk{"vda": both, "vdb": {"0", "2000"}}, true, true},
		{"one is not throttled", map[string]disk{"vda": both, "vdb": {"1", "0"}}, false, true},
		{"the first is not throttled", map[string]disk{"vda": {"1", "0"}, "vdb": both}, false, true},
		{"one has no throttling", map[string]disk{"vda": both, "vdb": {"1", ""}}, false, true},
		{"one of no size has neither", map[string]disk{"vda": both, "loop7": {"0", "0"}}, false, false},
		{"one without requests has neither", map[string]disk{"vda": both, "zram0": {"0", ""}}, false, false},
		{"nothing is known", nil, true, true},
	} {
		k := kernel{root: t.TempDir()}
		write := func(path, text string) {
			t.Helper()
			path = filepath.Join(k.root, "sys/block", path)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text+"\n"), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		for name, d := range tt.disks {
			size := "2048"
			if name == "loop7" {
				size = "0"
			}
			write(name+"/size", size)
			write(name+"/queue/iostats", d.iostats)
			if d.throttling != "" {
				write(name+"/queue/wbt_lat_usec", d.throttling)
			}
			if name != "zram0" {
				write(name+"/mq/0/nr_tags", "64")
			}
		}
		spec, err := bpf.LoadDisks()
		if err != nil {
			t.Fatal(err)
		}
		o := &Observer{}
		if err := o.disksGroup().spare(spec, k); err != nil {
			t.Fatal(err)
		}
		_, insert := spec.Programs[bpf.DisksProgBlockRqInsert]
		_, issue := spec.Programs[bpf.DisksProgBlockRqIssue]
		if insert != tt.insert || issue != tt.issue || o.timed == issue {
			t.Errorf("%s: insertions are watched: %v, issues: %v; want %v, %v", tt.name, insert, issue, tt.insert, tt.issue)
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
	if before < ours || ours < 7 {
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
