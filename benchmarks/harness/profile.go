package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	fioprofiles "github.com/ashlar-storage/ashlar/tools/fio-profiles"
)

// Profile is a fio job file cut into cases.
type Profile struct {
	Name  string
	Cases []Case
}

// Case is what one fio process runs: one job, or several that fio would run at
// the same time.
type Case struct {
	Name   string
	global []option
	jobs   []section
}

type option struct {
	name, value string // value is empty for a bare word
	bare        bool
}

type section struct {
	name    string
	options []option
}

// placement are the options that choose the target. The harness gives them, so
// a profile must not.
var placement = []string{"filename", "uri", "directory", "ioengine", "filename_format", "opendir"}

// LoadProfile finds a profile by the name of a built-in one, or reads a file.
func LoadProfile(name string) (*Profile, error) {
	if slices.Contains(fioprofiles.Names(), name) {
		text, err := fioprofiles.Read(name)
		if err != nil {
			return nil, err
		}
		return ParseProfile(name, text)
	}
	text, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("profile %q: neither a file nor built in (%s)", name, strings.Join(fioprofiles.Names(), ", "))
	}
	if err != nil {
		return nil, fmt.Errorf("profile: %w", err)
	}
	return ParseProfile(strings.TrimSuffix(filepath.Base(name), ".fio"), string(text))
}

// ParseProfile cuts a job file into cases. A job with stonewall, its own or
// inherited, starts a case; others join the case before them, as in fio.
func ParseProfile(name, text string) (*Profile, error) {
	p := &Profile{Name: name}
	var global []option
	var current *section
	inGlobal, started := false, false
	flush := func() {
		if current == nil {
			return
		}
		both := append(slices.Clone(global), current.options...)
		if len(p.Cases) == 0 || isOn(both, "stonewall", "wait_for_previous") {
			p.Cases = append(p.Cases, Case{Name: current.name, global: slices.Clone(global)})
		}
		c := &p.Cases[len(p.Cases)-1]
		c.jobs = append(c.jobs, *current)
		current = nil
	}
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		if line[0] == '[' && strings.HasSuffix(line, "]") {
			flush()
			started = true
			title := strings.TrimSpace(line[1 : len(line)-1])
			if inGlobal = title == "global"; !inGlobal {
				current = &section{name: title}
			}
			continue
		}
		o, err := parseOption(line)
		if err != nil {
			return nil, fmt.Errorf("profile %s: line %d: %w", name, i+1, err)
		}
		switch {
		case !started:
			return nil, fmt.Errorf("profile %s: line %d: %q stands before the first [section]", name, i+1, line)
		case inGlobal:
			global = append(global, o)
		default:
			current.options = append(current.options, o)
		}
	}
	flush()
	if len(p.Cases) == 0 {
		return nil, fmt.Errorf("profile %s: no jobs in it", name)
	}
	seen := map[string]bool{}
	for _, c := range p.Cases {
		if seen[c.Name] {
			return nil, fmt.Errorf("profile %s: two jobs are called %q; results need names of their own", name, c.Name)
		}
		seen[c.Name] = true
	}
	return p, nil
}

func parseOption(line string) (option, error) {
	if strings.HasPrefix(line, "include ") {
		return option{}, errors.New("include is not followed; write the options into the profile")
	}
	key, value, found := strings.Cut(line, "=")
	o := option{name: strings.TrimSpace(key), value: strings.TrimSpace(value), bare: !found}
	switch o.name {
	case "readwrite":
		o.name = "rw"
	case "blocksize":
		o.name = "bs"
	}
	if slices.Contains(placement, o.name) {
		return o, fmt.Errorf("%s is given by the harness, together with the target; remove it", o.name)
	}
	return o, nil
}

// value finds the last setting of a name.
func value(options []option, name string) (string, bool) {
	for i := len(options) - 1; i >= 0; i-- {
		if options[i].name == name {
			return options[i].value, true
		}
	}
	return "", false
}

// isOn tells whether a switch is set and not to 0.
func isOn(options []option, names ...string) bool {
	for i := len(options) - 1; i >= 0; i-- {
		if slices.Contains(names, options[i].name) {
			return options[i].bare || options[i].value != "0"
		}
	}
	return false
}

// all are the options of a job with those it inherits.
func (c Case) all(job int) []option {
	return append(slices.Clone(c.global), c.jobs[job].options...)
}

// Find gives the case of a name.
func (p *Profile) Find(name string) (Case, error) {
	for _, c := range p.Cases {
		if c.Name == name {
			return c, nil
		}
	}
	names := make([]string, len(p.Cases))
	for i, c := range p.Cases {
		names[i] = c.Name
	}
	return Case{}, fmt.Errorf("profile %s: no job %q (have %s)", p.Name, name, strings.Join(names, ", "))
}

// Writes tells whether a job of the case changes the target.
func (c Case) Writes() bool {
	for i := range c.jobs {
		rw, ok := value(c.all(i), "rw")
		if ok && !slices.Contains([]string{"read", "randread"}, rw) {
			return true
		}
	}
	return false
}

// verifies tells whether a job of the case reads back what it wrote.
func (c Case) verifies() bool {
	for i := range c.jobs {
		if v, ok := value(c.all(i), "verify"); ok && v != "0" {
			return true
		}
	}
	return false
}

// Writes tells whether any case changes the target.
func (p *Profile) Writes() bool { return slices.ContainsFunc(p.Cases, Case.Writes) }

// Timing is the time table of a case. Runtime 0 means until the work is done.
type Timing struct {
	Ramp, Runtime time.Duration
}

// Timing reads the longest ramp and runtime of the case's jobs.
func (c Case) Timing() (Timing, error) {
	var t Timing
	for i := range c.jobs {
		for _, x := range []struct {
			name string
			into *time.Duration
		}{{"ramp_time", &t.Ramp}, {"runtime", &t.Runtime}} {
			text, ok := value(c.all(i), x.name)
			if !ok {
				continue
			}
			d, err := parseTime(text)
			if err != nil {
				return t, fmt.Errorf("job %s: %s: %w", c.jobs[i].name, x.name, err)
			}
			*x.into = max(*x.into, d)
		}
	}
	return t, nil
}

// Override replaces the times of a case that has a runtime; negative means keep.
func (t Timing) Override(ramp, runtime time.Duration) Timing {
	if t.Runtime == 0 {
		return t // it ends when its work is done
	}
	if ramp >= 0 {
		t.Ramp = ramp
	}
	if runtime > 0 {
		t.Runtime = runtime
	}
	return t
}

// Render writes the case as a job file of its own with t in force.
func (c Case) Render(t Timing) string {
	var b strings.Builder
	write := func(name string, options []option) {
		fmt.Fprintf(&b, "[%s]\n", name)
		for _, o := range options {
			if o.bare {
				fmt.Fprintln(&b, o.name)
			} else {
				fmt.Fprintf(&b, "%s=%s\n", o.name, o.value)
			}
		}
	}
	timed := func(o option) bool { return t.Runtime > 0 && (o.name == "runtime" || o.name == "ramp_time") }
	added := []option{
		{name: "group_reporting", value: "1"},
		{name: "unified_rw_reporting", value: "both"},
		{name: "percentile_list", value: "50:99:99.9"},
	}
	if t.Runtime > 0 {
		added = append(added, option{name: "runtime", value: fioTime(t.Runtime)})
		if t.Ramp > 0 {
			added = append(added, option{name: "ramp_time", value: fioTime(t.Ramp)})
		}
	}
	write("global", append(slices.DeleteFunc(slices.Clone(c.global), timed), added...))
	for i, j := range c.jobs {
		write(j.name, slices.DeleteFunc(slices.Clone(j.options), func(o option) bool {
			return timed(o) || i > 0 && o.name == "stonewall" // the case's jobs run at the same time
		}))
	}
	return b.String()
}

func fioTime(d time.Duration) string { return strconv.FormatInt(d.Microseconds(), 10) + "us" }

// parseTime reads a fio time: a number of seconds, or with us, ms, s, m, h or d.
func parseTime(text string) (time.Duration, error) {
	units := []struct {
		suffix string
		unit   time.Duration
	}{{"us", time.Microsecond}, {"ms", time.Millisecond}, {"s", time.Second}, {"m", time.Minute},
		{"h", time.Hour}, {"d", 24 * time.Hour}, {"", time.Second}}
	for _, u := range units {
		digits, ok := strings.CutSuffix(text, u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 32)
		if err != nil {
			break
		}
		return time.Duration(n) * u.unit, nil
	}
	return 0, fmt.Errorf("%q is not a time such as 20s or 500ms", text)
}

// Load is a case in the words of clients other than fio.
type Load struct {
	RW          string // randread, randwrite, randrw, read or write
	ReadPercent int
	BlockBytes  uint64
	Depth       int
	Jobs        int
	FlushEvery  int
}

// Load translates the case. It refuses what only fio can do.
func (c Case) Load() (Load, error) {
	l := Load{ReadPercent: 50, BlockBytes: 4096, Depth: 1, Jobs: 1}
	if len(c.jobs) != 1 {
		return l, fmt.Errorf("case %s: %d jobs at once; only fio runs that", c.Name, len(c.jobs))
	}
	for _, o := range c.all(0) {
		var err error
		switch o.name {
		case "rw":
			l.RW = o.value
		case "bs":
			l.BlockBytes, err = parseFioSize(o.value)
		case "iodepth":
			l.Depth, err = strconv.Atoi(o.value)
		case "numjobs":
			l.Jobs, err = strconv.Atoi(o.value)
		case "rwmixread":
			l.ReadPercent, err = strconv.Atoi(o.value)
		case "fsync", "fdatasync":
			l.FlushEvery, err = strconv.Atoi(o.value)
		case "verify":
			if o.value != "0" {
				err = errors.New("only fio verifies")
			}
		case "direct", "randrepeat", "norandommap", "time_based", "ramp_time", "runtime", "group_reporting",
			"stonewall", "thread", "gtod_reduce", "offset_increment":
			// Without a meaning for the other clients, or theirs by nature.
		default:
			err = errors.New("only fio knows it")
		}
		if err != nil {
			return l, fmt.Errorf("case %s: %s: %w; use --client fio", c.Name, o.name, err)
		}
	}
	switch l.RW {
	case "randread", "read":
		l.ReadPercent = 100
	case "randwrite", "write":
		l.ReadPercent = 0
	case "randrw", "rw":
	default:
		return l, fmt.Errorf("case %s: rw=%s: only fio runs that; use --client fio", c.Name, l.RW)
	}
	return l, nil
}

// parseFioSize reads 4k, 128k, 1M: fio's units are binary.
func parseFioSize(text string) (uint64, error) {
	shifts := map[byte]uint{'k': 10, 'm': 20, 'g': 30}
	lower, shift := strings.ToLower(text), uint(0)
	if n := len(lower); n > 0 {
		if s, ok := shifts[lower[n-1]]; ok {
			lower, shift = lower[:n-1], s
		}
	}
	n, err := strconv.ParseUint(lower, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("%q is not a size such as 4k or 1M", text)
	}
	return n << shift, nil
}
