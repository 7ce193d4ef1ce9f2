package pool

import (
	"bytes"
	"errors"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

func (g *rig) limits(name string) Limits {
	g.Helper()
	i, err := g.pool.Volume(name)
	if err != nil {
		g.Fatal(err)
	}
	return i.Limits
}

// TestLimitsAreKeptAndHidden: over labels, snapshots, reverts and reopening.
func TestLimitsAreKeptAndHidden(t *testing.T) {
	g := newRig(t, 2, memory(16<<20))
	p := g.open()
	users := map[string]string{"a": "b"}
	i, err := p.CreateVolume(VolumeSpec{Name: "v", Size: 1 << 20, Labels: users, Limits: Limits{IOPS: 7}})
	if err != nil || i.Limits != (Limits{IOPS: 7}) || !maps.Equal(i.Labels, users) {
		t.Fatalf("%+v, %v", i, err)
	}
	want := Limits{IOPS: 100, Bandwidth: 1 << 20}
	if err := p.SetLimits("v", want); err != nil {
		t.Fatal(err)
	}
	users = map[string]string{"c": strings.Repeat("d", labelsMax-10)} // as much as there may be
	if err := p.SetLabels("v", users); err != nil {
		t.Fatal(err)
	}
	if _, err := p.CreateSnapshot("v", "s", nil); err != nil {
		t.Fatal(err)
	}
	if s, err := p.Snapshots("v"); err != nil || len(s) != 1 || len(s[0].Labels) != 0 {
		t.Errorf("snapshots: %+v, %v", s, err)
	}
	if c, err := p.Clone("v", "s", VolumeSpec{Name: "w"}); err != nil || c.Limits != (Limits{}) {
		t.Errorf("a clone has the limits of its source: %+v, %v", c, err)
	}
	if err := p.Revert("v", "s"); err != nil {
		t.Fatal(err)
	}
	if got := g.limits("v"); got != want {
		t.Errorf("after a revert: %+v", got)
	}
	g.close()
	p = g.open()
	if got := g.limits("v"); got != want {
		t.Errorf("after reopening: %+v", got)
	}
	if i, err := p.Volume("v"); err != nil || !maps.Equal(i.Labels, users) {
		t.Errorf("labels: %v, %v", i.Labels, err)
	}
	if err := p.SetLimits("v", Limits{}); err != nil {
		t.Fatal(err)
	}
	if r := p.volumes["v"].head.Load().rec; len(r.labels) != 1 {
		t.Errorf("limits that are none are kept: %v", r.labels)
	}
	g.close()
}

func TestLimitsThatCannotBe(t *testing.T) {
	g := newRig(t, 2, memory(16<<20))
	p := g.open()
	own := map[string]string{labelIOPS: "1"}
	_, errCreate := p.CreateVolume(VolumeSpec{Name: "v", Size: 1 << 20, Labels: own})
	_, errSmall := p.CreateVolume(VolumeSpec{Name: "v", Size: 1 << 20, Limits: Limits{Bandwidth: 4095}})
	if _, err := p.CreateVolume(VolumeSpec{Name: "v", Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	_, errSnapshot := p.CreateSnapshot("v", "s", own)
	for i, err := range []error{errCreate, errSmall, errSnapshot, p.SetLabels("v", own), p.SetLimits("v", Limits{Bandwidth: 1})} {
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%d: %v", i, err)
		}
	}
	if err := p.SetLimits("w", Limits{}); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	for _, labels := range []map[string]string{{labelIOPS: "x", labelBandwidth: "-1"}, {labelIOPS: "99999999999999999999", labelBandwidth: "1"}} {
		if got := (&layerRecord{labels: labels}).limits(); got != (Limits{}) {
			t.Errorf("%v: %+v", labels, got)
		}
	}
	g.close()
	g.config.ReadOnly = true
	if err := g.open().SetLimits("v", Limits{IOPS: 1}); !errors.Is(err, ErrReadOnly) {
		t.Error(err)
	}
	g.close()
}

// TestLimitsHoldLive: together for all devices and queues of a volume, from the
// moment they are set, also for what waits already.
func TestLimitsHoldLive(t *testing.T) {
	g := newRig(t, 4, memory(32<<20))
	p := g.open()
	d := g.volume("v", 1<<20)
	second, err := p.OpenVolume("v")
	if err != nil {
		t.Fatal(err)
	}
	a, err := openPort(g.r, d, 64)
	if err != nil {
		t.Fatal(err)
	}
	b, err := openPort(devtest.Reactors(t, reactor.EngineAuto, 1)[0], second, 64)
	if err != nil {
		t.Fatal(err)
	}
	requests := func(op datapath.Op, n int) (list []*datapath.Request) {
		for i := range n {
			r := &datapath.Request{Op: op, Offset: uint64(i) * blockSize, Length: blockSize}
			if op == datapath.OpRead || op == datapath.OpWrite {
				r.Buf = make([]byte, blockSize)
			}
			list = append(list, r)
		}
		return list
	}
	timed := func(f func()) time.Duration {
		began := time.Now()
		f()
		return time.Since(began)
	}
	both := func(op datapath.Op, n int) time.Duration {
		return timed(func() {
			waitA := a.begin(t, requests(op, n)...)
			if !b.begin(t, requests(op, n)...)() || !waitA() {
				t.FailNow()
			}
		})
	}
	for _, test := range []struct {
		op     datapath.Op
		limits Limits
		n      int           // requests on each queue
		least  time.Duration // less the burst of a tenth of a second
	}{
		{datapath.OpWrite, Limits{IOPS: 100}, 30, 450 * time.Millisecond},
		{datapath.OpRead, Limits{IOPS: 100}, 30, 450 * time.Millisecond},
		{datapath.OpDiscard, Limits{IOPS: 100}, 30, 450 * time.Millisecond},
		{datapath.OpWrite, Limits{Bandwidth: 400 << 10}, 30, 450 * time.Millisecond},
	} {
		if err := p.SetLimits("v", test.limits); err != nil {
			t.Fatal(err)
		}
		if took := both(test.op, test.n); took < test.least {
			t.Errorf("%v with %+v: %d requests took %v", test.op, test.limits, 2*test.n, took)
		}
		if took := timed(func() { a.begin(t, &datapath.Request{Op: datapath.OpFlush})() }); took > 5*time.Second {
			t.Errorf("a flush took %v", took)
		}
	}
	// Hours of waiting, until the limit goes.
	if err := p.SetLimits("v", Limits{IOPS: 1}); err != nil {
		t.Fatal(err)
	}
	wait := a.begin(t, requests(datapath.OpWrite, 60)...)
	waitReads := b.begin(t, requests(datapath.OpRead, 60)...)
	if err := p.SetLimits("v", Limits{}); err != nil {
		t.Fatal(err)
	}
	if !wait() || !waitReads() {
		t.FailNow()
	}
	if err := errors.Join(a.close(), b.close(), d.Close(), second.Close()); err != nil {
		t.Error(err)
	}
	g.close()
}

// TestChangesThatWaitForTheirRateKeepTheirPlace sends a copy through another queue
// while the old one waits, as TestOldCopyOfAChangeNeverOvertakes.
func TestChangesThatWaitForTheirRateKeepTheirPlace(t *testing.T) {
	g, a, b, end := volumePorts(t, 8, 0)
	defer end()
	if err := g.pool.SetLimits("v", Limits{IOPS: 20}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		var list []*datapath.Request
		for i := range uint64(7) { // uses up the burst, and has the last one wait
			list = append(list, filled(datapath.OpWrite, 1<<20+i*blockSize, blockSize, 9))
		}
		oldDone := a.begin(t, append(list, filled(datapath.OpWrite, 0, blockSize, 1))...)
		newer := filled(datapath.OpWrite, 0, blockSize, 2)
		if !b.begin(t, filled(datapath.OpWrite, 0, blockSize, 1))() || !b.begin(t, newer)() || !oldDone() {
			t.FailNow()
		}
		got := &datapath.Request{Op: datapath.OpRead, Length: blockSize, Buf: make([]byte, blockSize)}
		if !b.begin(t, got)() {
			t.FailNow()
		}
		if !bytes.Equal(got.Buf, newer.Buf) {
			t.Error("the newer write was overtaken")
		}
	}
}

// TestRequestsBeyondTheEndTouchNothing: whoever forgot to look.
func TestRequestsBeyondTheEndTouchNothing(t *testing.T) {
	g := newRig(t, 2, memory(16<<20))
	g.open()
	d := g.volume("v", 8192)
	q, err := openPort(g.r, d, 4)
	if err != nil {
		t.Fatal(err)
	}
	for op, want := range map[datapath.Op]datapath.Status{datapath.OpRead: datapath.StatusInvalid, datapath.OpWrite: datapath.StatusNoSpace,
		datapath.OpDiscard: datapath.StatusInvalid, datapath.OpWriteZeroes: datapath.StatusNoSpace, datapath.OpExtents: datapath.StatusInvalid} {
		for _, at := range []uint64{4097, 8192, 1 << 50, ^uint64(0) - 4095} {
			if s, err := q.one(op, 0, at, make([]byte, 4096), 4096); err != nil || s != want {
				t.Errorf("%v at %d: %v %v", op, at, s, err)
			}
		}
	}
	if q.q.(*queue).modifying != 0 {
		t.Error("a change that was refused counts as under way")
	}
	if err := errors.Join(q.close(), d.Close()); err != nil {
		t.Error(err)
	}
	g.close()
}
