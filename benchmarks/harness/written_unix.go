//go:build unix

package harness

import (
	"os/exec"
	"syscall"
)

// bytesWritten is what an ended process gave to block devices in its life. Linux
// counts it in units of 512 bytes (getrusage(2), ru_oublock): direct I/O where it
// is submitted, buffered writes where pages become dirty, threads together.
func bytesWritten(cmd *exec.Cmd) uint64 {
	use, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok || use.Oublock < 0 {
		return 0
	}
	return uint64(use.Oublock) * 512
}
