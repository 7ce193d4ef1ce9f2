package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestTimeLimitIsThatOfTheTests(t *testing.T) {
	for want, arguments := range map[time.Duration][]string{
		0:                {"-test.v", "-test.run=X"},
		30 * time.Minute: {"-test.v", "-test.timeout=30m0s", "-test.run=X"},
		time.Second:      {"-test.timeout=bad", "-test.timeout=1s"},
	} {
		if got := timeLimit(arguments); got != want {
			t.Errorf("%q: %v, want %v", arguments, got, want)
		}
	}
}

func TestThreadsThatHangAreExplained(t *testing.T) {
	proc := t.TempDir()
	for file, text := range map[string]string{
		"7/task/7/stat": "7 (a) b) S 1", "7/task/7/wchan": "futex_do_wait",
		"7/task/8/stat": "8 (a) D 1", "7/task/8/wchan": "request_wait_answer", "7/task/8/stack": "[<0>] request_wait_answer\n",
	} {
		path := filepath.Join(proc, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var b strings.Builder
	explain(&b, proc, 7)
	if want := "thread 8, state D, in request_wait_answer\n[<0>] request_wait_answer\nthread 7, state S, in futex_do_wait\n"; b.String() != want {
		t.Errorf("%q, want %q", b.String(), want)
	}
}

// TestRunInNamespace runs this program so: the namespace is another, and the code is that
// of the tests.
func TestRunInNamespace(t *testing.T) {
	RequireRoot(t)
	here, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	for words, code := range map[string]int{"namespace": 0, "namespace fail": 5} {
		c := exec.Command("/proc/self/exe", "-test.timeout=1m0s")
		c.Env = append(os.Environ(), childVariable+"="+words)
		out, err := c.CombinedOutput()
		if got := c.ProcessState.ExitCode(); got != code || strings.Contains(string(out), here) || !strings.Contains(string(out), "mnt:[") {
			t.Errorf("%s: code %d, %q, %v", words, got, out, err)
		}
	}
}
