package fuse_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/fuse"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

func TestPartitionsGoWithTheDevice(t *testing.T) {
	require(t)
	testenv.RequireCommand(t, "addpart", "util-linux")
	target := start(t, fuse.Config{Device: memory(t, memdev.Config{Size: 64 << 20}), Loop: fuse.AnyLoop})
	for _, p := range []string{"1", "3"} {
		run(t, "addpart", target.Path(), p, p+"2048", "2048")
	}
	name := filepath.Base(target.Path())
	partitions := func() []string {
		found, err := filepath.Glob("/sys/block/" + name + "/" + name + "p*")
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	if found := partitions(); len(found) != 2 {
		t.Fatalf("partitions: %q", found)
	}

	// One that a program reads keeps the device. The node is ours: not every host makes one.
	number, err := os.ReadFile("/sys/block/" + name + "/" + name + "p3/dev")
	if err != nil {
		t.Fatal(err)
	}
	f, err := openNode(t, string(number))
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Stop(within(t)); !errors.Is(err, fuse.ErrInUse) {
		t.Errorf("a partition is open: %v", err)
	}
	_ = f.Close()
	stop(t, target)
	if found := partitions(); len(found) != 0 {
		t.Errorf("left behind: %q", found)
	}
}

// openNode opens the block device of a number as sysfs writes it, by a node of its own.
func openNode(t *testing.T, number string) (*os.File, error) {
	var major, minor uint32
	if _, err := fmt.Sscanf(number, "%d:%d", &major, &minor); err != nil {
		return nil, err
	}
	node := filepath.Join(t.TempDir(), "node")
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor))); err != nil {
		return nil, err
	}
	return os.Open(node)
}
