package harness

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// detachMax is how long a loop device may take to go: whoever looks at new devices,
// as udev does, may have it open.
const detachMax = 10 * time.Second

// stackMax is above how many devices of a group lie on each other: thin volume, thin
// pool, data or metadata.
const stackMax = 8

// lvmVolume is the physical volume of a Stage while it is attached, and what is active
// on it. It is a kernelTarget.
type lvmVolume struct {
	on     machine
	lock   *os.File // of the Stage's directory: who holds it lives
	device string   // the physical volume
	loop   bool     // device is a loop device of ours
	group  string   // empty: none yet
	own    string   // a volume to be removed at the end
	ended  bool
	gave   uint64 // bytes written, when it has ended

	command []string // which activated the volume
}

// attach takes the physical volume of a Stage in hand. On error nothing is attached.
func (m machine) attach(ctx context.Context, dir string) (v *lvmVolume, err error) {
	v = &lvmVolume{on: m}
	if v.lock, err = lockFolder(dir); err != nil {
		return nil, fmt.Errorf("another run works in %s: %w", dir, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.Stop())
			v = nil
		}
	}()
	path := filepath.Join(dir, lvmFile)
	info, err := os.Stat(path)
	if err != nil {
		return v, err
	}
	if info.Mode()&os.ModeDevice != 0 {
		v.device, err = filepath.EvalSymlinks(path)
		return v, err
	}
	output, err := m.order(ctx, []string{"losetup", "--find", "--show", "--direct-io=on", path})
	if err != nil {
		return v, noLoop(err)
	}
	v.device, v.loop = strings.TrimSpace(string(output)), true
	if direct, err := os.ReadFile(m.block(v.device, "loop/dio")); err != nil || strings.TrimSpace(string(direct)) != "1" {
		return v, fmt.Errorf("%s has no direct I/O on %s: its file system does not do it", v.device, path)
	}
	return v, nil
}

// block is a file about a block device in /sys.
func (m machine) block(device, name string) string {
	return filepath.Join(m.root, "sys/class/block", filepath.Base(device), name)
}

// format makes the group, the thin pool, and a volume of size bytes.
//
// A new chunk is not zeroed (--zero n, which is not LVM's default): a first write costs
// no more than itself, and what is beside it in the chunk is what lay there before. That
// is the most that LVM can give. Discards do not go down (nopassdown), or the file would
// become sparse.
func (v *lvmVolume) format(ctx context.Context, size uint64) error {
	var digits [4]byte
	_, _ = rand.Read(digits[:]) // never fails
	group := lvmGroup + hex.EncodeToString(digits[:])
	for _, words := range [][]string{
		{"pvcreate", "--yes", v.device},
		{"vgcreate", "--setautoactivation", "n", group, v.device},
		{
			"lvcreate", "--yes", "--type", "thin-pool", "--name", lvmPool, "--size", bytesOf(2*size + size/2), "--chunksize", bytesOf(lvmChunk),
			"--zero", "n", "--discards", "nopassdown", "--poolmetadataspare", "n", group,
		},
		thinArgs(group, mappedVolume, size),
	} {
		if words[0] == "lvcreate" {
			v.group = group // from here on something may be active
		}
		if _, err := v.on.lvm(ctx, v.device, words[0], words[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// thinArgs make a thin volume, and activate it.
func thinArgs(group, name string, size uint64) []string {
	return []string{"lvcreate", "--yes", "--type", "thin", "--name", name, "--virtualsize", bytesOf(size), "--thinpool", lvmPool, group}
}

// start activates the volume of a run, or makes it, and a symbolic link to it.
func (l lvmThin) start(ctx context.Context, s Site) (v *lvmVolume, err error) {
	v, err = l.on.attach(ctx, s.Backing.Path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.Stop())
			v = nil
		}
	}()
	if v.group, err = l.on.groupOf(ctx, v.device); err != nil {
		return v, err
	}
	name := mappedVolume
	words := []string{"lvchange", "--activate", "y", v.group + "/" + name}
	if s.Volume != VolumeMapped {
		name = lvmRun
		words = thinArgs(v.group, name, s.Backing.Size)
	}
	if _, err = l.on.lvm(ctx, v.device, words[0], words[1:]...); err != nil {
		return v, err
	}
	v.command = lvmArgs(v.device, words[0], words[1:]...)
	if s.Volume != VolumeMapped {
		v.own = name
	}
	return v, os.Symlink(filepath.Join(l.on.root, "dev", v.group, name), filepath.Join(s.Dir, "volume"))
}

// Command names the physical volume, too: a loop device, or what was given.
func (v *lvmVolume) Command() []string { return v.command }

// Written is what the physical volume took: data, and LVM's metadata.
func (v *lvmVolume) Written() uint64 {
	if v.ended {
		return v.gave
	}
	stat, err := os.ReadFile(v.on.block(v.device, "stat"))
	if err != nil {
		return 0
	}
	return sectorsWritten(string(stat))
}

// Stop removes the volume of the run, deactivates all others, and detaches the loop
// device, also when ctx of the run has ended.
func (v *lvmVolume) Stop() (err error) {
	ctx := context.Background()
	if v.ended {
		return nil
	}
	if v.own != "" {
		_, err = v.on.lvm(ctx, v.device, "lvremove", "--yes", v.group+"/"+v.own)
	}
	if v.group != "" {
		err = errors.Join(err, v.on.deactivate(ctx, v.device, v.group))
	}
	v.gave = v.Written()
	v.ended = true
	if v.loop {
		err = errors.Join(err, v.on.detach(ctx, v.device))
	}
	return errors.Join(err, v.lock.Close())
}

// deactivate takes a group's devices away. What LVM cannot do, as when its metadata is
// not whole, is asked of the device mapper: those first that nothing lies on.
func (m machine) deactivate(ctx context.Context, device, group string) error {
	_, err := m.lvm(ctx, device, "vgchange", "--activate", "n", group)
	for pass := 1; ; pass++ {
		all, top := m.mapped(group)
		if len(all) == 0 {
			// Links to devices that are no more: LVM did not see these go.
			return os.RemoveAll(filepath.Join(m.root, "dev", group))
		}
		removed := false
		for _, name := range top {
			if _, removeErr := m.mapping(ctx, []string{"dmsetup", "remove", "--retry", name}); removeErr != nil {
				err = errors.Join(err, removeErr)
			} else {
				removed = true
			}
		}
		if !removed || pass == stackMax {
			return fmt.Errorf("left on %s, and to be removed with `dmsetup remove` when nobody uses them: %s: %w", device, strings.Join(all, " "), err)
		}
	}
}

// mapped are the names of a group's devices, and of those that nothing lies on.
func (m machine) mapped(group string) (all, top []string) {
	paths, _ := filepath.Glob(filepath.Join(m.root, "sys/block/dm-*")) // the pattern is well formed
	for _, path := range paths {
		text, err := os.ReadFile(filepath.Join(path, "dm/name"))
		name := strings.TrimSpace(string(text))
		if err != nil || !strings.HasPrefix(name, group+"-") {
			continue // gone, or another's
		}
		all = append(all, name)
		if holders, err := os.ReadDir(filepath.Join(path, "holders")); err != nil || len(holders) == 0 {
			top = append(top, name)
		}
	}
	return all, top
}

// detach lets go of a loop device and waits until it is free. One that was let go of
// before, while somebody had it open, may be free already.
func (m machine) detach(ctx context.Context, device string) error {
	_, err := m.order(ctx, []string{"losetup", "--detach", device})
	for deadline := time.Now().Add(m.detachMax); ; time.Sleep(readyGap) {
		if _, err := os.Stat(m.block(device, "loop/backing_file")); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is still attached: somebody has it open; it goes when it is closed", device)
		}
	}
}
