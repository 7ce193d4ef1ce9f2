package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath/devtest"
	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/pool"
)

func TestCheckPoolOfTwoFiles(t *testing.T) {
	var paths []string
	var disks []pool.Disk
	for _, name := range []string{"a", "b"} {
		path := filepath.Join(t.TempDir(), name)
		f, err := os.Create(path)
		if err == nil {
			err = f.Truncate(64 << 20)
		}
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		d, err := filedev.Open(path, filedev.Options{Access: filedev.AccessAuto})
		if err != nil {
			t.Fatal(err)
		}
		paths, disks = append(paths, path), append(disks, pool.Disk{Path: path, Device: d})
	}
	r := devtest.Reactors(t, reactor.EngineAuto, 1)[0]
	if _, err := pool.Format(pool.FormatConfig{Name: "two", Disks: disks, Reactor: r, ZoneRegions: 4}); err != nil {
		t.Fatal(err)
	}
	if _, err := CheckPool(PoolCheck{Paths: paths}); err == nil {
		t.Error("checked a pool that is in use")
	}
	for _, d := range disks {
		if err := d.Device.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, repair := range []bool{false, true} {
		if report, err := CheckPool(PoolCheck{Paths: paths, Data: true, Repair: repair}); err != nil || !report.Complete || len(report.Findings) > 0 || report.Devices != 2 {
			t.Errorf("repair %v: %v, %+v", repair, err, report)
		}
	}
	var missing *pool.MissingError
	if _, err := CheckPool(PoolCheck{Paths: paths[1:]}); !errors.As(err, &missing) {
		t.Errorf("one of two files: %v", err)
	}
}
