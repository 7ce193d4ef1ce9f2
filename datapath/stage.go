package datapath

import (
	"fmt"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// Stage is a part of the way of a request.
type Stage uint8

// The stages, in the order of the way. A request may come back to an earlier one;
// what it spends in each adds up.
const (
	StageReceive  Stage = iota // from the arrival of the request to the end of its payload
	StageQueue                 // until the store has it: waiting for buffers, slots, limits
	StageMetadata              // in a pool until the disks have it: locks, maps, allocation, checksums
	StageDevice                // until the last disk has done it
	StageCommit                // until it is durable: flushes, FUA, the journal
	StageFinish                // in a pool after the disks: verifying
	StageReply                 // until the reply is on its way to the client
	StageCount                 // how many stages there are; not a stage
)

var stageNames = [StageCount]string{"receive", "queue", "metadata", "device", "commit", "finish", "reply"}

// String names the stage as metrics and logs do.
func (s Stage) String() string {
	if s >= StageCount {
		return fmt.Sprintf("stage(%d)", uint8(s))
	}
	return stageNames[s]
}

// Timing says where the time of one request went. Times are nanoseconds on the
// clock of the request's reactor.
//
// The export that wants its requests timed by stage, and whose device says that it
// has [FeatureTimed], sets Request.Timing and calls Begin before Submit; layers call
// [Request.Mark]. In Done the request is in [StageReply], and the export calls End
// when the reply is on its way; meanwhile it may copy the Timing and reuse the
// request. Stages that were not entered took no time, and the others together the
// whole.
//
// Ownership: the export's; between Submit and Done also the layers', like the
// request. Reactor only. Nothing is allocated.
type Timing struct {
	// Of the request, set by the layer that records it, before Done.
	Op             Op
	Status         Status
	Offset, Length uint64 // bytes

	began, at int64
	spent     [StageCount]int64
	stage     Stage
	entered   uint8 // a bit a stage
	recorder  Recorder
}

// Recorder keeps what requests took.
type Recorder interface {
	// Record takes the timing of a request that has ended. t is not kept.
	Record(t *Timing)
}

// Begin starts the clock: the request arrived at time arrived, and is in stage s.
func (t *Timing) Begin(s Stage, arrived int64) {
	t.spent = [StageCount]int64{}
	t.began, t.at, t.stage, t.entered, t.recorder = arrived, arrived, s, 1<<s, nil
}

// Enter ends the present stage at time now and begins stage s. A time before the
// last one counts as that.
func (t *Timing) Enter(s Stage, now int64) {
	if d := now - t.at; d > 0 {
		t.spent[t.stage] += d
		t.at = now
	}
	t.stage = s
	t.entered |= 1 << s
}

// Claim makes r the one who records the request, unless there is one.
func (t *Timing) Claim(r Recorder) bool {
	if t.recorder != nil {
		return false
	}
	t.recorder = r
	return true
}

// End ends the request at time now and records it, where a layer claimed to. Later
// calls do nothing.
func (t *Timing) End(now int64) {
	r := t.recorder
	if r == nil {
		return
	}
	t.recorder = nil
	t.Enter(t.stage, now)
	r.Record(t)
}

// Began is when the request arrived.
func (t *Timing) Began() int64 { return t.began }

// Total is the time from Begin to the last call of Enter or End: the sum of all
// stages.
func (t *Timing) Total() int64 { return t.at - t.began }

// Spent is what the request spent in stage s, and whether it came there at all.
func (t *Timing) Spent(s Stage) (nanoseconds int64, entered bool) {
	return t.spent[s], t.entered&(1<<s) != 0
}

// Mark says that the request has come to stage s by now, on reactor on, which is its
// own. It reads the clock if the request is timed.
func (r *Request) Mark(s Stage, on *reactor.Reactor) {
	if r.Timing != nil {
		r.Timing.Enter(s, on.Tick())
	}
}

// MarkRecent is Mark with the last reading of the clock: where little was done
// since.
func (r *Request) MarkRecent(s Stage, on *reactor.Reactor) {
	if r.Timing != nil {
		r.Timing.Enter(s, on.Recent())
	}
}
