package csi

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// want fails t unless err has a code, and a text in it.
func want(t *testing.T, what string, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), text) {
		t.Errorf("%s: %v; want %v with %q", what, err, code, text)
	}
}

// sizeAt is how large a filesystem or device is for whoever uses it.
func sizeAt(t *testing.T, v *volume) uint64 {
	t.Helper()
	if v.capability.GetBlock() != nil {
		f, err := os.Open(v.target)
		must(t, err)
		defer f.Close() // read-only
		end, err := f.Seek(0, io.SeekEnd)
		must(t, err)
		return uint64(end)
	}
	var s syscall.Statfs_t
	must(t, syscall.Statfs(v.target, &s))
	return s.Blocks * uint64(s.Bsize)
}

// mayGrowExt4 says whether this process, and so the driver, has CAP_SYS_RESOURCE,
// without which a mounted ext4 does not grow.
func mayGrowExt4(t *testing.T) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	must(t, err)
	_, line, _ := strings.Cut(string(text), "CapEff:")
	capabilities, err := strconv.ParseUint(strings.Fields(line)[0], 16, 64)
	must(t, err)
	return capabilities&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// TestLifeOfAVolume goes the whole way, twice each call, for each kind of volume:
// made, written, grown while it is mounted, snapshotted, restored and cloned beside
// its source, deleted.
func TestLifeOfAVolume(t *testing.T) {
	w := newWorld(t, "20GiB")
	for _, c := range []struct {
		name       string
		capability *spec.VolumeCapability
	}{{"ext4", mountCapability("ext4")}, {"xfs", mountCapability("xfs")}, {"block", blockCapability()}} {
		t.Run(c.name, func(t *testing.T) {
			w.t = t
			const size, written = 512 * mib, 3*mib + 17
			v := w.volume("life-"+c.name, c.capability)
			if c.name == "ext4" {
				v.parameters = map[string]string{"mkfsOptions": "-L labelled"}
			}
			must(t, v.use(size, nil), v.use(size, nil))
			must(t, v.write("one", written), v.read("one", written))
			before := sizeAt(t, v)
			if err := v.expand(2 * size); c.name == "ext4" && !mayGrowExt4(t) {
				want(t, "a mounted ext4", err, codes.FailedPrecondition, "CAP_SYS_RESOURCE")
				must(t, v.release(), v.stage(), v.publish(v.target, false))
			} else {
				must(t, err, v.expand(2*size))
			}
			if after := sizeAt(t, v); after < before*3/2 {
				t.Errorf("%d bytes became %d", before, after)
			}
			stats, err := w.NodeGetVolumeStats(t.Context(), &spec.NodeGetVolumeStatsRequest{VolumeId: v.id, VolumePath: v.target, StagingTargetPath: v.staging})
			must(t, err)
			if u := stats.GetUsage()[0]; u.GetTotal() < size || c.capability.GetMount() != nil && (u.GetUsed() < written || u.GetAvailable() <= 0) {
				t.Errorf("stats %v", stats)
			}
			s, err := v.snapshot("snap-" + c.name)
			must(t, err)
			must(t, v.write("two", written))

			restored := w.volume("restored-"+c.name, c.capability)
			must(t, restored.use(3*size, fromSnapshot(s.GetSnapshotId())), restored.read("one", written))
			if got := sizeAt(t, restored); got < 3*size*8/10 {
				t.Errorf("what is restored into a larger volume has %d bytes", got)
			}
			clone := w.volume("clone-"+c.name, c.capability)
			must(t, clone.use(2*size, fromVolume(v.id)), clone.read("two", written))
			must(t, clone.write("three", written), v.read("two", written), restored.read("one", written))
			if c.name == "ext4" {
				if out := w.tool("findmnt", "--noheadings", "--output", "LABEL", v.target); !strings.Contains(out, "labelled") {
					t.Errorf("mkfsOptions made %q", out)
				}
			}

			want(t, "delete of a volume in use", v.delete(), codes.FailedPrecondition, "in use")
			want(t, "unstage of what is published", v.unstage(), codes.FailedPrecondition, v.target)
			must(t, clone.drop(), restored.drop())
			want(t, "delete of a volume with a snapshot", func() error {
				must(t, v.release(), v.release())
				return v.delete()
			}(), codes.FailedPrecondition, "has snapshots")
			must(t, w.deleteSnapshot(s.GetSnapshotId()), w.deleteSnapshot(s.GetSnapshotId()), v.delete(), v.delete())
			_, err = v.snapshot("late")
			want(t, "snapshot of a deleted volume", err, codes.NotFound, "not found")
			want(t, "stage of a deleted volume", v.stage(), codes.NotFound, "not found")
		})
	}
	w.t = t
}

// TestCopiesOutliveTheirSource deletes what a volume was copied from.
func TestCopiesOutliveTheirSource(t *testing.T) {
	w := newWorld(t, "4GiB")
	v := w.volume("source", mountCapability("ext4"))
	must(t, v.use(64*mib, nil), v.write("x", mib))
	s, err := v.snapshot("s")
	must(t, err)
	a, b := w.volume("of-snapshot", mountCapability("ext4")), w.volume("of-volume", mountCapability("ext4"))
	must(t, a.create(64*mib, fromSnapshot(s.GetSnapshotId())), b.create(64*mib, fromVolume(v.id)))
	must(t, w.deleteSnapshot(s.GetSnapshotId()), v.drop())
	for _, c := range []*volume{a, b} {
		must(t, c.stage(), c.publish(c.target, false), c.read("x", mib), c.drop())
	}
}

func TestReadOnlyAndSingleWriters(t *testing.T) {
	w := newWorld(t, "4GiB")
	v := w.volume("v", mountCapability("ext4"))
	must(t, v.use(64*mib, nil), v.write("x", mib))
	second := v.target + "-2"
	must(t, v.publish(second, true), v.publish(second, true))
	if err := os.WriteFile(filepath.Join(second, "y"), nil, 0o600); err == nil {
		t.Error("a read-only mount is written to")
	}
	want(t, "the same target, writable", v.publish(second, false), codes.AlreadyExists, "readonly=true")
	v.capability.AccessMode.Mode = spec.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	want(t, "a second path of a single writer", v.publish(v.target+"-3", false), codes.FailedPrecondition, "single writer")
	v.capability.AccessMode.Mode = spec.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
	must(t, v.publish(v.target+"-3", false), v.unpublish(v.target+"-3"), v.unpublish(second), v.release())

	v.capability.AccessMode.Mode = spec.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
	must(t, v.stage(), v.publish(v.target, false), v.read("x", mib))
	if err := v.write("y", mib); err == nil {
		t.Error("a volume with a reader only is written to")
	}
	v.capability.AccessMode.Mode = spec.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	want(t, "staged for a reader only", v.stage(), codes.AlreadyExists, "other options")
	want(t, "published where something else is", func() error {
		must(t, v.unpublish(v.target), os.MkdirAll(v.target, 0o755), syscall.Mount("tmpfs", v.target, "tmpfs", 0, ""))
		defer func() { must(t, syscall.Unmount(v.target, 0)) }()
		return v.publish(v.target, true)
	}(), codes.AlreadyExists, "something else")
	must(t, v.unpublish(v.target))
	want(t, "not staged there", func() error {
		other := *v
		other.staging += "-other"
		return other.publish(v.target, false)
	}(), codes.FailedPrecondition, "stage it first")
	must(t, v.drop())
}

// TestWrongInputOnTheNode is what issue lists call bad input, on a real pool.
func TestWrongInputOnTheNode(t *testing.T) {
	w := newWorld(t, "1GiB")
	v := w.volume("v", mountCapability("ext4"))
	must(t, v.create(512*mib, nil))
	for _, tt := range []struct {
		name   string
		change func(*spec.NodeStageVolumeRequest)
		code   codes.Code
		text   string
	}{
		{"another node's", func(q *spec.NodeStageVolumeRequest) { q.VolumeId = "v1/node-2/default/v" }, codes.FailedPrecondition, "node-2"},
		{"no volume", func(q *spec.NodeStageVolumeRequest) { q.VolumeId = "v1/node-1/default/w" }, codes.NotFound, "not found"},
		{"nonsense", func(q *spec.NodeStageVolumeRequest) { q.VolumeId = "nonsense" }, codes.NotFound, "nonsense"},
		{"a relative path", func(q *spec.NodeStageVolumeRequest) { q.StagingTargetPath = "x" }, codes.InvalidArgument, "absolute"},
		{"a way that is none", func(q *spec.NodeStageVolumeRequest) { q.VolumeContext = map[string]string{"via": "usb"} }, codes.InvalidArgument, "usb"},
		{"a way that is not here", func(q *spec.NodeStageVolumeRequest) { q.VolumeContext = map[string]string{"via": "ublk"} }, codes.Unimplemented, "ublk"},
		{"a filesystem that is none", func(q *spec.NodeStageVolumeRequest) {
			q.VolumeCapability, q.VolumeContext = mountCapability(""), map[string]string{"fsType": "btrfs"}
		}, codes.InvalidArgument, "ext4 or xfs"},
		{"a wrong mount option", func(q *spec.NodeStageVolumeRequest) {
			q.VolumeCapability = mountCapability("ext4")
			q.VolumeCapability.GetMount().MountFlags = []string{"no-such-option"}
		}, codes.Internal, "ext4"},
		{"encrypted by context alone", func(q *spec.NodeStageVolumeRequest) { q.VolumeContext = map[string]string{"encrypted": "true"} }, codes.FailedPrecondition, "was not made encrypted"},
	} {
		q := &spec.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging, VolumeCapability: v.capability}
		tt.change(q)
		_, err := w.NodeStageVolume(t.Context(), q)
		if tt.name == "a way that is not here" && status.Code(err) == codes.OK { // a host with ublk
			must(t, v.unstage())
			continue
		}
		if tt.name == "a way that is not here" && status.Code(err) == codes.FailedPrecondition {
			tt.code = codes.FailedPrecondition
		}
		want(t, tt.name, err, tt.code, tt.text)
	}
	_, err := w.NodeGetVolumeStats(t.Context(), &spec.NodeGetVolumeStatsRequest{VolumeId: v.id, VolumePath: w.path("nowhere")})
	want(t, "stats of nothing", err, codes.NotFound, "not found")
	_, err = w.NodeGetVolumeStats(t.Context(), &spec.NodeGetVolumeStatsRequest{VolumeId: v.id, VolumePath: w.dir})
	want(t, "stats of a folder", err, codes.NotFound, "no volume is mounted")
	_, err = w.NodeExpandVolume(t.Context(), &spec.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: w.dir})
	want(t, "expand of a folder", err, codes.NotFound, "no volume is mounted")

	// ext4 that is staged as xfs.
	must(t, v.use(512*mib, nil), v.write("x", mib), v.release())
	v.capability = mountCapability("xfs")
	want(t, "ext4 as xfs", v.stage(), codes.FailedPrecondition, "xfs")
	v.capability = mountCapability("ext4")
	must(t, v.stage(), v.publish(v.target, false), v.read("x", mib))

	// A full pool: writes fail, a volume cannot be made thick, and one that is thin
	// cannot get a filesystem. Nothing that was written is lost.
	thick := w.volume("thick", blockCapability())
	thick.parameters = map[string]string{"thick": "true"}
	want(t, "thick, too large", thick.create(4*gib, nil), codes.ResourceExhausted, "available")
	thin := w.volume("thin", mountCapability("ext4"))
	must(t, thin.create(512*mib, nil))
	filler := w.volume("filler", blockCapability())
	must(t, filler.use(4*gib, nil))
	fill(t, filler.target)
	want(t, "stage onto a full disk", thin.stage(), codes.ResourceExhausted, "available")
	want(t, "make in a full pool", w.volume("late", blockCapability()).create(gib, nil), codes.ResourceExhausted, "available")
	must(t, v.read("x", mib), filler.drop())
	for deadline := time.Now().Add(startLimit); ; time.Sleep(100 * time.Millisecond) { // freeing goes on after the delete
		if err := thin.stage(); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("there is space again, and the volume cannot be staged: %v", err)
		}
	}
	must(t, thin.publish(thin.target, false), thin.write("y", mib), thin.read("y", mib), thin.drop(), v.drop())
}

// fill writes to a device until it fails.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|syscall.O_DIRECT, 0)
	must(t, err)
	defer f.Close() // what was written is of no value
	b := alignedPattern(mib)
	for offset := int64(0); offset < 4*gib; offset += mib {
		if _, err := f.WriteAt(b, offset); err != nil {
			break
		}
	}
	for offset := int64(0); offset < 4*gib; offset += mib { // what is left in between
		for part := int64(0); part < mib; part += 64 * kib {
			if _, err := f.WriteAt(b[:64*kib], offset+part); err != nil {
				return
			}
		}
	}
	t.Error("a pool of 1 GiB takes 4 GiB")
}

// alignedPattern is a buffer that O_DIRECT takes.
func alignedPattern(size int) []byte {
	b, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		panic(err) // no memory
	}
	copy(b, pattern("fill", size))
	return b
}

func TestDriverIsKilledUnderAWriter(t *testing.T) {
	w := newWorld(t, "4GiB")
	v, b := w.volume("v", mountCapability("ext4")), w.volume("b", blockCapability())
	must(t, v.use(256*mib, nil), b.use(64*mib, nil))
	stop, written := make(chan struct{}), make(chan error, 1)
	var count atomic.Int64
	go func() { // ends with stop
		for i := 0; ; i++ {
			select {
			case <-stop:
				written <- nil
				return
			default:
			}
			if err := v.write(fmt.Sprint(i), mib); err != nil {
				written <- err
				return
			}
			count.Store(int64(i))
		}
	}()
	for range 3 {
		w.killDriver()
		must(t, v.stage(), v.publish(v.target, false), b.stage(), b.publish(b.target, false)) // as it was
		if err := v.expand(256 * mib); err != nil {
			t.Error(err)
		}
	}
	w.killDaemon()
	for at, deadline := count.Load(), time.Now().Add(startLimit); count.Load() < at+3; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nothing is written after the daemon was killed")
		}
	}
	close(stop)
	if err := <-written; err != nil {
		t.Errorf("the writer had an error: %v", err)
	}
	must(t, v.read(fmt.Sprint(count.Load()), mib), v.drop(), b.drop())
}

// TestOrphansAreTakenAway has the kubelet forget what was staged.
func TestOrphansAreTakenAway(t *testing.T) {
	w := newWorld(t, "4GiB")
	lost, block, kept := w.volume("lost", mountCapability("ext4")), w.volume("block", blockCapability()), w.volume("kept", mountCapability("ext4"))
	operators := w.volume("operators", blockCapability())
	must(t, lost.use(64*mib, nil), block.use(64*mib, nil), kept.use(64*mib, nil), operators.create(64*mib, nil))
	w.ashlar(nil, "attach", "operators")
	for _, m := range []string{lost.target, lost.staging, block.target, filepath.Join(block.staging, "device")} {
		must(t, syscall.Unmount(m, 0))
	}
	must(t, os.Remove(filepath.Join(block.staging, "device")), os.Remove(block.target), os.Remove(lost.target))
	w.killDriver()
	attached := func() string {
		var l items[struct{ Volume string }]
		w.ashlar(&l, "devices")
		text := ""
		for _, d := range l.Items {
			text += d.Volume + " "
		}
		return text
	}
	for deadline := time.Now().Add(startLimit); len(strings.Fields(attached())) != 2; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("attached are %s", attached())
		}
	}
	if a := attached(); !strings.Contains(a, "kept") || !strings.Contains(a, "operators") {
		t.Errorf("attached are %s", a)
	}
	must(t, lost.delete(), block.delete(), kept.drop())
	w.ashlar(nil, "detach", "operators")
	must(t, operators.delete())
}

func TestLimitsChange(t *testing.T) {
	w := newWorld(t, "4GiB")
	v := w.volume("v", blockCapability())
	v.parameters = map[string]string{"iopsLimit": "1000"}
	must(t, v.use(64*mib, nil))
	check := func(iops, bandwidth number) {
		t.Helper()
		l := w.volumeItems()[0].Limits
		if l.IOPS != iops || l.Bandwidth != bandwidth {
			t.Errorf("the limits are %+v; want %d and %d", l, iops, bandwidth)
		}
	}
	check(1000, 0)
	modify := func(given map[string]string) {
		t.Helper()
		_, err := w.ControllerModifyVolume(t.Context(), &spec.ControllerModifyVolumeRequest{VolumeId: v.id, MutableParameters: given})
		must(t, err)
	}
	modify(map[string]string{"bandwidthLimit": "4MiB"})
	check(1000, 4*mib)
	began := time.Now()
	must(t, v.write("slow", 16*mib))
	if took := time.Since(began); took < 2*time.Second { // 4 s less what a burst may be
		t.Errorf("16 MiB at 4 MiB/s took %v", took)
	}
	modify(map[string]string{"iopsLimit": "0", "bandwidthLimit": "0"})
	check(0, 0)
	must(t, v.drop())
}
