package filter

import (
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/nulldev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// sumOfStages is what the stages of an operation took together.
func sumOfStages(o *OpStats) (sum time.Duration) {
	for _, h := range o.Stages {
		if h != nil {
			sum += h.Sum
		}
	}
	return sum
}

func TestWaitingForALimitIsTheQueueAndASlowDeviceIsTheDevice(t *testing.T) {
	r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
	slow := NewDelay(memory(t, memdev.Config{}), DelayConfig{Latency: map[datapath.Op]Latency{datapath.OpRead: {Fixed: 20 * time.Millisecond}}})
	d := NewStats(NewLimit(slow, Limits{RequestsPerSecond: 50, BurstRequests: 1}), StatsConfig{})
	defer closeDevice(t, d)
	c := devtest.NewClient(t, r, d, 8)
	c.Do(read(0, 1), read(0, 1), read(0, 1))
	c.Close()
	o := d.Snapshot().Op(datapath.OpRead)
	if o.Count != 3 || sumOfStages(o) != o.Latency.Sum {
		t.Fatalf("%d reads took %v, their stages %v", o.Count, o.Latency.Sum, sumOfStages(o))
	}
	queue, device := o.Stages[datapath.StageQueue], o.Stages[datapath.StageDevice]
	// Of the three the second waits 20 ms for its turn, the third 40.
	if queue == nil || queue.Count != 3 || queue.Sum < 55*time.Millisecond {
		t.Errorf("in the queue: %v", queue)
	}
	if device == nil || device.Count != 3 || device.Sum < 55*time.Millisecond {
		t.Errorf("at the device: %v", device)
	}
	for _, s := range []datapath.Stage{datapath.StageReceive, datapath.StageMetadata, datapath.StageCommit, datapath.StageFinish, datapath.StageReply} {
		if o.Stages[s] != nil {
			t.Errorf("%s: %v, though no request came there", s, o.Stages[s])
		}
	}
}

// timedClient submits like an export that times its requests.
type timedClient struct {
	t       *testing.T
	reactor *reactor.Reactor
	queue   datapath.Queue
}

// do submits a request whose arrival was before ago, and calls then on the reactor in
// its Done.
func (c *timedClient) do(r *datapath.Request, x *datapath.Timing, ago time.Duration, then func()) {
	c.t.Helper()
	done := make(chan struct{})
	r.Timing = x
	r.Done = func(*datapath.Request) {
		then()
		close(done)
	}
	if err := c.reactor.Run(func(on *reactor.Reactor) {
		x.Begin(datapath.StageReceive, on.Tick()-int64(ago))
		x.Enter(datapath.StageQueue, on.Tick())
		c.queue.Submit(r)
	}); err != nil {
		c.t.Fatal(err)
	}
	<-done
}

func TestAnExportTimesFromArrivalToReply(t *testing.T) {
	r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
	inner := NewStats(memory(t, memdev.Config{}), StatsConfig{})
	d := NewStats(inner, StatsConfig{}) // which claims the request; the inner one measures for itself
	defer closeDevice(t, d)
	if info := d.Info(); !info.Has(datapath.FeatureTimed) {
		t.Error("a device that records timings does not say so")
	}
	c := &timedClient{t: t, reactor: r}
	run := func(f func()) {
		t.Helper()
		if err := r.Run(func(*reactor.Reactor) { f() }); err != nil {
			t.Fatal(err)
		}
	}
	run(func() {
		var err error
		if c.queue, err = datapath.Checked(d).OpenQueue(r, 4); err != nil {
			t.Error(err)
		}
	})
	var x, reply datapath.Timing
	request := write(block, 2)
	c.do(request, &x, 30*time.Millisecond, func() {
		reply = x
		x.Begin(datapath.StageQueue, 0) // the slot is used again
	})
	if o := d.Snapshot().Op(datapath.OpWrite); o.Count != 1 || o.Bytes != 2*block || o.InFlight != 0 || o.Latency.Count != 0 {
		t.Errorf("before the reply: %+v", o)
	}
	run(func() { reply.End(r.Tick() + int64(10*time.Millisecond)) })
	o := d.Snapshot().Op(datapath.OpWrite)
	if o.Latency.Count != 1 || sumOfStages(o) != o.Latency.Sum {
		t.Fatalf("after the reply: %d latencies, %v, stages %v", o.Latency.Count, o.Latency.Sum, sumOfStages(o))
	}
	if h := o.Stages[datapath.StageReceive]; h == nil || h.Sum < 30*time.Millisecond {
		t.Errorf("receive: %v", h)
	}
	if h := o.Stages[datapath.StageReply]; h == nil || h.Sum < 10*time.Millisecond {
		t.Errorf("reply: %v", h)
	}
	if o.Stages[datapath.StageDevice] == nil {
		t.Error("the device is missing")
	}
	// The inner one has it as a whole, from Submit to Done.
	if o := inner.Snapshot().Op(datapath.OpWrite); o.Count != 1 || o.Latency.Count != 1 || o.Latency.Sum >= 30*time.Millisecond || sumOfStages(o) != 0 {
		t.Errorf("inner: %+v", o)
	}
	run(func() {
		if err := c.queue.Close(); err != nil {
			t.Error(err)
		}
	})
	if again := d.Snapshot().Op(datapath.OpWrite); again.Latency.Count != 1 || again.Stages[datapath.StageReply] == nil {
		t.Error("what was counted went when the queue closed")
	}
}

func TestWithoutStagesLatencyIsMeasuredAllTheSame(t *testing.T) {
	r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
	d := NewStats(memory(t, memdev.Config{}), StatsConfig{NoStages: true})
	defer closeDevice(t, d)
	if info := d.Info(); info.Has(datapath.FeatureTimed) {
		t.Error("a device that records no timings says that it does")
	}
	c := devtest.NewClient(t, r, d, 8)
	c.Do(read(0, 1), read(0, 1))
	c.Close()
	if o := d.Snapshot().Op(datapath.OpRead); o.Count != 2 || o.Latency.Count != 2 || sumOfStages(o) != 0 {
		t.Errorf("%+v", o)
	}
}

func TestSnapshotsOfBusyAndStuckReactors(t *testing.T) {
	reactors := devtest.Reactors(t, reactor.EngineAuto, 2)
	d := NewStats(memory(t, memdev.Config{}), StatsConfig{})
	defer closeDevice(t, d)
	clients := []*devtest.Client{devtest.NewClient(t, reactors[0], d, 8), devtest.NewClient(t, reactors[1], d, 8)}
	for _, c := range clients {
		c.Do(read(0, 1))
	}
	if n := d.Snapshot().Op(datapath.OpRead).Count; n != 2 {
		t.Fatalf("%d reads, want 2", n)
	}
	clients[1].Do(read(0, 1))
	clients[0].Do(read(0, 1))
	free, stuck := make(chan struct{}), make(chan struct{})
	reactors[1].Post(reactor.TaskFunc(func(*reactor.Reactor) {
		close(stuck)
		<-free
	}))
	<-stuck
	// The one that answers has its two reads, the stuck one what it told before.
	if n := d.Snapshot().Op(datapath.OpRead).Count; n != 3 {
		t.Errorf("%d reads beside a stuck reactor, want 3", n)
	}
	close(free)
	for deadline := time.Now().Add(10 * time.Second); d.Snapshot().Op(datapath.OpRead).Count != 4; {
		if time.Now().After(deadline) {
			t.Fatal("the counts of a reactor that was stuck do not come")
		}
	}
	for _, c := range clients {
		c.Close()
	}
	if n := d.Snapshot().Op(datapath.OpRead).Count; n != 4 {
		t.Errorf("%d reads after all queues closed, want 4", n)
	}
}

func TestSlowRequestsAreHandedOverUpToABound(t *testing.T) {
	r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
	slow := NewSlowRequests(10 * time.Millisecond)
	lame := NewDelay(memory(t, memdev.Config{}), DelayConfig{Latency: map[datapath.Op]Latency{datapath.OpWrite: {Fixed: 15 * time.Millisecond}}})
	d := NewStats(lame, StatsConfig{Name: "vol", Slow: slow})
	defer closeDevice(t, d)
	const depth = 32
	c := devtest.NewClient(t, r, d, depth)
	c.Do(write(3*block, 2))
	got := <-slow.Waiting()
	if got.Name != "vol" || got.Op != datapath.OpWrite || got.Offset != 3*block || got.Length != 2*block || got.Status != datapath.StatusOK || got.Total < 15*time.Millisecond {
		t.Errorf("%+v", got)
	}
	var sum time.Duration
	stages := got.Stages()
	for _, s := range stages {
		sum += s.Time
	}
	if sum != got.Total || stages[len(stages)-1].Stage != datapath.StageDevice {
		t.Errorf("stages %v of %v", stages, got.Total)
	}
	var batch []*datapath.Request
	for range depth {
		batch = append(batch, write(0, 1))
	}
	for range slowWaiting/depth + 1 {
		c.Do(batch...)
	}
	if waiting, dropped := len(slow.Waiting()), slow.Dropped(); waiting+int(dropped) != slowWaiting+depth || waiting != slowWaiting {
		t.Errorf("%d wait and %d are dropped, want %d and %d", waiting, dropped, slowWaiting, depth)
	}
	c.Close()
}

// stream keeps depth requests of an export under way until count have ended.
type stream struct {
	on       *reactor.Reactor
	queue    datapath.Queue
	requests []datapath.Request
	timings  []datapath.Timing
	timed    bool
	ended    []*datapath.Request // of this turn
	reply    reactor.Deferred
	left     int
	under    int
	over     chan struct{}
}

func newStream(on *reactor.Reactor, d datapath.Device, depth int) (*stream, error) {
	info := d.Info()
	s := &stream{on: on, requests: make([]datapath.Request, depth), timings: make([]datapath.Timing, depth),
		timed: info.Has(datapath.FeatureTimed), ended: make([]*datapath.Request, 0, depth), over: make(chan struct{}, 1)}
	s.reply.Func = s.replied
	for i := range s.requests {
		s.requests[i] = datapath.Request{Op: datapath.OpRead, Offset: uint64(i) * block, Length: block, Buf: make([]byte, block), Tag: uint32(i), Done: s.done}
	}
	var err error
	if runErr := on.Run(func(*reactor.Reactor) { s.queue, err = d.OpenQueue(on, depth) }); runErr != nil {
		return nil, runErr
	}
	return s, err
}

// run does count requests.
func (s *stream) run(count int) {
	_ = s.on.Run(func(*reactor.Reactor) { // runs until the test ends
		s.left = count
		now := s.on.Tick()
		for i := range s.requests {
			s.submit(&s.requests[i], now)
		}
	})
	<-s.over
}

func (s *stream) submit(r *datapath.Request, now int64) {
	if s.left == 0 {
		return
	}
	s.left--
	s.under++
	if s.timed {
		r.Timing = &s.timings[r.Tag]
		r.Timing.Begin(datapath.StageReceive, now)
		r.Timing.Enter(datapath.StageQueue, now)
	}
	s.queue.Submit(r)
}

func (s *stream) done(r *datapath.Request) {
	s.ended = append(s.ended, r)
	s.on.Defer(&s.reply)
}

// replied is the end of a turn: replies go out in one call, the next requests come in
// with another.
func (s *stream) replied() {
	now := s.on.Tick()
	for _, r := range s.ended {
		s.timings[r.Tag].End(now)
	}
	s.under -= len(s.ended)
	for _, r := range s.ended {
		s.submit(r, now)
	}
	s.ended = s.ended[:0]
	if s.under == 0 {
		s.over <- struct{}{}
	}
}

func (s *stream) close() { _ = s.on.Run(func(*reactor.Reactor) { _ = s.queue.Close() }) }

// BenchmarkRequest is what counting a request costs: the difference to the device
// alone. The device does nothing, or copies 4 KiB.
func BenchmarkRequest(b *testing.B) {
	for _, device := range []struct {
		name string
		make func(b *testing.B) datapath.Device
	}{
		{"null", func(*testing.B) datapath.Device { return nulldev.New(8 << 20) }},
		{"memory", func(b *testing.B) datapath.Device { return memory(b, memdev.Config{}) }},
	} {
		for _, with := range []struct {
			name string
			wrap func(datapath.Device) datapath.Device
		}{
			{"alone", func(d datapath.Device) datapath.Device { return d }},
			{"counted", func(d datapath.Device) datapath.Device { return NewStats(d, StatsConfig{NoStages: true}) }},
			{"stages", func(d datapath.Device) datapath.Device {
				return NewStats(d, StatsConfig{Slow: NewSlowRequests(time.Second)})
			}},
		} {
			b.Run(device.name+"/"+with.name, func(b *testing.B) {
				d := with.wrap(device.make(b))
				r := devtest.Reactors(b, reactor.EngineAuto, 1)[0]
				s, err := newStream(r, d, 32)
				if err != nil {
					b.Fatal(err)
				}
				s.run(1000)
				b.ResetTimer()
				s.run(b.N)
				b.StopTimer()
				s.close()
				if err := d.Close(); err != nil {
					b.Error(err)
				}
			})
		}
	}
}
