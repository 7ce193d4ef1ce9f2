package testenv

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"
)

// TempFileOn makes a sparse file of size bytes in dir and returns its path. The
// file is removed at the end of the test.
func TempFileOn(t testing.TB, dir string, size int64) string {
	t.Helper()
	f, err := os.CreateTemp(dir, "ashlar-test-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(f.Name()) }) // a test may have removed it
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// TmpfsDir makes a directory on tmpfs, removed at the end of the test: files
// there are memory, and refuse or emulate what disks do (O_DIRECT before Linux
// 6.5, for one).
func TmpfsDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ashlar-test-*")
	if err != nil {
		missing(t, "interop", fmt.Sprintf("a tmpfs on /dev/shm (%v)", err))
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// SparseFile makes a file of size bytes without any data at path, which it returns.
func SparseFile(t testing.TB, path string, size int64) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

// Unpack returns what a file has that gzip made.
func Unpack(t testing.TB, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }() // read only
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
