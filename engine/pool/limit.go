package pool

import (
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/rate"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// Limits are how much the clients of a volume may do, all together. 0: as much as
// they like. Every operation but a flush counts as a request, reads and writes also
// with their bytes.
type Limits struct {
	IOPS      uint64 // requests a second
	Bandwidth uint64 // bytes a second, a block at least
}

// The limits of a volume are kept in the record of its head, as labels that no user
// sees: a program that does not know them keeps them.
const (
	ownLabels      = "ashlar.io/" // prefix of labels that are not the user's
	labelIOPS      = ownLabels + "limit-iops"
	labelBandwidth = ownLabels + "limit-bandwidth"
)

// checkLabels refuses what cannot be kept as labels of a user. what names whose.
func checkLabels(what string, labels map[string]string) error {
	for key := range labels {
		if strings.HasPrefix(key, ownLabels) {
			return fmt.Errorf("%s: label %s: what begins with %s is the pool's own: choose another key: %w", what, key, ownLabels, ErrInvalid)
		}
	}
	if len(appendLabels(nil, labels)) > labelsMax {
		return fmt.Errorf("%s: labels of more than %d bytes: %w", what, labelsMax, ErrInvalid)
	}
	return nil
}

func (l Limits) check(name string) error {
	if l.Bandwidth > 0 && l.Bandwidth < blockSize {
		return fmt.Errorf("volume %s: a bandwidth of %d bytes a second: must be %d, one block, or more (0: no limit): %w", name, l.Bandwidth, blockSize, ErrInvalid)
	}
	return nil
}

// userLabels are labels without the pool's own.
func userLabels(labels map[string]string) map[string]string {
	users := maps.Clone(labels)
	maps.DeleteFunc(users, func(key, _ string) bool { return strings.HasPrefix(key, ownLabels) })
	if len(users) == 0 {
		return nil
	}
	return users
}

// withLimits are labels of a user together with the pool's own.
func withLimits(labels map[string]string, l Limits) map[string]string {
	all := userLabels(labels)
	for key, value := range map[string]uint64{labelIOPS: l.IOPS, labelBandwidth: l.Bandwidth} {
		if value > 0 {
			if all == nil {
				all = map[string]string{}
			}
			all[key] = strconv.FormatUint(value, 10)
		}
	}
	return all
}

// limits are those of a layer's record. What makes no sense is no limit.
func (r *layerRecord) limits() (l Limits) {
	for key, value := range map[string]*uint64{labelIOPS: &l.IOPS, labelBandwidth: &l.Bandwidth} {
		if n, err := strconv.ParseUint(r.labels[key], 10, 64); err == nil {
			*value = n
		}
	}
	if l.check("") != nil {
		l.Bandwidth = 0
	}
	return l
}

// SetLimits changes how much a volume may do: durably, and at once for what is under
// way. Requests that wait are measured by the new rate.
func (p *Pool) SetLimits(name string, l Limits) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := p.volumes[name]
	if v == nil {
		return fmt.Errorf("volume %s: %w", name, ErrNotFound)
	}
	if err := l.check(name); err != nil {
		return err
	}
	head := v.head.Load()
	if l == head.rec.limits() {
		return nil
	}
	rec := head.rec
	rec.labels = withLimits(rec.labels, l)
	if err := p.commitRecord(head, rec); err != nil {
		return err
	}
	v.setRate(l)
	return nil
}

// setRate puts limits in force.
func (v *volume) setRate(l Limits) {
	v.rate.Store(rate.New(rate.Limits{RequestsPerSecond: l.IOPS, BytesPerSecond: l.Bandwidth}))
	for _, x := range *v.queues.Load() {
		if x.woken.CompareAndSwap(false, true) {
			x.r.Post(x)
		}
	}
}

// throttle holds the requests of a queue back to the volume's rate. They wait in
// their order, and the queue asks for the turn of the first of them only: so queues
// take turns. A change that waits has its place in the order of changes already: no
// later one overtakes it through a queue that waits less. Owned by the reactor.
type throttle struct {
	line  rate.Line[*slot]
	timer reactor.Timer
}

func (p *Pool) clock() int64 { return int64(time.Since(p.start)) }

// throttled reports whether a request has to wait for its turn. What would fail, or
// is a flush, does not.
func (q *queue) throttled(s *slot) bool {
	t, turns := &q.throttle, q.v.rate.Load()
	if s.r.Op == datapath.OpFlush || turns == nil && t.line.Empty() || s.r.Modifies() && (q.v.readOnly || q.p.writable() != nil) {
		return false
	}
	wait, waits := t.line.Enter(turns, q.p.clock(), s, s.r.DataBytes())
	if !waits {
		return false
	}
	if wait > 0 {
		q.r.Arm(&t.timer, wait)
	}
	if s.r.Modifies() {
		q.v.order.enter(s, true, true)
	}
	return true
}

// releaseThrottled goes on with every request whose turn has come.
func (q *queue) releaseThrottled() {
	t := &q.throttle
	if q.closed || t.line.Empty() {
		return
	}
	for !t.line.Empty() {
		s, wait := t.line.Leave(q.v.rate.Load(), q.p.clock())
		if wait > 0 {
			q.r.Arm(&t.timer, wait)
			return
		}
		s.r.Mark(datapath.StageMetadata, q.r)
		switch {
		case !s.r.Modifies():
			s.parity = q.enter()
			s.advance()
		case q.v.order.free(s):
			q.begin(s)
		}
	}
	q.r.Disarm(&t.timer)
}
