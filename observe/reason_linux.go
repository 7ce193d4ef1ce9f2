//go:build amd64 || arm64

package observe

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

var (
	errNoBTF        = errors.New("the kernel does not describe its types: it has no BTF (CONFIG_DEBUG_INFO_BTF)")
	errNoTracepoint = errors.New("this kernel has no tracepoint")
	errNoDriver     = errors.New("nothing to see yet")
)

// capabilities that Linux 5.8 and later want for programs of this kind; those who have
// CAP_SYS_ADMIN need none of them.
var capabilities = []struct {
	number int
	name   string
}{{unix.CAP_BPF, "CAP_BPF"}, {unix.CAP_PERFMON, "CAP_PERFMON"}}

// missingRights names the capabilities that this process lacks.
func missingRights() error {
	effective, err := effectiveCapabilities()
	if err != nil || effective&(1<<unix.CAP_SYS_ADMIN) != 0 {
		return nil // loading will tell
	}
	var missing []string
	for _, c := range capabilities {
		if effective&(1<<c.number) == 0 {
			missing = append(missing, c.name)
		}
	}
	switch len(missing) {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("%s is missing: run as root, or give the service AmbientCapabilities=CAP_BPF CAP_PERFMON", missing[0])
	}
	return fmt.Errorf("%s are missing: run as root, or give the service AmbientCapabilities=CAP_BPF CAP_PERFMON", strings.Join(missing, " and "))
}

func effectiveCapabilities() (uint64, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return 0, err
	}
	return uint64(data[1].Effective)<<32 | uint64(data[0].Effective), nil
}

// reasonOf puts an error of loading into a sentence for the operator.
func reasonOf(err error) string {
	var refused *ebpf.VerifierError
	switch {
	case errors.As(err, &refused):
		return fmt.Sprintf("the kernel's verifier refuses a program, please report it: %v", refused)
	case errors.Is(err, os.ErrPermission):
		if lockdown, _ := os.ReadFile("/sys/kernel/security/lockdown"); strings.Contains(string(lockdown), "[confidentiality]") { // absent: no lockdown
			return "the kernel is locked down (confidentiality): it lets nobody read its memory"
		}
		return "the kernel does not allow it: a container's user namespace or seccomp filter stands before it"
	case errors.Is(err, unix.ENOSYS):
		return "the kernel has no eBPF (CONFIG_BPF_SYSCALL)"
	case errors.Is(err, unix.ENOMEM):
		return "there is no memory for its counters"
	}
	return err.Error()
}
