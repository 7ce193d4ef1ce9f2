package flusher

import (
	"log/slog"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

var process struct {
	once sync.Once
	err  error // why not every thread is one
	told sync.Once
}

// Become makes the process an I/O flusher, all its threads, and so those they make. Not
// those of the reactors alone: the runtime stops them while another thread waits. In a
// program built with cgo there is no other way than the reactors, and the rest stays as
// it is.
//
// Where that is not allowed, the log has it, once.
func Become(reactors []*reactor.Reactor, log *slog.Logger) {
	process.once.Do(func() {
		if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0); errno != 0 {
			process.err = errno // ENOTSUP with cgo
		}
	})
	failed := process.err
	if failed == nil {
		return
	}
	if len(reactors) > 0 {
		failed = nil
	}
	for _, r := range reactors {
		_ = r.Run(func(*reactor.Reactor) { // a reactor that stopped serves nobody
			if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
				failed = err
			}
		})
	}
	if failed != nil {
		process.told.Do(func() {
			log.Warn("the process may wait for a device that waits for it when memory is short (PR_SET_IO_FLUSHER needs CAP_SYS_RESOURCE)", "error", failed)
		})
	}
}
