package harness

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// kernelTarget is what a plan starts in the kernel, where no process serves it.
type kernelTarget interface {
	// Command is what made it, for the result.
	Command() []string
	// Written is what it gave to the device below it so far, in bytes; after Stop,
	// up to its end.
	Written() uint64
	// Stop takes it away, all of it, whatever state it is in. The error names what
	// could not be.
	Stop() error
}

// kernelSamplePeriod is longer than a process's: a sample reads one file for each
// thread of the kernel, some 200, in 1 to 2 ms.
const kernelSamplePeriod = 200 * time.Millisecond

// kthreadd starts all threads of the kernel, as their parent (kernel/kthread.c).
const kthreadd = 2

// kernelThreads adds up what the kernel's workers have used: kworker, which run
// what device mapper, loop and bufio queue, and the threads that those have of their
// own. Threads of the kernel come and go, and kthreadd does not wait for them, so
// the time of those that ended is remembered here.
type kernelThreads struct {
	proc  string             // the folder of /proc
	ended float64            // CPU seconds
	last  map[thread]float64 // of the last look
}

// thread is one thread of the kernel for ever.
type thread struct {
	id         int
	startTicks uint64
}

// use is what the workers have used, those that ended too. Memory of the kernel is
// nobody's.
func (k *kernelThreads) use() (cpuSeconds float64, residentBytes uint64) {
	text, err := os.ReadFile(fmt.Sprintf("%s/%d/task/%d/children", k.proc, kthreadd, kthreadd))
	if err != nil {
		return k.ended, 0
	}
	now := map[thread]float64{}
	for _, field := range strings.Fields(string(text)) {
		line, err := os.ReadFile(k.proc + "/" + field + "/stat")
		if err != nil || !isWorker(string(line)) {
			continue // ended, or of no interest
		}
		id, err := strconv.Atoi(field)
		if err != nil {
			continue
		}
		if s, err := parseStat(string(line)); err == nil {
			now[thread{id, s.startTicks}] = s.cpuSeconds
		}
	}
	for t, seconds := range k.last {
		if _, runs := now[t]; !runs {
			k.ended += seconds
		}
	}
	k.last = now
	cpuSeconds = k.ended
	for _, seconds := range now {
		cpuSeconds += seconds
	}
	return cpuSeconds, 0
}

// isWorker tells from a stat line whether a thread of the kernel works for block
// devices. A kworker's name goes on with what it does: kworker/u8:1-dm-thin.
func isWorker(stat string) bool {
	_, name, found := strings.Cut(stat, "(")
	if !found {
		return false
	}
	for _, prefix := range []string{"kworker/", "loop", "dm-", "dm_"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// startKernelSampler follows the kernel's workers until Stop.
func startKernelSampler() *sampler {
	return startUse((&kernelThreads{proc: "/proc"}).use, kernelSamplePeriod)
}

// kernelSeen tells whether the kernel's threads are to be seen in a folder of
// /proc. They are not in a process namespace of a container.
func kernelSeen(proc string) bool {
	name, err := os.ReadFile(fmt.Sprintf("%s/%d/comm", proc, kthreadd))
	return err == nil && strings.TrimSpace(string(name)) == "kthreadd"
}
