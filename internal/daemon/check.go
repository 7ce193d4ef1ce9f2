package daemon

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/pool"
)

// PoolCheck says which pool to check, and what may be changed; see pool.CheckConfig.
type PoolCheck struct {
	Paths                       []string // all its devices and files
	Data, Repair, RecomputeSums bool
	Progress                    func(PoolCheckProgress)
	Log                         *slog.Logger
}

// What a check tells.
type (
	PoolCheckProgress = pool.CheckProgress
	PoolReport        = pool.Report
	PoolFinding       = pool.Finding
)

// CheckPool checks a pool that no daemon has open: its devices are locked
// meanwhile, and a device in use is refused.
func CheckPool(c PoolCheck) (report *PoolReport, err error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	var disks []pool.Disk
	defer func() {
		for _, d := range disks {
			err = errors.Join(err, d.Device.Close())
		}
	}()
	for _, path := range c.Paths {
		d, err := filedev.Open(path, filedev.Options{ReadOnly: !c.Repair, Access: filedev.AccessAuto})
		if errors.Is(err, filedev.ErrLocked) {
			return nil, fmt.Errorf("%w (a pool is checked while it is closed: ashlar pool close)", err)
		}
		if err != nil {
			return nil, err
		}
		disks = append(disks, pool.Disk{Path: path, Device: d})
	}
	r, err := reactor.Start(reactor.Config{Name: "check", Poll: reactor.PollOff, Log: c.Log})
	if err != nil {
		return nil, err
	}
	defer r.Stop()
	report, err = pool.Check(pool.CheckConfig{Disks: disks, Reactor: r, Data: c.Data, Repair: c.Repair, RecomputeSums: c.RecomputeSums, Progress: c.Progress})
	return report, plain(err)
}
