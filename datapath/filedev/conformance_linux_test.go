package filedev

import (
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// The sizes are odd where that is not a case of its own: what is special about
// the end of a file comes on top of the rest. The cases marked brief also run with
// the race detector, under which the suite takes several times as long.
func TestConformance(t *testing.T) {
	const size = 6 << 20
	tmpfs := func(t testing.TB) string { return testenv.TmpfsDir(t) }
	for _, test := range []struct {
		name   string
		dir    func(t testing.TB) string
		size   int64
		access Access
		want   Access
		brief  bool
	}{
		{"disk file, direct", diskDir, size + 777, AccessAuto, AccessDirect, true},
		{"disk file, buffered", diskDir, size + 777, AccessBuffered, AccessBuffered, true},
		{"tmpfs file, inline", tmpfs, size + 777, AccessAuto, AccessInline, true},
		{"tmpfs file, buffered", tmpfs, size, AccessBuffered, AccessBuffered, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if raceEnabled && !test.brief {
				t.Skip("runs without the race detector")
			}
			dir := test.dir(t)
			open := func(readOnly bool) func(t *testing.T) datapath.Device {
				return func(t *testing.T) datapath.Device {
					d, err := Open(newFile(t, dir, test.size), Options{Access: test.access, ReadOnly: readOnly})
					if err != nil {
						t.Fatal(err)
					}
					if way, reason := d.Access(); way != test.want {
						t.Fatalf("access %s (%s), want %s", way, reason, test.want)
					}
					return d
				}
			}
			devtest.Run(t, open(false), devtest.Options{DiscardZeroes: true, ReadOnly: open(true)})
		})
	}
}

func TestConformanceOfBlockDevices(t *testing.T) {
	if raceEnabled {
		t.Skip("runs without the race detector")
	}
	requireLoop(t)
	for _, test := range []struct {
		name   string
		sector int
		access Access
	}{
		{"512", 512, AccessAuto},
		{"4096", 4096, AccessAuto},
		{"4096, buffered", 4096, AccessBuffered},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := loopDevice(t, newFile(t, testenv.TmpfsDir(t), 6<<20), test.sector)
			open := func(readOnly bool) func(t *testing.T) datapath.Device {
				return func(t *testing.T) datapath.Device {
					d, err := Open(path, Options{Access: test.access, ReadOnly: readOnly})
					if err != nil {
						t.Fatal(err)
					}
					if d.access == AccessDirect && d.align != test.sector {
						t.Fatalf("direct I/O in multiples of %d bytes, want %d", d.align, test.sector)
					}
					return d
				}
			}
			devtest.Run(t, open(false), devtest.Options{ReadOnly: open(true)})
		})
	}
}
