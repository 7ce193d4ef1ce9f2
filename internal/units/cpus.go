package units

import (
	"fmt"
	"strconv"
	"strings"
)

// CPUMax is the largest CPU number a list may hold: the kernel's cpu_set_t has
// 1024 bits (sched_setaffinity(2)).
const CPUMax = 1023

// CPUs is a list of CPU numbers, in the order given, each at most once. It is a
// flag value.
type CPUs []int

// String prints the list as it would be typed.
func (c CPUs) String() string { return FormatCPUs(c) }

// Set parses text as [ParseCPUs] does.
func (c *CPUs) Set(text string) error {
	v, err := ParseCPUs(text)
	if err != nil {
		return err
	}
	*c = v
	return nil
}

// Type names the flag's argument in help texts.
func (*CPUs) Type() string { return "cpus" }

// ParseCPUs reads a list of CPUs and ranges of them: "0", "0,2-3", "3,1". The
// order is kept, since the first reactor goes to the first CPU named. The empty
// text is the empty list.
func ParseCPUs(text string) ([]int, error) {
	if text == "" {
		return nil, nil
	}
	var cpus []int
	var seen [CPUMax + 1]bool
	for part := range strings.SplitSeq(text, ",") {
		firstText, lastText, ranged := strings.Cut(part, "-")
		first, err := parseCPU(firstText)
		if err != nil {
			return nil, fmt.Errorf("cpus %s: %w", quote(text), err)
		}
		last := first
		if ranged {
			if last, err = parseCPU(lastText); err != nil {
				return nil, fmt.Errorf("cpus %s: %w", quote(text), err)
			}
		}
		if last < first {
			return nil, fmt.Errorf("cpus %s: range %d-%d runs backwards", quote(text), first, last)
		}
		for cpu := first; cpu <= last; cpu++ {
			if seen[cpu] {
				return nil, fmt.Errorf("cpus %s: CPU %d is named twice", quote(text), cpu)
			}
			seen[cpu] = true
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}

// FormatCPUs prints cpus with runs as ranges, so that [ParseCPUs] gives the same
// list back.
func FormatCPUs(cpus []int) string {
	var b strings.Builder
	for i := 0; i < len(cpus); {
		run := 1
		for i+run < len(cpus) && cpus[i+run] == cpus[i]+run {
			run++
		}
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.Itoa(cpus[i]))
		if run > 1 {
			b.WriteByte('-')
			b.WriteString(strconv.Itoa(cpus[i+run-1]))
		}
		i += run
	}
	return b.String()
}

func parseCPU(text string) (int, error) {
	if text == "" || strings.Trim(text, "0123456789") != "" {
		return 0, fmt.Errorf("%s is not a CPU number (want a list such as 0,2-3)", quote(text))
	}
	cpu, err := strconv.Atoi(text)
	if err != nil || cpu > CPUMax {
		return 0, fmt.Errorf("CPU %s is above %d", quote(text), CPUMax)
	}
	return cpu, nil
}
