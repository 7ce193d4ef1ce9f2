//go:build linux

package reactor

import (
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func socketpair(t testing.TB) (ours, theirs int) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return pair[0], pair[1]
}

// drain reads until there is no more.
func drain(fd int) (n int, ended bool) {
	var b [256]byte
	for {
		k, err := unix.Read(fd, b[:])
		if k <= 0 || err != nil {
			return n, k == 0 && err == nil
		}
		n += k
	}
}

func write(t testing.TB, fd, n int) {
	t.Helper()
	if k, err := unix.Write(fd, make([]byte, n)); k != n || err != nil {
		t.Errorf("write: %d, %v", k, err)
	}
}

func closeFD(t testing.TB, fd int) {
	t.Helper()
	if err := unix.Close(fd); err != nil {
		t.Errorf("close %d: %v", fd, err)
	}
}

func TestWatchReportsData(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		ours, theirs := socketpair(t)
		write(t, theirs, 3) // before the watch: a present state is reported too
		got := make(chan int, 100)
		reports, ended := 0, make(chan struct{})
		w := &Watch{FD: ours}
		w.Ready = func(events uint32) {
			reports++
			n, end := drain(ours)
			if n > 0 {
				got <- n
			}
			if end {
				if events&(unix.EPOLLIN|unix.EPOLLHUP|unix.EPOLLRDHUP) == 0 {
					t.Errorf("end of stream came with events %#x", events)
				}
				select {
				case <-ended:
				default:
					close(ended)
				}
			}
		}
		run(t, r, func(r *Reactor) {
			if err := r.AddWatch(w); err != nil {
				t.Error(err)
			}
		})
		total := <-got
		for range 100 {
			write(t, theirs, 5)
			total += <-got
		}
		if total != 503 {
			t.Errorf("%d bytes arrived, want 503", total)
		}
		before := 0
		run(t, r, func(*Reactor) { before = reports })
		time.Sleep(20 * time.Millisecond)
		run(t, r, func(*Reactor) {
			if reports > before+1 {
				t.Errorf("%d reports without a change", reports-before)
			}
		})
		closeFD(t, theirs)
		await(t, ended, "the end of the stream")
		run(t, r, func(*Reactor) { before = reports })
		turns := r.Stats().Turns
		time.Sleep(50 * time.Millisecond)
		run(t, r, func(r *Reactor) {
			if reports > before+5 || r.Stats().Turns-turns > 50 {
				t.Errorf("a hung-up socket was reported %d times in %d turns", reports-before, r.Stats().Turns-turns)
			}
			r.RemoveWatch(w)
		})
		closeFD(t, ours)
	})
}

func TestDataIsReportedThoughNotAllWasRead(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		ours, theirs := socketpair(t)
		reported := make(chan struct{}, 1000)
		w := &Watch{FD: ours, Ready: func(uint32) { reported <- struct{}{} }}
		run(t, r, func(r *Reactor) {
			if err := r.AddWatch(w); err != nil {
				t.Error(err)
			}
		})
		for range 5 {
			write(t, theirs, 1)
			select {
			case <-reported:
			case <-time.After(10 * time.Second):
				t.Fatal("new data behind unread data was not reported")
			}
		}
		run(t, r, func(r *Reactor) { r.RemoveWatch(w) })
		closeFD(t, ours)
		closeFD(t, theirs)
	})
}

func TestWantWriteReportsRoomOnce(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		ours, theirs := socketpair(t)
		writable := make(chan struct{}, 100)
		w := &Watch{FD: ours, Ready: func(events uint32) {
			if events&unix.EPOLLOUT != 0 {
				writable <- struct{}{}
			}
		}}
		run(t, r, func(r *Reactor) {
			if err := r.AddWatch(w); err != nil {
				t.Error(err)
			}
			r.WantWrite(w)
			r.WantWrite(w)
		})
		<-writable
		time.Sleep(10 * time.Millisecond)
		if len(writable) > 0 {
			t.Error("room was reported more than once")
		}
		for round := range 5 {
			for {
				if _, err := unix.Write(ours, make([]byte, 4096)); err != nil {
					break
				}
			}
			run(t, r, func(r *Reactor) { r.WantWrite(w) })
			time.Sleep(5 * time.Millisecond)
			if len(writable) > 0 {
				t.Fatalf("round %d: room was reported on a full socket", round)
			}
			drain(theirs)
			select {
			case <-writable:
			case <-time.After(10 * time.Second):
				t.Fatalf("round %d: room was not reported", round)
			}
		}
		run(t, r, func(r *Reactor) { r.RemoveWatch(w) })
		closeFD(t, ours)
		closeFD(t, theirs)
	})
}

func TestRemovedWatchIsSilent(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		for i := range 200 {
			ours, theirs := socketpair(t)
			removed := false
			w := &Watch{FD: ours}
			w.Ready = func(uint32) {
				if removed {
					t.Error("a removed watch was reported")
				}
				drain(ours)
			}
			run(t, r, func(r *Reactor) {
				if err := r.AddWatch(w); err != nil {
					t.Error(err)
				}
				if i%3 == 0 {
					r.WantWrite(w)
				}
			})
			write(t, theirs, 10)
			run(t, r, func(r *Reactor) {
				r.RemoveWatch(w)
				removed = true
				closeFD(t, ours)
			})
			_, _ = unix.Write(theirs, []byte("late")) // nobody listens
			closeFD(t, theirs)
		}
		run(t, r, func(*Reactor) {})
	})
}

func TestWatchIsRemovedInsideReady(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		ours, theirs := socketpair(t)
		other, otherTheirs := socketpair(t)
		done := make(chan struct{})
		reports := 0
		var w, second Watch
		second = Watch{FD: other, Ready: func(uint32) {
			if n, _ := drain(other); n > 0 {
				close(done)
			}
		}}
		w = Watch{FD: ours, Ready: func(uint32) {
			reports++
			r.RemoveWatch(&w)
			if err := r.AddWatch(&second); err != nil { // takes the same slot
				t.Error(err)
			}
		}}
		run(t, r, func(r *Reactor) {
			if err := r.AddWatch(&w); err != nil {
				t.Error(err)
			}
		})
		write(t, theirs, 1)
		write(t, otherTheirs, 1)
		await(t, done, "the second watch")
		write(t, theirs, 1)
		run(t, r, func(r *Reactor) {
			if reports != 1 {
				t.Errorf("%d reports, want 1", reports)
			}
			r.RemoveWatch(&second)
		})
		for _, fd := range []int{ours, theirs, other, otherTheirs} {
			closeFD(t, fd)
		}
	})
}

func TestBadDescriptorsEndInAReportOrAnError(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		r := begin(t, c)
		reported := make(chan struct{}, 10)
		w := &Watch{FD: 1 << 20, Ready: func(uint32) { reported <- struct{}{} }}
		var err error
		run(t, r, func(r *Reactor) { err = r.AddWatch(w) })
		if err == nil {
			select {
			case <-reported:
			case <-time.After(10 * time.Second):
				t.Error("neither an error nor a report")
			}
		}
		run(t, r, func(r *Reactor) { r.RemoveWatch(w) })
	})
}

// peer is one end of a stream that a reactor watches, and how much went through.
type peer struct {
	watch    Watch
	theirs   int
	received int
	removed  bool
}

// TestWatchesComeAndGoUnderLoad opens and closes connections while others carry
// data, so that slots and descriptors are used again at once.
func TestWatchesComeAndGoUnderLoad(t *testing.T) {
	each(t, func(t *testing.T, c Config) {
		const seed, peers = 11, 24
		rng := rand.New(rand.NewPCG(seed, 0))
		r := begin(t, c)
		add := func() *peer {
			p := &peer{}
			p.watch.FD, p.theirs = socketpair(t)
			p.watch.Ready = func(uint32) {
				if p.removed {
					t.Error("a removed watch was reported")
				}
				n, _ := drain(p.watch.FD)
				p.received += n
			}
			run(t, r, func(r *Reactor) {
				if err := r.AddWatch(&p.watch); err != nil {
					t.Error(err)
				}
				if rng.IntN(3) == 0 {
					r.WantWrite(&p.watch)
				}
			})
			return p
		}
		remove := func(p *peer, sent int) {
			for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Microsecond) {
				received := 0
				run(t, r, func(*Reactor) { received = p.received })
				if received == sent {
					break
				}
				if time.Now().After(deadline) {
					t.Errorf("seed %d: %d of %d bytes were reported", seed, received, sent)
					break
				}
			}
			if rng.IntN(2) == 0 {
				write(t, p.theirs, 1) // in the middle of a report
			}
			run(t, r, func(r *Reactor) {
				r.RemoveWatch(&p.watch)
				p.removed = true
				closeFD(t, p.watch.FD)
			})
			closeFD(t, p.theirs)
		}
		var live [peers]*peer
		var sent [peers]int
		for range 3000 {
			i := rng.IntN(peers)
			switch {
			case live[i] == nil:
				live[i], sent[i] = add(), 0
			case rng.IntN(12) == 0:
				remove(live[i], sent[i])
				live[i] = nil
			default:
				n := 1 + rng.IntN(300)
				write(t, live[i].theirs, n)
				sent[i] += n
			}
			if t.Failed() {
				return
			}
		}
		for i, p := range live {
			if p != nil {
				remove(p, sent[i])
			}
		}
	})
}
