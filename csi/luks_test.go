package csi

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
)

const passphrase = "correct-horse\nbattery" // with a newline, which must stay in it

// fakeCryptsetup is a Command that knows exactly the cryptsetup command lines the
// driver may use. Volumes are files that hold their key; a mapping is a file in dir.
type fakeCryptsetup struct {
	t   *testing.T
	dir string

	mu    sync.Mutex
	calls []string
	exit  int // not 0: fail so
}

func (f *fakeCryptsetup) run(_ context.Context, stdin []byte, name string, args ...string) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	line := name + " " + strings.Join(args, " ")
	f.calls = append(f.calls, line)
	if strings.Contains(line, passphrase) {
		f.t.Errorf("the key is on the command line: %s", line)
	}
	if f.exit != 0 {
		return nil, exited(f.t, f.exit)
	}
	if name != "cryptsetup" {
		f.t.Errorf("%s is not cryptsetup", line)
		return nil, exited(f.t, 1)
	}
	switch {
	case slices.Equal(args[:len(args)-1], []string{"luksFormat", "--batch-mode", "--type", "luks2", "--offset", "32768", "--pbkdf-memory", "65536", "--key-file", "-"}):
		return nil, os.WriteFile(args[len(args)-1], stdin, 0o600)
	case len(args) == 9 && slices.Equal(args[:7], []string{"open", "--type", "luks2", "--allow-discards", "--disable-keyring", "--key-file", "-"}):
		key, err := os.ReadFile(args[7])
		if err != nil || len(key) == 0 {
			return nil, exited(f.t, 1)
		}
		if string(key) != string(stdin) {
			return nil, exited(f.t, exitNoPermission)
		}
		return nil, os.Symlink("/dev/null", filepath.Join(f.dir, args[8]))
	case len(args) == 2 && args[0] == "resize" && len(stdin) == 0:
		return nil, nil
	case len(args) == 2 && args[0] == "close" && len(stdin) == 0:
		return nil, os.Remove(filepath.Join(f.dir, args[1]))
	}
	f.t.Errorf("%s: the driver may not use that", line)
	return nil, exited(f.t, 1)
}

// exited is the error of a program that ended with a code.
func exited(t *testing.T, code int) error {
	t.Helper()
	err := exec.Command("/bin/sh", "-c", "exit "+string(rune('0'+code))).Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatalf("sh ended with %v", err)
	}
	return err
}

// newLuks is a volume in a file, whose mapping is a device there is on every host.
func newLuks(t *testing.T) (*luks, *fakeCryptsetup, string) {
	t.Helper()
	dir := t.TempDir()
	f := &fakeCryptsetup{t: t, dir: dir}
	h := newHost(nil, f.run, newRigLog())
	h.mapper = dir
	device := filepath.Join(dir, "device")
	if err := os.WriteFile(device, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l := h.luksOf("default", "v")
	l.exists = func(path string) bool { _, err := os.Lstat(path); return err == nil }
	return l, f, device
}

func TestLUKSIsFormattedOnceAndOpened(t *testing.T) {
	l, f, device := newLuks(t)
	ctx := t.Context()
	if err := l.open(ctx, device, passphrase, true); err != nil {
		t.Fatal(err)
	}
	if key, err := os.ReadFile(device); err != nil || string(key) != passphrase {
		t.Errorf("the key became %q, %v", key, err)
	}
	if err := l.open(ctx, device, passphrase, true); err != nil || len(f.calls) != 2 {
		t.Errorf("what is open was opened again: %v, %v", f.calls, err)
	}
	if err := errors.Join(l.resize(ctx), l.close(ctx), l.close(ctx)); err != nil {
		t.Error(err)
	}
	f.calls = nil
	if err := l.open(ctx, device, passphrase, false); err != nil || len(f.calls) != 1 || !strings.Contains(f.calls[0], " open ") {
		t.Errorf("%v, %v", f.calls, err)
	}
	if err := l.close(ctx); err != nil {
		t.Error(err)
	}
}

func TestLUKSWithoutTheRightKeyStaysShut(t *testing.T) {
	l, f, device := newLuks(t)
	ctx := t.Context()
	if err := errors.Join(l.open(ctx, device, passphrase, true), l.close(ctx)); err != nil {
		t.Fatal(err)
	}
	want(t, "a wrong key", l.open(ctx, device, "wrong", false), codes.Unauthenticated, "does not open it")
	want(t, "no key", l.open(ctx, device, "", false), codes.Unauthenticated, "node-stage-secret-name")
	if key, _ := os.ReadFile(device); string(key) != passphrase {
		t.Error("a wrong key has changed the volume")
	}
	for _, tt := range []struct {
		exit int
		call func() error
		code codes.Code
		text string
	}{
		{1, func() error { return l.open(ctx, device, passphrase, true) }, codes.Internal, "exit status 1"},
		{1, func() error { return l.open(ctx, device, passphrase, false) }, codes.Internal, "exit status 1"},
		{exitBusy, func() error { return l.open(ctx, device, passphrase, false) }, codes.Aborted, "at work"},
		{1, func() error { return l.resize(ctx) }, codes.Internal, "exit status 1"},
	} {
		f.exit = tt.exit
		want(t, "a failure", tt.call(), tt.code, tt.text)
	}
	f.exit = 0
	if err := l.open(ctx, device, passphrase, false); err != nil {
		t.Fatal(err)
	}
	for exit, code := range map[int]codes.Code{exitBusy: codes.FailedPrecondition, 1: codes.Internal, exitNoDevice: codes.OK} {
		f.exit = exit
		want(t, "close", l.close(ctx), code, "")
	}
	f.exit = 0
	if err := l.close(ctx); err != nil {
		t.Error(err)
	}
	l.run = func(context.Context, []byte, string, ...string) ([]byte, error) {
		return nil, &exec.Error{Name: "cryptsetup", Err: exec.ErrNotFound}
	}
	want(t, "no cryptsetup", l.open(ctx, device, passphrase, false), codes.FailedPrecondition, "not installed")
}

// A node that starts opens all its volumes at once; the memory of the driver's container
// is for luksAtOnce.
func TestLUKSIsOpenedForAFewVolumesAtATime(t *testing.T) {
	const volumes = 5 * luksAtOnce
	begun, end := make(chan string, volumes), make(chan struct{})
	h := newHost(nil, func(_ context.Context, _ []byte, _ string, args ...string) ([]byte, error) {
		begun <- args[len(args)-1]
		<-end
		return nil, nil
	}, newRigLog())
	h.mapper = t.TempDir()
	results := make(chan error, volumes)
	for i := range volumes {
		go func() { results <- h.luksOf("default", strconv.Itoa(i)).open(t.Context(), "device", passphrase, false) }()
	}
	for range luksAtOnce {
		<-begun
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	want(t, "a call that ends while it waits", h.luksOf("default", "late").open(ctx, "device", passphrase, false), codes.Canceled, "")
	if len(begun) > 0 {
		t.Errorf("more than %d are at work", luksAtOnce)
	}
	for range volumes {
		end <- struct{}{}
	}
	for range volumes {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

func TestProgramsGetTheirInputAndTellWhatFailed(t *testing.T) {
	out, err := execCommand(t.Context(), []byte("from stdin"), "cat")
	if err != nil || string(out) != "from stdin" {
		t.Errorf("%q, %v", out, err)
	}
	_, err = execCommand(t.Context(), nil, "/bin/sh", "-c", "head -c 2000 /dev/zero | tr '\\0' x; exit 3")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || len(err.Error()) > 2*outputMax {
		t.Errorf("%v", err)
	}
	if _, err := execCommand(t.Context(), nil, "no-such-program"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("%v", err)
	}
}
