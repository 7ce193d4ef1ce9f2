package powerfail

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

const (
	dropRounds     = 4
	dropRoundsLong = 20
)

// dropWrites lets the disk drop what is written from some moment on, kills the
// daemon a little later, and wants what was promised before that moment.
func dropWrites(t *testing.T, fs string) {
	m := newMachine(t, fs)
	random := rand.New(rand.NewPCG(seed(t), 3))
	rounds := dropRounds
	if long() {
		rounds = dropRoundsLong
	}
	disk, _ := m.loop(0, diskSize)
	works := table("flakey", disk, "0", "180", "0")
	drops := table("flakey", disk, "0", "0", "180", "1", "drop_writes")
	change := func(to string) {
		t.Helper()
		m.must(run("dmsetup", "suspend", "--nolockfs", "disk"))
		m.must(run("dmsetup", "load", "disk", "--table", to))
		m.must(run("dmsetup", "resume", "disk"))
	}
	m.must(run("dmsetup", "create", "disk", "--table", works))
	m.create()
	begun := time.Now()
	var opened []time.Duration
	kept, late := 0, 0
	for round := range rounds {
		name := fmt.Sprintf("files-%d", round)
		dir := m.in(mountPoint + "/" + name)
		e, err := newExerciser(dir, random)
		m.must(err)
		stop, exercised, quiet := make(chan struct{}), make(chan struct{}), make(chan struct{})
		noise := rand.New(rand.NewPCG(random.Uint64(), 4))
		delay, after := time.Duration(1000+random.IntN(2000))*time.Millisecond, time.Duration(100+random.IntN(700))*time.Millisecond
		go func() { e.noise(stop, noise); close(quiet) }() // until stop, or the file system fails
		go func() {                                        // likewise
			defer close(exercised)
			for {
				select {
				case <-stop:
					return
				default:
				}
				if e.step() != nil {
					return
				}
			}
		}()
		time.Sleep(delay)
		promised := int(e.promised.Load())
		change(drops)
		last := int(e.begun.Load())
		time.Sleep(after)
		m.kill()
		m.disconnect("/dev/nbd0")
		close(stop)
		<-exercised
		<-quiet
		m.unmount()
		m.detached("/dev/nbd0")
		change(works)
		m.reboot()

		m.checkPool(fmt.Sprintf("after loss %d", round), false, diskPath)
		opened = append(opened, m.start())
		m.must(m.attach("data", "/dev/nbd0"))
		m.mount()
		if err := e.check(dir, promised, last); err != nil {
			t.Errorf("loss %d, step %d promised, %d begun: %v", round, promised, last, err)
		}
		kept, late = kept+promised, late+int(e.begun.Load())-last
		m.unmount()
		if err := m.fsck(); err != nil {
			t.Errorf("loss %d: %v", round, err)
		}
		if t.Failed() {
			return
		}
		m.mount()
		m.must(os.RemoveAll(dir)) // the next round needs the space
	}
	m.unmount()
	m.detach("/dev/nbd0")
	m.stop()
	m.checkPool("at the end", true, diskPath)
	t.Logf("%s: %d losses of power in %v: %d steps promised and kept, %d begun after the loss; ready: %s",
		fs, rounds, time.Since(begun).Round(time.Second), kept, late, percentiles(opened))
}
