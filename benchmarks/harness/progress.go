package harness

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// overheadGuess is what starting and stopping a server and fio adds to a run.
const overheadGuess = time.Second

// progress shows where a benchmark is. On a terminal it keeps one line up to
// date, elsewhere it prints one line per run.
type progress struct {
	out      io.Writer
	terminal bool
	quit     chan struct{}
	ended    sync.WaitGroup

	mu      sync.Mutex
	label   string
	done    int
	total   int
	planned time.Duration // of all runs
	began   time.Time
}

func newProgress(out io.Writer, terminal bool) *progress {
	return &progress{out: out, terminal: terminal, quit: make(chan struct{})}
}

func (p *progress) Begin(total int, planned time.Duration) {
	p.mu.Lock()
	p.total, p.planned, p.began = total, planned+time.Duration(total)*overheadGuess, time.Now()
	p.mu.Unlock()
	if p.out == nil || !p.terminal {
		return
	}
	p.ended.Add(1)
	go func() { // ends when quit closes
		defer p.ended.Done()
		ticker := time.NewTicker(500 * time.Millisecond)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				p.draw()
			case <-p.quit:
				fmt.Fprint(p.out, "\r\x1b[K")
				return
			}
		}
	}()
}

func (p *progress) Step(label string) {
	p.mu.Lock()
	p.label = label
	p.mu.Unlock()
	if p.out != nil && p.terminal {
		p.draw()
	}
}

func (p *progress) Done(outcome string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done++
	if p.out != nil && !p.terminal {
		fmt.Fprintf(p.out, "[%d/%d] %s  %s  ETA %s\n", p.done, p.total, p.label, outcome, p.etaLocked(time.Now()))
	}
}

func (p *progress) draw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.out, "\r\x1b[K[%d/%d] %s  ETA %s", p.done+1, p.total, p.label, p.etaLocked(time.Now()))
}

// etaLocked trusts the plan at first and the pace so far later.
func (p *progress) etaLocked(now time.Time) time.Duration {
	passed := now.Sub(p.began)
	left := p.planned - passed
	if p.done > 0 {
		left = time.Duration(float64(passed)/float64(p.done)*float64(p.total)) - passed
	}
	return max(left, 0).Round(time.Second)
}

func (p *progress) Stop() {
	close(p.quit)
	p.ended.Wait()
}
