// Package blockdev reads what the kernel says of its block devices: sysfs, debugfs, the
// mount tables, the list of swap areas, and what processes have open. It opens no device.
//
// It leaves to others: attaching and detaching (packages ublk, nbd/attach, fuse).
package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Host is where the kernel shows its devices. Tests have directories of their own.
type Host struct{ Sys, Dev, Proc string }

// Kernel is the running system.
func Kernel() Host { return Host{Sys: "/sys", Dev: "/dev", Proc: "/proc"} }

// Device is a block device as the kernel shows it.
type Device struct {
	Name         string // in /sys/block
	Path         string // of its node
	Major, Minor uint32
	Size         uint64 // bytes
	ReadOnly     bool
	Mounts       []string // where its file systems are mounted, in our mount namespace; "swap" too
	Holders      []string // devices made of it: device mapper, RAID
}

// Device describes the device called name in /sys/block. Errors: fs.ErrNotExist.
func (h Host) Device(name string) (Device, error) {
	d := Device{Name: name, Path: filepath.Join(h.Dev, name)}
	number := h.Text(name, "dev")
	if number == "" {
		return d, &fs.PathError{Op: "look up", Path: d.Path, Err: fs.ErrNotExist}
	}
	if _, err := fmt.Sscanf(number, "%d:%d", &d.Major, &d.Minor); err != nil {
		return d, fmt.Errorf("%s: device number %q: %w", d.Path, number, err)
	}
	d.Size = h.Number(name, "size") * 512 // sectors, whatever the block size
	d.ReadOnly = h.Text(name, "ro") == "1"
	var err error
	d.Mounts, d.Holders, err = h.Users(name)
	return d, err
}

// Attribute is the path of a file about a device.
func (h Host) Attribute(name string, file ...string) string {
	return filepath.Join(append([]string{h.Sys, "block", name}, file...)...)
}

// Text reads an attribute; "" is one that is not there.
func (h Host) Text(name string, file ...string) string { return text(h.Attribute(name, file...)) }

// Number reads an attribute that is a number; 0 is one that is not there.
func (h Host) Number(name string, file ...string) uint64 {
	n, err := strconv.ParseUint(strings.TrimSpace(h.Text(name, file...)), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

func text(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

// Users tells who has a device or a partition of it mounted, or made another device
// of it.
func (h Host) Users(name string) (mounts, holders []string, err error) {
	numbers, names, holders := h.parts(name)
	table, err := os.ReadFile(filepath.Join(h.Proc, "self/mountinfo"))
	if err != nil {
		return nil, nil, err
	}
	for line := range strings.Lines(string(table)) {
		if where, ok := mountOf(line, numbers, names); ok && !slices.Contains(mounts, where) {
			mounts = append(mounts, where)
		}
	}
	for line := range strings.Lines(text(filepath.Join(h.Proc, "swaps"))) {
		if fields := strings.Fields(line); len(fields) > 0 && slices.Contains(names, fields[0]) {
			mounts = append(mounts, "swap")
		}
	}
	return mounts, holders, nil
}

// parts are the numbers and nodes of a device and its partitions.
func (h Host) parts(name string) (numbers, nodes, holders []string) {
	dirs := []string{h.Attribute(name)}
	partitions, err := filepath.Glob(h.Attribute(name, name+"*", "dev"))
	if err != nil {
		partitions = nil // the name is no good pattern; then it is no device's either
	}
	for _, p := range partitions {
		dirs = append(dirs, filepath.Dir(p))
	}
	for _, dir := range dirs {
		numbers = append(numbers, text(filepath.Join(dir, "dev")))
		nodes = append(nodes, filepath.Join(h.Dev, filepath.Base(dir)))
		entries, err := os.ReadDir(filepath.Join(dir, "holders"))
		if err != nil {
			continue // a device on its way out
		}
		for _, e := range entries {
			holder := e.Name()
			if mapped := h.Text(holder, "dm/name"); mapped != "" {
				holder += " (" + mapped + ")"
			}
			holders = append(holders, holder)
		}
	}
	return numbers, nodes, holders
}

// mountOf reads a line of mountinfo (proc_pid_mountinfo(5)) and returns the mount
// point if it is of one of the devices. File systems that span devices, such as
// btrfs, show a number of their own and are found by the source.
//
//	36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw
func mountOf(line string, numbers, sources []string) (string, bool) {
	head, tail, ok := strings.Cut(line, " - ")
	fields, rest := strings.Fields(head), strings.Fields(tail)
	if !ok || len(fields) < 5 {
		return "", false
	}
	if !slices.Contains(numbers, fields[2]) && (len(rest) < 2 || !slices.Contains(sources, Unescape(rest[1]))) {
		return "", false
	}
	return Unescape(fields[4]), true
}

// Unescape undoes what the kernel does to blanks in mountinfo: \040.
func Unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Used says in words what a device is used for; "" for nothing.
func Used(mounts, holders []string) string {
	var words []string
	for _, m := range mounts {
		if m == "swap" {
			words = append(words, "used as swap")
		} else {
			words = append(words, "mounted on "+m)
		}
	}
	for _, h := range holders {
		words = append(words, "part of "+h)
	}
	return strings.Join(words, ", ")
}

// IsGone says whether err means that there is no such device.
func IsGone(err error) bool { return errors.Is(err, fs.ErrNotExist) }
