package powerfail

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/test/powerfail/writelog"
)

const (
	replaySteps  = 90
	replayFirst  = 16 // points from the first on, and then others at random; every one in long runs
	replayOthers = 24

	thorough = 8 // every so many points, the check reads all data too, after an orderly end

	logSize = 1 << 30
	cowSize = 256 << 20
)

// replay is the run in the guest: a load on a logged disk, then the log up to one
// point after the other.
type replay struct {
	*machine
	files  *exerciser
	random *rand.Rand
	seen   map[string]int // how many points had what
}

func replayLog(t *testing.T, fs string) {
	r := &replay{machine: newMachine(t, fs), random: rand.New(rand.NewPCG(seed(t), 1)), seen: map[string]int{}}
	disk, _ := r.loop(0, diskSize)
	logDevice, logFile := r.loop(1, logSize)
	r.must(run("dmsetup", "create", "disk", "--table", table("log-writes", disk, logDevice)))
	begun := time.Now()
	r.load()
	r.remove()
	f, err := os.Open(logFile)
	r.must(err)
	log, err := writelog.Read(f)
	r.must(err)
	t.Logf("%d steps in %v: %d entries in the log", len(r.files.steps), time.Since(begun).Round(time.Second), len(log.Entries))
	r.replay(log)
}

func (r *replay) load() {
	r.t.Helper()
	r.create()
	e, err := newExerciser(r.in(mountPoint+"/files"), r.random)
	r.must(err)
	e.promise = func(step int) error { return run("dmsetup", "message", "disk", "0", "mark", strconv.Itoa(step)) }
	r.files = e
	r.must(e.promise(0))
	stop, stopped := make(chan struct{}), make(chan struct{})
	noise := rand.New(rand.NewPCG(r.random.Uint64(), 2))
	go func() { e.noise(stop, noise); close(stopped) }() // until stop
	for step := range replaySteps {
		switch step {
		case replaySteps / 6:
			r.must(r.keep("s0"))
		case replaySteps / 3:
			r.must(r.keep("s1"))
		case replaySteps / 2:
			r.must(e.do(deedOn{what: "delete snapshot s0", gone: "s0"}, func() error {
				_, err := r.try("snapshot", "delete", "data@s0", "--yes")
				return err
			}))
		}
		r.must(e.step())
	}
	close(stop)
	<-stopped
	r.unmount()
	r.detach("/dev/nbd0")
	r.stop()
}

// keep takes a snapshot of the frozen file system.
func (r *replay) keep(name string) error {
	return r.files.do(deedOn{what: "snapshot " + name, made: name}, func() error {
		return r.frozen(func() error {
			_, err := r.try("snapshot", "create", "data@"+name)
			return err
		})
	})
}

// point is a state of the disk: all entries before end; then, of those before more,
// the FUA writes and any part of the others, as they were in the disk's cache.
type point struct {
	end, more int
	promised  int
}

// points picks states of the disk at which the file system was there.
func (r *replay) points(log *writelog.Log) (picked []point, all int) {
	var points []point
	promised := -1
	for i := range log.Entries {
		e := &log.Entries[i]
		if n, err := strconv.Atoi(e.Text); e.Flags&writelog.Mark != 0 && err == nil {
			promised = n
			if len(points) > 0 && !slices.ContainsFunc(log.Entries[points[len(points)-1].end:i], func(e writelog.Entry) bool { return e.Writes() }) {
				points[len(points)-1].promised, points[len(points)-1].end = n, i+1 // nothing happened on the way here
			}
		}
		if e.Durable() && promised >= 0 {
			points = append(points, point{end: i + 1, promised: promised})
		}
	}
	all = len(points)
	first, others := replayFirst, replayOthers
	if long() {
		first = all
	}
	rest := points[min(first, all):]
	picked = slices.Clone(points[:all-len(rest)])
	for _, i := range r.random.Perm(len(rest))[:min(others, len(rest))] {
		picked = append(picked, rest[i])
	}
	slices.SortFunc(picked, func(a, b point) int { return a.end - b.end })
	for i := range picked {
		if p := &picked[i]; i%2 == 1 {
			p.more = p.end
			for p.more < len(log.Entries) && log.Entries[p.more].Flags&writelog.Flush == 0 {
				if n, err := strconv.Atoi(log.Entries[p.more].Text); err == nil {
					p.promised = n // what lies before it was durable then, by FUA
				}
				p.more++
			}
		}
	}
	return picked, all
}

// target is a file that is a disk.
type target struct{ *os.File }

func (d target) Discard(offset, length int64) error {
	return unix.Fallocate(int(d.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
}

// hole is a target in a sparse file.
type hole struct{ target }

func (d hole) Discard(offset, length int64) error {
	return unix.Fallocate(int(d.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
}

func (r *replay) replay(log *writelog.Log) {
	r.t.Helper()
	base, baseFile := r.loop(2, diskSize)
	cow, _ := r.loop(3, cowSize)
	f, err := os.OpenFile(baseFile, os.O_RDWR, 0)
	r.must(err)
	picked, all := r.points(log)
	begun, done := time.Now(), 0
	var opened []time.Duration
	for i, p := range picked {
		for ; done < p.end; done++ {
			r.must(log.Apply(hole{target{f}}, &log.Entries[done]))
		}
		// The state lives in a device of its own: what recovery writes is forgotten.
		r.must(run("dmsetup", "create", "disk", "--table", table("snapshot", base, cow, "N", "8")))
		r.cached(log, p)
		r.reboot()
		opened = append(opened, r.verify(p, i%thorough == thorough-1))
		r.remove()
		if r.t.Failed() {
			r.t.Fatalf("at entry %d of %d (with a part of those up to %d), step %d promised", p.end, len(log.Entries), p.more, p.promised)
		}
	}
	r.t.Logf("%s: %d of %d points replayed in %v; ready: %s", r.fs, len(picked), all, time.Since(begun).Round(time.Second), percentiles(opened))
	r.t.Logf("%s: %v", r.fs, r.seen)
}

// cached writes what of the disk's cache got through at a point.
func (r *replay) cached(log *writelog.Log, p point) {
	r.t.Helper()
	if p.more <= p.end {
		return
	}
	f, err := os.OpenFile(diskPath, os.O_RDWR, 0)
	r.must(err)
	whole := r.random.IntN(100) // per cent that got through; differs from point to point
	for i := p.end; i < p.more; i++ {
		e := &log.Entries[i]
		switch {
		case e.Flags&writelog.FUA != 0 || r.random.IntN(100) < whole:
			r.must(log.Apply(target{f}, e))
		case r.random.IntN(4) == 0: // torn: any of its sectors
			r.seen["torn writes"]++
			for at := int64(0); at < e.Length; at += log.SectorSize {
				if r.random.IntN(2) == 0 {
					r.must(log.ApplyPart(target{f}, e, at, log.SectorSize))
				}
			}
		default:
			r.seen["lost writes"]++
		}
	}
	r.must(errors.Join(f.Sync(), f.Close()))
}

// verify opens what is on the disk and wants all that was promised.
func (r *replay) verify(p point, thoroughly bool) time.Duration {
	r.t.Helper()
	r.checkPool("before it is opened", false, diskPath)
	took := r.start()
	r.must(r.attach("data", "/dev/nbd0"))
	r.mount()
	report := func(what string, err error) {
		if err != nil {
			r.t.Errorf("%s: %v", what, err)
		}
	}
	report("files", r.files.check(r.in(mountPoint+"/files"), p.promised, p.promised+1))
	r.unmount()
	report("fsck", r.fsck())
	for i, d := range r.files.steps {
		step := i + 1
		if d.made == "" || step > p.promised {
			continue
		}
		gone := slices.IndexFunc(r.files.steps, func(g deedOn) bool { return g.gone == d.made })
		if gone < 0 || gone+1 > p.promised+1 {
			report(d.what, r.snapshot(d.made, r.files.history, "files", step))
			r.seen["snapshots compared"]++
		}
	}
	r.detach("/dev/nbd0")
	if thoroughly {
		r.stop()
		r.checkPool("after an orderly end", true, diskPath)
		return took
	}
	r.kill()
	return took
}

// ---- the host's side ------------------------------------------------------------

func TestReplayedLogsHoldWhatWasPromised(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			t.Parallel()
			guest(t, "replay", fs)
		})
	}
}

func TestDroppedWritesLoseNothingPromised(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			t.Parallel()
			guest(t, "drop", fs)
		})
	}
}

// TestInGuest is what guest runs.
func TestInGuest(t *testing.T) {
	kind, fs := os.Getenv("ASHLAR_GUEST"), os.Getenv("ASHLAR_GUEST_FS")
	switch kind {
	case "":
		t.Skip("runs in the guest of the other tests (make test-powerfail)")
	case "replay":
		replayLog(t, fs)
	case "drop":
		dropWrites(t, fs)
	default:
		t.Fatal(fmt.Errorf("nothing is called %q", kind))
	}
}
