package interop

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestQemuImgConvertAndCompare(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	source, disk, back := patchwork(t, dir, "source", 64*mib), sparse(t, dir, "disk", 64*mib), filepath.Join(dir, "back.qcow2")
	s := serve(t, disk)
	tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, s.uri)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", source, s.uri)
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.uri, back)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, back)
	tool(t, "qemu-img", "convert", "-n", "-W", "-m", "16", "--target-is-zero", "-f", "raw", "-O", "raw", source, s.uri)
	s.stop(t)
	same(t, source, disk)
}

func TestQemuImgMapAndInfo(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	s := serve(t, patchwork(t, dir, "disk", 64*mib))
	out := tool(t, "qemu-img", "map", "-f", "raw", "--output=json", s.uri)
	for _, want := range []string{`"data": true`, `"data": false`, `"zero": true`} {
		if !strings.Contains(out, want) {
			t.Errorf("the map has no %s:\n%s", want, out)
		}
	}
	if out := tool(t, "qemu-img", "info", "-f", "raw", s.uri); !strings.Contains(out, "64 MiB") {
		t.Errorf("unexpected:\n%s", out)
	}
}

func TestQemuImgCreatesAndChecksQcow2OnTheExport(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	s := serve(t, sparse(t, dir, "disk", 64*mib))
	source := patchwork(t, dir, "source", 32*mib)
	tool(t, "qemu-img", "create", "-f", "qcow2", s.uri, "32M")
	tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", source, s.uri)
	tool(t, "qemu-img", "check", "-f", "qcow2", s.uri)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, s.uri)
}

func TestQemuImgBench(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	s := serve(t, sparse(t, dir, "disk", 64*mib))
	for _, args := range [][]string{
		{"-c", "4000", "-d", "32", "-s", "4096"},
		{"-c", "4000", "-d", "32", "-s", "4096", "-w", "--pattern=85"},
		{"-c", "400", "-d", "8", "-s", "131072", "-w", "--flush-interval=8"},
	} {
		tool(t, "qemu-img", append(append([]string{"bench", "-f", "raw", "-t", "none"}, args...), s.uri)...)
	}
}

func TestQemuIO(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	disk := sparse(t, dir, "disk", 64*mib)
	s := serve(t, disk)
	run := func(commands ...string) {
		t.Helper()
		args := []string{"-f", "raw", "-t", "writeback", "-d", "unmap"}
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		out := tool(t, "qemu-io", append(args, s.uri)...)
		if strings.Contains(out, "failed") || strings.Contains(out, "rror") {
			t.Errorf("qemu-io %q:\n%s", commands, out)
		}
	}
	run("write -P 0xa5 1M 2M", "read -P 0xa5 1M 2M", "flush")
	run("read -P 0 0 1M", "read -P 0xa5 1M 2M", "read -P 0 3M 1M")
	run("write -P 0x11 513 1023", "read -P 0x11 513 1023", "read -P 0 0 513", "read -P 0 1536 512")
	run("write -f -P 0x22 8M 64k", "read -P 0x22 8M 64k") // FUA
	run("write -z 1M 1M", "read -P 0 1M 1M", "read -P 0xa5 2M 1M")
	run("write -z -u 2M 512k", "read -P 0 2M 512k") // may unmap
	run("discard 8M 64k", "write -P 0x33 8M 4k", "read -P 0x33 8M 4k")
	run("aio_write -P 0x44 16M 1M", "aio_write -P 0x55 17M 1M", "aio_flush", "read -P 0x44 16M 1M", "read -P 0x55 17M 1M")
	run("writev -P 0x66 20M 4k 8k 512 1k", "readv -P 0x66 20M 512 4k 1k 8k")
	s.stop(t)
	t.Run("another server shows the same", func(t *testing.T) {
		again := serve(t, "--read-only", disk)
		out := tool(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0x44 16M 1M", "-c", "read -P 0x33 8M 4k", "-c", "read -P 0x66 20M 13824", again.uri)
		if strings.Contains(out, "failed") {
			t.Errorf("unexpected:\n%s", out)
		}
	})
}
