package attach

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/internal/blockdev"
)

// host is where the kernel shows its devices. Tests have directories of their own.
type host struct {
	sys, dev, proc string
	// node tells the device number behind a device node: "43:0".
	node func(path string) (string, error)
	// claim opens a device so that nobody can mount it, or fails with EBUSY.
	claim func(path string) (claimed, error)
}

// claimed is a device that nobody can mount.
type claimed interface {
	Sync() error
	Close() error
}

func kernelHost() host {
	return host{sys: "/sys", dev: "/dev", proc: "/proc", node: deviceNumber, claim: claimDevice}
}

func deviceNumber(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return "no block device", nil
	}
	return fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)), nil
}

// claimDevice opens for reading only: udev looks at a device anew when a writer
// closes it.
func claimDevice(path string) (claimed, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
}

func (h *host) block(index Index, name ...string) string {
	return filepath.Join(append([]string{h.sys, "block", index.String()}, name...)...)
}

// text reads a file of sysfs; "" is one that is not there.
func text(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

// number reads a file of one number; 0 is one that is not there.
func number(path string) uint64 {
	n, err := strconv.ParseUint(strings.TrimSpace(text(path)), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// attached tells whether a device has a server: the driver shows the process that
// gave it one.
func (h *host) attached(index Index) bool {
	_, err := os.Stat(h.block(index, "pid"))
	return err == nil
}

// device describes an attached device. Errors: ErrNotAttached.
func (h *host) device(index Index) (Device, error) {
	d := Device{Index: index, Path: filepath.Join(h.dev, index.String())}
	if !h.attached(index) {
		return d, fmt.Errorf("%w: %s", ErrNotAttached, d.Path)
	}
	d.Backend = text(h.block(index, "backend"))
	d.PID = int(number(h.block(index, "pid")))
	d.Size = number(h.block(index, "size")) * 512 // sectors, whatever the block size
	d.BlockSize = uint32(number(h.block(index, "queue/logical_block_size")))
	d.ReadOnly = text(h.block(index, "ro")) == "1"
	d.Cached = text(h.block(index, "queue/write_cache")) == "write back"
	d.FUA = text(h.block(index, "queue/fua")) == "1"
	d.Discard = number(h.block(index, "queue/discard_max_bytes")) != 0
	d.Zeroes = number(h.block(index, "queue/write_zeroes_max_bytes")) != 0
	for _, n := range strings.Fields(text(h.block(index, "inflight"))) { // reads, writes
		count, _ := strconv.Atoi(n) // the kernel's own number
		d.InFlight += count
	}
	var err error
	if d.Mounts, d.Holders, err = h.users(index); err != nil {
		return d, fmt.Errorf("attach: %w", err)
	}
	return d, nil
}

// users tells who has a device mounted or made another device of it.
func (h *host) users(index Index) (mounts, holders []string, err error) {
	return blockdev.Host{Sys: h.sys, Dev: h.dev, Proc: h.proc}.Users(index.String())
}

// checkNode tells whether the device node leads to the device: one of a kernel that
// ran before, or of a container without devtmpfs, may not.
func (h *host) checkNode(index Index) error {
	path, want := filepath.Join(h.dev, index.String()), text(h.block(index, "dev"))
	if want == "" {
		return nil // not there yet; nothing to compare with
	}
	have, err := h.node(path)
	if errors.Is(err, fs.ErrNotExist) {
		have = "missing"
	} else if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	if have != want {
		return &StaleNodeError{Path: path, Have: have, Want: want}
	}
	return nil
}
