package testenv

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// namespaceVariable says that the process is in a mount namespace of its own.
const namespaceVariable = "ASHLAR_TEST_NAMESPACE"

// stuckAfter is how long after its own limit a test program may live. One that cannot end
// has a thread in a call that nothing interrupts.
const stuckAfter = 20 * time.Second

// InNamespace tells whether [RunInNamespace] started this process.
func InNamespace() bool { return os.Getenv(namespaceVariable) != "" }

// RunInNamespace runs this test program again in a mount namespace of its own and returns
// its exit code: what it mounts is in nobody else's then, and a process beside it that
// makes itself a namespace takes no copies of the mounts along, which would keep the
// devices in use.
//
// A test of devices can hang in the kernel so that not even the end of the program's time
// ends it. What its threads wait for is printed then. For TestMain, as root.
func RunInNamespace() int {
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), namespaceVariable+"=1")
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := c.Start(); err != nil {
		fmt.Println(err)
		return 2
	}
	ended := make(chan struct{})
	if limit := timeLimit(os.Args[1:]); limit > 0 {
		go func() {
			select {
			case <-ended:
			case <-time.After(limit + stuckAfter):
				fmt.Println("the tests do not end; what their threads wait for:")
				explain(os.Stdout, "/proc", c.Process.Pid)
			}
		}()
	}
	err := c.Wait()
	close(ended)
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		fmt.Println(err)
		return 2
	}
	if code := c.ProcessState.ExitCode(); code >= 0 {
		return code
	}
	fmt.Println("the tests:", c.ProcessState)
	return 2
}

// timeLimit is -test.timeout among the arguments of a test program; 0 for none.
func timeLimit(arguments []string) (limit time.Duration) {
	f := flag.NewFlagSet("", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.DurationVar(&limit, "test.timeout", 0, "")
	for _, a := range arguments {
		if strings.HasPrefix(a, "-test.timeout=") {
			_ = f.Parse([]string{a}) // 0 is what a bad one leaves; the tests refuse it
		}
	}
	return limit
}

// explain writes what each thread of a process is doing in the kernel, those first that
// nothing can interrupt. proc is where procfs is mounted.
func explain(w io.Writer, proc string, pid int) {
	threads, _ := filepath.Glob(fmt.Sprintf("%s/%d/task/*", proc, pid)) // the pattern is good
	read := func(path string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			return err.Error()
		}
		return strings.TrimSpace(string(b))
	}
	for _, uninterruptible := range []bool{true, false} {
		for _, dir := range threads {
			stat := read(dir + "/stat")
			fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
			if len(fields) == 0 || (fields[0] == "D") != uninterruptible {
				continue
			}
			_, _ = fmt.Fprintf(w, "thread %s, state %s, in %s\n", filepath.Base(dir), fields[0], read(dir+"/wchan")) // a report to whoever reads on
			if uninterruptible {
				_, _ = fmt.Fprintln(w, read(dir+"/stack")) // as above
			}
		}
	}
}
