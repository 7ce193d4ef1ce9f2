package csi

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestStorm makes many volumes at once, each for the whole of its life, and kills
// the driver and the daemon all the while. Nothing that was written may be lost, and
// nothing may be left.
func TestStorm(t *testing.T) {
	count, killDriverEvery, killDaemonEvery := 16, 700*time.Millisecond, 3*time.Second
	if os.Getenv("ASHLAR_TEST_LONG") != "" {
		count = 100
	}
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("ASHLAR_TEST_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("ASHLAR_TEST_SEED=%d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	w := newWorld(t, "40GiB")
	const workers = 8
	var group sync.WaitGroup
	next := make(chan int)
	for range workers {
		group.Go(func() { // ends with next
			for i := range next {
				if err := w.life(i); err != nil {
					t.Errorf("volume %d: %v", i, err)
				}
			}
		})
	}
	stop := make(chan struct{})
	var killer sync.WaitGroup
	kills := [2]int{}
	killer.Go(func() { // ends with stop
		for daemonAt := time.Now().Add(killDaemonEvery); ; {
			select {
			case <-stop:
				return
			case <-time.After(killDriverEvery/2 + time.Duration(random.Int64N(int64(killDriverEvery)))):
			}
			// On a slow machine no call would come to its end.
			for before := w.succeeded.Load(); w.succeeded.Load() < before+workers/2; time.Sleep(10 * time.Millisecond) {
				select {
				case <-stop:
					return
				default:
				}
			}
			w.killDriver()
			kills[0]++
			if time.Now().After(daemonAt) {
				w.killDaemon()
				kills[1]++
				daemonAt = time.Now().Add(killDaemonEvery)
			}
		}
	})
	began := time.Now()
	for i := range count {
		next <- i
	}
	close(next)
	group.Wait()
	close(stop)
	killer.Wait()
	t.Logf("%d volumes in %v; the driver was killed %d times, the daemon %d times", count, time.Since(began).Round(time.Millisecond), kills[0], kills[1])
	if kills[0] == 0 {
		t.Error("the driver was never killed")
	}
}

// patiently repeats what failed, as the kubelet does whatever the error.
func (v *volume) patiently(what string, call func() error) error {
	for deadline := time.Now().Add(startLimit); ; time.Sleep(100 * time.Millisecond) {
		err := call()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: %w", what, err)
		}
		v.w.t.Logf("%s: %s, once more: %v", v.name, what, err)
	}
}

// life is what one volume goes through in the storm.
func (w *world) life(i int) error {
	capability := mountCapability([]string{"ext4", "xfs"}[i%2])
	if i%3 == 2 {
		capability = blockCapability()
	}
	const size, written = 320 * mib, mib + 4093
	name := fmt.Sprintf("pvc-storm-%d", i)
	v := w.volume(name, capability)
	if err := v.patiently("use", func() error { return v.use(size, nil) }); err != nil {
		return err
	}
	if err := v.write(name, written); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	s, err := v.snapshot("snap-" + name)
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	if err := v.expand(size + 64*mib); err != nil && (mayGrowExt4(w.t) || status.Code(err) != codes.FailedPrecondition) {
		return fmt.Errorf("expand: %w", err)
	}
	if err := v.write("more "+name, written); err != nil {
		return fmt.Errorf("write again: %w", err)
	}
	if i%4 == 0 {
		c := w.volume("of-"+name, capability)
		if err := c.patiently("use", func() error { return c.use(size+64*mib, fromSnapshot(s.GetSnapshotId())) }); err != nil {
			return fmt.Errorf("copy: %w", err)
		}
		if err := c.read(name, written); err != nil {
			return fmt.Errorf("copy: %w", err)
		}
		if err := c.patiently("drop", c.drop); err != nil {
			return fmt.Errorf("copy: %w", err)
		}
	}
	if i%4 == 1 {
		c := w.volume("clone-"+name, capability)
		if err := c.create(size+64*mib, fromVolume(v.id)); err != nil {
			return fmt.Errorf("clone: %w", err)
		}
		if err := c.delete(); err != nil {
			return fmt.Errorf("clone: %w", err)
		}
	}
	if err := v.patiently("release", v.release); err != nil {
		return err
	}
	if err := v.patiently("stage again", v.stage); err != nil {
		return err
	}
	if err := v.publish(v.target, false); err != nil {
		return fmt.Errorf("publish again: %w", err)
	}
	if err := v.read("more "+name, written); err != nil {
		return err
	}
	if err := w.deleteSnapshot(s.GetSnapshotId()); err != nil {
		return fmt.Errorf("delete snapshot: %w", err)
	}
	return v.patiently("drop", v.drop)
}
