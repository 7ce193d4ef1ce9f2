package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func testOptions(seed uint64) options {
	return options{seed: seed, steps: 600, sizeMax: 128 << 10, lengthMax: 16 << 10, logMax: 5, command: "fsstress", path: "file"}
}

func stressMemory(t *testing.T, m *memory, o options) (*stress, error) {
	t.Helper()
	s, err := newStress(m, o)
	if err != nil {
		t.Fatal(err)
	}
	return s, s.run()
}

func TestRightTargetPasses(t *testing.T) {
	for _, device := range []bool{false, true} {
		for seed := range uint64(3) {
			s, err := stressMemory(t, newMemory(128<<10, device), testOptions(seed))
			if err != nil {
				t.Fatal(err)
			}
			for k, n := range s.counts {
				weights := fileWeights
				if device {
					weights = blockWeights
				}
				if (n > 0) != (weights[k] > 0) {
					t.Errorf("device %v: %d steps of kind %s, whose weight is %d", device, n, kind(k), weights[k])
				}
			}
		}
	}
}

// TestPlantedFaultsAreFound has a device do one thing wrong. Every seed must find it, whether
// everything is compared all the time or only as it comes.
func TestPlantedFaultsAreFound(t *testing.T) {
	for _, test := range []struct {
		name  string
		fault fault
		where string // "file": shows in files only; "check": a later write may hide it
		says  string
	}{
		{"a write is lost", fault{after: 40, write: func(*memory, int64, []byte) {}}, "", "(zeroes|of step)"},
		{"half of a write is lost", fault{after: 40, write: func(m *memory, at int64, page []byte) {
			copy(m.stored[at:], page[:pageSize/2])
		}}, "check", "(zeroes|of step)"},
		{"a write goes elsewhere", fault{after: 40, write: func(m *memory, at int64, page []byte) {
			copy(m.stored[(at+pageSize)%int64(len(m.stored)):], page)
		}}, "", "differ"},
		{"a byte rots", fault{after: 40, write: func(m *memory, at int64, page []byte) {
			copy(m.stored[at:], page)
			m.stored[at] ^= 1
		}}, "", "no step that is remembered"},
		{"a hole is not made", fault{punch: true}, "", "wanted 0+: zeroes"},
		{"truncated bytes come back", fault{shrink: true}, "file", "wanted 0+: zeroes"},
		{"reads are of another place", fault{read: func(m *memory, p []byte, offset int64) {
			if offset == 5*pageSize {
				copy(p, m.stored[:min(len(m.stored), pageSize)])
			}
		}}, "", "differ"},
		{"a direct read is short", fault{directRead: func(_ *memory, _ []byte, _ int64, n int) int { return n / 2 }}, "", "bytes are there, want"},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, device := range []bool{false, true} {
				if device && test.where == "file" {
					continue
				}
				for _, check := range []bool{false, true} {
					if !check && test.where == "check" {
						continue
					}
					for seed := range uint64(2) {
						m := newMemory(128<<10, device)
						m.fault = test.fault
						o := testOptions(seed)
						// A fault that is overwritten before it is read is none.
						if o.check = check; !check && test.fault.write != nil {
							o.steps, m.fault.after = 400, lastWriteBack(t, device, seed)
						}
						_, err := stressMemory(t, m, o)
						if err == nil {
							t.Fatalf("device %v, check %v, seed %d: not found", device, check, seed)
						}
						if !regexp.MustCompile(test.says).MatchString(err.Error()) || !strings.Contains(err.Error(), fmt.Sprintf("seed %d, step ", seed)) {
							t.Fatalf("device %v, check %v: %v", device, check, err)
						}
					}
				}
			}
		})
	}
}

// lastWriteBack returns how many pages a right run writes back, less the last: what the last
// one writes nobody overwrites.
func lastWriteBack(t *testing.T, device bool, seed uint64) int {
	m := newMemory(128<<10, device)
	o := testOptions(seed)
	o.steps = 400
	if _, err := stressMemory(t, m, o); err != nil {
		t.Fatal(err)
	}
	return m.writebacks - 1
}

func TestSeedRepeatsARun(t *testing.T) {
	fail := func() (*stress, string) {
		m := newMemory(128<<10, true)
		m.fault = fault{after: 60, write: func(*memory, int64, []byte) {}}
		o := testOptions(7)
		o.check = true
		s, err := stressMemory(t, m, o)
		d := new(difference)
		if !errors.As(err, &d) {
			t.Fatalf("no difference: %v", err)
		}
		if want := fmt.Sprintf("to repeat it: fsstress --steps %d file", d.at.number+1); !strings.HasSuffix(d.text, want) {
			t.Errorf("%s\ndoes not end in %q", d.text, want)
		}
		return s, d.text
	}
	one, said := fail()
	two, again := fail()
	if said != again {
		t.Errorf("two runs of one seed:\n%s\n%s", said, again)
	}
	if one.history != two.history {
		t.Error("two runs of one seed took other steps")
	}
}

func TestDifferenceTellsWhoWroteWhat(t *testing.T) {
	s, err := newStress(newMemory(64<<10, true), testOptions(3))
	if err != nil {
		t.Fatal(err)
	}
	first := step{number: 1, kind: write, offset: 8192, length: 8192}
	second := step{number: 2, kind: directWrite, offset: 8192, length: 4096}
	for _, at := range []step{first, second} {
		if err := s.step(at); err != nil {
			t.Fatal(err)
		}
	}
	lost := bytes.Clone(s.want[8192:16384])
	fill(lost[:4096], s.seed, 1, 8192)
	at := step{number: 3, kind: read, offset: 8192, length: 8192}
	said := s.differ(at, lost, 8192).Error()
	for _, want := range []string{
		"seed 3, step 3: read 8192 bytes at 8192: bytes 8192 to 12287 differ",
		": of step 1: write 8192 bytes at 8192\n  wanted ",
		": of step 2: direct-write 4096 bytes at 8192\n",
	} {
		if !strings.Contains(said, want) {
			t.Errorf("%s\ndoes not say %q", said, want)
		}
	}
}

func TestDiscardedBlocksAreAsTheyWereOrZeroes(t *testing.T) {
	s, err := newStress(newMemory(64<<10, true), testOptions(1))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.step(step{number: 0, kind: write, length: 16 << 10}); err != nil {
		t.Fatal(err)
	}
	if err := s.step(step{number: 1, kind: discard, offset: align, length: align}); err != nil { // which memory zeroes
		t.Fatal(err)
	}
	if !bytes.Equal(s.want[align:2*align], make([]byte, align)) {
		t.Error("a discarded block that is zeroes is wanted as it was")
	}
	s.target.(*memory).fault.read = func(_ *memory, p []byte, _ int64) { p[0]++ }
	s.target.(*memory).clean = map[int64][]byte{}
	if err := s.step(step{number: 2, kind: discard, offset: 2 * align, length: align}); !errors.As(err, new(*difference)) {
		t.Errorf("a discarded block that became something else: %v", err)
	}
}

func TestLeftOutKindsDoNotMoveTheOthers(t *testing.T) {
	o := testOptions(9)
	all, err := stressMemory(t, newMemory(128<<10, true), o)
	if err != nil {
		t.Fatal(err)
	}
	o.without[discard], o.without[punch] = true, true
	some, err := stressMemory(t, newMemory(128<<10, true), o)
	if err != nil {
		t.Fatal(err)
	}
	for k := range kindCount {
		want := all.counts[k]
		if o.without[k] {
			want = 0
		}
		if some.counts[k] != want {
			t.Errorf("%d steps of kind %s, want %d", some.counts[k], k, want)
		}
	}
}

func TestErrorsEndTheRun(t *testing.T) {
	failed := errors.New("the disk is gone")
	for k := range kindCount {
		s, err := newStress(newMemory(64<<10, k == discard), testOptions(1))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.step(step{kind: write, length: align}); err != nil {
			t.Fatal(err)
		}
		s.target.(*memory).err = failed
		if err := s.step(step{number: 1, kind: k, length: align}); !errors.Is(err, failed) || !strings.Contains(err.Error(), "seed 1, step 1: "+k.String()) {
			t.Errorf("%s: %v", k, err)
		}
		if err := s.run(); !errors.Is(err, failed) {
			t.Errorf("run: %v", err)
		}
	}
	m := newMemory(64<<10, true)
	m.err = failed
	if _, err := newStress(m, testOptions(1)); !errors.Is(err, failed) {
		t.Errorf("new: %v", err)
	}
	if _, err := newStress(newMemory(1, true), testOptions(1)); err == nil {
		t.Error("a device of one byte is accepted")
	}
}

// TestFileOfThisKernel runs it on the file system of temporary files.
func TestFileOfThisKernel(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	var out, log bytes.Buffer
	if err := run([]string{"--seed", "1", "--steps", "300", "--size", "1048576", "--check", path}, &out, &log); err != nil {
		t.Fatal(err, log.String())
	}
	if !strings.HasPrefix(out.String(), "seed 1: "+path+"\nseed 1: ") {
		t.Errorf("said %q", out.String())
	}
	info, err := os.Stat(path)
	if err != nil || info.Size() > 1<<20 {
		t.Errorf("%v, %v", info, err)
	}
}

// TestUntilEndsARun counts on the file being there at the first look.
func TestUntilEndsARun(t *testing.T) {
	dir := t.TempDir()
	s, err := newStress(newMemory(64<<10, true), testOptions(1))
	if err != nil {
		t.Fatal(err)
	}
	s.until = filepath.Join(dir, "end")
	if s.mayEnd(16) {
		t.Error("ends before the file exists")
	}
	if err := os.WriteFile(s.until, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if s.mayEnd(17) || !s.mayEnd(32) {
		t.Error("does not look at every 16th step")
	}
}

func TestCommandLine(t *testing.T) {
	t.Setenv(seedVariable, "")
	for _, test := range []struct{ args, seed, says string }{
		{"", "", "one PATH, not 0"},
		{"a b", "", "one PATH, not 2"},
		{"--size 1 a", "", "at least 4096"},
		{"--size 1099511627776 a", "", "at most 4 GiB"},
		{"--without nothing a", "", `no kind of step "nothing"`},
		{"--depth 3 a", "", "usage: fsstress"},
		{"a", "x", seedVariable},
	} {
		t.Setenv(seedVariable, test.seed)
		var out, log bytes.Buffer
		if err := run(strings.Fields(test.args), &out, &log); !errors.Is(err, errUsage) || !strings.Contains(log.String(), test.says) {
			t.Errorf("%q: %v, said %q", test.args, err, log.String())
		}
	}
	t.Setenv(seedVariable, "12")
	o, err := parse([]string{"--without", "punch,zero", "/dev/x"}, &bytes.Buffer{})
	if err != nil || o.seed != 12 || !o.without[zero] || o.command != "fsstress --seed 12 --size 8388608 --length 131072 --without punch,zero" {
		t.Errorf("%+v, %v", o, err)
	}
	if o, err = parse([]string{"--seed", "5", "/dev/x"}, &bytes.Buffer{}); err != nil || o.seed != 5 {
		t.Errorf("%+v, %v", o, err)
	}
	for path, says := range map[string]string{t.TempDir(): "is a directory", "/dev/null": "neither a file nor a block device"} {
		var out, log bytes.Buffer
		if err := run([]string{path}, &out, &log); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", path, err)
		}
	}
}
