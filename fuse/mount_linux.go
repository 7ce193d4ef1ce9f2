package fuse

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/internal/blockdev"
)

const (
	devicePath   = "/dev/fuse"
	mountType    = "fuse.ashlar"
	mountInfo    = "/proc/self/mountinfo"
	initWait     = 10 * time.Second // for INIT, which the kernel sends with mount(2)
	unmountWait  = 5 * time.Second  // for the loop driver to let go of the file
	pollInterval = 5 * time.Millisecond
	probeWait    = time.Second // for an answer of a mount that may be dead
)

// mounted is a mount of ours as mountinfo shows it.
type mounted struct {
	name       string
	file       string
	connection uint32 // minor number of the mount's device
}

// mounts are the mounts of ours in this mount namespace.
func mounts() ([]mounted, error) {
	table, err := os.ReadFile(mountInfo)
	if err != nil {
		return nil, fmt.Errorf("fuse: %w", err)
	}
	return parseMounts(string(table)), nil
}

// parseMounts reads mountinfo (proc_pid_mountinfo(5)):
//
//	36 35 0:98 / /run/ashlar/fuse/v rw,noatime shared:1 - fuse.ashlar v rw,user_id=0
//
// A mount that is shown twice, as bind mounts are, is told once.
func parseMounts(table string) (list []mounted) {
	for line := range strings.Lines(table) {
		head, tail, ok := strings.Cut(line, " - ")
		fields, rest := strings.Fields(head), strings.Fields(tail)
		if !ok || len(fields) < 5 || len(rest) < 2 || rest[0] != mountType || fields[3] != "/" {
			continue
		}
		_, minor, _ := strings.Cut(fields[2], ":")
		number, err := strconv.ParseUint(minor, 10, 32)
		if err != nil {
			continue
		}
		m := mounted{name: blockdev.Unescape(rest[1]), file: blockdev.Unescape(fields[4]), connection: uint32(number)}
		if !slices.ContainsFunc(list, func(o mounted) bool { return o.connection == m.connection }) {
			list = append(list, m)
		}
	}
	return list
}

// mountsOf are the places where one of the devices is mounted: numbers are
// "major:minor", and sources their nodes, for file systems that show numbers of their
// own.
func mountsOf(table string, numbers, sources []string) (list []string) {
	for line := range strings.Lines(table) {
		head, tail, ok := strings.Cut(line, " - ")
		fields, rest := strings.Fields(head), strings.Fields(tail)
		if !ok || len(fields) < 5 {
			continue
		}
		if !slices.Contains(numbers, fields[2]) && (len(rest) < 2 || !slices.Contains(sources, blockdev.Unescape(rest[1]))) {
			continue
		}
		if where := blockdev.Unescape(fields[4]); !slices.Contains(list, where) {
			list = append(list, where)
		}
	}
	return list
}

// openConnection opens /dev/fuse for a new connection.
func openConnection() (int, error) {
	fd, err := unix.Open(devicePath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		return fd, nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return -1, fmt.Errorf("%w: no %s (run: modprobe fuse)", ErrUnsupported, devicePath)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return -1, fmt.Errorf("fuse: open %s: %w (needs root; in a container, the device)", devicePath, err)
	}
	return -1, fmt.Errorf("fuse: open %s: %w", devicePath, err)
}

// mountFile mounts a connection on a file, which it makes. The mount's root is a file
// itself, so there is no directory to serve.
func mountFile(fd int, name, file string, ioMax int) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("fuse: %w", err)
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("fuse: %w", err)
	}
	_ = f.Close() // nothing is written
	options := fmt.Sprintf("fd=%d,rootmode=%o,user_id=0,group_id=0,default_permissions,max_read=%d", fd, modeRegular, ioMax)
	err = unix.Mount(name, file, mountType, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_NOATIME, options)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM):
		err = fmt.Errorf("fuse: mount %s: %w (needs CAP_SYS_ADMIN)", file, err)
	case errors.Is(err, unix.ENODEV):
		err = fmt.Errorf("%w: the kernel has no FUSE (run: modprobe fuse)", ErrUnsupported)
	default:
		err = fmt.Errorf("fuse: mount %s: %w", file, err)
	}
	_ = os.Remove(file) // ours, and empty
	return err
}

// greet answers INIT, the first request of a connection.
func greet(ctx context.Context, fd int, s *session) error {
	buffer := make([]byte, readLeast+ioMaxLimit) // the kernel wants room for the longest write
	deadline := time.Now().Add(initWait)
	for {
		n, err := unix.Read(fd, buffer)
		switch {
		case err == nil:
			return s.greeted(fd, buffer[:n])
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EAGAIN):
			return fmt.Errorf("fuse: read INIT: %w", err)
		case ctx.Err() != nil:
			return fmt.Errorf("fuse: no INIT: %w", ctx.Err())
		case time.Now().After(deadline):
			return fmt.Errorf("fuse: no INIT within %v", initWait)
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20) // the read tells
	}
}

// greeted answers the INIT in b.
func (s *session) greeted(fd int, b []byte) error {
	var c call
	var i initIn
	if err := c.decode(b[:min(len(b), headSize)], len(b)); err != nil {
		return err
	}
	if c.op != opInit {
		return fmt.Errorf("fuse: operation %d came before INIT", c.op)
	}
	if err := i.decode(b[headerInSize:]); err != nil {
		return err
	}
	if i.major != protocolMajor || i.minor < minorLeast || i.flags&initMaxPages == 0 {
		return fmt.Errorf("%w: the kernel speaks version %d.%d of the protocol (needs %d.%d: Linux 4.20)", ErrUnsupported, i.major, i.minor, protocolMajor, minorLeast)
	}
	s.minor = min(i.minor, protocolMinor)
	s.flags = i.flags & initWanted
	if s.minor < protocolMinor {
		s.flags &^= initHasResend
	}
	out := make([]byte, headerOutSize+initOutSize)
	putHeader(out, initOutSize, 0, c.unique)
	putInit(out[headerOutSize:], s)
	if _, err := unix.Write(fd, out); err != nil {
		return fmt.Errorf("fuse: answer INIT: %w", err)
	}
	return nil
}

// connectionOf is the number of the mount on a file. It does not ask the server.
func connectionOf(file string) (uint32, error) {
	list, err := mounts()
	if err != nil {
		return 0, err
	}
	for i := len(list) - 1; i >= 0; i-- { // the one above the others
		if list[i].file == file {
			return list[i].connection, nil
		}
	}
	return 0, fmt.Errorf("fuse: the mount on %s is not in %s", file, mountInfo)
}

// unmountFile removes a mount, which the loop driver may hold for a moment yet, and its
// file.
//
// Errors: ErrInUse when a program has the file open.
func unmountFile(ctx context.Context, file string) error {
	for deadline := time.Now().Add(unmountWait); ; {
		err := unix.Unmount(file, unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil, errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT): // not mounted any more
			return removeFile(file)
		case !errors.Is(err, unix.EBUSY):
			return fmt.Errorf("fuse: unmount %s: %w", file, err)
		case time.Now().After(deadline) || ctx.Err() != nil:
			return fmt.Errorf("%w: a program has %s open", ErrInUse, file)
		}
		time.Sleep(pollInterval)
	}
}

func removeFile(file string) error {
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("fuse: %w", err)
	}
	return nil
}

// dead tells whether the connection of a mount is broken. A mount that is served, or
// waits for its server, is not; to tell them apart takes up to probeWait, and leaves a
// thread waiting for the answer.
func dead(file string) bool {
	err, answered := probe(func() error {
		var st unix.Statx_t
		return unix.Statx(unix.AT_FDCWD, file, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_FORCE_SYNC, unix.STATX_SIZE, &st)
	})
	return answered && (errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED))
}

// deadLoop is dead for a loop device whose mount is not seen: it reads a block.
func deadLoop(number int) bool {
	err, answered := probe(func() error {
		fd, err := openLoop(number, unix.O_RDONLY|unix.O_DIRECT)
		if err != nil {
			return nil // who knows
		}
		defer func() { _ = unix.Close(fd) }() // nothing is written
		page, err := newPage()
		if err != nil {
			return nil // as above
		}
		defer func() { _ = unix.Munmap(page) }() // ours
		_, err = unix.Pread(fd, page, 0)
		return err
	})
	return answered && errors.Is(err, unix.EIO)
}

// probe calls f, which may wait for a server that is away, and gives up after probeWait.
func probe(f func() error) (answer error, answered bool) {
	result := make(chan error, 1)
	go func() { result <- f() }() // ends with the server's answer, or the connection
	select {
	case err := <-result:
		return err, true
	case <-time.After(probeWait):
		return nil, false
	}
}

// broken tells whether a connection is broken, by its descriptor.
func broken(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	_, err := unix.Poll(p, 0)
	return err == nil && p[0].Revents&unix.POLLERR != 0
}
