package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// labHost is a host with LVM, as far as the rig sees it: it has a /proc and a /sys, and
// obeys commands by changing them.
type labHost struct {
	machine
	t     *testing.T
	calls []string
	fail  map[string]error // by the begin of a command
	group string           // on the physical volume
	stays bool             // devices do not go, whatever LVM says
	mute  bool             // the file system does no direct I/O
	open  bool             // somebody has the loop device open

	without []string // what commands have in their environment
}

const (
	labTargets = "thin-pool        v1.23.0\nlinear           v1.5.0\n"
)

func newLabHost(t *testing.T) *labHost {
	t.Helper()
	h := &labHost{t: t, fail: map[string]error{}}
	h.machine = machine{root: t.TempDir(), order: h.obey}
	h.write("proc/devices", "Block devices:\n  7 loop\n253 device-mapper\n")
	h.write("proc/2/comm", "kthreadd\n")
	h.write("run/udev/control", "")
	h.folder("sys/block")
	h.folder("sys/class")
	if err := os.Symlink("../block", filepath.Join(h.root, "sys/class/block")); err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir() // programs that are only looked for
	for _, program := range []string{"thin_check", "dmsetup"} {
		if err := os.WriteFile(filepath.Join(bin, program), []byte("#!/bin/sh\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", bin)
	return h
}

func (h *labHost) write(name, text string) {
	h.t.Helper()
	h.folder(filepath.Dir(name))
	if err := os.WriteFile(filepath.Join(h.root, name), []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

func (h *labHost) folder(name string) {
	h.t.Helper()
	if err := os.MkdirAll(filepath.Join(h.root, name), 0o700); err != nil {
		h.t.Fatal(err)
	}
}

func (h *labHost) remove(name string) {
	h.t.Helper()
	if err := os.RemoveAll(filepath.Join(h.root, name)); err != nil {
		h.t.Fatal(err)
	}
}

// lie makes a device of device mapper that lies on another.
func (h *labHost) lie(number, name, on string) {
	h.write("sys/block/dm-"+number+"/dm/name", name+"\n")
	h.folder("sys/block/dm-" + number + "/holders")
	h.folder("sys/block/" + on + "/holders/dm-" + number)
}

// activate makes what LVM makes of a thin volume: it lies on its pool.
func (h *labHost) activate(name string) {
	on := "loop7"
	if !h.has("sys/block/loop7") {
		on = "given"
	}
	h.lie("0", h.group+"-pool_tdata", on)
	h.lie("1", h.group+"-pool-tpool", "dm-0")
	h.lie("2", h.group+"-"+name, "dm-1")
	h.folder("dev/" + h.group)
}

func (h *labHost) has(name string) bool {
	_, err := os.Stat(filepath.Join(h.root, name))
	return err == nil
}

// left are the devices that are there.
func (h *labHost) left() string {
	paths, err := filepath.Glob(filepath.Join(h.root, "sys/block/*/*/*"))
	if err != nil {
		h.t.Fatal(err)
	}
	var names []string
	for _, path := range paths {
		if base := filepath.Base(path); base == "name" || base == "backing_file" {
			names = append(names, filepath.Base(filepath.Dir(filepath.Dir(path))))
		}
	}
	return strings.Join(names, " ")
}

func (h *labHost) obey(ctx context.Context, argv []string) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if argv[0] == "env" {
		h.without = append(h.without, argv[1])
		argv = argv[2:]
	}
	call := strings.Replace(strings.Join(argv, " "), " --config "+lvmConfig, "", 1)
	if h.group != "" {
		call = strings.ReplaceAll(call, h.group, "GROUP")
	}
	h.calls = append(h.calls, call)
	last := argv[len(argv)-1]
	for begin, err := range h.fail {
		if strings.HasPrefix(call, begin) {
			return nil, err
		}
	}
	if argv[0] == "lvm" {
		return h.lvmObeys(argv, last)
	}
	switch strings.Join(argv[:2], " ") {
	case "dmsetup targets":
		return []byte(labTargets), nil
	case "dmsetup remove":
		paths, err := filepath.Glob(filepath.Join(h.root, "sys/block/dm-*/dm/name"))
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			if text, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(text)) == last {
				dm := filepath.Base(filepath.Dir(filepath.Dir(path)))
				holders, err := filepath.Glob(filepath.Join(h.root, "sys/block/*/holders/"+dm))
				if err != nil {
					return nil, err
				}
				for _, holder := range append(holders, filepath.Join(h.root, "sys/block", dm)) {
					if err := os.RemoveAll(holder); err != nil {
						return nil, err
					}
				}
			}
		}
	case "losetup --find":
		if len(argv) > 2 {
			h.write("sys/block/loop7/loop/backing_file", last+"\n")
			h.write("sys/block/loop7/loop/dio", map[bool]string{true: "0\n", false: "1\n"}[h.mute])
			h.write("sys/block/loop7/stat", "0 0 0 0 0 0 8 0 0 0 0\n")
		}
		return []byte("/dev/loop7\n"), nil
	case "losetup --detach":
		if !h.open {
			h.remove("sys/block/" + filepath.Base(last) + "/loop")
		}
	}
	return nil, nil
}

func (h *labHost) lvmObeys(argv []string, last string) ([]byte, error) {
	switch argv[1] {
	case "pvs":
		if h.group == "" {
			return nil, errors.New("no physical volume")
		}
		return []byte("  " + h.group + "\n"), nil
	case "vgcreate":
		h.group = argv[len(argv)-2]
	case "vgremove":
		h.group = ""
	case "lvcreate":
		h.activate(argv[slices.Index(argv, "--name")+1])
	case "lvchange":
		h.activate(filepath.Base(last))
	case "vgchange":
		paths, err := filepath.Glob(filepath.Join(h.root, "sys/block/dm-*"))
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			if !h.stays {
				h.remove("sys/block/" + filepath.Base(path))
			}
		}
		if !h.stays {
			h.remove("sys/block/loop7/holders")
		}
		h.write("sys/block/loop7/stat", "0 0 0 0 0 0 24 0 0 0 0\n") // the metadata is written
	}
	return nil, nil
}

// prepared is a Stage on the host, with LVM's part of it made.
func (h *labHost) prepared() (lvmThin, *Stage) {
	h.t.Helper()
	l, s := lvmThin{on: h.machine}, &Stage{Dir: h.t.TempDir(), Size: 1 << 20}
	if err := l.prepare(h.t.Context(), s); err != nil {
		h.t.Fatal(err)
	}
	if left := h.left(); left != "" {
		h.t.Fatalf("active after it was prepared: %s", left)
	}
	return l, s
}

func (s *Stage) site(t *testing.T, v Volume) Site {
	return Site{Dir: t.TempDir(), Backing: s.Backing(), Volume: v}
}

func TestAThinPoolIsMadeAsDocumented(t *testing.T) {
	h := newLabHost(t)
	_, s := h.prepared()
	want := []string{
		"modprobe --dry-run --quiet dm_thin_pool", "losetup --find", "modprobe --quiet dm_thin_pool",
		"losetup --find --show --direct-io=on " + s.Dir + "/ashlar-lvm.img",
		"lvm pvcreate --devices /dev/loop7 --yes /dev/loop7",
		"lvm vgcreate --devices /dev/loop7 --setautoactivation n GROUP /dev/loop7",
		"lvm lvcreate --devices /dev/loop7 --yes --type thin-pool --name pool --size 2621440b --chunksize 131072b --zero n --discards nopassdown --poolmetadataspare n GROUP",
		"lvm lvcreate --devices /dev/loop7 --yes --type thin --name data --virtualsize 1048576b --thinpool pool GROUP",
		"lvm vgchange --devices /dev/loop7 --activate n GROUP",
		"losetup --detach /dev/loop7",
	}
	for i := range h.calls {
		h.calls[i] = strings.ReplaceAll(h.calls[i], h.group, "GROUP") // when it was made
	}
	if !slices.Equal(h.calls, want) {
		t.Errorf("%s\nwant\n%s", strings.Join(h.calls, "\n"), strings.Join(want, "\n"))
	}
	if !strings.HasPrefix(h.group, "ashlar_bench_") || len(h.group) != len("ashlar_bench_")+8 {
		t.Errorf("the group is called %q, want one of its own", h.group)
	}
	if info, err := os.Stat(filepath.Join(s.Dir, lvmFile)); err != nil || info.Size() != 3<<20 {
		t.Errorf("the file: %v, %v, want 3 MiB", info, err)
	}
}

func TestAThinVolumeServesTheVolumeOfTheBar(t *testing.T) {
	h := newLabHost(t)
	l, s := h.prepared()
	const (
		attach = "losetup --find --show --direct-io=on DIR/ashlar-lvm.img; lvm pvs --devices /dev/loop7 --noheadings --options vg_name /dev/loop7; "
		end    = "lvm vgchange --devices /dev/loop7 --activate n GROUP; losetup --detach /dev/loop7"
		fresh  = "lvm lvcreate --devices /dev/loop7 --yes --type thin --name run --virtualsize 1048576b --thinpool pool GROUP; " +
			"lvm lvremove --devices /dev/loop7 --yes GROUP/run; "
	)
	for _, c := range []struct {
		volume            Volume
		want, link, setup string
	}{
		{VolumeMapped, attach + "lvm lvchange --devices /dev/loop7 --activate y GROUP/data; " + end, "data", ""},
		{VolumeFresh, attach + fresh + end, "run", ""},
		{VolumeFilled, attach + fresh + end, "run", "fio --name=fill --thread --ioengine=io_uring --filename=SITE/volume --direct=1 --rw=write --bs=128k --iodepth=16 --size=25% --end_fsync=1 --output-format=terse"},
	} {
		site := s.site(t, c.volume)
		plan, err := l.Plan(site)
		if err != nil {
			t.Fatal(err)
		}
		if got := joined(plan.Setup); got != strings.ReplaceAll(c.setup, "SITE", site.Dir) || plan.Argv != nil || plan.Target != (Target{Engine: "io_uring", Path: site.Dir + "/volume"}) {
			t.Errorf("%q: %+v", c.volume, plan)
		}
		h.calls = nil
		target, err := plan.Kernel(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if link, err := os.Readlink(plan.Target.Path); err != nil || link != filepath.Join(h.root, "dev", h.group, c.link) {
			t.Errorf("%q: %s, %v", c.volume, link, err)
		}
		if c := target.Command(); len(c) < 4 || c[3] != "/dev/loop7" || !strings.HasPrefix(c[len(c)-1], h.group) {
			t.Errorf("made by %v", c)
		}
		if target.Written() != 8*512 {
			t.Errorf("%q: %d bytes written so far", c.volume, target.Written())
		}
		if _, err := h.attach(t.Context(), s.Dir); !errors.Is(err, errLocked) {
			t.Errorf("%q: a second run on the same volumes: %v", c.volume, err)
		}
		for range 2 { // a second time does nothing
			if err := target.Stop(); err != nil {
				t.Error(err)
			}
		}
		if target.Written() != 24*512 {
			t.Errorf("%q: %d bytes written up to the end", c.volume, target.Written())
		}
		if got := strings.Join(h.calls, "; "); got != strings.ReplaceAll(c.want, "DIR", s.Dir) {
			t.Errorf("%q:\n%s\nwant\n%s", c.volume, got, c.want)
		}
		if left := h.left(); left != "" {
			t.Errorf("%q: left behind: %s", c.volume, left)
		}
	}
}

// whichever command fails, the error is that command's, and nothing stays.
func TestAFailedStepLeavesNothing(t *testing.T) {
	broken := errors.New("broken")
	for _, begin := range []string{"lvm pvcreate", "lvm vgcreate", "lvm lvcreate", "losetup --find --show"} {
		h := newLabHost(t)
		h.fail[begin] = broken
		if err := (lvmThin{on: h.machine}).prepare(t.Context(), &Stage{Dir: t.TempDir(), Size: 1 << 20}); !errors.Is(err, broken) {
			t.Errorf("%s: %v", begin, err)
		}
		if left := h.left(); left != "" {
			t.Errorf("%s: left behind: %s", begin, left)
		}
	}
	h := newLabHost(t)
	l, s := h.prepared()
	for _, c := range []struct {
		begin  string
		volume Volume
	}{{"losetup --find", ""}, {"lvm pvs", ""}, {"lvm lvchange", ""}, {"lvm lvcreate", VolumeFresh}} {
		h.fail = map[string]error{c.begin: broken}
		if _, err := l.start(t.Context(), s.site(t, c.volume)); !errors.Is(err, broken) {
			t.Errorf("%s: %v", c.begin, err)
		}
		if left := h.left(); left != "" {
			t.Errorf("%s: left behind: %s", c.begin, left)
		}
	}
	h.fail = nil
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.start(ctx, s.site(t, "")); !errors.Is(err, context.Canceled) || h.left() != "" {
		t.Errorf("with an ended context: %v, left %s", err, h.left())
	}
	site := s.site(t, "")
	if err := os.WriteFile(filepath.Join(site.Dir, "volume"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := l.start(t.Context(), site); !errors.Is(err, os.ErrExist) || h.left() != "" {
		t.Errorf("no place for the link: %v, left %s", err, h.left())
	}
	h.mute = true
	if _, err := l.start(t.Context(), s.site(t, "")); err == nil || !strings.Contains(err.Error(), "no direct I/O") || h.left() != "" {
		t.Errorf("without direct I/O: %v, left %s", err, h.left())
	}
	h.mute, h.group = false, "vg0"
	if _, err := l.start(t.Context(), s.site(t, "")); err == nil || !strings.Contains(err.Error(), "vg0") || h.left() != "" {
		t.Errorf("a group that is not a benchmark's: %v, left %s", err, h.left())
	}
	if _, err := l.start(t.Context(), Site{Backing: Backing{Kind: BackingPool, Path: filepath.Join(s.Dir, "nowhere")}}); err == nil {
		t.Error("started in no Stage")
	}
	if _, err := l.start(t.Context(), Site{Backing: Backing{Kind: BackingPool, Path: t.TempDir()}}); err == nil {
		t.Error("started without a physical volume")
	}
}

func TestWhatLVMDoesNotTakeAwayDeviceMapperDoes(t *testing.T) {
	h := newLabHost(t)
	l, s := h.prepared()
	v, err := l.start(t.Context(), s.site(t, VolumeFresh))
	if err != nil {
		t.Fatal(err)
	}
	h.stays, h.calls = true, nil
	h.fail = map[string]error{"lvm vgchange": errors.New("the metadata is not whole")}
	if err := v.Stop(); err != nil {
		t.Error(err)
	}
	want := "lvm lvremove --devices /dev/loop7 --yes GROUP/run; lvm vgchange --devices /dev/loop7 --activate n GROUP; " +
		"dmsetup remove --retry GROUP-run; dmsetup remove --retry GROUP-pool-tpool; dmsetup remove --retry GROUP-pool_tdata; losetup --detach /dev/loop7"
	if got := strings.Join(h.calls, "; "); got != want || h.left() != "" || h.has("dev/"+h.group) {
		t.Errorf("left %q, after\n%s\nwant\n%s", h.left(), got, want)
	}

	if len(h.without) > 0 {
		t.Errorf("commands that do without udev, which runs: %v", h.without)
	}
	h.remove("run/udev/control")
	if v, err = l.start(t.Context(), s.site(t, "")); err == nil {
		h.fail["dmsetup remove --retry GROUP-pool-tpool"] = errors.New("device is busy")
		err = v.Stop()
	}
	if err == nil || !strings.Contains(err.Error(), h.group+"-pool-tpool") || !strings.Contains(err.Error(), "busy") || !strings.Contains(err.Error(), "/dev/loop7") {
		t.Errorf("%v, want what is left, and why", err)
	}
	if got := strings.Join(h.without, " "); got != strings.TrimSuffix(strings.Repeat("DM_DISABLE_UDEV=1 ", 5), " ") { // pvs, lvchange, vgchange, dmsetup twice
		t.Errorf("commands that do without udev: %s", got)
	}
}

func TestStopNamesWhatItCannotDo(t *testing.T) {
	h := newLabHost(t)
	l, s := h.prepared()
	v, err := l.start(t.Context(), s.site(t, VolumeFresh))
	if err != nil {
		t.Fatal(err)
	}
	remove, detach := errors.New("cannot remove"), errors.New("cannot detach")
	h.fail = map[string]error{"lvm lvremove": remove, "losetup --detach": detach}
	if err := v.Stop(); !errors.Is(err, remove) || !errors.Is(err, detach) {
		t.Errorf("%v, want both", err)
	}
	if left := h.left(); left != "loop7" {
		t.Errorf("left: %s; the volume is there, but not active", left)
	}
	h.fail, h.open = nil, true
	plan, err := l.Plan(s.site(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	target, err := plan.Kernel(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Stop(); err == nil || !strings.Contains(err.Error(), "/dev/loop7 is still attached") {
		t.Errorf("%v, want that it is attached", err)
	}
	h.remove("sys/block/loop7/loop") // it was closed
	h.fail = map[string]error{"losetup --detach": detach}
	if err := h.detach(t.Context(), "/dev/loop7"); err != nil {
		t.Errorf("a loop device that is free: %v", err)
	}
	h.fail = nil
	if _, err := plan.Kernel(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "lvm-thin: ") { // the link is there
		t.Error(err)
	}
}

func TestLVMThinSaysWhyItCannotRun(t *testing.T) {
	none := errors.New("modprobe: no such module")
	for _, c := range []struct {
		name   string
		change func(h *labHost)
		want   string // empty: it can
	}{
		{"module loaded", func(h *labHost) {}, ""},
		{"module to be loaded", func(h *labHost) { h.write("proc/devices", "  7 loop\n") }, ""},
		{"built in", func(h *labHost) { h.fail["modprobe"] = none }, ""},
		{"no device mapper", func(h *labHost) { h.write("proc/devices", "  7 loop\n"); h.fail["modprobe"] = none }, "no device mapper"},
		{"no /proc", func(h *labHost) { h.remove("proc/devices") }, "cannot be read"},
		{"not root", func(h *labHost) { h.uid = 1000 }, "run it with sudo"},
		{"a container", func(h *labHost) { h.write("proc/2/comm", "sleep\n") }, "outside of a container"},
		{"targets unread", func(h *labHost) { h.fail["modprobe"] = none; h.fail["dmsetup targets"] = none }, "targets cannot be read"},
		{"no loop", func(h *labHost) {
			h.fail["losetup"] = errors.New("losetup: cannot find an unused loop device: No such device")
		}, "no loop device is free; load the module loop"},
		{"loop broken", func(h *labHost) { h.fail["losetup"] = errors.New("losetup: Permission denied") }, "Permission denied"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newLabHost(t)
			c.change(h)
			err := Available(lvmThin{on: h.machine})
			if (err == nil) != (c.want == "") || err != nil && (!strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "lvm-thin: ")) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if slices.ContainsFunc(h.calls, func(call string) bool { return strings.HasPrefix(call, "modprobe --quiet") }) {
				t.Error("a question loaded a module")
			}
		})
	}
	h := newLabHost(t)
	h.fail["modprobe"] = none
	h.machine.order = func(ctx context.Context, argv []string) ([]byte, error) {
		if argv[0] == "dmsetup" {
			return []byte("linear           v1.5.0\n"), nil
		}
		return h.obey(ctx, argv)
	}
	if err := Available(lvmThin{on: h.machine}); err == nil || !strings.Contains(err.Error(), "no thin pools") {
		t.Errorf("%v, want that there are no thin pools", err)
	}
}

func TestPrepareRefusesWhatIsMissing(t *testing.T) {
	s := &Stage{Dir: t.TempDir(), Size: 1 << 20}
	h := newLabHost(t)
	h.uid = 1000
	if err := (lvmThin{on: h.machine}).prepare(t.Context(), s); err == nil || !strings.Contains(err.Error(), "sudo") {
		t.Errorf("as a user: %v", err)
	}
	h = newLabHost(t)
	t.Setenv("PATH", t.TempDir())
	var missing *MissingError
	if err := (lvmThin{on: h.machine}).prepare(t.Context(), s); !errors.As(err, &missing) || missing.Error() != "thin_check is not installed; apt install lvm2 thin-provisioning-tools" {
		t.Errorf("without its tools: %v", err)
	}
	if err := lookProgram(lvmThin{}.Program()); err == nil || err.Error() != "lvm is not installed; apt install lvm2 thin-provisioning-tools" {
		t.Errorf("without LVM: %v", err)
	}
	h = newLabHost(t)
	h.fail["modprobe --quiet"] = errors.New("module is not signed")
	h.fail["dmsetup targets"] = errors.New("no such device")
	if err := (lvmThin{on: h.machine}).prepare(t.Context(), s); err == nil || !strings.Contains(err.Error(), "targets cannot be read") {
		t.Errorf("with a module that cannot be loaded: %v", err)
	}
	s.Dir = filepath.Join(s.Dir, "nowhere")
	if err := (lvmThin{on: newLabHost(t).machine}).prepare(t.Context(), s); err == nil {
		t.Error("prepared nowhere")
	}
}

func TestWhatKilledRunsLeftIsRemoved(t *testing.T) {
	h := newLabHost(t)
	dead, alive, elsewhere := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "gone")
	lock, err := lockFolder(alive)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }() // nothing was written
	for loop, file := range map[string]string{
		"loop1": filepath.Join(dead, lvmFile), "loop2": filepath.Join(alive, lvmFile), "loop3": filepath.Join(elsewhere, lvmFile),
		"loop4": "/var/tmp/x/" + lvmFile + deletedMark, "loop5": "/var/lib/image.img", "loop6": filepath.Join(dead, "other.img"),
	} {
		h.write("sys/block/"+loop+"/loop/backing_file", file+"\n")
	}
	h.folder("sys/block/loop0") // not attached
	for i, loop := range []string{"loop1", "loop2", "loop5"} {
		group := fmt.Sprintf("%s%08d", lvmGroup, i)
		if loop == "loop5" {
			group = "vg0"
		}
		h.lie(fmt.Sprint(3*i), group+"-pool_tdata", loop)
		h.lie(fmt.Sprint(3*i+1), group+"-pool_tmeta", loop)
		h.lie(fmt.Sprint(3*i+2), group+"-data", fmt.Sprintf("dm-%d", 3*i))
	}
	h.folder("sys/block/loop1/holders/nvme0") // something that is no device mapper's
	h.stays = true
	var said []string
	say := func(format string, arguments ...any) { said = append(said, fmt.Sprintf(format, arguments...)) }
	if err := h.sweep(t.Context(), say); err != nil {
		t.Fatal(err)
	}
	if left := h.left(); left != "dm-3 dm-4 dm-5 dm-6 dm-7 dm-8 loop2 loop3 loop5 loop6" {
		t.Errorf("left: %s", left)
	}
	text := strings.Join(said, "\n")
	for _, want := range []string{
		"removed what a run that was killed left: /dev/loop1 and ashlar_bench_00000000; its files are in " + dead + " still",
		"/dev/loop3 may be left of a run that was killed", "losetup --detach /dev/loop3",
		"removed what a run that was killed left: /dev/loop4",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q goes unsaid in\n%s", want, text)
		}
	}
	if len(said) != 3 {
		t.Errorf("said:\n%s", text)
	}

	// What cannot be removed ends it.
	h.write("sys/block/loop4/loop/backing_file", "/x/"+lvmFile+deletedMark)
	h.fail["losetup --detach"] = errors.New("no permission")
	if err := h.sweep(t.Context(), say); err == nil || !strings.Contains(err.Error(), "left /dev/loop4") {
		t.Errorf("%v, want the device named", err)
	}
	if err := (lvmThin{on: h.machine}).prepare(t.Context(), &Stage{Dir: t.TempDir(), Size: 1 << 20}); err == nil || !strings.Contains(err.Error(), "lvm-thin: ") {
		t.Errorf("prepared all the same: %v", err)
	}
	h.lie("9", lvmGroup+"99-data", "loop4")
	h.fail["dmsetup remove"] = errors.New("busy")
	if err := h.sweep(t.Context(), say); err == nil || !strings.Contains(err.Error(), lvmGroup+"99-data") {
		t.Errorf("%v, want the volume named", err)
	}
}

// blockDevice is the name of a block device of this host; nothing is done to it.
func blockDevice(t *testing.T) string {
	t.Helper()
	found, err := filepath.Glob("/sys/block/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range found {
		device := "/dev/" + filepath.Base(path)
		if info, err := os.Stat(device); err == nil && info.Mode()&os.ModeDevice != 0 {
			return device
		}
	}
	t.Skip("this host shows no block device")
	return ""
}

func TestABlockDeviceTakesThePlaceOfTheFile(t *testing.T) {
	device := blockDevice(t)
	h := newLabHost(t)
	l, s := lvmThin{on: h.machine}, &Stage{Dir: t.TempDir(), Size: 1 << 20, LVMDevice: device}
	if err := l.prepare(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	v, err := l.start(t.Context(), s.site(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Stop(); err != nil {
		t.Error(err)
	}
	text := strings.Join(h.calls, "\n")
	if strings.Contains(text, "losetup --find --show") || strings.Contains(text, "--detach") || !strings.Contains(text, "lvm pvcreate --devices "+device+" --yes "+device) {
		t.Error(text)
	}
	// The same again: it is in use, says the group on it.
	again := &Stage{Dir: t.TempDir(), Size: 1 << 20, LVMDevice: device}
	if err := l.prepare(t.Context(), again); err == nil || !strings.Contains(err.Error(), "vgremove --yes "+h.group+" && pvremove "+device) {
		t.Errorf("%v, want what to do", err)
	}
	if err := l.giveBack(t.Context(), again); err != nil || h.group == "" {
		t.Errorf("gave back what was not taken: %v", err)
	}
	h.fail["lvm pvremove"] = errors.New("no permission")
	if err := l.giveBack(t.Context(), s); err == nil || !strings.Contains(err.Error(), device+" keeps the volume group") {
		t.Errorf("%v, want what is left", err)
	}
	if err := l.giveBack(t.Context(), s); err != nil { // the group is gone
		t.Error(err)
	}
	for device, want := range map[string]string{s.Dir: "is not a block device", "/dev/null": "is not a block device", filepath.Join(s.Dir, "x"): "no such file"} {
		err := l.prepare(t.Context(), &Stage{Dir: t.TempDir(), Size: 1 << 20, LVMDevice: device})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", device, err, want)
		}
	}
	if err := l.giveBack(t.Context(), &Stage{Dir: s.Dir}); err != nil {
		t.Error(err)
	}
}

func TestDeviceMapperIsFoundInProcDevices(t *testing.T) {
	const without = "Character devices:\n  1 mem\n\nBlock devices:\n  7 loop\n254 virtblk\n"
	if hasDeviceMapper(without) || !hasDeviceMapper(without+"253 device-mapper\n") {
		t.Error("/proc/devices misread")
	}
	found, err := FindPeers("lvm-thin", "raw")
	if err != nil {
		t.Fatal(err)
	}
	if _, isKernels := found[0].(lvmThin); !isKernels {
		t.Errorf("%T", found[0])
	}
	if err := Available(found[1]); err != nil {
		t.Errorf("raw: %v", err)
	}
}
