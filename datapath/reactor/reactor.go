package reactor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/buf"
	"github.com/ashlar-storage/ashlar/datapath/ring"
	"github.com/ashlar-storage/ashlar/internal/invariant"
)

// EngineKind names what carries a reactor.
type EngineKind string

// The engines.
const (
	EngineAuto  EngineKind = "auto"  // io_uring where it works, else epoll
	EngineRing  EngineKind = "ring"  // io_uring or an error
	EngineEpoll EngineKind = "epoll" // epoll and worker threads
)

// Config says how a reactor runs. The zero value is a good default.
type Config struct {
	Name   string     // for logs and metrics; "reactor" when empty
	Engine EngineKind // EngineAuto when empty
	Poll   PollMode   // PollAuto when empty
	CPU    int        // 1 + the CPU to pin the thread to; 0: not pinned

	BufferBytes int64 // bound of the buffer arena; 64 MiB when 0
	Entries     int   // submission entries of the ring; 1024 when 0
	Workers     int   // worker threads for calls that sleep; 32 when 0
	IODepthMax  int   // bound of all reservations together; 65536 when 0, which suits hundreds of attached devices

	Log *slog.Logger // slog.Default() when nil
}

func (c *Config) setDefaults() {
	set := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	set(&c.Entries, 1024)
	set(&c.Workers, 32)
	set(&c.IODepthMax, ioDepthLimit)
	if c.Name == "" {
		c.Name = "reactor"
	}
	if c.Engine == "" {
		c.Engine = EngineAuto
	}
	if c.Poll == "" {
		c.Poll = PollAuto
	}
	if c.BufferBytes == 0 {
		c.BufferBytes = 64 << 20
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
}

const (
	mailboxCapacity = 1024
	mailboxBatch    = mailboxCapacity // drained fully: one message a wake-up hung a job once
	deferRounds     = 64              // rounds of deferred work in one turn; the rest runs next turn
)

// ErrStopped is the answer of a reactor that no longer runs.
var ErrStopped = errors.New("reactor: stopped")

// engine is what a reactor needs from the kernel. All methods run on the
// reactor's thread.
type engine interface {
	kind() EngineKind
	describe() string
	commands() bool
	watch(w *Watch) error
	unwatch(w *Watch)
	wantWrite(w *Watch)
	submit(io *IO)
	addFile(f *File)
	removeFile(f *File)
	addBuffers(count int) (first int, ok bool)
	removeBuffers(first, count int)
	growBuffers(index int, memory []byte)
	reserve(total int)
	// poll hands over submissions and runs what has completed, without sleeping.
	// It returns how many events it ran.
	poll() int
	// wait is poll, but sleeps up to timeout nanoseconds (negative: no limit)
	// for the first event.
	wait(timeout int64) int
	// nap is wait with a limit of at most napMax, hidden from the Go scheduler where
	// the engine can. It may end sooner without an event.
	nap(limit int64) int
	close()
}

// Reactor is one polling thread.
type Reactor struct {
	config  Config // immutable
	log     *slog.Logger
	start   time.Time // origin of the clock
	done    chan struct{}
	wakeFD  int // eventfd
	mailbox *ring.MPSC[Task]
	// finished carries operations that a worker ended back to the reactor.
	finished *ring.MPSC[*IO]

	asleep  atomic.Bool // the thread is, or is about to be, asleep in the kernel
	stopped atomic.Bool // no message is taken any more

	observed atomic.Int64 // service time in nanoseconds, by ObserveService; 0: none

	// Owned by the reactor.
	engine    engine
	arena     *buf.Arena
	workers   *workers
	timers    timerHeap
	pollers   []*Poller
	deferred  []*Deferred
	spare     []*Deferred
	buffers   []*Deferred // who waits for buffers
	wakeWatch Watch
	wakeBytes [8]byte
	wakesOwed uint64 // wake-ups that were claimed and not yet read from wakeFD
	now       int64
	recent    int64 // the last reading of the clock by Tick
	reserved  int
	inflight  int
	commands  int // OpCommands in flight, which are not in inflight
	sleepless int // owners that need every turn
	idle      idlePolicy
	found     uint64 // messages, timers, completions and reports so far
	worked    int64  // when the last turn that found something, and the lull after it, ended
	lull      int64  // nanoseconds by which the next turn is put off

	stats statistics
}

// Task is a message to a reactor.
type Task interface{ RunTask(r *Reactor) }

// TaskFunc makes a function a Task.
type TaskFunc func(r *Reactor)

// RunTask implements Task.
func (f TaskFunc) RunTask(r *Reactor) { f(r) }

// Deferred runs a function later in the current turn, once however often it is
// deferred: the way to gather many small pieces of work into one system call.
// It is made once and reused.
type Deferred struct {
	Func   func()
	queued bool
}

// Poller is called every turn. Poll reports whether it found work; as long as one
// does, the reactor does not sleep.
type Poller struct{ Poll func() bool }

// ioDepthLimit is the most that a reactor reserves: 16 bytes each are made at once.
const ioDepthLimit = 1 << 16

// Start makes the thread, the ring and the memory of a reactor.
func Start(c Config) (*Reactor, error) {
	c.setDefaults()
	r := &Reactor{
		config:   c,
		log:      c.Log.With("reactor", c.Name),
		start:    time.Now(),
		done:     make(chan struct{}),
		mailbox:  ring.NewMPSC[Task](mailboxCapacity),
		finished: ring.NewMPSC[*IO](ioDepthLimit),
	}
	if c.IODepthMax > ioDepthLimit {
		return nil, fmt.Errorf("reactor %s: depth %d: at most %d", c.Name, c.IODepthMax, ioDepthLimit)
	}
	switch c.Engine {
	case EngineAuto, EngineRing, EngineEpoll:
	default:
		return nil, fmt.Errorf("reactor %s: unknown engine %q (auto, ring, epoll)", c.Name, c.Engine)
	}
	var err error
	if r.idle, err = newIdlePolicy(c.Poll); err != nil {
		return nil, fmt.Errorf("reactor %s: %w", c.Name, err)
	}
	if r.wakeFD, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC); err != nil {
		return nil, fmt.Errorf("reactor %s: eventfd: %w", c.Name, err)
	}
	if r.arena, err = buf.NewArena(c.BufferBytes); err != nil {
		_ = unix.Close(r.wakeFD) // unused
		return nil, fmt.Errorf("reactor %s: %w", c.Name, err)
	}
	r.workers = newWorkers(r, c.IODepthMax)
	ready := make(chan error)
	go r.thread(ready)
	if err := <-ready; err != nil {
		<-r.done
		_ = unix.Close(r.wakeFD) // unused
		_ = r.arena.Close()      // unused
		return nil, fmt.Errorf("reactor %s: %w", c.Name, err)
	}
	return r, nil
}

// Stop ends the thread and waits for it. The owners have closed their watches and
// waited for their operations before; messages not yet run are dropped, and Run
// answers ErrStopped for them.
func (r *Reactor) Stop() {
	if r.stopped.CompareAndSwap(false, true) {
		r.wake()
	}
	<-r.done
}

// thread is the reactor's goroutine; it ends on Stop.
func (r *Reactor) thread(ready chan<- error) {
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, and its affinity with it
	defer close(r.done)
	if r.config.CPU > 0 {
		var set unix.CPUSet
		set.Set(r.config.CPU - 1)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			ready <- fmt.Errorf("pin to CPU %d: %w", r.config.CPU-1, err)
			return
		}
	}
	var err error
	if r.engine, err = openEngine(r); err != nil {
		ready <- err
		return
	}
	r.arena.OnGrow = r.engine.growBuffers
	r.wakeWatch = Watch{FD: r.wakeFD, Ready: func(uint32) { r.readWakes() }}
	if err := r.engine.watch(&r.wakeWatch); err != nil {
		r.engine.close()
		ready <- err
		return
	}
	if used, err := threadCPU(unix.Gettid()); err == nil { // Go gives threads that have worked before
		r.stats.used.Store(int64(used))
	}
	r.stats.thread.Store(int64(unix.Gettid()))
	r.log.Log(context.Background(), slog.LevelDebug, "reactor started", "engine", r.engine.describe(), "poll", r.config.Poll, "cpu", r.config.CPU-1)
	ready <- nil
	r.loop()
	r.engine.unwatch(&r.wakeWatch)
	r.engine.poll()
	r.engine.close()
	r.workers.stop()
	for { // messages that came too late
		t, ok := r.mailbox.Pop()
		if !ok {
			break
		}
		if c, ok := t.(*runTask); ok {
			c.finish(ErrStopped)
		}
	}
	for r.wakesOwed > 0 { // whoever claimed one writes soon; not into a descriptor that is another's by then
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(r.wakeFD), Events: unix.POLLIN}}, -1) // interrupted: again
		r.readWakes()
	}
	_ = unix.Close(r.wakeFD) // an eventfd holds nothing
	if err := r.arena.Close(); err != nil {
		r.log.Error("reactor stopped with buffers in use", "error", err)
	}
}

func (r *Reactor) loop() {
	busySince := r.clock()
	r.now = busySince
	for !r.stopped.Load() {
		if r.lull > 0 {
			r.waitLull(r.now)
			r.worked = r.now
		}
		found := r.turn()
		now := r.clock()
		r.stats.turns.Add(1)
		if gap := now - r.now; gap > 0 {
			r.stats.recordGap(gap)
		}
		r.now = now
		if found {
			r.worked = now
			continue
		}
		r.stats.busy.Add(uint64(now - busySince))
		r.rest(now)
		busySince = r.clock()
		r.now = busySince
	}
}

// turn does one round of everything that is ready and reports whether there was
// anything.
func (r *Reactor) turn() bool {
	found := false
	for range mailboxBatch {
		t, ok := r.mailbox.Pop()
		if !ok {
			break
		}
		r.found++
		t.RunTask(r)
		found = true
	}
	if len(r.timers) > 0 && r.runTimers(r.now) {
		r.found++
		found = true
	}
	for _, p := range r.pollers {
		if p.Poll() {
			found = true
		}
	}
	if r.reapWorkers() {
		found = true
	}
	if n := r.engine.poll(); n > 0 {
		r.found += uint64(n)
		found = true
	}
	if r.runDeferred() {
		found = true
	}
	return found
}

func (r *Reactor) reapWorkers() (found bool) {
	for r.workers.busy > 0 {
		io, ok := r.finished.Pop()
		if !ok {
			break
		}
		r.workers.busy--
		r.finish(io)
		found = true
	}
	return found
}

func (r *Reactor) runDeferred() (found bool) {
	for range deferRounds {
		if len(r.deferred) == 0 {
			return found
		}
		found = true
		batch := r.deferred
		r.deferred = r.spare[:0]
		for i, d := range batch {
			batch[i] = nil
			d.queued = false
			d.Func()
		}
		r.spare = batch[:0]
	}
	return found
}

// Lull puts the next turn off by d: for an owner whose work comes in one by one, faster
// than turns take, and costs less when some has gathered. Messages and timers end it, and
// there is none while an operation is in flight, or where the reactor does not poll. The
// reactor spins, and counts it so.
//
// Bounds: d delays everyone on the reactor; see Activity for how to find that there is
// nobody else.
// Context: on the reactor.
func (r *Reactor) Lull(d time.Duration) { r.lull = int64(d) }

// Activity is how much the reactor had found before this turn (messages, timers, completions,
// reports of descriptors), and for how long it had then found nothing more. They tell
// an owner whether the reactor has anything else to do, and how long its own work let it wait.
//
// Context: on the reactor.
func (r *Reactor) Activity() (found uint64, idle time.Duration) {
	return r.found, time.Duration(r.now - r.worked)
}

func (r *Reactor) waitLull(now int64) {
	end := now + r.lull
	r.lull = 0
	if r.inflight > 0 || r.commands > 0 || len(r.deferred) > 0 || r.config.Poll == PollOff {
		return
	}
	if t := r.untilTimer(now); t >= 0 {
		end = min(end, now+t)
	}
	for r.now < end && r.mailbox.Empty() && r.finished.Empty() && !r.stopped.Load() {
		r.now = r.clock()
	}
	r.stats.spun.Add(uint64(r.now - now))
}

// rest spins, then sleeps, until something arrives. Nothing is deferred.
func (r *Reactor) rest(now int64) {
	r.idle.observed = r.observed.Load()
	budget := r.idle.budget(r.inflight > 0)
	r.stats.spinBudget.Store(budget)
	r.stats.service.Store(r.idle.serviceTime())
	if budget > 0 {
		end := now + budget
		for {
			if r.turn() {
				t := r.clock()
				r.worked = t
				r.stats.spun.Add(uint64(t - now))
				r.idle.spinHit(t - now)
				return
			}
			t := r.clock()
			r.now = t
			if r.stopped.Load() {
				return
			}
			if t >= end {
				r.stats.spun.Add(uint64(t - now))
				now = t
				break
			}
		}
		r.idle.spinMissed()
		if r.config.Poll == PollBusy {
			return
		}
	}
	if r.sleepless > 0 {
		return
	}
	timeout := r.untilTimer(now)
	if timeout == 0 {
		return
	}
	r.asleep.Store(true)
	if !r.mailbox.Empty() || !r.finished.Empty() || r.stopped.Load() {
		r.awake()
		return
	}
	r.stats.sleepBegins(now)
	nap := r.idle.nap()
	if nap > 0 && (timeout < 0 || timeout > 2*nap) { // the second of two naps may end so late
		came := 0
		for r.now = now; came == 0 && r.now-now < nap; {
			came = r.engine.nap(nap)
		}
		if came == 0 {
			r.engine.wait(r.untilTimer(r.now)) // sleep for real
		}
	} else {
		r.engine.wait(timeout)
	}
	r.awake()
	t := r.stats.sleepEnds(r.clock)
	r.idle.slept(t - now)
	r.now = t
	r.runDeferred()
	r.worked = t
}

// awake ends a sleep. When someone claimed the wake-up, their write to wakeFD is
// on its way.
func (r *Reactor) awake() {
	if !r.asleep.CompareAndSwap(true, false) {
		r.wakesOwed++
	}
}

// readWakes takes the wake-ups written so far.
func (r *Reactor) readWakes() {
	if n, err := unix.Read(r.wakeFD, r.wakeBytes[:]); n == len(r.wakeBytes) && err == nil {
		r.wakesOwed -= binary.NativeEndian.Uint64(r.wakeBytes[:])
	}
}

// wake makes a sleeping reactor look at its queues.
func (r *Reactor) wake() {
	if r.asleep.CompareAndSwap(true, false) {
		one := [8]byte{1}
		_, _ = unix.Write(r.wakeFD, one[:]) // fails only when the counter is full: awake already
	}
}

// complete is called by workers.
func (r *Reactor) complete(io *IO) {
	for !r.finished.Push(io) {
		runtime.Gosched() // cannot be: it holds every operation that Reserve admits
	}
	r.wake()
}

// clock is the reactor's time in nanoseconds since it started.
func (r *Reactor) clock() int64 { return int64(time.Since(r.start)) }

// Now is the time of the current turn in nanoseconds since the reactor started,
// read once a turn. Reactor only.
func (r *Reactor) Now() int64 { return r.now }

// Clock is the present time on the same scale as Now, at the cost of reading
// the clock. Any goroutine.
func (r *Reactor) Clock() int64 { return r.clock() }

// Tick reads the clock, on the same scale as Now, and has Recent return that until
// the next reading. Reactor only.
func (r *Reactor) Tick() int64 {
	r.recent = r.clock()
	return r.recent
}

// Recent is the last reading of the clock, by Tick or by the loop: for those whom a
// time of some microseconds ago serves, at no cost. Reactor only.
func (r *Reactor) Recent() int64 { return max(r.recent, r.now) }

// ObserveService has the idle policy use d as the service time of the device, as
// measured by someone who sees more of it than the reactor does; 0: what the reactor
// learns itself. Any goroutine.
func (r *Reactor) ObserveService(d time.Duration) { r.observed.Store(int64(max(d, 0))) }

// CPU is the CPU the thread is pinned to, if it is. Any goroutine.
func (r *Reactor) CPU() (cpu int, pinned bool) { return r.config.CPU - 1, r.config.CPU > 0 }

// Name is the name it was started with.
func (r *Reactor) Name() string { return r.config.Name }

// Log is the reactor's logger.
func (r *Reactor) Log() *slog.Logger { return r.log }

// Engine is the engine in force. Any goroutine.
func (r *Reactor) Engine() EngineKind { return r.engine.kind() }

// Commands reports whether OpCommand works: on the io_uring engine, since Linux
// 5.19. Any goroutine.
func (r *Reactor) Commands() bool { return r.engine.commands() }

// Describe is the engine in force with its details, for people. Any goroutine.
func (r *Reactor) Describe() string { return r.engine.describe() }

// Buffers is the arena of the reactor. Reactor only.
func (r *Reactor) Buffers() *buf.Arena { return r.arena }

// Post sends a message. It waits while the mailbox is full and is for ordinary
// goroutines; a reactor uses TryPost to another. It reports false when the
// reactor has stopped.
func (r *Reactor) Post(t Task) bool {
	for !r.stopped.Load() {
		if r.TryPost(t) {
			return true
		}
		r.wake()
		time.Sleep(50 * time.Microsecond) // a full mailbox is drained in one turn
	}
	return false
}

// TryPost sends a message unless the mailbox is full. Any goroutine, any reactor.
func (r *Reactor) TryPost(t Task) bool {
	if !r.mailbox.Push(t) {
		return false
	}
	r.wake()
	return true
}

type runTask struct {
	fn   func(r *Reactor)
	once sync.Once
	err  error
	done chan struct{}
}

func (t *runTask) RunTask(r *Reactor) {
	t.fn(r)
	t.finish(nil)
}

func (t *runTask) finish(err error) {
	t.once.Do(func() {
		t.err = err
		close(t.done)
	})
}

// Run executes fn on the reactor and waits for it. It is for ordinary
// goroutines, never for a reactor.
func (r *Reactor) Run(fn func(r *Reactor)) error {
	t := &runTask{fn: fn, done: make(chan struct{})}
	if !r.Post(t) {
		return ErrStopped
	}
	select {
	case <-t.done:
	case <-r.done:
		t.finish(ErrStopped) // no-op when it did run
	}
	<-t.done
	return t.err
}

// Defer runs d later in this turn. Reactor only.
func (r *Reactor) Defer(d *Deferred) {
	if !d.queued {
		d.queued = true
		r.deferred = append(r.deferred, d)
	}
}

// WaitBuffers runs d, once, after buffers were freed with FreeBuffer. Reactor only.
func (r *Reactor) WaitBuffers(d *Deferred) {
	for _, w := range r.buffers {
		if w == d {
			return
		}
	}
	r.buffers = append(r.buffers, d)
}

// CancelWait undoes WaitBuffers. Reactor only.
func (r *Reactor) CancelWait(d *Deferred) {
	for i, w := range r.buffers {
		if w == d {
			r.buffers = append(r.buffers[:i], r.buffers[i+1:]...)
			return
		}
	}
}

// FreeBuffer gives b back to the arena and lets those who wait for buffers try
// again. Reactor only.
func (r *Reactor) FreeBuffer(b []byte) {
	r.arena.Free(b)
	if len(r.buffers) > 0 {
		for i, d := range r.buffers {
			r.buffers[i] = nil
			r.Defer(d)
		}
		r.buffers = r.buffers[:0]
	}
}

// AddPoller calls p every turn. Reactor only.
func (r *Reactor) AddPoller(p *Poller) { r.pollers = append(r.pollers, p) }

// RemovePoller undoes AddPoller. Reactor only, not from within a Poll.
func (r *Reactor) RemovePoller(p *Poller) {
	for i, q := range r.pollers {
		if q == p {
			r.pollers = append(r.pollers[:i], r.pollers[i+1:]...)
			return
		}
	}
}

// NeedTurns keeps the reactor from sleeping until as many ReleaseTurns: for
// work that can only be found by looking. Reactor only.
func (r *Reactor) NeedTurns() { r.sleepless++ }

// ReleaseTurns undoes one NeedTurns.
func (r *Reactor) ReleaseTurns() { r.sleepless-- }

// Reserve sets room aside for n operations in flight, so that SubmitIO never
// fails. Reactor only.
func (r *Reactor) Reserve(n int) error {
	if r.reserved+n > r.config.IODepthMax {
		return fmt.Errorf("reactor %s: %d operations reserved, %d more exceed the bound of %d", r.config.Name, r.reserved, n, r.config.IODepthMax)
	}
	r.reserved += n
	r.engine.reserve(r.reserved)
	return nil
}

// Release gives back what Reserve set aside. Reactor only.
func (r *Reactor) Release(n int) { r.reserved -= n }

// SubmitIO starts io. It never blocks; io.Done runs later. Reactor only.
func (r *Reactor) SubmitIO(io *IO) {
	if invariant.Enabled && r.inflight+r.commands >= r.reserved { // arguments are made only for a failure
		invariant.Check(false, "reactor %s: %d operations in flight, %d reserved", r.config.Name, r.inflight+r.commands, r.reserved)
	}
	if io.Op == OpCommand {
		r.commands++
		r.engine.submit(io)
		return
	}
	r.inflight++
	io.submitted = r.now
	if io.Op == OpFunc {
		r.workers.submit(io)
		return
	}
	r.engine.submit(io)
}

// finish ends io on the reactor.
func (r *Reactor) finish(io *IO) {
	switch {
	case io.Op == OpCommand:
		r.commands--
	default:
		r.inflight--
		if io.Op <= OpWrite {
			r.idle.served(r.now - io.submitted)
		}
	}
	r.stats.completions.Add(1)
	io.Done(io)
}

// AddFile registers fd for use in IO.File. Reactor only.
func (r *Reactor) AddFile(fd int) *File {
	f := &File{fd: fd, fixed: -1}
	r.engine.addFile(f)
	return f
}

// RemoveFile undoes AddFile; nothing of f is in flight. Reactor only.
func (r *Reactor) RemoveFile(f *File) { r.engine.removeFile(f) }

// AddBuffers takes count places in a row of the ring's table of registered buffers, for
// a driver that registers memory of the kernel's own there (ublk), and returns the first.
// It reports false where the engine or the kernel has no such table, or it is full.
// Reactor only.
func (r *Reactor) AddBuffers(count int) (first int, ok bool) { return r.engine.addBuffers(count) }

// RemoveBuffers undoes AddBuffers, and lets go of what the driver has registered there. No
// operation on the places is in flight, and the driver registers nothing there any more.
// Reactor only.
func (r *Reactor) RemoveBuffers(first, count int) { r.engine.removeBuffers(first, count) }

// Watch is a descriptor whose readiness a reactor reports.
type Watch struct {
	FD int
	// Ready is told the epoll event bits. Reports may be spurious, and one
	// arrives per change, not as long as the state lasts: read until the
	// socket has no more.
	Ready func(events uint32)

	slot   uint32
	armed  bool
	events uint32
}

// AddWatch reports when w.FD is readable or hung up. Reactor only.
func (r *Reactor) AddWatch(w *Watch) error { return r.engine.watch(w) }

// WantWrite reports once when w.FD can be written, as an EPOLLOUT. Reactor only.
func (r *Reactor) WantWrite(w *Watch) { r.engine.wantWrite(w) }

// RemoveWatch ends the reports of w. The descriptor may be closed afterwards.
// Reactor only.
func (r *Reactor) RemoveWatch(w *Watch) { r.engine.unwatch(w) }
