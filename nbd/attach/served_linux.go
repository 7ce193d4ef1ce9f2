package attach

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// servedWait is how long a server may take to replace a connection that died: it hears of
// it at once, and tries again within half a second (paceDefault).
const servedWait = time.Second

// Served tells whether a device has a server, which the kernel has no answer for: it
// shows who attached a device, who may be gone and replaced. So it is offered a
// connection whose other end is closed. A kernel whose connections live takes none; one
// that lost some takes it, finds it dead, and says so to the server, which replaces it.
// What nobody replaces is a device without a server. No request is lost by it, since
// nothing can be sent on such a connection.
//
// A device whose server answers slowly, or not at all, has one. It takes CAP_SYS_ADMIN,
// and up to a second.
//
// Errors: ErrNotAttached, ErrPermission.
func (d *Driver) Served(index Index) (bool, error) {
	if !d.host.attached(index) {
		return false, fmt.Errorf("%w: %v", ErrNotAttached, index)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("attach: socket pair: %w", err)
	}
	_ = unix.Close(pair[1]) // nothing was sent
	var st unix.Stat_t
	if err = unix.Fstat(pair[0], &st); err == nil {
		err = d.change(&parameters{index: &index, backend: d.host.backend(index), sockets: []int{pair[0]}})
	}
	_ = unix.Close(pair[0]) // the kernel has a reference of its own, where it took it
	if err != nil {
		return false, err
	}
	for deadline := time.Now().Add(servedWait); ; time.Sleep(poll) {
		if !d.host.socket(st.Ino) {
			return true, nil
		}
		if time.Now().After(deadline) {
			return false, nil
		}
	}
}

func (h *host) backend(index Index) string { return text(h.block(index, "backend")) }

// socket tells whether a unix socket of this network namespace is there still, whoever
// has it. The table is that of unix(7): the inode is the seventh field of a line.
func (h *host) socket(inode uint64) bool {
	want := strconv.FormatUint(inode, 10)
	for line := range strings.Lines(text(filepath.Join(h.proc, "self/net/unix"))) {
		if fields := strings.Fields(line); len(fields) >= 7 && fields[6] == want {
			return true
		}
	}
	return false
}
