package flusher

import (
	"errors"
	"log/slog"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
)

// TestBecomeMakesEveryThreadOne, or says once why not. The first call of a process
// counts, so all of it is one test.
func TestBecomeMakesEveryThreadOne(t *testing.T) {
	defer goleak.VerifyNone(t)
	var log strings.Builder
	logger := slog.New(slog.NewTextHandler(&log, nil))
	r, err := reactor.Start(reactor.Config{Name: "r", Poll: reactor.PollOff, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	Become([]*reactor.Reactor{r}, logger)
	is := func() bool {
		n, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
		return n == 1 && err == nil
	}
	var onReactor bool
	if err := r.Run(func(*reactor.Reactor) { onReactor = is() }); err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	switch here := is(); {
	case errors.Is(process.err, syscall.EPERM):
		if here || onReactor || !strings.Contains(log.String(), "CAP_SYS_RESOURCE") {
			t.Errorf("without the right: %v here, %v on the reactor\n%s", here, onReactor, log.String())
		}
	case errors.Is(process.err, syscall.ENOTSUP): // with cgo
		if here || onReactor == strings.Contains(log.String(), "CAP_SYS_RESOURCE") {
			t.Errorf("with cgo: %v here, %v on the reactor\n%s", here, onReactor, log.String())
		}
	default:
		if !here || !onReactor || log.Len() > 0 {
			t.Errorf("%v, %v here, %v on the reactor\n%s", process.err, here, onReactor, log.String())
		}
	}
	said := strings.Count(log.String(), "\n")
	for range 2 {
		Become(nil, logger)
	}
	if n := strings.Count(log.String(), "\n"); n > 1 || said == 1 && n != 1 || process.err != nil && n != 1 {
		t.Errorf("said %d times\n%s", n, log.String())
	}
}
