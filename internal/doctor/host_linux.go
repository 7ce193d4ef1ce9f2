package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath/uring"
	"github.com/ashlar-storage/ashlar/engine/pool"
	"github.com/ashlar-storage/ashlar/nbd/attach"
	"github.com/ashlar-storage/ashlar/ublk"
)

// daemonWait bounds the question whether there is a daemon.
const daemonWait = 2 * time.Second

// This is the host that the process runs on.
func This() *Host {
	return &Host{
		Root: os.DirFS("/"), UID: os.Geteuid(),
		Release: release, Ring: openRing, Ublk: ublk.Supported, NBD: openNBD, Limit: limit, Filesystem: filesystem,
		Direct: writeDirect, Reflink: shareBlock, Writable: writable, ReadDisk: readDisk, Listen: listen, Daemon: askDaemon, Clock: clock, Foreign: pool.Foreign,
	}
}

func release() (release, machine string, err error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", "", err
	}
	return unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Machine[:]), nil
}

func openRing() error {
	runtime.LockOSThread() // a ring belongs to its thread
	defer runtime.UnlockOSThread()
	r, err := uring.Open(uring.Config{Entries: 8})
	if err != nil {
		return err
	}
	return r.Close()
}

// openNBD does not ask a kernel that has not loaded the driver: it would load it.
func openNBD() error {
	if _, err := os.Stat("/sys/module/nbd"); errors.Is(err, os.ErrNotExist) {
		return attach.ErrNoDriver
	}
	d, err := attach.Open(attach.Options{})
	if err != nil {
		return err
	}
	return d.Close()
}

func limit(r Resource) (soft, hard uint64, err error) {
	var l unix.Rlimit
	if err := unix.Getrlimit(map[Resource]int{Memlock: unix.RLIMIT_MEMLOCK, Nofile: unix.RLIMIT_NOFILE}[r], &l); err != nil {
		return 0, 0, err
	}
	return l.Cur, l.Max, nil // RLIM_INFINITY is Unlimited
}

func filesystem(dir string) (Filesystem, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return Filesystem{}, err
	}
	return Filesystem{
		Magic: int64(uint32(s.Type)), Size: s.Blocks * uint64(s.Bsize), Free: s.Bavail * uint64(s.Bsize), ReadOnly: s.Flags&unix.ST_RDONLY != 0,
	}, nil
}

// unnamed makes a file without a name, which is gone when it is closed. File systems
// that have none get one with a name, which is taken away at once.
func unnamed(dir string, flags int) (int, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC|flags, 0o600)
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return fd, err
	}
	return named(dir, flags)
}

// named makes a file and takes its name away.
func named(dir string, flags int) (int, error) {
	name := fmt.Sprintf("%s/.ashlar-doctor-%d", dir, os.Getpid())
	fd, err := unix.Open(name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC|flags, 0o600)
	if err != nil {
		return -1, err
	}
	if err := unix.Unlink(name); err != nil {
		_ = unix.Close(fd) // nothing was written
		return -1, err
	}
	return fd, nil
}

func writable(dir string) error {
	fd, err := unnamed(dir, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func writeDirect(dir string) error {
	fd, err := unnamed(dir, unix.O_DIRECT)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()                                                                // gone with it
	block, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON) // aligned
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(block) }() // ours
	_, err = unix.Pwrite(fd, block, 0)
	return err
}

func shareBlock(dir string) error {
	from, err := unnamed(dir, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(from) }() // gone with it
	to, err := unnamed(dir, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(to) }() // gone with it
	if _, err := unix.Pwrite(from, make([]byte, 4096), 0); err != nil {
		return err
	}
	return unix.IoctlFileClone(to, from)
}

func readDisk(device string, b []byte) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // read-only
	_, err = f.ReadAt(b, 0)
	return err
}

func listen(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	return l.Close()
}

func askDaemon(socket string) (string, error) {
	if _, err := os.Stat(socket); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), daemonWait)
	defer cancel()
	c, err := control.Dial(ctx, "unix://"+socket, control.Options{})
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }() // nothing is in flight
	info, err := c.Node.Info(ctx, new(controlpb.InfoRequest))
	return info.GetVersion(), err
}

func clock() (bool, error) {
	var t unix.Timex
	if _, err := unix.Adjtimex(&t); err != nil {
		return false, err
	}
	return t.Status&unix.STA_UNSYNC == 0, nil
}
