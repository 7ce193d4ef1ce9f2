package pool

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/engine/disk/memdisk"
)

// someBit is one that no program knows.
const someBit = 1 << 40

// changeSuper writes superblocks of disk 0 anew: those in slot, or all of them for -1.
func changeSuper(t *testing.T, m *memdisk.Disk, slot int, change func(s *superblock)) {
	t.Helper()
	size := m.Info().Size &^ (clusterSize - 1)
	for n, at := range []uint64{0, pageSize, size - pairSize, size - pageSize} {
		if slot >= 0 && n%2 != slot {
			continue
		}
		b := m.Bytes(at, pageSize)
		s, err := decodeSuperblock(b)
		if err != nil {
			t.Fatal(err)
		}
		change(s)
		s.encode(b)
		m.Poke(at, b)
	}
}

// newestSlot is where the newer superblocks of disk 0 lie.
func newestSlot(t *testing.T, m *memdisk.Disk) int {
	t.Helper()
	a, errA := decodeSuperblock(m.Bytes(0, pageSize))
	b, errB := decodeSuperblock(m.Bytes(pageSize, pageSize))
	if err := errors.Join(errA, errB); err != nil {
		t.Fatal(err)
	}
	if a.generation > b.generation {
		return 0
	}
	return 1
}

// TestFeaturesThatAreNotKnown: what a newer program has made is read, changed, or
// neither, as its superblock says; also when it has written one of the two slots yet,
// and the other is as this program left it.
func TestFeaturesThatAreNotKnown(t *testing.T) {
	incompat := func(s *superblock) { s.incompat = someBit }
	rocompat := func(s *superblock) { s.rocompat = someBit }
	newer := func(s *superblock) { s.version = formatVersion + 1 }
	for _, test := range []struct {
		name        string
		change      func(s *superblock)
		says        string // part of the errors
		read, write bool   // may be
	}{
		{"incompatible", incompat, "features", false, false},
		{"read-only compatible", rocompat, "only read", true, false},
		{"compatible", func(s *superblock) { s.compat = someBit }, "", true, true},
		{"version", newer, "format version 2", false, false},
		{"all", func(s *superblock) { incompat(s); rocompat(s); newer(s) }, "format version 2", false, false},
	} {
		for _, slots := range []string{"both slots", "the newer slot"} {
			t.Run(test.name+", "+slots, func(t *testing.T) {
				x := newPatient(t, 1)
				m, slot := x.mem[0], -1
				if slots == "the newer slot" {
					slot = newestSlot(t, m)
				}
				changeSuper(t, m, slot, test.change)
				image := m.Bytes(0, m.Info().Size)
				refused := func(what string, allowed bool, err error) bool {
					t.Helper()
					if allowed {
						if err != nil {
							t.Errorf("%s: %v", what, err)
						}
						return err != nil
					}
					if !errors.Is(err, ErrUnsupported) || errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), test.says) {
						t.Errorf("%s: %v", what, err)
					}
					return true
				}
				_, err := Probe(x.r, x.disks[0])
				refused("probe", test.read, err)
				_, err = Check(CheckConfig{Disks: x.disks, Reactor: x.r})
				refused("check", test.read, err)
				x.config.ReadOnly = true
				if !refused("open read-only", test.read, x.tryOpen()) {
					if n := x.reads(); n > 0 {
						t.Errorf("%d blocks cannot be read", n)
					}
					x.close()
				}
				if test.write {
					x.config.ReadOnly = false
					x.open()
					x.close()
					if s, err := decodeSuperblock(m.Bytes(uint64(newestSlot(t, m))*pageSize, pageSize)); err != nil || s.compat != someBit {
						t.Errorf("what this program does not know of is gone: %+v, %v", s, err)
					}
					return
				}
				x.config.ReadOnly = false
				refused("open", false, x.tryOpen())
				_, err = Check(CheckConfig{Disks: x.disks, Reactor: x.r, Repair: true})
				refused("repair", false, err)
				if _, err := Format(FormatConfig{Name: "p", Disks: x.disks, Reactor: x.r}); err == nil {
					t.Error("it can be formatted without force")
				}
				if !slices.Equal(m.Bytes(0, m.Info().Size), image) {
					t.Error("something was written")
				}
			})
		}
	}
	if knownIncompat|knownROCompat != 0 {
		t.Error("a bit is defined: disk-format.md says that none is")
	}
}
