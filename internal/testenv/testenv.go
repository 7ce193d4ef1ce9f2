// Package testenv tells a test what the machine under it can do.
//
// Each Require function skips the test when something is missing; the skip line
// says what is missing and which make target brings it. Inside that target the
// same absence fails the test, so a job whose purpose is to run it cannot
// quietly skip it: the target names itself in the environment variable
// [TargetVariable].
package testenv

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TargetVariable holds the names, separated by spaces, of the make targets that
// are running and therefore promise what they set up.
const TargetVariable = "ASHLAR_TARGET"

// missing skips t, or fails it when target is running and has promised what is
// missing.
func missing(t testing.TB, target, what string) {
	t.Helper()
	if slices.Contains(strings.Fields(os.Getenv(TargetVariable)), target) {
		t.Fatalf("needs %s, which make %s must provide", what, target)
	}
	t.Skipf("needs %s (make %s does not skip it)", what, target)
}

// RequireRoot skips t unless it runs as root.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "test-root", "root")
	}
}

// RequireCommand returns the path of a command, and skips t when it is not
// installed; debianPackage is the package that has it.
func RequireCommand(t testing.TB, name, debianPackage string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(t, "interop", fmt.Sprintf("the command %s (Debian package %s)", name, debianPackage))
	}
	return path
}

// RequireIOURing skips t when the kernel refuses io_uring to this process.
func RequireIOURing(t testing.TB) {
	t.Helper()
	if err := probeIOURing(); err != nil {
		missing(t, "test-uml", fmt.Sprintf("io_uring (Linux 5.1, not barred by seccomp or kernel.io_uring_disabled; here: %v)", err))
	}
}

// RequireUblk skips t unless the kernel has the driver ublk_drv and this process may
// make devices with it.
func RequireUblk(t testing.TB) {
	t.Helper()
	if _, err := os.Stat("/dev/ublk-control"); err != nil || os.Geteuid() != 0 {
		missing(t, "test-vm", "root and the driver ublk_drv (Linux 6.0; modprobe ublk_drv)")
	}
}

// RequireBPF skips t unless this process may load eBPF programs that read kernel
// memory, and the kernel describes its types for them.
func RequireBPF(t testing.TB) {
	t.Helper()
	const bpf, perfmon, admin = 39, 38, 21 // linux/capability.h
	status, _ := os.ReadFile("/proc/thread-self/status")
	var effective uint64
	if _, after, ok := strings.Cut(string(status), "\nCapEff:"); ok {
		_, _ = fmt.Sscanf(after, "%x", &effective) // else there are none
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil || effective>>admin&1 == 0 && effective>>bpf&(effective>>perfmon)&1 == 0 {
		missing(t, "test-vm", "CAP_BPF, CAP_PERFMON and a kernel with BTF (/sys/kernel/btf/vmlinux)")
	}
}

const fdWait = 2 * time.Second // goroutines that close a descriptor after their connection ended need a moment

// CheckFDs fails t when it ends with file descriptors open that were not open
// at the call. Call it first, so that its check runs after all other clean-up.
// It must not be used in tests that run in parallel.
func CheckFDs(t testing.TB) {
	t.Helper()
	if _, err := os.Stat("/proc/self/fd"); err != nil {
		missing(t, "test", "/proc")
	}
	if r, w, err := os.Pipe(); err == nil { // opens the Go runtime's poller, which stays
		_, _ = r.Close(), w.Close() // nothing was written
	}
	before := openFDs()
	t.Cleanup(func() {
		var leaked []string
		for deadline := time.Now().Add(fdWait); ; time.Sleep(10 * time.Millisecond) {
			leaked = leaked[:0]
			for fd, target := range openFDs() {
				if was, ok := before[fd]; !ok || was != target {
					leaked = append(leaked, fd+" -> "+target)
				}
			}
			if len(leaked) == 0 {
				return
			}
			if time.Now().After(deadline) {
				break
			}
		}
		slices.Sort(leaked)
		t.Errorf("file descriptors left open:\n\t%s", strings.Join(leaked, "\n\t"))
	})
}

// openFDs maps each descriptor of this process to what it is.
func openFDs() map[string]string {
	fds := make(map[string]string)
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fds
	}
	for _, entry := range entries {
		target, err := os.Readlink(filepath.Join("/proc/self/fd", entry.Name()))
		if err != nil {
			continue // the directory's own descriptor, closed by now
		}
		fds[entry.Name()] = target
	}
	return fds
}
