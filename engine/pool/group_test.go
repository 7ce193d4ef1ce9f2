package pool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
)

// TestGroupIsOnePointInTheWritesOfAllVolumes: writers write a number to a, and when
// that has completed the same number to b. A group must never have b's without a's,
// nor be a round behind.
func TestGroupIsOnePointInTheWritesOfAllVolumes(t *testing.T) {
	h := newHammer(t, 4, nil, memory(64<<20))
	p := h.rig.pool
	a, b := h.rig.volume("a", 2<<20), h.rig.volume("b", 2<<20)
	const writers = 6
	at := func(i int) uint64 { return uint64(i%3)*clusterSize + uint64(i)*512 } // some share a block
	for i := range writers {
		qa, qb := h.port(a, i), h.port(b, i+i/3)
		h.go_(func() {
			defer func() {
				if err := errors.Join(qa.close(), qb.close()); err != nil {
					t.Error(err)
				}
			}()
			buffer := make([]byte, 512)
			for n := uint64(1); !h.stop.Load(); n++ {
				binary.LittleEndian.PutUint64(buffer, n)
				for _, q := range []*port{qa, qb} {
					if s, err := q.one(datapath.OpWrite, 0, at(i), buffer, 512); err != nil || s != datapath.StatusOK {
						t.Errorf("write: %v %v", s, err)
						return
					}
				}
			}
		})
	}
	h.upkeep()
	read := func(volume, snapshot string, i int) uint64 {
		d, err := p.OpenSnapshot(volume, snapshot)
		if err != nil {
			t.Fatal(err)
		}
		q := h.port(d, i)
		buffer := make([]byte, 512)
		if s, err := q.one(datapath.OpRead, 0, at(i), buffer, 512); err != nil || s != datapath.StatusOK {
			t.Errorf("read: %v %v", s, err)
		}
		if err := errors.Join(q.close(), d.Close()); err != nil {
			t.Error(err)
		}
		return binary.LittleEndian.Uint64(buffer)
	}
	groups := 0
	for end := time.Now().Add(hammerTime()); time.Now().Before(end) && !t.Failed(); groups++ {
		name := fmt.Sprintf("g%d", groups)
		if !h.space() {
			break
		}
		infos, err := p.CreateSnapshotGroup(name, []string{"b", "a"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if len(infos) != 2 || infos[0].Volume != "b" || !infos[0].Created.Equal(infos[1].Created) {
			t.Errorf("%+v", infos)
		}
		for i := range writers {
			if x, y := read("a", name, i), read("b", name, i); y > x || x > y+1 {
				t.Errorf("group %s, writer %d: %d in a, %d in b", name, i, x, y)
			}
		}
		for _, volume := range []string{"a", "b"} {
			if _, err := p.DeleteSnapshot(volume, name); err != nil {
				t.Fatal(err)
			}
		}
	}
	h.end()
	t.Logf("%d groups", groups)
	if err := errors.Join(a.Close(), b.Close()); err != nil {
		t.Error(err)
	}
	within(t, time.Minute, "Close", h.rig.close)
}

func TestGroupsThatCannotBe(t *testing.T) {
	g := newRig(t, 2, memory(18<<20))
	p := g.open()
	for _, s := range []VolumeSpec{{Name: "a", Size: 1 << 20}, {Name: "thick", Size: 6 << 20, Thick: true}, {Name: "thicker", Size: 6 << 20, Thick: true}} {
		if _, err := p.CreateVolume(s); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.CreateSnapshot("a", "taken", nil); err != nil {
		t.Fatal(err)
	}
	d, err := p.OpenVolume("thicker")
	if err != nil {
		t.Fatal(err)
	}
	q, err := openPort(g.r, d, 4)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(48) { // so that a snapshot has to reserve it all once more
		if s, err := q.one(datapath.OpWrite, 0, i*clusterSize, make([]byte, clusterSize), clusterSize); err != nil || s != datapath.StatusOK {
			t.Fatal(s, err)
		}
	}
	for name, test := range map[string]struct {
		snapshot string
		volumes  []string
		labels   map[string]string
		want     error
	}{
		"no volume":       {"s", nil, nil, ErrInvalid},
		"no name":         {"", []string{"a"}, nil, ErrInvalid},
		"unknown volume":  {"s", []string{"a", "none"}, nil, ErrNotFound},
		"twice":           {"s", []string{"a", "thick", "a"}, nil, ErrInvalid},
		"one has it":      {"taken", []string{"thick", "a"}, nil, ErrExists},
		"labels":          {"s", []string{"a"}, map[string]string{labelIOPS: "1"}, ErrInvalid},
		"no space for it": {"s", []string{"a", "thick", "thicker"}, nil, ErrNoSpace},
	} {
		before := p.Info()
		if _, err := p.CreateSnapshotGroup(test.snapshot, test.volumes, test.labels); !errors.Is(err, test.want) {
			t.Errorf("%s: %v", name, err)
		}
		if after := p.Info(); after.Snapshots != 1 || after.Reserved != before.Reserved {
			t.Errorf("%s: something is left: %+v, was %+v", name, after, before)
		}
	}
	if err := errors.Join(q.close(), d.Close()); err != nil {
		t.Error(err)
	}
	g.close()
}

// TestGroupsHaveABound: what does not lie in one group of the journal is refused.
func TestGroupsHaveABound(t *testing.T) {
	g := newRig(t, 2, memory(64<<20))
	p := g.open()
	var names []string
	long := map[string]string{"k": string(make([]byte, labelsMax-16))}
	for n := 0; n*labelsMax < p.journal.chunkMax(); n++ {
		name := fmt.Sprintf("v%d", n)
		if _, err := p.CreateVolume(VolumeSpec{Name: name, Size: 4096}); err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	if _, err := p.CreateSnapshotGroup("s", names, long); !errors.Is(err, ErrInvalid) {
		t.Errorf("%d volumes: %v", len(names), err)
	}
	if i, err := p.CreateSnapshotGroup("s", names[:len(names)/2], long); err != nil || len(i) != len(names)/2 {
		t.Errorf("half of them: %v", err)
	}
	g.close()
	g.open()
	if n := g.pool.Info().Snapshots; n != len(names)/2 {
		t.Errorf("%d snapshots after reopening", n)
	}
	g.close()
}
