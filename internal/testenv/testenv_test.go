package testenv

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// recorder is a testing.TB that keeps what a helper reports instead of ending
// the real test.
type recorder struct {
	testing.TB
	skipped, failed string
	cleanups        []func()
}

func (r *recorder) Helper()                   {}
func (r *recorder) Cleanup(f func())          { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Error(args ...any)         { r.failed = fmt.Sprint(args...) }
func (r *recorder) Fatal(args ...any)         { r.failed = fmt.Sprint(args...); runtime.Goexit() }
func (r *recorder) Errorf(f string, a ...any) { r.failed = fmt.Sprintf(f, a...) }
func (r *recorder) Fatalf(f string, a ...any) { r.failed = fmt.Sprintf(f, a...); runtime.Goexit() }
func (r *recorder) Skipf(f string, a ...any)  { r.skipped = fmt.Sprintf(f, a...); runtime.Goexit() }

// record runs f and then its clean-ups against a recorder, as a test would.
func record(t *testing.T, f func(tb testing.TB)) *recorder {
	r := &recorder{TB: t}
	done := make(chan struct{})
	go func() { // ends when f returns or leaves by Goexit
		defer close(done)
		f(r)
	}()
	<-done
	for i := len(r.cleanups) - 1; i >= 0; i-- {
		r.cleanups[i]()
	}
	return r
}

func TestMissingCommandSkipsAndNamesPackageAndTarget(t *testing.T) {
	t.Setenv(TargetVariable, "test")
	r := record(t, func(tb testing.TB) { RequireCommand(tb, "no-such-command-here", "some-package") })
	for _, want := range []string{"no-such-command-here", "some-package", "make interop"} {
		if !strings.Contains(r.skipped, want) {
			t.Errorf("skip line %q does not name %s", r.skipped, want)
		}
	}
}

func TestMissingCommandFailsInTheTargetThatPromisesIt(t *testing.T) {
	t.Setenv(TargetVariable, "test-uml interop")
	r := record(t, func(tb testing.TB) { RequireCommand(tb, "no-such-command-here", "some-package") })
	if r.skipped != "" || !strings.Contains(r.failed, "make interop must provide") {
		t.Errorf("skipped %q, failed %q; want a failure", r.skipped, r.failed)
	}
}

func TestPresentCommandIsFound(t *testing.T) {
	if path := RequireCommand(t, "sh", "dash"); !filepath.IsAbs(path) {
		t.Errorf("path %q", path)
	}
}

func TestTempFileOnHasSizeAndGoesAway(t *testing.T) {
	var path string
	r := record(t, func(tb testing.TB) {
		path = TempFileOn(tb, TmpfsDir(tb), 12345)
		if info, err := os.Stat(path); err != nil || info.Size() != 12345 {
			t.Errorf("stat %s: %v, %v", path, info, err)
		}
	})
	if r.skipped != "" {
		t.Skip(r.skipped)
	}
	if r.failed != "" {
		t.Error(r.failed)
	}
	if _, err := os.Stat(filepath.Dir(path)); !os.IsNotExist(err) {
		t.Errorf("%s is left behind (%v)", path, err)
	}
}

func TestCheckFDsFindsALeak(t *testing.T) {
	path := filepath.Join(t.TempDir(), "leak")
	var f *os.File
	r := record(t, func(tb testing.TB) {
		CheckFDs(tb)
		f, _ = os.Create(path)
	})
	defer func() { _ = f.Close() }()
	if !strings.Contains(r.failed, path) {
		t.Errorf("reported %q, want the path of the leaked file", r.failed)
	}
	r = record(t, func(tb testing.TB) {
		CheckFDs(tb)
		g, err := os.Open(path)
		if err != nil {
			t.Error(err)
			return
		}
		_ = g.Close() // read-only
	})
	if r.failed != "" {
		t.Errorf("reported without a leak: %s", r.failed)
	}
}

func TestIOURingProbeAgreesWithItself(t *testing.T) {
	first, second := probeIOURing(), probeIOURing()
	if (first == nil) != (second == nil) {
		t.Errorf("probes differ: %v, %v", first, second)
	}
	t.Logf("io_uring: %v", first)
}
