package fuse

import (
	"log/slog"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

var flusher struct {
	once sync.Once
	all  bool // every thread of the process is one
	told sync.Once
}

// becomeFlusher makes the process an I/O flusher: memory it asks for is never freed by
// writing dirty pages back, which may be pages of a device that waits for this very
// process. Not the reactors alone: the runtime stops them while another thread waits.
//
// Threads are made by threads, and are what those are.
// Where that is not allowed, the log has it, once.
func becomeFlusher(reactors []*reactor.Reactor, log *slog.Logger) {
	flusher.once.Do(func() {
		_, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0)
		flusher.all = errno == 0 // ENOTSUP with cgo
	})
	if flusher.all {
		return
	}
	var failed error
	for _, r := range reactors {
		_ = r.Run(func(*reactor.Reactor) { // a reactor that stopped serves nobody
			if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
				failed = err
			}
		})
	}
	if failed != nil {
		flusher.told.Do(func() {
			log.Warn("the process may wait for its own device when memory is short (PR_SET_IO_FLUSHER needs CAP_SYS_RESOURCE)", "error", failed)
		})
	}
}
