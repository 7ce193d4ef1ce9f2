package datapath

import (
	"testing"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// recording is a Recorder that keeps copies.
type recording []Timing

func (r *recording) Record(t *Timing) { *r = append(*r, *t) }

func TestStagesOfATimingAddUp(t *testing.T) {
	var kept recording
	var x Timing
	x.Begin(StageReceive, 100)
	if !x.Claim(&kept) || x.Claim(&recording{}) {
		t.Fatal("a timing has exactly one recorder, the first")
	}
	x.Enter(StageQueue, 110)
	x.Enter(StageMetadata, 115)
	x.Enter(StageDevice, 130)
	x.Enter(StageMetadata, 200) // a second piece
	x.Enter(StageDevice, 190)   // an older reading of the clock
	x.Enter(StageFinish, 260)
	x.Enter(StageReply, 300)
	x.End(321)
	x.End(500) // is over
	if len(kept) != 1 {
		t.Fatalf("recorded %d times", len(kept))
	}
	got := &kept[0]
	want := map[Stage]int64{StageReceive: 10, StageQueue: 5, StageMetadata: 15, StageDevice: 70 + 60, StageFinish: 40, StageReply: 21}
	sum := int64(0)
	for s := range StageCount {
		ns, entered := got.Spent(s)
		_, wanted := want[s]
		if ns != want[s] || entered != wanted {
			t.Errorf("%s: %d ns, entered %t, want %d", s, ns, entered, want[s])
		}
		sum += ns
	}
	if got.Began() != 100 || got.Total() != 221 || sum != got.Total() {
		t.Errorf("began %d, total %d, the stages together %d", got.Began(), got.Total(), sum)
	}
}

func TestATimingOfNobodyEndsQuietly(t *testing.T) {
	var x Timing
	x.Begin(StageQueue, 0)
	x.End(10)
	if x.Total() != 0 {
		t.Error("a timing that nobody records runs on")
	}
}

func TestMarksOfRequests(t *testing.T) {
	r, err := reactor.Start(reactor.Config{Poll: reactor.PollOff})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	var kept recording
	var x Timing
	timed, plain := Request{Timing: &x}, Request{}
	if err := r.Run(func(r *reactor.Reactor) {
		x.Begin(StageQueue, r.Tick())
		x.Claim(&kept)
		plain.Mark(StageDevice, r)
		plain.MarkRecent(StageDevice, r)
		timed.Mark(StageDevice, r)
		timed.MarkRecent(StageReply, r)
		x.End(r.Tick())
	}); err != nil {
		t.Fatal(err)
	}
	if _, entered := kept[0].Spent(StageDevice); !entered {
		t.Error("the mark of a timed request is lost")
	}
	if ns, entered := kept[0].Spent(StageReply); !entered || ns > kept[0].Total() {
		t.Errorf("reply took %d of %d ns, entered %t", ns, kept[0].Total(), entered)
	}
}

func TestStageNames(t *testing.T) {
	if StageReceive.String() != "receive" || StageReply.String() != "reply" || StageCount.String() != "stage(7)" {
		t.Errorf("%s %s %s", StageReceive, StageReply, StageCount)
	}
}
