package pool

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath/devtest"
)

// TestKillWhileASnapshotBegins: writes that were acknowledged after the head was
// changed, and before the journal knew of that, are there after the death of the
// process; the snapshot, of which nobody was told, is not.
func TestKillWhileASnapshotBegins(t *testing.T) {
	m := memory(64 << 20)
	g := newRig(t, 4, m)
	g.config.CrashLog = filepath.Join(t.TempDir(), "pending")
	p := g.open()
	d := g.volume("v", 8<<20)
	c := devtest.NewClient(t, g.r, d, 8)
	before, after := bytes.Repeat([]byte{1}, 3*blockSize), bytes.Repeat([]byte{2}, blockSize)
	c.Write(0, before)
	c.Write(clusterSize, before)
	c.Flush()

	v := p.volumes["v"]
	head := v.head.Load()
	p.applyMu.Lock() // the committer stops here
	made := make(chan error, 1)
	go func() {
		_, err := p.CreateSnapshot("v", "s", nil)
		made <- err
	}()
	for deadline := time.Now().Add(10 * time.Second); v.head.Load() == head; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the head does not change")
		}
	}
	c.Write(blockSize, after)     // over what the snapshot keeps
	c.Write(2*clusterSize, after) // where nothing was
	left := m.Clone()
	left.CrashKeep()
	log, err := os.ReadFile(g.config.CrashLog)
	if err != nil {
		t.Fatal(err)
	}
	p.applyMu.Unlock()
	if err := <-made; err != nil {
		t.Error(err)
	}
	c.Close()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	g.close()

	copied := filepath.Join(t.TempDir(), "pending")
	if err := os.WriteFile(copied, log, 0o600); err != nil {
		t.Fatal(err)
	}
	g.config.CrashLog = copied
	g.config.Disks = []Disk{{Path: "left", Device: left}}
	want := bytes.Clone(before)
	copy(want[blockSize:], after)
	for round := range 3 {
		p = g.open()
		if s, err := p.Snapshots("v"); err != nil || len(s) != 0 {
			t.Errorf("round %d: %d snapshots, %v", round, len(s), err)
		}
		if d, err = p.OpenVolume("v"); err != nil {
			t.Fatal(err)
		}
		c = devtest.NewClient(t, g.r, d, 8)
		if !bytes.Equal(c.Read(0, uint64(len(want))), want) || !bytes.Equal(c.Read(clusterSize, uint64(len(before))), before) || !bytes.Equal(c.Read(2*clusterSize, blockSize), after) {
			t.Errorf("round %d: acknowledged writes are lost", round)
		}
		if round == 1 {
			if err := p.Maintain(); err != nil {
				t.Error(err)
			}
			if i, err := p.Volume("v"); err != nil || i.Depth != 1 {
				t.Errorf("depth %d, %v", i.Depth, err)
			}
		}
		c.Close()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		g.close()
	}
}

// TestDamageOfTheLastGroupIsToldFromATornTail: the crash log knows how far the journal
// had been written. After a loss of power nothing does.
func TestDamageOfTheLastGroupIsToldFromATornTail(t *testing.T) {
	m := memory(16 << 20)
	g := newRig(t, 2, m)
	g.config.CrashLog = filepath.Join(t.TempDir(), "pending")
	p := g.open()
	d := g.volume("v", 1<<20)
	last := p.journal.offset + p.journal.next.Load()%p.journal.blocks*pageSize
	if err := p.SetLabels("v", map[string]string{"a": "b"}); err != nil {
		t.Fatal(err)
	}
	p.fail(errors.New("killed by the test"))
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	_ = p.Close() // has failed
	m.CrashKeep()
	open := func(change func(log []byte) []byte, damage bool) error {
		t.Helper()
		disk := m.Clone()
		if damage {
			disk.Corrupt(last, pageSize, 1)
		}
		log, err := os.ReadFile(g.config.CrashLog)
		if err != nil {
			t.Fatal(err)
		}
		c := g.config
		c.Disks = []Disk{{Path: "mem0", Device: disk}}
		c.CrashLog = filepath.Join(t.TempDir(), "copy")
		if err := os.WriteFile(c.CrashLog, change(log), 0o600); err != nil {
			t.Fatal(err)
		}
		p, err := Open(c)
		if err == nil {
			err = p.Close()
		}
		return err
	}
	same := func(log []byte) []byte { return log }
	if err := open(same, false); err != nil {
		t.Errorf("nothing is damaged: %v", err)
	}
	if err := open(same, true); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "remove the file") {
		t.Errorf("the last group is damaged: %v", err)
	}
	for name, change := range map[string]func([]byte) []byte{
		"of another boot":    func(log []byte) []byte { log[50] ^= 1; return log },
		"that does not say":  func(log []byte) []byte { clear(log[pendingLSN : pendingLSN+8]); return log },
		"that was cut short": func(log []byte) []byte { return log[:100] },
		"that is empty":      func(log []byte) []byte { return nil },
	} {
		if err := open(change, true); err != nil {
			t.Errorf("a crash log %s: %v", name, err)
		}
	}
}
