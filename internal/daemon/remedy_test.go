package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/control/controlpb"
	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/engine/enginetest"
	"github.com/ashlar-storage/ashlar/engine/pool"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// TestErrorsSayWhatHelps: what is refused is told in words of who asked, with what
// helps, and without the bare words that mark errors inside.
func TestErrorsSayWhatHelps(t *testing.T) {
	n := newNode(t, nil, nil)
	ctx := t.Context()
	n.volume("v", mib)
	empty := testenv.SparseFile(t, filepath.Join(n.dir, "empty.img"), mib)
	c := n.dial("v")
	defer func() { _ = c.Close() }() // nothing was written
	for name, call := range map[string]struct {
		err    func() error
		reason control.Reason
		want   string   // the whole error
		not    []string // in it
	}{
		"import of a file without a pool": {
			func() error {
				_, err := n.client.Pools.Open(ctx, &controlpb.OpenPoolRequest{Paths: []string{empty}})
				return err
			},
			control.ErrNotFound, "import: no pool that is not open already on " + empty + ": not found; `ashlar pool scan` shows where pools are", nil,
		},
		"import by a name nothing has": {
			func() error {
				_, err := n.client.Pools.Open(ctx, &controlpb.OpenPoolRequest{Name: "tank", Paths: []string{empty}})
				return err
			},
			control.ErrNotFound, "import pool tank: it is not on " + empty + ": not found; `ashlar pool scan` shows where pools are", nil,
		},
		"a scrub that does not run": {
			func() error {
				_, err := n.client.Pools.StopScrub(ctx, &controlpb.StopScrubRequest{Name: "default"})
				return err
			},
			control.ErrNotFound, "pool default: no scrub is running; `ashlar job list` shows what there is", nil,
		},
		"a scrub of no pool": {
			func() error {
				_, err := n.client.Pools.StopScrub(ctx, &controlpb.StopScrubRequest{Name: "none"})
				return err
			},
			control.ErrNotFound, "pool none: not found; `ashlar pool list` shows what there is", nil,
		},
		"close under a client": {
			func() error {
				_, err := n.client.Pools.Close(ctx, &controlpb.ClosePoolRequest{Name: "default"})
				return err
			},
			control.ErrInUse, "pool default: its volumes and snapshots are open 1 time(s): in use; disconnect their clients, or give --disconnect", nil,
		},
		"destroy under a client": {
			func() error {
				_, err := n.client.Pools.Destroy(ctx, &controlpb.DestroyPoolRequest{Name: "default", Volumes: true})
				return err
			},
			control.ErrInUse, "", []string{"device(s)", "--disconnect"},
		},
		"a smaller pool": {
			func() error {
				_, err := n.client.Pools.Grow(ctx, &controlpb.GrowPoolRequest{Name: "default", FileSizeBytes: 32 * mib})
				return err
			},
			control.ErrInvalid, "grow pool default: 32MiB are less than the 64MiB its files have, and a pool cannot become smaller", nil,
		},
		"a size that is no multiple": {
			func() error {
				_, err := n.client.Volumes.Create(ctx, &controlpb.CreateVolumeRequest{Name: "odd", SizeBytes: 4097})
				return err
			},
			control.ErrInvalid, "", []string{": invalid"},
		},
		"a path for a name": {
			func() error {
				_, err := n.client.Volumes.Create(ctx, &controlpb.CreateVolumeRequest{Name: "../x", Pool: "default", SizeBytes: mib})
				return err
			},
			control.ErrInvalid, `volume ../x: pool name "..": letters, digits and, after the first, . _ - : only`, nil,
		},
		"two pools for a volume": {
			func() error {
				_, err := n.client.Volumes.Create(ctx, &controlpb.CreateVolumeRequest{Name: "tank/x", Pool: "default", SizeBytes: mib})
				return err
			},
			control.ErrInvalid, "volume tank/x: what stands before the slash is its pool, but the pool asked for is default: name one pool", nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := call.err()
			if !errors.Is(err, call.reason) || call.want != "" && err.Error() != call.want {
				t.Errorf("%v\nwant %s", err, call.want)
			}
			for _, word := range call.not {
				if err != nil && strings.Contains(err.Error(), word) {
					t.Errorf("%v: has %q", err, word)
				}
			}
		})
	}
	if i, err := n.client.Pools.Grow(ctx, &controlpb.GrowPoolRequest{Name: "default", FileSizeBytes: 64 * mib}); err != nil || i.GetDevices()[0].GetSizeBytes() != 64*mib {
		t.Errorf("grow to the size it has: %v, %v", i, err)
	}
}

func TestPlain(t *testing.T) {
	if plain(nil) != nil {
		t.Error("nil is an error")
	}
	for text, want := range map[error]string{
		fmt.Errorf("a: too large: %w", pool.ErrInvalid):       "a: too large",
		fmt.Errorf("a: %w (of all)", pool.ErrInvalid):         "a: invalid (of all)",
		fmt.Errorf("a: %w: %w", pool.ErrInvalid, os.ErrExist): "a: invalid: file already exists",
	} {
		if err := plain(text); err.Error() != want || !errors.Is(err, pool.ErrInvalid) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	// What would be left says nothing.
	if err := problem("volume", "v", fmt.Errorf("volume v: %w", pool.ErrInvalid)); err.Error() != "volume v: invalid" {
		t.Errorf("%v", err)
	}
}

// TestCheckOfAPoolInUseSaysToCloseIt, not what helps those who export files.
func TestCheckOfAPoolInUseSaysToCloseIt(t *testing.T) {
	path := testenv.SparseFile(t, filepath.Join(t.TempDir(), "pool.img"), mib)
	d, err := filedev.Open(path, filedev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = CheckPool(PoolCheck{Paths: []string{path}})
	if !errors.Is(err, filedev.ErrLocked) || strings.Contains(err.Error(), "--read-only") || !strings.Contains(err.Error(), "ashlar pool close") {
		t.Errorf("check: %v", err)
	}
	_, err = StartExport(ExportConfig{Sources: []Source{{Path: path}}, Log: quiet()})
	if !errors.Is(err, filedev.ErrLocked) || !strings.Contains(err.Error(), "--read-only on both sides") {
		t.Errorf("export: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := CheckPool(PoolCheck{Paths: []string{path + ".none"}}); !errors.Is(err, fs.ErrNotExist) || strings.Contains(err.Error(), "pool close") {
		t.Errorf("a file that is not there: %v", err)
	}
	// The refusals of package pool are plain, too.
	if _, err := CheckPool(PoolCheck{Paths: []string{path}, RecomputeSums: true}); !errors.Is(err, pool.ErrInvalid) || strings.HasSuffix(err.Error(), ": invalid") {
		t.Errorf("recompute: %v", err)
	}
}

// TestMetricsAreForThisHost: the remedy is none of those for exports.
func TestMetricsAreForThisHost(t *testing.T) {
	for address, want := range map[string]string{
		"0.0.0.0:9809": "127.0.0.1:9809", ":9809": "127.0.0.1:9809", "192.0.2.1:1": "127.0.0.1:1", "[::]:1": "127.0.0.1:1", "nonsense": "nonsense",
	} {
		_, stop, err := StartHTTP(address, Healthy)
		if err == nil {
			stop()
		}
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "--insecure-plaintext") || strings.Contains(err.Error(), "--tls") {
			t.Errorf("%s: %v", address, err)
		}
	}
	err := Serve(t.Context(), ServeConfig{DataDir: t.TempDir(), Metrics: "0.0.0.0:1", NBDSockets: []string{filepath.Join(t.TempDir(), "s")}, Log: quiet(), Layout: &enginetest.Fake{}})
	if err == nil || !strings.Contains(err.Error(), "--metrics") || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Errorf("serve: %v", err)
	}
}
