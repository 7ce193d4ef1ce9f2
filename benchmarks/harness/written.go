package harness

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// processWritten is what a running process has given to block devices so far, 0
// when that cannot be read; see bytesWritten.
func processWritten(pid int) uint64 {
	if pid == 0 {
		return 0
	}
	n, _ := strconv.ParseUint(procField(fmt.Sprintf("/proc/%d/io", pid), "write_bytes"), 10, 64) // 0 when unknown
	return n
}

// diskWritten is what the disk under path has taken since the host started, from
// everybody, 0 when that cannot be read.
func diskWritten(path string) uint64 {
	absolute, err := filepath.Abs(path)
	if err != nil {
		return 0
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return 0
	}
	number, ok := deviceOf(string(mounts), absolute)
	if !ok {
		return 0
	}
	stat, err := os.ReadFile(filepath.Join("/sys/dev/block", number, "stat"))
	if err != nil {
		return 0 // no disk, such as tmpfs
	}
	return sectorsWritten(string(stat))
}

// deviceOf finds "major:minor" of the file system that holds an absolute path, in
// the text of mountinfo (proc_pid_mountinfo(5)): the longest mount point wins, and
// of two equal ones the later.
func deviceOf(mountinfo, path string) (number string, ok bool) {
	longest := -1
	for _, line := range strings.Split(mountinfo, "\n") {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		point := strings.ReplaceAll(fields[4], `\040`, " ")
		inside := point == "/" || path == point || strings.HasPrefix(path, point+"/")
		if inside && len(point) >= longest {
			number, longest, ok = fields[2], len(point), true
		}
	}
	return number, ok
}

// sectorsWritten reads the seventh field of a block device's stat, in bytes: a
// sector is 512 bytes (Documentation/block/stat.rst).
func sectorsWritten(stat string) uint64 {
	fields := strings.Fields(stat)
	if len(fields) < 7 {
		return 0
	}
	n, _ := strconv.ParseUint(fields[6], 10, 64) // the kernel prints a number
	return n * 512
}
