package main

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// pinThread ties the calling goroutine to its thread and the thread to the CPUs.
func pinThread(cpus []int) error {
	runtime.LockOSThread()
	if len(cpus) == 0 {
		return nil
	}
	var set unix.CPUSet
	for _, cpu := range cpus {
		set.Set(cpu)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin to CPUs %v: %w", cpus, err)
	}
	return nil
}

// cpuSeconds is the CPU time of this process so far.
func cpuSeconds() float64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}
