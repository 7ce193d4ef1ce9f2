//go:build !linux || !(amd64 || arm64)

package observe

import "time"

// Observer observes nothing here.
type Observer struct{ started time.Time }

// Start returns an observer that observes nothing: the programs are for Linux on
// amd64 and arm64.
//
// Errors: of the configuration.
func Start(c Config) (*Observer, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	return &Observer{started: time.Now()}, nil
}

// Unobserved lists what is not observed, and why.
func (o *Observer) Unobserved() []Unobserved {
	var list []Unobserved
	for _, name := range groupNames {
		list = append(list, Unobserved{name, "observation needs Linux on amd64 or arm64"})
	}
	return list
}

// SetThreads only looks at its argument.
func (o *Observer) SetThreads(ids []int) error { return checkThreads(ids) }

// SetDisks only looks at its argument.
func (o *Observer) SetDisks(disks []Number) error { return checkDisks(disks) }

// Snapshot has counted nothing.
func (o *Observer) Snapshot() *Snapshot {
	return &Snapshot{Time: time.Now(), Started: o.started, Unobserved: o.Unobserved()}
}

// ServiceTime knows no disk.
func (o *Observer) ServiceTime(major, minor uint32) (median time.Duration, ok bool) {
	return 0, false
}

// Close does nothing.
func (o *Observer) Close() error { return nil }
