package pool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// killedPool is a pool whose process was killed with changes in its crash log that no
// flush covers, the log, and the number of its last change.
func killedPool(t testing.TB) (x *patient, log []byte, last uint64) {
	x = newPatient(t, 1)
	x.config.CrashLog = filepath.Join(t.TempDir(), "pending")
	x.open()
	d, err := x.pool.OpenVolume("v")
	if err != nil {
		t.Fatal(err)
	}
	q := x.port(d)
	for i := range 3 { // into the snapshot's clusters, and one block is discarded
		at := i * 3 * clusterSize
		b := bytes.Repeat([]byte{byte(0xa0 + i)}, 2*blockSize)
		x.must(q, datapath.OpWrite, uint64(at), b)
		copy(x.data[at:], b)
		if s, err := q.one(datapath.OpDiscard, 0, uint64(at+clusterSize), nil, blockSize); err != nil || s != datapath.StatusOK {
			t.Fatal(s, err)
		}
		clear(x.data[at+clusterSize:][:blockSize])
	}
	last = x.pool.changes.Load()
	if last == x.pool.settled.Load() {
		t.Fatal("everything is durable")
	}
	if log, err = os.ReadFile(x.config.CrashLog); err != nil {
		t.Fatal(err)
	}
	x.mem[0] = x.mem[0].Clone()
	x.mem[0].CrashKeep() // the process dies, the machine does not
	x.release(d, q)
	x.pool.fail(errKilled)
	if err := x.pool.Close(); err != nil {
		t.Fatal(err)
	}
	return x, log, last
}

// TestCrashLogOfUnknownKindsIsRefused: to leave such a change out would lose what was
// acknowledged, and to guess would do worse. Removing the file is the user's word.
func TestCrashLogOfUnknownKindsIsRefused(t *testing.T) {
	x, log, last := killedPool(t)
	x.disks[0].Device = x.mem[0]
	x.config.Disks = x.disks
	at := pendingHeader + last%pendingSlots*8*pendingWords + 24
	for _, kind := range []uint32{0, pendingFreeze + 1, 1 << 31} {
		b := bytes.Clone(log)
		le.PutUint32(b[at:], kind)
		if err := os.WriteFile(x.config.CrashLog, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := x.tryOpen(); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), x.config.CrashLog) {
			t.Fatalf("kind %d: %v", kind, err)
		}
	}
	if err := os.WriteFile(x.config.CrashLog, log, 0o600); err != nil {
		t.Fatal(err)
	}
	x.open()
	if n := x.reads(); n > 0 {
		t.Errorf("%d blocks cannot be read", n)
	}
	x.close()
}

// FuzzCrashLog opens a pool with a crash log of its last run that was changed: records
// are added, 20 bytes each, and bytes of the file replaced, 4 bytes of input each. Nothing
// in the log has a checksum, so whatever is in it is taken seriously: the pool refuses
// it, or is sound, and so for good.
func FuzzCrashLog(f *testing.F) {
	base, log, last := killedPool(f)
	dir := f.TempDir()
	if d, err := os.MkdirTemp("/dev/shm", "ashlar"); err == nil { // the log is 2 MiB, and made thousands of times
		f.Cleanup(func() { _ = os.RemoveAll(d) }) // a directory of the test
		dir = d
	}
	record := func(kind byte, layer, v, cluster, mask uint32, zero byte) []byte {
		b := []byte{kind, zero}
		for _, x := range []uint32{layer, v, cluster, mask} {
			b = le.AppendUint32(b, x)
		}
		return append(b, 0, 0)
	}
	f.Add([]byte{}, []byte{})
	for kind := range byte(6) {
		f.Add(record(kind, 1, 3, 200, 0xff, 0), []byte{})
		f.Add(record(kind, 2, 3, 1, 1, 1), []byte{})
		f.Add(append(record(byte(pendingFreeze), 9, 2, 0, 0, 0), record(kind, 9, 1<<31, 1<<30, wholeMask, 0)...), []byte{})
	}
	f.Add(record(byte(pendingSet), 2, 0, noCluster, 1, 0), []byte{})
	for _, at := range []uint16{0, 33, 50, 96, pendingLSN, pendingHeader, pendingHeader + 24, pendingHeader + 8*pendingWords + 12} {
		f.Add([]byte{}, binary.LittleEndian.AppendUint16(nil, at))
		f.Add([]byte{}, append(binary.LittleEndian.AppendUint16(nil, at), 0xff, 0))
	}
	f.Fuzz(func(t *testing.T, records, bytesOfIt []byte) {
		b := bytes.Clone(log)
		change := last
		for n := 0; len(records) >= 20 && n < 64; records, n = records[20:], n+1 {
			change++
			e := makeEntry(le.Uint32(records[10:])&entryNumber, le.Uint32(records[14:]), records[1]&1 != 0)
			if le.Uint32(records[10:]) == noCluster {
				e = makeEntry(noCluster, le.Uint32(records[14:]), records[1]&1 != 0)
			}
			s := b[pendingHeader+change%pendingSlots*8*pendingWords:]
			le.PutUint64(s, change)
			le.PutUint32(s[8:], le.Uint32(records[2:]))
			le.PutUint32(s[12:], le.Uint32(records[6:]))
			le.PutUint64(s[16:], uint64(e))
			le.PutUint32(s[24:], uint32(records[0]))
		}
		sound := change == last
		for ; len(bytesOfIt) >= 4; bytesOfIt = bytesOfIt[4:] {
			at := le.Uint16(bytesOfIt)
			sound = sound && (at < pendingHeader || b[at] == bytesOfIt[2])
			b[at] = bytesOfIt[2]
		}
		if len(bytesOfIt) >= 2 { // cut short
			b = b[:le.Uint16(bytesOfIt)]
		}
		path := filepath.Join(dir, "pending")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		m := base.mem[0].Clone()
		x := &patient{rig: &rig{TB: t, r: base.r}, mem: []*memdisk.Disk{m}, data: base.data, sealed: base.sealed}
		x.config = Config{Disks: []Disk{{Path: "mem0", Device: m}}, Reactor: x.r, Manual: true, Log: quiet(), CrashLog: path}
		done := make(chan struct{})
		go func() { // ends with done
			select {
			case <-done:
			case <-time.After(time.Minute):
				panic("a pool with a changed crash log hangs")
			}
		}()
		defer close(done)
		if err := x.tryOpen(); err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		audit := func() {
			t.Helper()
			if err := (&session{lab: &lab{T: t}, pool: x.pool}).audit(); err != nil {
				t.Fatal(err)
			}
		}
		audit()
		if sound {
			if !bytes.Equal(b, log) { // it does not count, or all of it does
				for i := range 3 {
					at := i * 3 * clusterSize
					x.doubts = append(x.doubts, [2]int{at, at + 2*blockSize}, [2]int{at + clusterSize, at + clusterSize + blockSize})
				}
			}
			if n := x.reads(); n > 0 {
				t.Fatalf("%d blocks cannot be read", n)
			}
		}
		x.readsAnything()
		audit()
		if err := x.pool.Close(); err != nil {
			t.Fatal(err)
		}
		x.config.CrashLog = ""
		if err := x.tryOpen(); err != nil {
			t.Fatalf("what the log said was taken, and now the pool does not open: %v", err)
		}
		audit()
		if err := x.pool.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
