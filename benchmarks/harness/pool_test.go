package harness

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func joined(commands [][]string) string {
	lines := make([]string, len(commands))
	for i, argv := range commands {
		lines[i] = strings.Join(argv, " ")
	}
	return strings.Join(lines, "; ")
}

func TestStagedPeersServeTheVolumeOfTheBar(t *testing.T) {
	const (
		serve = "/b/ashlar serve --data-dir /d/node --socket /t/r-1/c --nbd-socket /t/r-1/s --pid-file /t/r-1/pid --log-level warn"
		make1 = "/b/ashlar volume create run-r-1 --size 1024 --server unix:///t/r-1/c"
		drop  = "/b/ashlar volume delete run-r-1 --snapshots --yes --wait --server unix:///t/r-1/c"
	)
	fill := func(export, percent string) string {
		return "fio --name=fill --thread --ioengine=nbd --uri=nbd+unix:///" + export + "?socket=/t/r-1/s --rw=write --bs=128k --iodepth=16 --size=" +
			percent + "% --end_fsync=1 --output-format=terse"
	}
	qemu := "qemu-nbd -k /t/r-1/s -t -e 16 -f qcow2 --cache=none --aio=native /d/"
	cow := "env TMPDIR=/d nbdkit -f -U /t/r-1/s --threads 16 --filter=cow file /d/export.img cache=none"
	for _, c := range []struct {
		peer                               string
		volume                             Volume
		writes                             bool
		argv, before, setup, after, target string
	}{
		{"pool", VolumeMapped, true, serve, "", "", "", "data"},
		{"pool-chain", VolumeMapped, false, serve, "", "", "", "chain"},
		{"pool", VolumeFresh, true, serve, "", make1, drop, "run-r-1"},
		{"pool-snapshots", VolumeFilled, true, serve, "", make1 + "; " + fill("run-r-1", "25"), drop, "run-r-1"},
		{"export", VolumeFresh, true, "/b/ashlar export --socket /t/r-1/s --pid-file /t/r-1/pid /d/export.img", "", "", "", ""},
		{"qcow2-prealloc", VolumeMapped, true, qemu + "qcow2-prealloc.img", "", "", "", ""},
		{"qcow2-prealloc", VolumeFresh, true, qemu + "qcow2-prealloc-run.img",
			"qemu-img create -q -f qcow2 -o preallocation=metadata /d/qcow2-prealloc-run.img 1024", "", "rm -f /d/qcow2-prealloc-run.img", ""},
		{"qcow2-thin", VolumeFilled, true, qemu + "qcow2-thin-run.img",
			"qemu-img create -q -f qcow2 /d/qcow2-thin-run.img 1024", fill("", "25"), "rm -f /d/qcow2-thin-run.img", ""},
		{"nbdkit-cow", VolumeMapped, false, cow, "", "", "", ""},
		{"nbdkit-cow", VolumeMapped, true, cow, "", fill("", "100"), "", ""},
		{"nbdkit-cow", VolumeFresh, true, cow, "", "", "", ""},
	} {
		found, err := FindPeers(c.peer)
		if err != nil {
			t.Fatal(err)
		}
		plan, err := found[0].Plan(Site{
			Dir: "/t/r-1", Ashlar: "/b/ashlar", Backing: Backing{Kind: BackingPool, Path: "/d", Size: 1024}, Volume: c.volume, Writes: c.writes,
		})
		if err != nil {
			t.Errorf("%s, %s: %v", c.peer, c.volume, err)
			continue
		}
		for _, x := range []struct{ have, want string }{
			{strings.Join(plan.Argv, " "), c.argv}, {joined(plan.Before), c.before}, {joined(plan.Setup), c.setup},
			{joined(plan.After), c.after}, {plan.Target.URI, "nbd+unix:///" + c.target + "?socket=/t/r-1/s"},
		} {
			if x.have != x.want {
				t.Errorf("%s, volume %q:\n%s\nwant\n%s", c.peer, c.volume, x.have, x.want)
			}
		}
		if (plan.During != nil) != (c.peer == "pool-snapshots") {
			t.Errorf("%s: takes snapshots: %v", c.peer, plan.During != nil)
		}
	}
}

func TestStagedPeersRefuseWhatTheyCannotServe(t *testing.T) {
	for _, name := range []string{"pool", "export", "qcow2-thin", "nbdkit-cow", "lvm-thin"} {
		found, err := FindPeers(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := found[0].Plan(Site{Dir: "/t", Ashlar: "/a", Backing: Backing{Kind: BackingFile, Path: "/f"}}); err == nil {
			t.Errorf("%s serves a file", name)
		}
		for _, shown := range PeerNames() {
			if shown == name {
				t.Errorf("%s is offered to those who have no Stage", name)
			}
		}
	}
	stage := Backing{Kind: BackingPool, Path: "/d", Size: 1024}
	if _, err := (poolVolume{name: "p"}).Plan(Site{Dir: "/t", Backing: stage}); err == nil {
		t.Error("a pool without a binary")
	}
	if _, err := (poolVolume{name: "p", snapshots: true}).Plan(Site{Dir: "/t", Ashlar: "/a", Backing: stage}); err == nil {
		t.Error("snapshots of the volume that all runs share")
	}
}

func TestTheDiskUnderAPathIsFound(t *testing.T) {
	const mounts = "22 27 0:21 / /proc rw - proc proc rw\n27 1 254:0 / / rw - ext4 /dev/vda rw\n30 27 254:16 / /var/tmp rw - ext4 /dev/vdb rw\n" +
		"31 27 254:32 / /my\\040disk rw - ext4 /dev/vdc rw\nshort line\n"
	for path, want := range map[string]string{
		"/home/x": "254:0", "/var/tmp": "254:16", "/var/tmp/a/b": "254:16", "/var/tmpx": "254:0", "/my disk/f": "254:32", "/proc/1": "0:21",
	} {
		if got, ok := deviceOf(mounts, path); !ok || got != want {
			t.Errorf("%s: %s, %v, want %s", path, got, ok, want)
		}
	}
	if _, ok := deviceOf("", "/x"); ok {
		t.Error("found a device where nothing is mounted")
	}
	if got := sectorsWritten(" 100 1 2000 5 300 2 4096 9 0 1 2 0 0 0 0\n"); got != 4096*512 {
		t.Errorf("%d bytes, want 4096 sectors", got)
	}
	if sectorsWritten("1 2") != 0 || processWritten(0) != 0 {
		t.Error("numbers out of nothing")
	}
}

func TestNobodyToControl(t *testing.T) {
	if _, err := dialNode(t.Context(), filepath.Join(t.TempDir(), "nobody")); err == nil {
		t.Error("connected to nobody")
	}
}

// serveOneBlock is a server that answers one read of an export with a status.
func serveOneBlock(c io.ReadWriter, export string, status uint32) error {
	hello := append([]byte("NBDMAGICIHAVEOPT"), 0, 3)
	if _, err := c.Write(hello); err != nil {
		return err
	}
	option := make([]byte, 4+16+len(export))
	if _, err := io.ReadFull(c, option); err != nil {
		return err
	}
	if string(option[20:]) != export {
		return errors.New("asked for " + string(option[20:]))
	}
	if _, err := c.Write(make([]byte, 10)); err != nil {
		return err
	}
	var request [28]byte
	if _, err := io.ReadFull(c, request[:]); err != nil {
		return err
	}
	reply := make([]byte, 16+4096)
	binary.BigEndian.PutUint32(reply, 0x67446698)
	binary.BigEndian.PutUint32(reply[4:], status)
	_, err := c.Write(reply)
	return err
}

func TestTheFirstBlockIsReallyRead(t *testing.T) {
	for _, status := range []uint32{0, 5} {
		client, server := net.Pipe()
		served := make(chan error, 1)
		go func() { served <- serveOneBlock(server, "vol", status) }() // ends with the reply
		if err := readFirstBlock(client, "vol"); (err != nil) != (status != 0) {
			t.Errorf("status %d: %v", status, err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
		_, _ = client.Close(), server.Close() // pipes in memory
	}
	client, server := net.Pipe()
	go func() { _, _ = server.Write(make([]byte, 18)); _ = server.Close() }() // ends with the write
	if err := readFirstBlock(client, ""); err == nil {
		t.Error("took 18 zeros for a greeting")
	}
	if err := firstBlock(filepath.Join(t.TempDir(), "nobody"), ""); err == nil {
		t.Error("read from nobody")
	}
}

func TestAllocatedBytesAreRead(t *testing.T) {
	if n, err := allocatedBytes([]byte(`{"name": "d", "allocated_bytes": 131072}`)); err != nil || n != 131072 {
		t.Error(n, err)
	}
	for _, text := range []string{"", "{}", `{"allocated_bytes": "x"}`} {
		if n, err := allocatedBytes([]byte(text)); err == nil {
			t.Errorf("%q: %d", text, n)
		}
	}
}

func TestWhatIsDoneMeanwhileEndsWithTheClient(t *testing.T) {
	m := startMeanwhile(t.Context(), func(ctx context.Context) ([]time.Duration, error) {
		<-ctx.Done()
		return []time.Duration{time.Millisecond, 3 * time.Millisecond, 2 * time.Millisecond}, nil
	})
	for range 2 {
		calls, err := m.Stop()
		if err != nil || len(calls) != 3 {
			t.Fatal(calls, err)
		}
	}
	var run RunResult
	calls, _ := m.Stop()
	run.addCalls(calls)
	if run.Calls != 3 || run.CallMedian != 2000 || run.CallMax != 3000 {
		t.Errorf("%+v", run.Metrics)
	}
	if calls, err := startMeanwhile(t.Context(), nil).Stop(); calls != nil || err != nil {
		t.Error(calls, err)
	}
}

func TestALoadThatEndsWithItsWorkIsChargedWhole(t *testing.T) {
	start := time.Unix(1000, 0)
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	s := new(sampler)
	for ms := 0; ms <= 1000; ms += 50 { // busy between 300 and 700 ms, for 0.4 s
		s.samples = append(s.samples, sample{at: at(ms), seconds: min(max(float64(ms)/1000-0.3, 0), 0.4)})
	}
	run := RunResult{Metrics: Metrics{IOs: 1000, Seconds: 0.5, IOPS: 2000}}
	run.addCPU(s, new(sampler), Measured{From: at(0), To: at(1000), Whole: true})
	if magnitude(run.ServerCPUSeconds-0.4) > 1e-9 || magnitude(run.ServerCPUPerMillion-400) > 1e-6 || magnitude(run.IOPSPerServerCPU-2500) > 1e-6 {
		t.Errorf("%+v, want 0.4 s for 1000 I/Os", run.Metrics)
	}
}

func TestDifferencesAndBytesPerByte(t *testing.T) {
	r := &Result{Peers: []PeerInfo{{Name: "a"}, {Name: "b"}}}
	for round, values := range [][2]float64{{10, 1}, {20, 2}, {40, 30}} {
		for i, peer := range []string{"a", "b"} {
			r.Runs = append(r.Runs, RunResult{Case: "c", Peer: peer, Round: round, Metrics: Metrics{
				LatencyMax: values[i], BytesWritten: 1 << 20, ServerBytesWritten: 3 << 19,
			}})
		}
	}
	longest, _ := FindMetric("latency_max_us")
	of, rounds, ok := r.Difference("c", "a", "b", longest)
	if !ok || of != 18 || rounds != 10 {
		t.Errorf("difference %v, of rounds %v, %v; want 18, 10", of, rounds, ok)
	}
	if _, _, ok := r.Difference("c", "a", "nobody", longest); ok {
		t.Error("a difference to nobody")
	}
	perByte, _ := FindMetric("server_bytes_per_byte")
	if s, ok := r.Spread("c", "a", perByte); !ok || s.Median != 1.5 {
		t.Errorf("%+v, %v, want 1.5", s, ok)
	}
	perByte, _ = FindMetric("disk_bytes_per_byte")
	if _, ok := r.Spread("c", "a", perByte); ok {
		t.Error("bytes of a disk nobody counted")
	}
}

func TestAStageIsNewAndWholeOrNotThere(t *testing.T) {
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("needs fio: apt install fio")
	}
	dir := t.TempDir()
	s := &Stage{Dir: dir, Size: SizeMin}
	if err := s.Prepare(t.Context(), nil); err == nil {
		t.Error("took a directory that was there")
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("removed what was not its own: %v", err)
	}
	s = &Stage{Dir: filepath.Join(dir, "s"), Size: SizeMin - 1}
	if err := s.Prepare(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "too small") {
		t.Errorf("%v, want too small", err)
	}
	s.Size = SizeMin
	found, err := FindPeers("pool")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Prepare(t.Context(), found); err == nil { // there is no binary
		t.Error("prepared a pool without a binary")
	}
	if _, err := os.Stat(s.Dir); err == nil {
		t.Error("left a part of a stage")
	}
}

// end to end with a peer that needs no build: prepared, run fresh, counted, removed.
func TestRunOnAStageCountsBytes(t *testing.T) {
	for _, program := range []string{"fio", "qemu-nbd", "qemu-img"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s: apt install fio qemu-utils", program)
		}
	}
	if testing.Short() {
		t.Skip("starts servers; not with -short")
	}
	parent, err := os.MkdirTemp("/var/tmp", "hb-") // O_DIRECT: not tmpfs
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(parent) })
	found, err := FindPeers("qcow2-thin")
	if err != nil {
		t.Fatal(err)
	}
	s := &Stage{Dir: filepath.Join(parent, "s"), Size: SizeMin, Settle: time.Millisecond}
	if err := s.Prepare(t.Context(), found); err != nil {
		t.Fatal(err)
	}
	profile, err := LoadProfile("bars")
	if err != nil {
		t.Fatal(err)
	}
	r, err := Run(t.Context(), Config{
		Profile: profile, Only: []string{"pool-bytes-randwrite-4k-thin"}, Backing: s.Backing(), Peers: found, Client: fio{},
		Rounds: 1, Ramp: -1, Volume: VolumeFresh, CountBytes: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	run := r.Runs[0]
	if run.BytesWritten != run.IOs*4096 || run.IOs < 1500 {
		t.Errorf("%d bytes in %d writes, want 12 %% of %d", run.BytesWritten, run.IOs, SizeMin)
	}
	if run.ServerBytesWritten < run.BytesWritten || run.ServerBytesWritten > 40*run.BytesWritten {
		t.Errorf("the server wrote %d bytes for %d", run.ServerBytesWritten, run.BytesWritten)
	}
	left, err := filepath.Glob(filepath.Join(s.Dir, "*-run.img"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if err := s.Remove(); err != nil {
		t.Error(err)
	}
}
