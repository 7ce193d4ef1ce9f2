package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/engine"
	"github.com/ashlar-storage/ashlar/observe"
)

// stackMax is how deep a device may lie on others: a volume of LVM on RAID on
// partitions is three.
const stackMax = 8

// poolDisks finds the disks, as the kernel counts requests, under the devices of
// pools: of a partition the whole disk, of a file that of its file system, of a device
// that only hands requests on (LVM, RAID, dm-crypt) those below it. What cannot be
// found, as on a network or in memory, is left out. root is that of the file system
// with proc and sys: /, but for tests.
func poolDisks(pools []engine.PoolInfo, root string) map[observe.Number][]string {
	found := make(map[observe.Number][]string)
	for _, p := range pools {
		for _, d := range p.Devices {
			if !d.Present {
				continue
			}
			for _, n := range disksUnder(d.Path, root) {
				if !slices.Contains(found[n], p.Name) {
					found[n] = append(found[n], p.Name)
				}
			}
		}
	}
	return found
}

// disksUnder are the disks that have the bytes of a block device or a file.
func disksUnder(path, root string) []observe.Number {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil
	}
	device := st.Dev
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		device = st.Rdev
	} else if unix.Major(device) == 0 { // a file system on several devices, as btrfs: its first one has to do
		source := mountSource(path, root)
		if !strings.HasPrefix(source, "/") || unix.Stat(source, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
			return nil
		}
		device = st.Rdev
	}
	return disksBelow(observe.Number{Major: unix.Major(uint64(device)), Minor: unix.Minor(uint64(device))}, root, stackMax)
}

func disksBelow(n observe.Number, root string, depth int) []observe.Number {
	dir, err := filepath.EvalSymlinks(filepath.Join(root, "sys/dev/block", n.String()))
	if err != nil || depth == 0 {
		return nil
	}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		dir = filepath.Dir(dir)
		if n, err = numberIn(dir); err != nil {
			return nil
		}
	}
	slaves, _ := filepath.Glob(filepath.Join(dir, "slaves", "*")) // the pattern is well-formed
	if len(slaves) == 0 {
		return []observe.Number{n}
	}
	var all []observe.Number
	for _, s := range slaves {
		if n, err := numberIn(s); err == nil {
			all = append(all, disksBelow(n, root, depth-1)...)
		}
	}
	return all
}

// numberIn reads the number of a device from its directory in sysfs.
func numberIn(dir string) (n observe.Number, err error) {
	b, err := os.ReadFile(filepath.Join(dir, "dev"))
	if err != nil {
		return n, err
	}
	_, err = fmt.Sscanf(string(b), "%d:%d", &n.Major, &n.Minor)
	return n, err
}

// mountSource is what is mounted where path lies; "": nobody knows.
func mountSource(path, root string) string {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return ""
	}
	b, err := os.ReadFile(filepath.Join(root, "proc/self/mountinfo"))
	if err != nil {
		return ""
	}
	var source, best string
	for line := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(line, " - ")
		fields, more := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(more) < 2 {
			continue
		}
		point := fields[4]
		if len(point) >= len(best) && (point == "/" || path == point || strings.HasPrefix(path, point+"/")) {
			best, source = point, more[1]
		}
	}
	return source
}
