package csi

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"strconv"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// secretPassphrase is the key in the node-stage secret.
const secretPassphrase = "passphrase"

// luksHeader is what LUKS has of a volume, before the data: the default of LUKS2,
// here said to cryptsetup so that it stays the same.
const luksHeader = 16 << 20

// Argon2 of LUKS takes by default up to 1 GiB, of whatever the machine has: more than the
// 512 MiB that deploy/helm/ashlar/values.yaml gives to the driver, whose programs the
// kernel would kill. Formatting writes the need into the header, so it is what opening takes.
const (
	luksMemory = 64 << 10 // KiB; the least that cryptsetup chooses by itself
	luksAtOnce = 2        // runs that take it at the same time; they use several CPUs each
)

// mapperDir is where device-mapper has its devices.
const mapperDir = "/dev/mapper"

// luks is the encryption of one volume.
type luks struct {
	run  Command
	name string // of the mapping
	dir  string // mapperDir, but in tests

	exists func(path string) bool // says whether a block device is there
	turns  chan struct{}          // of the host: one value for each run under way that takes luksMemory
}

// luksOf gives the encryption of a volume. The name of the mapping is made from
// those of the pool and the volume, so that it is known without the daemon.
func (h *host) luksOf(pool, volume string) *luks {
	exists := func(path string) bool { _, err := deviceNumber(path); return err == nil }
	return &luks{run: h.command, name: "ashlar-" + digest(pool+"/"+volume, hashedName), dir: h.mapper, exists: exists, turns: h.turns}
}

// path is the device with the plain bytes.
func (l *luks) path() string { return filepath.Join(l.dir, l.name) }

// isOpen says whether the mapping is there.
func (l *luks) isOpen() bool { return l.exists(l.path()) }

// open makes the plain device of an encrypted one, after formatting it when it is
// blank. The key goes to standard input, in a way that cryptsetup takes every byte
// of it. It waits while luksAtOnce others do the same.
func (l *luks) open(ctx context.Context, device, passphrase string, blank bool) error {
	if passphrase == "" {
		return status.Errorf(codes.Unauthenticated, "the volume is encrypted, and the secret has no %s: name it with csi.storage.k8s.io/node-stage-secret-name", secretPassphrase)
	}
	if l.isOpen() {
		return nil
	}
	select {
	case l.turns <- struct{}{}:
		defer func() { <-l.turns }()
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	key := []byte(passphrase)
	if blank {
		_, err := l.run(ctx, key, "cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2",
			"--offset", strconv.Itoa(luksHeader/512), "--pbkdf-memory", strconv.Itoa(luksMemory), "--key-file", "-", device)
		if err != nil {
			return l.problem(device, err)
		}
	}
	// Discards pass, or the pool would never get space back. Without the keyring, it
	// can be resized without the key.
	_, err := l.run(ctx, key, "cryptsetup", "open", "--type", "luks2", "--allow-discards", "--disable-keyring", "--key-file", "-", device, l.name)
	return l.problem(device, err)
}

// Exit codes of cryptsetup, in its manual.
const (
	exitNoPermission = 2 // wrong passphrase
	exitNoDevice     = 4
	exitBusy         = 5
)

func (l *luks) problem(device string, err error) error {
	if err == nil {
		return nil
	}
	var exit *exec.ExitError
	if errors.Is(err, exec.ErrNotFound) {
		return status.Error(codes.FailedPrecondition, "cryptsetup is not installed on this node: encrypted volumes need it")
	}
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == exitNoPermission:
		return status.Errorf(codes.Unauthenticated, "%s: the passphrase in the secret does not open it", device)
	case errors.As(err, &exit) && exit.ExitCode() == exitBusy:
		return status.Errorf(codes.Aborted, "%s: a program that an earlier driver has begun is at work on it; repeat this call when that has ended", device)
	}
	return status.Errorf(codes.Internal, "%s: %v", device, err)
}

// resize has the plain device follow the encrypted one.
func (l *luks) resize(ctx context.Context) error {
	_, err := l.run(ctx, nil, "cryptsetup", "resize", l.name)
	return l.problem(l.path(), err)
}

// close takes the plain device away; one that is not there is closed.
func (l *luks) close(ctx context.Context) error {
	if !l.isOpen() {
		return nil
	}
	_, err := l.run(ctx, nil, "cryptsetup", "close", l.name)
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == exitNoDevice:
		return nil
	case errors.As(err, &exit) && exit.ExitCode() == exitBusy:
		return status.Errorf(codes.FailedPrecondition, "%s: in use", l.path())
	}
	return l.problem(l.path(), err)
}
