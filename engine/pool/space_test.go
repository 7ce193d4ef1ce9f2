package pool

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
)

// TestOverProvisionRefusesPromises: a pool with nearly all its space free says that
// more was to be promised than allowed, and not that it is full.
func TestOverProvisionRefusesPromises(t *testing.T) {
	g := newRig(t, 2, memory(24<<20))
	g.config.OverProvision = 150
	p := g.open()
	bound := p.Info().Total / 100 * 150 &^ (blockSize - 1)
	refused := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, ErrOverProvisioned) || errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), "volume v") || !strings.Contains(err.Error(), "150 %") {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err := p.CreateVolume(VolumeSpec{Name: "v", Size: bound + blockSize})
	refused("create", err)
	if _, err := p.CreateVolume(VolumeSpec{Name: "v", Size: bound - blockSize}); err != nil {
		t.Fatal(err)
	}
	if err := p.Resize("v", bound); err != nil {
		t.Errorf("just what is allowed: %v", err)
	}
	refused("resize", p.Resize("v", bound+blockSize))
	if _, err := p.CreateSnapshot("v", "s", nil); err != nil {
		t.Errorf("a snapshot promises nothing: %v", err)
	}
	_, err = p.Clone("v", "s", VolumeSpec{Name: "v2"})
	refused("clone", err)
	if i := p.Info(); i.Volumes != 1 || i.Provisioned != bound || i.Available < i.Total/2 {
		t.Errorf("%+v", i)
	}
	g.close()
	g.config.OverProvision = 0
	p = g.open()
	if err := p.Resize("v", 4*bound); err != nil {
		t.Errorf("without a bound: %v", err)
	}
	g.close()
}

// TestFillingAPoolIsTold: each threshold once on the way up, again after the pool had
// room, and writes that found none at most once a minute.
func TestFillingAPoolIsTold(t *testing.T) {
	g := newRig(t, 2, memory(24<<20))
	var mu sync.Mutex
	var events []Event
	g.config.Event = func(e Event) {
		mu.Lock()
		defer mu.Unlock()
		events = append(events, e)
	}
	g.config.Manual = false
	p := g.open()
	d := g.volume("v", 64<<20)
	q, err := openPort(g.r, d, 4)
	if err != nil {
		t.Fatal(err)
	}
	clusters := p.Info().Total >> clusterShift
	next := uint64(0)
	fill := func(percent uint64) {
		t.Helper()
		for ; (clusters-p.Info().Free>>clusterShift)*100 < percent*clusters; next++ {
			if s, err := q.one(datapath.OpWrite, 0, next*clusterSize, make([]byte, blockSize), blockSize); err != nil || s != datapath.StatusOK {
				t.Fatalf("write of cluster %d of %d: %v %v", next, clusters, s, err)
			}
		}
	}
	told := func(kind EventKind) (list []Event) {
		mu.Lock()
		defer mu.Unlock()
		for _, e := range events {
			if e.Kind == kind {
				list = append(list, e)
			}
		}
		return list
	}
	await := func(kind EventKind, count int) Event {
		t.Helper()
		within(t, time.Minute, fmt.Sprintf("event %d %s", count, kind), func() {
			for len(told(kind)) < count {
				time.Sleep(10 * time.Millisecond)
			}
		})
		list := told(kind)
		if len(list) != count {
			t.Fatalf("%d events %s, want %d: %+v", len(list), kind, count, list)
		}
		return list[count-1]
	}
	about := func(e Event, percent uint64) bool { // a checkpoint may take a cluster meanwhile
		return strings.Contains(e.Message, fmt.Sprintf("%d %% full", percent)) || strings.Contains(e.Message, fmt.Sprintf("%d %% full", percent+1))
	}
	fill(70)
	time.Sleep(2 * keeperTick)
	if list := told(EventSpaceLow); len(list) > 0 {
		t.Errorf("told of a pool 70 %% full: %+v", list)
	}
	for i, percent := range []uint64{80, 90, 95} {
		fill(percent)
		if e := await(EventSpaceLow, i+1); e.Pool != "p" || e.Time.IsZero() || !about(e, percent) {
			t.Errorf("at %d %%: %+v", percent, e)
		}
	}
	for range 3 {
		s := datapath.StatusOK
		for ; s == datapath.StatusOK; next++ {
			if s, err = q.one(datapath.OpWrite, 0, next*clusterSize, make([]byte, blockSize), blockSize); err != nil {
				t.Fatal(err)
			}
		}
		if s != datapath.StatusNoSpace {
			t.Fatal(s)
		}
	}
	if e := await(EventFull, 1); e.Volume != "v" || e.Pool != "p" || e.Message == "" {
		t.Errorf("%+v", e)
	}
	if s, err := q.one(datapath.OpDiscard, 0, 0, nil, 64<<20); err != nil || s != datapath.StatusOK {
		t.Fatal(s, err)
	}
	within(t, time.Minute, "the space of a discard", func() {
		for p.spaceLevel.Load() != 0 {
			time.Sleep(10 * time.Millisecond)
		}
	})
	next = 0
	fill(80)
	if e := await(EventSpaceLow, 4); !about(e, 80) {
		t.Errorf("once more at 80 %%: %+v", e)
	}
	if err := errors.Join(q.close(), d.Close()); err != nil {
		t.Error(err)
	}
	g.close()
}
