package harness

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestParseBacking(t *testing.T) {
	for text, want := range map[string]Backing{
		"null:1GiB":                   {Kind: BackingNull, Size: 1 << 30},
		"mem:64MiB":                   {Kind: BackingMemory, Size: 64 << 20},
		"/dev/sdx":                    {Kind: BackingFile, Path: "/dev/sdx"},
		"nbd://h:1/e":                 {Kind: BackingURI, URI: "nbd://h:1/e"},
		"nbd+unix:///e?socket=/run/s": {Kind: BackingURI, URI: "nbd+unix:///e?socket=/run/s"},
	} {
		if got, err := ParseBacking(text); err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "null:", "null:0", "mem:x", "iscsi://h/t/1", "nbd+unix:///e"} {
		if got, err := ParseBacking(text); err == nil {
			t.Errorf("%q: %+v, want an error", text, got)
		}
	}
}

func TestWritesNeedConsent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, SizeMin); err != nil {
		t.Fatal(err)
	}
	var overwrite *OverwriteError
	b := Backing{Kind: BackingFile, Path: path}
	if _, err := b.Prepare(true, false, 0); !errors.As(err, &overwrite) || overwrite.Size != SizeMin || !strings.Contains(err.Error(), path) {
		t.Errorf("writes without consent: %v", err)
	}
	if _, err := b.Prepare(true, true, 0); err != nil || b.Size != SizeMin {
		t.Errorf("writes with consent: %v, size %d", err, b.Size)
	}
	if _, err := b.Prepare(false, false, 0); err != nil {
		t.Errorf("reads: %v", err)
	}
	uri := Backing{Kind: BackingURI, URI: "nbd://h"}
	if _, err := uri.Prepare(true, false, 0); err == nil {
		t.Error("an export was to be overwritten without consent")
	}
}

func TestTargetsAreCreatedFullOrNotAtAll(t *testing.T) {
	dir := t.TempDir()
	b := Backing{Kind: BackingFile, Path: filepath.Join(dir, "f")}
	if _, err := b.Prepare(true, false, 0); err == nil || !strings.Contains(err.Error(), "--size") {
		t.Errorf("absent, no size: %v", err)
	}
	if _, err := b.Prepare(true, false, SizeMin-1); err == nil || !strings.Contains(err.Error(), "too small") {
		t.Errorf("too small: %v", err)
	}
	if created, err := b.Prepare(true, false, SizeMin); err != nil || !created {
		t.Fatalf("created %v, %v", created, err)
	}
	text, err := os.ReadFile(b.Path)
	if err != nil || len(text) != SizeMin || bytes.Count(text[:1<<20], []byte{0}) > 1<<14 {
		t.Errorf("%d bytes, %v; want %d that are not zeros", len(text), err, SizeMin)
	}
	directory := Backing{Kind: BackingFile, Path: dir}
	if _, err := directory.Prepare(false, false, 0); err == nil {
		t.Error("a directory is no target")
	}
	nowhere := Backing{Kind: BackingFile, Path: filepath.Join(dir, "no", "f")}
	if _, err := nowhere.Prepare(true, false, SizeMin); err == nil {
		t.Error("created a file in a directory that is not there")
	}
}

func TestCPULists(t *testing.T) {
	for list, want := range map[string]string{"": "", "any": "", "0": "0", "1,3-5": "1,3,4,5"} {
		got, err := parseCPUs(list)
		if err != nil || joinCPUs(got) != want {
			t.Errorf("%q: %v, %v", list, got, err)
		}
	}
	for _, list := range []string{"x", "3-1", "-1", "1,", "99999"} {
		if got, err := parseCPUs(list); err == nil {
			t.Errorf("%q: %v, want an error", list, got)
		}
	}
}

func TestStatLines(t *testing.T) {
	line := "42 (a) b (c)) S 7 1 1 0 -1 4194560 100 0 0 0 150 50 25 25 20 0 9 0 12345 1000 200"
	s, err := parseStat(line)
	if err != nil || s != (processStat{parent: 7, startTicks: 12345, cpuSeconds: 2.5}) {
		t.Errorf("%+v, %v", s, err)
	}
	for _, line := range []string{"", "1 (x", "1 (x) S 2", strings.Replace(line, "150", "x", 1)} {
		if _, err := parseStat(line); err == nil {
			t.Errorf("%q accepted", line)
		}
	}
}

func TestRatesComeFromInsideTheWindow(t *testing.T) {
	start := time.Unix(1000, 0)
	s := new(sampler)
	for i := range 11 { // idle for half a second, then one CPU busy
		s.samples = append(s.samples, sample{at: start.Add(time.Duration(i) * 100 * time.Millisecond), seconds: max(0, float64(i)/10-0.5), resident: uint64(i)})
	}
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	for _, c := range []struct {
		from, to int
		want     float64
		ok       bool
	}{
		{500, 1000, 1, true},
		{0, 500, 0, true},
		{450, 550, 0.5, true},
		{500, 1200, 1, true},  // the samples end first
		{900, 1200, 0, false}, // and cover too little
		{600, 600, 0, false},
	} {
		rate, resident, ok := s.Rate(at(c.from), at(c.to))
		if ok != c.ok || magnitude(rate-c.want) > 1e-6 || resident != 10 {
			t.Errorf("%d to %d ms: %v, %v, resident %d, want %v, %v", c.from, c.to, rate, ok, resident, c.want, c.ok)
		}
	}
}

func magnitude(x float64) float64 { return max(x, -x) }

func TestOptionsAreCheckedBeforeAnythingStarts(t *testing.T) {
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("needs fio: apt install fio")
	}
	profile, err := LoadProfile("quick")
	if err != nil {
		t.Fatal(err)
	}
	found, err := FindPeers("raw")
	if err != nil {
		t.Fatal(err)
	}
	good := Config{Profile: profile, Peers: found, Client: fio{}, Rounds: 1, Backing: Backing{Kind: BackingFile, Path: "/f"}}
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Config){
		"no profile":       func(c *Config) { c.Profile = nil },
		"no peers":         func(c *Config) { c.Peers = nil },
		"0 rounds":         func(c *Config) { c.Rounds = 0 },
		"runtime":          func(c *Config) { c.Runtime = RuntimeMax + 1 },
		"ramp":             func(c *Config) { c.Ramp = RuntimeMax + 1 },
		"baseline":         func(c *Config) { c.Baseline = "nobody" },
		"CPU 4095":         func(c *Config) { c.ServerCPUs = []int{4095} },
		"no job":           func(c *Config) { c.Only = []string{"nope"} },
		"cannot serve":     func(c *Config) { c.Backing = Backing{Kind: BackingNull, Size: 1} },
		"is not installed": func(c *Config) { c.Client = missingClient{} },
	} {
		c := good
		change(&c)
		if err := c.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

type missingClient struct{ fio }

func (missingClient) Program() (string, string) { return "no-such-program-here", "nothing" }

// end to end, as short as it can be: two peers, two rounds.
func TestRunMeasuresPeersAndLeavesNothing(t *testing.T) {
	for _, program := range []string{"fio", "nbdkit"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s: apt install %s", program, program)
		}
	}
	if testing.Short() {
		t.Skip("starts servers; not with -short")
	}
	t.Setenv("TMPDIR", shortTemp(t))
	path := filepath.Join(os.Getenv("TMPDIR"), "f")
	b := Backing{Kind: BackingFile, Path: path}
	if _, err := b.Prepare(true, false, SizeMin); err != nil {
		t.Fatal(err)
	}
	profile, err := LoadProfile("quick")
	if err != nil {
		t.Fatal(err)
	}
	found, err := FindPeers("nbdkit-1", "raw")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := Config{
		Profile: profile, Only: []string{"randread-4k-qd32"}, Backing: b, Peers: found, Client: fio{},
		Rounds: 2, Runtime: 300 * time.Millisecond, Ramp: 0, Progress: new(bytes.Buffer),
	}
	r, err := Run(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Runs) != 4 || r.Runs[0].Peer != "nbdkit-1" || r.Runs[2].Peer != "raw" {
		t.Errorf("%d runs, rounds begin with %s and %s; want 4, turning", len(r.Runs), r.Runs[0].Peer, r.Runs[2].Peer)
	}
	for _, run := range r.Runs {
		if run.IOPS == 0 || run.LatencyP999 == 0 || run.ServerSampled != (run.Peer == "nbdkit-1") {
			t.Errorf("run %+v", run)
		}
	}
	left, err := filepath.Glob(filepath.Join(os.Getenv("TMPDIR"), "ashlar-bench-*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestAnEndedContextStopsTheServer(t *testing.T) {
	if _, err := exec.LookPath("nbdkit"); err != nil {
		t.Skip("needs nbdkit: apt install nbdkit")
	}
	found, err := FindPeers("nbdkit-1")
	if err != nil {
		t.Fatal(err)
	}
	plan, err := found[0].Plan(Site{Dir: shortTemp(t), Backing: Backing{Kind: BackingNull, Size: 1 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	s, err := startServer(t.Context(), plan, nil)
	if err != nil {
		t.Fatal(err)
	}
	pid := s.pid
	s.Stop()
	if _, err := readStat(pid); err == nil {
		t.Errorf("process %d is still there", pid)
	}
	s.Stop() // a second time does nothing
}

func TestAServerThatDoesNotEndIsKilledAndKnownFor(t *testing.T) {
	dir := shortTemp(t)
	l, err := net.Listen("unix", dir+"/s") // answers in its place
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }() // nothing was accepted
	s, err := startServer(t.Context(), Plan{
		Argv: []string{"sh", "-c", "trap '' TERM; touch " + dir + "/ready; while :; do sleep 1; done"}, Ready: "unix:" + dir + "/s", StopMax: 50 * time.Millisecond,
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 500 { // until the trap is set
		if _, err := os.Stat(dir + "/ready"); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if s.Stop(); !s.killed {
		t.Error("ended by itself, it seems")
	}
}

func TestAServerThatEndsIsReportedWithItsOutput(t *testing.T) {
	dir := shortTemp(t)
	_, err := startServer(t.Context(), Plan{Argv: []string{"sh", "-c", "echo no such disk >&2; exit 3"}, Ready: "unix:" + dir + "/s"}, nil)
	if err == nil || !strings.Contains(err.Error(), "no such disk") {
		t.Errorf("%v, want what the server said", err)
	}
	if _, err := startServer(t.Context(), Plan{Argv: []string{dir + "/absent"}}, nil); err == nil {
		t.Error("started a program that is not there")
	}
}

func TestAClientIsEndedAtItsBound(t *testing.T) {
	began := time.Now()
	_, _, _, err := runClient(t.Context(), ClientJob{Dir: t.TempDir(), Bound: 100 * time.Millisecond}, []string{"sleep", "60"})
	if err == nil || !strings.Contains(err.Error(), "not done after") || time.Since(began) > 10*time.Second {
		t.Errorf("%v after %v", err, time.Since(began))
	}
}

// shortTemp is a directory whose sockets have short paths.
func shortTemp(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hb-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}
