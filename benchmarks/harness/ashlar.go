package harness

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

// ashlar is this project's own export.
type ashlar struct {
	name, about, poll string
	reactors          int
	pin               bool
}

func (a ashlar) Name() string            { return a.name }
func (a ashlar) About() string           { return a.about }
func (ashlar) Program() (string, string) { return "", "" } // the site names the binary
func (ashlar) VersionArgs() []string     { return nil }
func (ashlar) ours()                     {}

func (a ashlar) Plan(s Site) (Plan, error) {
	if s.Ashlar == "" {
		return Plan{}, fmt.Errorf("%s: no binary to start; build bin/ashlar and name it", a.name)
	}
	socket := filepath.Join(s.Dir, "s")
	argv := []string{s.Ashlar, "export", "--socket", socket, "--pid-file", filepath.Join(s.Dir, "pid")}
	reactors, poll := a.reactors, a.poll
	if reactors == 0 {
		reactors = s.Reactor
	}
	if poll == "" {
		poll = s.Poll
	}
	if reactors > 0 {
		argv = append(argv, "--reactors", strconv.Itoa(reactors))
	}
	if poll != "" {
		argv = append(argv, "--poll", poll)
	}
	if a.pin && len(s.CPUs) > 0 {
		argv = append(argv, "--pin", joinCPUs(s.CPUs))
	}
	switch s.Backing.Kind {
	case BackingFile:
		argv = append(argv, s.Backing.Path)
	case BackingNull:
		argv = append(argv, "--null", strconv.FormatUint(s.Backing.Size, 10))
	case BackingMemory:
		argv = append(argv, "--mem", strconv.FormatUint(s.Backing.Size, 10))
	default:
		return Plan{}, unsupported(a, s.Backing)
	}
	return Plan{Argv: argv, Ready: "unix:" + socket, Target: nbdUnix("", socket)}, nil
}

func joinCPUs(cpus []int) string {
	words := make([]string, len(cpus))
	for i, cpu := range cpus {
		words[i] = strconv.Itoa(cpu)
	}
	return strings.Join(words, ",")
}
