package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	fioprofiles "github.com/ashlar-storage/ashlar/tools/fio-profiles"
)

func TestBuiltInProfilesParse(t *testing.T) {
	for name, want := range map[string]struct{ cases, writing int }{
		"kbench": {12, 6}, "dbench": {9, 5}, "palark": {8, 4}, "quick": {4, 2}, "bars": {22, 14}, "verify": {3, 3},
	} {
		p, err := LoadProfile(name)
		if err != nil {
			t.Error(err)
			continue
		}
		writing := 0
		for _, c := range p.Cases {
			if c.Writes() {
				writing++
			}
			if timing, err := c.Timing(); err != nil || (timing.Runtime == 0) != endsWithItsWork(name, c.Name) {
				t.Errorf("%s, %s: timing %v, %v", name, c.Name, timing, err)
			}
		}
		if len(p.Cases) != want.cases || writing != want.writing {
			t.Errorf("%s: %d cases, %d writing, want %d, %d", name, len(p.Cases), writing, want.cases, want.writing)
		}
	}
	if len(fioprofiles.Names()) != 6 {
		t.Errorf("profiles %v: the table above misses one", fioprofiles.Names())
	}
}

func endsWithItsWork(profile, job string) bool {
	return profile == "verify" || strings.HasPrefix(job, "pool-bytes-") || strings.HasPrefix(job, "pool-first-")
}

func TestStonewallStartsACase(t *testing.T) {
	p, err := ParseProfile("p", "[global]\nbs=4k\n[a]\nrw=read\n[b]\nstonewall\nrw=write\n[c]\nrw=read\n; note\n# note\n[global]\nbs=8k\n[d]\nstonewall=1\nrw=read\n")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range p.Cases {
		got = append(got, c.Name+":"+string(rune('0'+len(c.jobs))))
	}
	if s := strings.Join(got, " "); s != "a:1 b:2 d:1" {
		t.Errorf("cases %s, want a:1 b:2 d:1", s)
	}
	if bs, _ := value(p.Cases[2].all(0), "bs"); bs != "8k" {
		t.Errorf("bs of d = %s, want the later global", bs)
	}
}

func TestProfileErrorsNameTheLine(t *testing.T) {
	for text, want := range map[string]string{
		"":                                 "no jobs",
		"bs=4k\n":                          "before the first",
		"[a]\nfilename=/dev/sda\n":         "line 2: filename is given by the harness",
		"[a]\nioengine=libaio\n":           "ioengine is given by the harness",
		"[a]\ninclude x.fio\n":             "include is not followed",
		"[a]\nstonewall\n[a]\nstonewall\n": "two jobs are called",
	} {
		if _, err := ParseProfile("p", text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func TestRenderPutsTheTimesInForce(t *testing.T) {
	p, err := ParseProfile("p", "[global]\nruntime=20s\nramp_time=5s\ntime_based=1\nstonewall\n[a]\nrw=randread\n")
	if err != nil {
		t.Fatal(err)
	}
	timing, err := p.Cases[0].Timing()
	if err != nil || timing != (Timing{5 * time.Second, 20 * time.Second}) {
		t.Fatalf("timing %v, %v", timing, err)
	}
	if kept := timing.Override(-1, 0); kept != timing {
		t.Errorf("override with nothing: %v", kept)
	}
	got := p.Cases[0].Render(timing.Override(0, 1500*time.Millisecond))
	want := "[global]\ntime_based=1\nstonewall\ngroup_reporting=1\nunified_rw_reporting=both\npercentile_list=50:99:99.9\nruntime=1500000us\n[a]\nrw=randread\n"
	if got != want {
		t.Errorf("rendered\n%s\nwant\n%s", got, want)
	}
	if forever := (Timing{}).Override(time.Second, time.Second); forever != (Timing{}) {
		t.Errorf("a case that ends with its work was given a runtime: %v", forever)
	}
}

func TestTimesOfFio(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"20": 20 * time.Second, "20s": 20 * time.Second, "500ms": 500 * time.Millisecond, "2m": 2 * time.Minute, "10us": 10 * time.Microsecond,
	} {
		if got, err := parseTime(text); err != nil || got != want {
			t.Errorf("%s = %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "s", "-1s", "1.5s", "x"} {
		if got, err := parseTime(text); err == nil {
			t.Errorf("%q = %v, want an error", text, got)
		}
	}
}

func TestLoadTranslatesWhatOtherClientsCanDo(t *testing.T) {
	p, err := LoadProfile("bars")
	if err != nil {
		t.Fatal(err)
	}
	c, err := p.Find("randwrite-4k-qd1-fsync")
	if err != nil {
		t.Fatal(err)
	}
	if l, err := c.Load(); err != nil || l != (Load{RW: "randwrite", BlockBytes: 4096, Depth: 1, Jobs: 1, FlushEvery: 1}) {
		t.Errorf("load %+v, %v", l, err)
	}
	verify, err := LoadProfile("verify")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := verify.Cases[0].Load(); err == nil || !strings.Contains(err.Error(), "only fio verifies") {
		t.Errorf("verify: %v", err)
	}
	if _, err := p.Find("nope"); err == nil || !strings.Contains(err.Error(), "randread-4k-qd1") {
		t.Errorf("an unknown job: %v, want the known ones named", err)
	}
}

// Fio itself must take every profile as it is rendered.
func TestFioAcceptsRenderedProfiles(t *testing.T) {
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("needs fio: apt install fio")
	}
	dir := t.TempDir()
	arguments := []string{"--parse-only", "--ioengine=io_uring", "--filename=" + filepath.Join(dir, "target"), "--size=64m"}
	for _, name := range fioprofiles.Names() {
		p, err := LoadProfile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range p.Cases {
			timing, err := c.Timing()
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, name+"-"+c.Name+".fio")
			if err := os.WriteFile(file, []byte(c.Render(timing)), 0o600); err != nil {
				t.Fatal(err)
			}
			arguments = append(arguments, file)
		}
	}
	if out, err := exec.Command("fio", arguments...).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
