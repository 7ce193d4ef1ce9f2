package interop

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const mib = 1 << 20

func TestNbdinfoShowsTheExport(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	s := serve(t, patchwork(t, dir, "disk", 64*mib))
	var info struct {
		Protocol   string `json:"protocol"`
		Structured bool   `json:"structured"`
		Exports    []struct {
			Size      int64    `json:"export-size"`
			ReadOnly  bool     `json:"is_read_only"`
			Flush     bool     `json:"can_flush"`
			FUA       bool     `json:"can_fua"`
			Trim      bool     `json:"can_trim"`
			Zero      bool     `json:"can_zero"`
			MultiConn bool     `json:"can_multi_conn"`
			DF        bool     `json:"can_df"`
			Contexts  []string `json:"contexts"`
		} `json:"exports"`
	}
	out := tool(t, "nbdinfo", "--json", s.uri)
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if info.Protocol != "newstyle-fixed" || !info.Structured || len(info.Exports) != 1 {
		t.Fatalf("unexpected:\n%s", out)
	}
	e := info.Exports[0]
	if e.Size != 64*mib || e.ReadOnly || !e.Flush || !e.FUA || !e.Trim || !e.Zero || !e.MultiConn || !e.DF {
		t.Errorf("unexpected:\n%s", out)
	}
	if len(e.Contexts) == 0 || e.Contexts[0] != "base:allocation" {
		t.Errorf("contexts %v, want base:allocation", e.Contexts)
	}
	if got := strings.TrimSpace(tool(t, "nbdinfo", "--size", s.uri)); got != strconv.Itoa(64*mib) {
		t.Errorf("nbdinfo --size prints %s", got)
	}
	for _, what := range []string{"flush", "fua", "trim", "zero", "multi-conn", "df", "structured-reply", "connect"} {
		tool(t, "nbdinfo", "--can", what, s.uri)
	}
	if _, err := try(t, "nbdinfo", "--is", "read-only", s.uri); err == nil {
		t.Error("nbdinfo --is read-only succeeds on a writable export")
	}
	tool(t, "nbdinfo", s.uri) // the form for people, which also sniffs the content
}

func TestNbdinfoListsExports(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	s := serve(t, "one="+sparse(t, dir, "a", 8*mib), "two="+sparse(t, dir, "b", 16*mib))
	var info struct {
		Exports []struct {
			Name string `json:"export-name"`
			Size int64  `json:"export-size"`
		} `json:"exports"`
	}
	out := tool(t, "nbdinfo", "--list", "--json", s.uri)
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	sizes := make(map[string]int64)
	for _, e := range info.Exports {
		sizes[e.Name] = e.Size
	}
	if len(sizes) != 2 || sizes["one"] != 8*mib || sizes["two"] != 16*mib {
		t.Errorf("exports %v", sizes)
	}
	if got := strings.TrimSpace(tool(t, "nbdinfo", "--size", s.named("two"))); got != strconv.Itoa(16*mib) {
		t.Errorf("size of two is %s", got)
	}
	if _, err := try(t, "nbdinfo", "--size", s.named("three")); err == nil {
		t.Error("an export that does not exist was opened")
	}
}

func TestNbdinfoMapAgreesWithTheFile(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	file := sparse(t, dir, "disk", 64*mib)
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, mib)
	for i := range block {
		block[i] = 7
	}
	for _, offset := range []int64{0, 10 * mib, 63 * mib} {
		if _, err := f.WriteAt(block, offset); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	s := serve(t, file)
	var extents []struct {
		Offset int64 `json:"offset"`
		Length int64 `json:"length"`
		Type   int   `json:"type"`
	}
	out := tool(t, "nbdinfo", "--map", "--json", s.uri)
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var end, data int64
	for _, e := range extents {
		if e.Offset != end || e.Length <= 0 {
			t.Fatalf("extents do not follow each other:\n%s", out)
		}
		end += e.Length
		if e.Type == 0 {
			data += e.Length
		}
	}
	if end != 64*mib {
		t.Errorf("the map ends at %d", end)
	}
	if data < 3*mib || data > 8*mib {
		t.Errorf("%d bytes are data, want little more than %d:\n%s", data, 3*mib, out)
	}
}

func TestNbdcopyBothWays(t *testing.T) {
	requireInterop(t)
	const size = 96*mib + 4096
	for _, tt := range []struct {
		name  string
		flags []string
	}{
		{"one connection", []string{"--connections=1"}},
		{"four connections", []string{"--connections=4"}},
		{"four connections, one request each", []string{"--connections=4", "--requests=1"}},
		{"synchronous", []string{"--synchronous"}},
		{"many requests", []string{"--connections=4", "--requests=128"}},
		{"allocated", []string{"--allocated"}},
		{"flush, no extents", []string{"--flush", "--no-extents"}},
		{"small sparse", []string{"--sparse=4096", "--request-size=65536"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := scratch(t)
			source := patchwork(t, dir, "source", size)
			disk, other, back := sparse(t, dir, "disk", size), sparse(t, dir, "other", size), filepath.Join(dir, "back")
			s, o := serve(t, disk), serve(t, other)
			tool(t, "nbdcopy", append(tt.flags, source, s.uri)...)
			tool(t, "nbdcopy", append(tt.flags, s.uri, o.uri)...)
			tool(t, "nbdcopy", append(tt.flags, o.uri, back)...)
			same(t, source, back)
			s.stop(t)
			o.stop(t)
			same(t, source, disk)
			same(t, source, other)
		})
	}
}

func TestNbdcopyIntoDirtyDestination(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	source := sparse(t, dir, "source", 32*mib) // all zeros: what is there must go
	disk := patchwork(t, dir, "disk", 32*mib)
	s := serve(t, disk)
	tool(t, "nbdcopy", source, s.uri)
	s.stop(t)
	same(t, source, disk)
}

func TestNbdcopyKeepsHoles(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	source := sparse(t, dir, "source", 1<<30)
	disk, back := sparse(t, dir, "disk", 1<<30), filepath.Join(dir, "back")
	s := serve(t, disk)
	tool(t, "nbdcopy", source, s.uri)
	tool(t, "nbdcopy", s.uri, back)
	out := tool(t, "/usr/bin/stat", "-c", "%b %B", disk, back)
	for line := range strings.Lines(out) {
		var blocks, unit int64
		if _, err := fmt.Sscan(line, &blocks, &unit); err != nil {
			t.Fatal(err)
		}
		if blocks*unit > 16*mib {
			t.Errorf("1 GiB of holes takes %d bytes after a copy", blocks*unit)
		}
	}
}

func TestNbdshCommands(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	file := sparse(t, dir, "disk", 8<<30)
	s := serve(t, file)
	readOnly := serve(t, "--read-only", sparse(t, dir, "ro", 16*mib))
	script(t, "commands.py", s.uri, readOnly.uri, file)
}

func TestNbdshCommandsOnMemory(t *testing.T) {
	requireInterop(t)
	s := serve(t, "--mem", "256MiB")
	readOnly := serve(t, "--read-only", "--mem", "16MiB")
	script(t, "commands.py", s.uri, readOnly.uri, "")
}

func TestNbdshNegotiation(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	s := serve(t, "first="+sparse(t, dir, "a", 64*mib), "second="+sparse(t, dir, "b", 32*mib))
	script(t, "negotiation.py", s.socket, "first", strconv.Itoa(64*mib), "second", strconv.Itoa(32*mib))
}

func TestNbdshAsDocumented(t *testing.T) {
	requireInterop(t)
	s := serve(t, "--null", "1TiB")
	if got := strings.TrimSpace(tool(t, "nbdsh", "-u", s.uri, "-c", "print(h.get_size())")); got != strconv.Itoa(1<<40) {
		t.Errorf("nbdsh prints %q", got)
	}
}

func TestExportsByNameWithOddCharacters(t *testing.T) {
	requireInterop(t)
	dir := scratch(t)
	file := sparse(t, dir, "disk", 4*mib)
	for _, name := range []string{"plain", "with space", "sl/ash", "ünïcode", "per%cent", strings.Repeat("n", 255)} {
		s := serve(t, "--name", name, file)
		if got := strings.TrimSpace(tool(t, "nbdinfo", "--size", s.named(name))); got != strconv.Itoa(4*mib) {
			t.Errorf("export %q: size %q", name, got)
		}
		s.stop(t)
	}
}
