package harness

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// guestStage is a Stage with LVM's part of it, on a host whose kernel has a device
// mapper: one that test/vm/lvm.sh emulates.
func guestStage(t *testing.T) (lvmThin, *Stage) {
	t.Helper()
	if !slices.Contains(strings.Fields(os.Getenv(testenv.TargetVariable)), "test-vm") {
		t.Skip("needs a kernel with dm-thin-pool, which makes it a guest's (make test-vm does not skip it)")
	}
	testenv.RequireRoot(t)
	found, err := FindPeers("lvm-thin")
	if err != nil {
		t.Fatal(err)
	}
	if err := Available(found[0]); err != nil {
		t.Fatal(err)
	}
	s := &Stage{Dir: filepath.Join(t.TempDir(), "s"), Size: SizeMin, Settle: time.Millisecond}
	if err := s.Prepare(t.Context(), found); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Remove(); err != nil {
			t.Error(err)
		}
	})
	nothingLeft(t)
	return found[0].(lvmThin), s
}

// nothingLeft wants no device of a benchmark to be there.
func nothingLeft(t *testing.T) {
	t.Helper()
	var all []string
	for _, pattern := range []string{"/sys/block/dm-*", "/sys/block/loop*/loop", "/dev/" + lvmGroup + "*", "/etc/lvm/backup/*", "/etc/lvm/archive/*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	if len(all) > 0 {
		t.Errorf("left behind: %v", all)
	}
}

func TestGuestThinVolumes(t *testing.T) {
	l, s := guestStage(t) // one for all: it takes a while
	for _, c := range []struct {
		name string
		test func(*testing.T, lvmThin, *Stage)
	}{
		{"are what is documented", documentedOptions}, {"keep their data", keptData}, {"are measured", measuredVolumes},
		{"do not outlive an interrupted run", interruptedRun}, {"in use are named, and removed later", volumeInUse},
		{"need a loop device", noLoopDevice},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.test(t, l, s)
			nothingLeft(t)
		})
	}
}

func documentedOptions(t *testing.T, l lvmThin, s *Stage) {
	v, err := l.start(t.Context(), s.site(t, VolumeMapped))
	if err != nil {
		t.Fatal(err)
	}
	about, err := thisMachine.lvm(t.Context(), v.device, "lvs", "--noheadings", "--separator", " ", "--units", "k", "--options", "lv_name,chunk_size,zero,discards,lv_when_full", v.group+"/"+lvmPool)
	if err != nil || about != "pool 128.00k  nopassdown error" {
		t.Errorf("%q, %v", about, err)
	}
	mapped, err := thisMachine.lvm(t.Context(), v.device, "lvs", "--noheadings", "--options", "data_percent", v.group+"/"+mappedVolume)
	if err != nil || mapped != "100.00" {
		t.Errorf("%q %% are mapped, %v", mapped, err)
	}
	if err := v.Stop(); err != nil {
		t.Error(err)
	}
}

// what a run writes, the next one finds.
func keptData(t *testing.T, l lvmThin, s *Stage) {
	want := randomChunk()
	for _, write := range []bool{true, false} {
		site := s.site(t, VolumeMapped)
		v, err := l.start(t.Context(), site)
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(filepath.Join(site.Dir, "volume"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if write {
			_, err = f.WriteAt(want, 4096)
		} else if _, err = f.ReadAt(got, 4096); err == nil && !bytes.Equal(got, want) {
			t.Error("the data is another")
		}
		if err := errors.Join(err, f.Close(), v.Stop()); err != nil {
			t.Fatal(err)
		}
	}
}

// end to end: each state of the volume, under fio, its CPU and its bytes counted.
func measuredVolumes(t *testing.T, l lvmThin, s *Stage) {
	profile, err := LoadProfile("bars")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		volume Volume
	}{
		{"pool-randread-4k-qd32", VolumeMapped}, {"pool-write-128k-qd16", VolumeMapped}, {"pool-first-randwrite-4k-qd32", VolumeFresh},
		{"pool-snapshot-randwrite-4k-qd32", VolumeFilled},
		{"pool-bytes-write-128k-thin", VolumeFresh}, {"pool-bytes-randwrite-4k-thin", VolumeFresh}, {"pool-bytes-randwrite-4k", VolumeMapped},
	} {
		counts := strings.Contains(c.name, "bytes")
		r, err := Run(t.Context(), Config{
			Profile: profile, Only: []string{c.name}, Backing: s.Backing(), Peers: []Peer{l}, Client: fio{},
			Rounds: 1, Runtime: time.Second, Volume: c.volume, CountBytes: counts,
		})
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		run := r.Runs[0]
		t.Logf("%s: %.0f IOPS, %.2f s of the kernel's threads, %d bytes given for %d", c.name, run.IOPS, run.ServerCPUSeconds, run.ServerBytesWritten, run.BytesWritten)
		if run.IOPS == 0 || run.LatencyP999 == 0 || !run.ServerSampled || run.ServerCPUPerMillion == 0 || !run.ClientSampled {
			t.Errorf("%s: %+v", c.name, run)
		}
		// Its data, its metadata, and no chunk zeroed: 4k in each 128 KiB would be 33 times as much.
		if counts && (run.ServerBytesWritten < run.BytesWritten || run.ServerBytesWritten > 3*run.BytesWritten || run.DiskBytesWritten < run.BytesWritten) {
			t.Errorf("%s: %d bytes, to the device %d, to the disk %d", c.name, run.BytesWritten, run.ServerBytesWritten, run.DiskBytesWritten)
		}
		if !strings.Contains(r.Peers[0].Version, "LVM version") {
			t.Errorf("version %q", r.Peers[0].Version)
		}
		nothingLeft(t)
	}
}

func interruptedRun(t *testing.T, l lvmThin, s *Stage) {
	profile, err := LoadProfile("bars")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { // ends with ctx: it waits for the volume, and a little of the load
		for ctx.Err() == nil {
			if found, err := filepath.Glob("/sys/block/dm-*"); err != nil || len(found) > 0 {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(time.Second)
		cancel()
	}()
	_, err = Run(ctx, Config{
		Profile: profile, Only: []string{"pool-snapshot-randwrite-4k-qd32"}, Backing: s.Backing(), Peers: []Peer{l}, Client: fio{},
		Rounds: 1, Runtime: time.Minute, Volume: VolumeFresh,
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want that it was interrupted", err)
	}
}

// a device that somebody has open cannot go: it is named, and goes with the next run.
func volumeInUse(t *testing.T, l lvmThin, s *Stage) {
	site := s.site(t, VolumeMapped)
	v, err := l.start(t.Context(), site)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(site.Dir, "volume"))
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Stop(); err == nil || !strings.Contains(err.Error(), v.group+"-data") || !strings.Contains(err.Error(), v.device) {
		t.Errorf("%v, want what is left", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	var said []string
	if err := thisMachine.sweep(t.Context(), func(format string, _ ...any) { said = append(said, format) }); err != nil || len(said) != 1 {
		t.Errorf("%v, said %q", err, said)
	}
}

// all loop devices in use: the error says what to do.
func noLoopDevice(t *testing.T, l lvmThin, _ *Stage) {
	if err := os.Rename("/dev/loop-control", "/dev/loop-control.away"); err != nil {
		t.Fatal(err)
	}
	found, err := filepath.Glob("/dev/loop[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range found {
		if err := os.Rename(path, path+".away"); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, path := range append(found, "/dev/loop-control") {
			if err := os.Rename(path+".away", path); err != nil {
				t.Error(err)
			}
		}
	})
	if err := Available(l); err == nil || !strings.Contains(err.Error(), "no loop device is free") {
		t.Errorf("%v", err)
	}
}

// a kernel without thin pools, or without a device mapper, says so.
func TestGuestThinVolumesNeedAModule(t *testing.T) {
	if !slices.Contains(strings.Fields(os.Getenv(testenv.TargetVariable)), "test-vm") {
		t.Skip("needs a kernel whose modules can be hidden, which makes it a guest's (make test-vm does not skip it)")
	}
	if out, err := exec.Command("modprobe", "-r", "dm_thin_pool").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	link := "/lib/modules"
	if err := os.Rename(link, link+".away"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Rename(link+".away", link); err != nil {
			t.Error(err)
		}
	})
	l := lvmThin{on: thisMachine}
	if err := Available(l); err == nil || !strings.Contains(err.Error(), "no thin pools") {
		t.Errorf("%v, want that there are no thin pools", err)
	}
}
