package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// clockTicks is USER_HZ, the unit of CPU times in /proc/PID/stat: 100 on every
// Linux architecture Go runs on.
const clockTicks = 100

// processStat is what is read of /proc/PID/stat.
type processStat struct {
	parent     int
	startTicks uint64  // with the id, names one process for ever
	cpuSeconds float64 // all threads, ended ones too, and children waited for
}

var errStat = errors.New("malformed stat line")

// parseStat reads a stat line. The name in it may hold blanks and parentheses.
func parseStat(line string) (processStat, error) {
	end := strings.LastIndexByte(line, ')')
	if end < 0 {
		return processStat{}, errStat
	}
	fields := strings.Fields(line[end+1:])
	const ( // proc_pid_stat(5), counted from the state, which is field 3
		parentField = 4 - 3
		utimeField  = 14 - 3 // utime stime cutime cstime
		startField  = 22 - 3
	)
	if len(fields) <= startField {
		return processStat{}, errStat
	}
	parent, err := strconv.Atoi(fields[parentField])
	if err != nil {
		return processStat{}, errStat
	}
	var ticks uint64
	for _, text := range fields[utimeField : utimeField+4] {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return processStat{}, errStat
		}
		ticks += n
	}
	start, err := strconv.ParseUint(fields[startField], 10, 64)
	if err != nil {
		return processStat{}, errStat
	}
	return processStat{parent: parent, startTicks: start, cpuSeconds: float64(ticks) / clockTicks}, nil
}

func readStat(pid int) (processStat, error) {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return processStat{}, err
	}
	return parseStat(string(line))
}

// tree lists a process and its descendants that run now.
func tree(pid int) []int {
	all := []int{pid}
	for i := 0; i < len(all); i++ {
		lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", all[i]))
		if err != nil {
			continue
		}
		for _, path := range lists {
			text, err := os.ReadFile(path)
			if err != nil {
				continue // the thread ended
			}
			for _, field := range strings.Fields(string(text)) {
				if child, err := strconv.Atoi(field); err == nil {
					all = append(all, child)
				}
			}
		}
	}
	return all
}

// treeUse is what a process tree has used so far and holds now.
func treeUse(pid int) (cpuSeconds float64, residentBytes uint64) {
	for _, p := range tree(pid) {
		s, err := readStat(p)
		if err != nil {
			continue // ended; its parent has its time
		}
		cpuSeconds += s.cpuSeconds
		if statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p)); err == nil {
			if fields := strings.Fields(string(statm)); len(fields) > 1 {
				pages, _ := strconv.ParseUint(fields[1], 10, 64) // the kernel prints a number
				residentBytes += pages * uint64(os.Getpagesize())
			}
		}
	}
	return cpuSeconds, residentBytes
}
