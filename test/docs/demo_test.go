package docs

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

const demoLimit = 2 * time.Minute // for a step of make run, whatever else the machine does

// demo is a run of tools/run.sh, as make run starts it.
type demo struct {
	t      *testing.T
	binary string
	in     string // RUN_DIR
	cmd    *exec.Cmd
	ended  chan error

	said testenv.Output
}

func startDemo(t *testing.T, seconds string) *demo {
	d := &demo{t: t, binary: requireDocs(t), in: t.TempDir(), ended: make(chan error, 1)}
	testenv.RequireCommand(t, "fio", "fio")
	d.cmd = exec.Command("tools/run.sh")
	d.cmd.Dir, d.cmd.Stdout, d.cmd.Stderr = root, &d.said, &d.said
	d.cmd.Env = append(os.Environ(), "RUN_SECONDS="+seconds, "RUN_SIZE=64M", "RUN_POOL=1G", "RUN_DIR="+d.in)
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // which Ctrl-C is for
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { d.ended <- d.cmd.Wait() }() // ends with the script
	t.Cleanup(func() {
		// Nothing of it is left unless the test failed.
		_ = syscall.Kill(-d.cmd.Process.Pid, syscall.SIGKILL)
		for _, dir := range d.dirs() {
			end := exec.Command("tools/run.sh", "--end", dir)
			end.Dir = root
			out, err := end.CombinedOutput()
			t.Logf("the end: %v\n%s", err, out)
		}
	})
	return d
}

func (d *demo) until(text string) {
	d.t.Helper()
	for deadline := time.Now().Add(demoLimit); !strings.Contains(d.said.String(), text); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			d.t.Fatalf("it does not say %q:\n%s", text, d.said.String())
		}
	}
}

// interrupt is Ctrl-C. It returns the exit code.
func (d *demo) interrupt() int {
	d.t.Helper()
	if err := syscall.Kill(-d.cmd.Process.Pid, syscall.SIGINT); err != nil {
		d.t.Fatal(err)
	}
	return d.wait()
}

func (d *demo) wait() int {
	d.t.Helper()
	select {
	case <-d.ended:
		return d.cmd.ProcessState.ExitCode()
	case <-time.After(demoLimit):
		d.t.Fatalf("it does not end:\n%s", d.said.String())
		return 0
	}
}

// dirs are the directories of nodes that are there.
func (d *demo) dirs() []string {
	list, err := filepath.Glob(filepath.Join(d.in, "ashlar-run.*"))
	if err != nil {
		d.t.Fatal(err)
	}
	return list
}

func (d *demo) gone() {
	d.t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if left := d.dirs(); err != nil || len(left) > 0 || bytes.Contains(mounts, []byte(d.in)) {
		d.t.Errorf("left: %v, %v\n%s", left, err, d.said.String())
	}
}

// run runs a command in the repository; it is given up after demoLimit.
func (d *demo) run(args ...string) (text string, code int) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), demoLimit)
	defer cancel()
	c := exec.CommandContext(ctx, args[0], args[1:]...)
	c.Dir, c.Env = root, append(os.Environ(), "ASHLAR_SERVER=unix://"+d.dirs()[0]+"/control.sock")
	out, err := c.CombinedOutput()
	if ctx.Err() != nil {
		d.t.Fatalf("%q does not end: %v\n%s", args, err, out)
	}
	return string(out), c.ProcessState.ExitCode()
}

func TestMakeRunLeavesNothing(t *testing.T) {
	d := startDemo(t, "1")
	if code := d.wait(); code != 0 || strings.Contains(d.said.String(), "mkfs.ext4 $(bin/ashlar attach demo)") {
		t.Errorf("exit code %d\n%s", code, d.said.String())
	}
	d.gone()
	d = startDemo(t, "60")
	d.until("70 % reads")
	if code := d.interrupt(); code != 130 {
		t.Errorf("Ctrl-C: exit code %d\n%s", code, d.said.String())
	}
	d.gone()
}

// TestMakeRunKeepsWhatIsMounted: Ctrl-C under a file system of the one who tries it ends
// nothing, and says what to do; that works.
func TestMakeRunKeepsWhatIsMounted(t *testing.T) {
	testenv.RequireCommand(t, "mkfs.ext4", "e2fsprogs")
	d := startDemo(t, "60")
	d.until("70 % reads")
	must := func(args ...string) string {
		t.Helper()
		text, code := d.run(args...)
		if code != 0 {
			t.Fatalf("%q: exit code %d\n%s", args, code, text)
		}
		return strings.TrimSpace(text)
	}
	must(d.binary, "volume", "create", "mine", "--size", "64MiB")
	must(d.binary, "attach", "mine", "--via", "fuse")
	device := must("readlink", "-f", "/dev/ashlar/default/mine")
	must("mkfs.ext4", "-q", device)
	at := t.TempDir()
	must("mount", device, at)
	t.Cleanup(func() {
		if unix.Unmount(at, 0) == nil { // the test failed before it was
			t.Error("it was mounted to the end")
		}
	})
	file := filepath.Join(at, "file")
	must("sh", "-c", "echo text >"+file)
	if code := d.interrupt(); code != 130 || len(d.dirs()) != 1 {
		t.Fatalf("exit code %d, left %v\n%s", code, d.dirs(), d.said.String())
	}
	end := "tools/run.sh --end " + d.dirs()[0]
	for _, want := range []string{device + " is in use: mounted on " + at + "\n", "\n    umount " + at + "\n", "\n    " + end + "\n"} {
		if !strings.Contains(d.said.String(), want) {
			t.Errorf("it does not say %q:\n%s", want, d.said.String())
		}
	}
	must("sh", "-c", "echo more >>"+file+" && sync -f "+file) // it is served
	if text, code := d.run("sh", "-c", end); code == 0 || !strings.Contains(text, "umount "+at) {
		t.Errorf("the end under it: exit code %d\n%s", code, text)
	}
	must("umount", at)
	text, code := d.run("sh", "-c", end)
	for deadline := time.Now().Add(demoLimit); code != 0 && strings.Contains(text, "(of process ") && time.Now().Before(deadline); {
		time.Sleep(time.Second) // a mount namespace made meanwhile has it too, until that ends
		text, code = d.run("sh", "-c", end)
	}
	if code != 0 {
		t.Errorf("the end: exit code %d\n%s", code, text)
	}
	d.gone()
}
