package daemon

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/filter"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/nulldev"
	"github.com/ashlar-storage/ashlar/internal/invariant"
)

// Source says what is behind an export: exactly one of the fields is set.
type Source struct {
	Name   string // of the export
	Path   string // a file or block device
	Memory uint64 // bytes of memory that forgets at the end
	Null   uint64 // bytes that are never kept
}

// ParseSource reads an argument of `ashlar export`: a path, or NAME=PATH. A path
// that exists is a path, whatever it contains.
func ParseSource(argument string) (Source, error) {
	if _, err := os.Stat(argument); err != nil {
		if name, path, ok := strings.Cut(argument, "="); ok {
			if path == "" {
				return Source{}, fmt.Errorf("%q: no file after the name (NAME=FILE)", argument)
			}
			return Source{Name: name, Path: path}, nil
		}
	}
	if argument == "" {
		return Source{}, fmt.Errorf("an empty argument is no file")
	}
	return Source{Path: argument}, nil
}

// Shape is what filters do to every device of an export.
type Shape struct {
	Limits filter.Limits
	Delay  time.Duration // added to every request
	Stats  bool          // measure each operation
}

// apply puts the filters of the shape above d, the counting one on top, so that it
// sees what clients see.
func (s *Shape) apply(d datapath.Device) (datapath.Device, *filter.Stats) {
	if s.Delay > 0 {
		slow := filter.NewDelay(d, filter.DelayConfig{})
		for op := range datapath.OpCount {
			slow.Set(op, filter.Latency{Fixed: s.Delay})
		}
		d = slow
	}
	if s.Limits.RequestsPerSecond > 0 || s.Limits.BytesPerSecond > 0 {
		d = filter.NewLimit(d, s.Limits)
	}
	if !s.Stats {
		return d, nil
	}
	stats := filter.NewStats(d)
	return stats, stats
}

// open makes the device of a source, and a line that says how it is reached.
func (s *Source) open(readOnly bool, access filedev.Access) (d datapath.Device, how string, err error) {
	switch {
	case s.Path != "":
		var f *filedev.Device
		if f, err = filedev.Open(s.Path, filedev.Options{ReadOnly: readOnly, Access: access}); err != nil {
			return nil, "", err
		}
		way, reason := f.Access()
		d, how = f, fmt.Sprintf("%s: %s (%s), at most %d in flight", s.Path, way, reason, f.InFlightMax())
	case s.Memory > 0:
		if d, err = memdev.New(memdev.Config{Size: s.Memory, ReadOnly: readOnly}); err != nil {
			return nil, "", err
		}
		how = fmt.Sprintf("%d bytes of memory", s.Memory)
	default:
		d, how = nulldev.New(s.Null), fmt.Sprintf("%d bytes that are not kept", s.Null)
	}
	if invariant.Enabled {
		d = datapath.Checked(d)
	}
	return d, how, nil
}
