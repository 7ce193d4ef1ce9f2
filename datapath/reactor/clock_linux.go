package reactor

import (
	"time"

	"golang.org/x/sys/unix"
)

// threadCPU is the CPU time that a thread of this process has used. The id of its
// clock is made of the thread's (clock_getcpuclockid(3), as the C library does it).
func threadCPU(thread int) (time.Duration, error) {
	const perThread, scheduled = 4, 2
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^thread<<3|perThread|scheduled), &t); err != nil {
		return 0, err
	}
	return time.Duration(t.Nano()), nil
}
