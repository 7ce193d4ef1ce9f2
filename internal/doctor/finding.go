package doctor

// Level says how much a finding matters.
type Level string

// The levels, from the best to the worst.
const (
	OK      Level = "ok"
	Note    Level = "note"    // to know; nothing is lost by it that was promised
	Warning Level = "warning" // it works, but not all of it, or not well
	Failure Level = "failure" // a daemon will not work, or not keep what it is given
)

// Finding is what one check found.
type Finding struct {
	Check  string `json:"check"` // stable: what was looked at
	Level  Level  `json:"level"`
	Text   string `json:"text"`   // a sentence without a full stop
	Remedy string `json:"remedy"` // a command, or what to do; "" when nothing needs to be
}

// Options say what the daemon is to be started with.
type Options struct {
	DataDir string
	Listen  []string // NBD, HOST:PORT
	Control []string // the control API on TCP, HOST:PORT
	Metrics string   // HOST:PORT; "": none
	Socket  string   // path of the control socket; "": none
	Buffers uint64   // bytes of each reactor
}

// check is one thing to look at.
type check struct {
	name string
	look func(*Host, *Options) []Finding // their Check is filled in
}

// checks in the order in which they are reported.
var checks = []check{
	{"kernel", checkKernel},
	{"io_uring", checkIOURing},
	{"ublk", checkUblk},
	{"nbd", checkNBD},
	{"fuse", checkFuse},
	{"capabilities", checkCapabilities},
	{"observation", checkObservation},
	{"limits", checkLimits},
	{"cgroup", checkCgroup},
	{"disks", checkDisks},
	{"data-dir", checkDataDir},
	{"ports", checkPorts},
	{"clock", checkClock},
	{"service", checkService},
}

// Examine looks at everything.
func Examine(h *Host, o Options) []Finding {
	var all []Finding
	for _, c := range checks {
		for _, f := range c.look(h, &o) {
			f.Check = c.name
			all = append(all, f)
		}
	}
	return all
}

// Count is how many findings have a level.
func Count(findings []Finding, l Level) int {
	n := 0
	for _, f := range findings {
		if f.Level == l {
			n++
		}
	}
	return n
}
