package blockdev

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func link(t *testing.T, to, path string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(to, path); err != nil {
		t.Fatal(err)
	}
}

func TestPending(t *testing.T) {
	root := t.TempDir()
	h := Host{Sys: filepath.Join(root, "sys"), Dev: "/dev", Proc: filepath.Join(root, "proc")}
	if p := h.Pending("nbd0"); !p.None() || p.String() != "" {
		t.Errorf("of no device: %+v, %q", p, p.String())
	}
	write(t, h.Attribute("nbd0", "dev"), "43:0\n")
	write(t, h.Attribute("nbd0", "nbd0p1/dev"), "43:1\n")
	write(t, h.Attribute("nbd0", "inflight"), "       0        1\n")
	if p := h.Pending("nbd0"); p.Requests != 1 || p.String() != "one request waits" {
		t.Errorf("without debugfs: %+v, %q", p, p.String())
	}
	// Requests that the driver has, and those a scheduler holds: the same ones, in part.
	tags := func(busy string) string {
		return "nr_tags=64\nnr_reserved_tags=1\nactive_queues=0\n\nbitmap_tags:\ndepth=64\nbusy=" + busy + "\ncleared=61\n\nbreserved_tags:\ndepth=1\nbusy=0\n"
	}
	debug := filepath.Join(h.Sys, "kernel/debug")
	write(t, filepath.Join(debug, "block/nbd0/hctx0/tags"), tags("2"))
	write(t, filepath.Join(debug, "block/nbd0/hctx1/tags"), tags("1"))
	write(t, filepath.Join(debug, "block/nbd0/hctx1/sched_tags"), tags("2"))
	write(t, filepath.Join(debug, "block/nbd1/hctx0/tags"), tags("60"))
	write(t, filepath.Join(debug, "bdi/43:0/stats"), "BdiWriteback:                0 kB\nBdiReclaimable:            512 kB\nBdiDirtyThresh:      500000 kB\n")
	// Who can write to it, itself or a partition; not who reads, or only names it.
	for pid, d := range map[string]struct{ node, flags string }{
		"7": {"/dev/nbd0p1", "flags:\t0100001\n"}, "8": {"/dev/nbd0", "flags:\t0100000\n"}, "9": {"/dev/nbd0", "flags:\t010000002\n"},
		"10": {"/dev/nbd00", "flags:\t0100002\n"}, "11": {"/dev/nbd0", "none"}, "12": {"/dev/nbd0", "flags:\tx\n"},
	} {
		write(t, filepath.Join(h.Proc, pid, "comm"), "dd\n")
		write(t, filepath.Join(h.Proc, pid, "fdinfo/3"), "pos:\t0\n"+d.flags)
		link(t, d.node, filepath.Join(h.Proc, pid, "fd/3"))
	}
	p := h.Pending("nbd0")
	if p.Requests != 3 || p.Dirty != 512<<10 || !slices.Equal(p.Writers, []string{"dd (process 7)"}) {
		t.Errorf("%+v", p)
	}
	if got, want := p.String(), "3 requests wait, 512 KiB are written and not synced, it is open for writing in dd (process 7)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestUsersElsewhere(t *testing.T) {
	root := t.TempDir()
	h := Host{Sys: filepath.Join(root, "sys"), Dev: "/dev", Proc: filepath.Join(root, "proc")}
	write(t, h.Attribute("nbd0", "dev"), "43:0\n")
	mounted := "30 22 43:0 / /mnt/a rw - ext4 /dev/nbd0 rw\n"
	link(t, "mnt:[1]", filepath.Join(h.Proc, "self/ns/mnt"))
	for pid, namespace := range map[string]string{"5": "mnt:[1]", "6": "mnt:[2]", "7": "mnt:[2]"} {
		write(t, filepath.Join(h.Proc, pid, "mountinfo"), mounted)
		link(t, namespace, filepath.Join(h.Proc, pid, "ns/mnt"))
	}
	write(t, filepath.Join(h.Proc, "8/mountinfo"), mounted) // on its way out
	if got := h.UsersElsewhere("nbd0"); !slices.Equal(got, []string{"/mnt/a (of process 6)"}) {
		t.Errorf("%q", got)
	}
}
