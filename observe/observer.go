package observe

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
)

// threadsMax is how many threads can be watched: the size of a map.
const threadsMax = 512

// watchedMax is how many disks can be named: the size of a map.
const watchedMax = 1024

// Config says what to observe.
type Config struct {
	Log *slog.Logger // required
	// Groups are those to load; none: all.
	Groups []string
	// Threads are ids of threads of this process, as the process knows them.
	Threads []int
	// Disks are those to count, whole disks, not partitions; none: all.
	Disks []Number
	// Every has each request timed. Without it, of many requests some are, which stand
	// for the others: that costs a half or less.
	Every bool

	pace uint32 // as the programs know it; 0: usualPace
}

// usualPace is how many events of a kind are all timed, on each CPU in each tick of the
// scheduler: 1,600 to 16,000 a second.
const usualPace = 16

var groupNames = []string{GroupDisks, GroupReactors, GroupRings, GroupNBD, GroupUblk}

func (c *Config) check() error {
	if c.Log == nil {
		return errors.New("observe: no log")
	}
	for _, g := range c.Groups {
		if !slices.Contains(groupNames, g) {
			return fmt.Errorf("observe: no such group: %q; there are %v", g, groupNames)
		}
	}
	if err := checkThreads(c.Threads); err != nil {
		return err
	}
	return checkDisks(c.Disks)
}

func checkThreads(ids []int) error {
	if len(ids) > threadsMax {
		return fmt.Errorf("observe: %d threads, more than %d", len(ids), threadsMax)
	}
	for _, id := range ids {
		if id <= 0 {
			return fmt.Errorf("observe: %d is not a thread", id)
		}
	}
	return nil
}

func checkDisks(disks []Number) error {
	if len(disks) > watchedMax {
		return fmt.Errorf("observe: %d disks, more than %d; name none to observe all", len(disks), watchedMax)
	}
	for _, d := range disks {
		if d.Major >= 1<<12 || d.Minor >= 1<<20 {
			return fmt.Errorf("observe: %d:%d is not a device number", d.Major, d.Minor)
		}
	}
	return nil
}
