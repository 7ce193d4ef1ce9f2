package docs

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/internal/testenv"
)

const (
	lineLimit = time.Minute
	pageLimit = 10 * time.Minute

	leaveLimit = 30 * time.Second // for a machine to take away what a page left
)

// runnable are the pages whose marked blocks are run.
var runnable = []string{"README.md", "docs/operating.md", "docs/security.md", "docs/attach.md"}

func TestMarkedBlocksRun(t *testing.T) {
	binary := requireDocs(t)
	for _, page := range runnable {
		if _, err := os.Stat(filepath.Join(root, page)); os.IsNotExist(err) {
			continue
		}
		_, blocks := readPage(t, page)
		blocks = slices.DeleteFunc(blocks, func(b block) bool { return !b.run })
		if len(blocks) == 0 {
			t.Logf("%s: no block is marked", page)
			continue
		}
		t.Run(page, func(t *testing.T) {
			if err := runPage(t, binary, blocks, lineLimit); err != nil {
				t.Errorf("%s:%v", page, err)
			}
		})
	}
}

// TestRunner runs an example page, and ones that must fail.
func TestRunner(t *testing.T) {
	binary := requireDocs(t)
	text, err := os.ReadFile("testdata/example.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks, problems := parsePage(string(text))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	blocks = slices.DeleteFunc(blocks, func(b block) bool { return !b.run })
	if err := runPage(t, binary, blocks, lineLimit); err != nil {
		t.Errorf("example.md:%v", err)
	}
	for text, want := range map[string]string{
		"true\nfalse\ntrue":                     "11: ",
		"ashlar volume list":                    "10: ",
		"test -f disk.img\nashlar pool creat x": "11: ",
	} {
		err := runPage(t, binary, []block{{line: 10, lines: strings.Split(text, "\n"), run: true}}, lineLimit)
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v, want a failure at line %s", text, err, want)
		}
	}
}

// TestWhatAPageLeavesGoesAway fails a page, and has one wait for ever, with a file system
// mounted on a device.
func TestWhatAPageLeavesGoesAway(t *testing.T) {
	binary := requireDocs(t)
	testenv.RequireCommand(t, "losetup", "mount")
	for _, last := range []string{"false", "sync -f /mnt/file", "kill -KILL %1; cat /mnt/file", "sleep 1000"} {
		err := runPage(t, binary, []block{{line: 1, run: true, lines: []string{
			"ashlar serve --data-dir /var/lib/ashlar --default-pool 4GiB &",
			"ashlar volume create data --size 1GiB --pool default",
			"echo device $(ashlar attach data --via fuse).",
			"mkfs.ext4 -q /dev/ashlar/default/data",
			"mount /dev/ashlar/default/data /mnt",
			"echo text >/mnt/file",
			last,
			"test -s /mnt/file && false",
		}}}, lineLimit/3)
		if err == nil {
			t.Fatalf("%s: the page does not fail", last)
		}
		device := regexp.MustCompile(`device /dev/(loop\d+)\.`).FindStringSubmatch(err.Error())
		if device == nil {
			t.Fatalf("%s: %v", last, err)
		}
		if file, readErr := os.ReadFile("/sys/block/" + device[1] + "/loop/backing_file"); readErr == nil {
			t.Errorf("%s: %s is left, of %s: %v", last, device[1], file, err)
		}
	}
}

// requireDocs is the path of the binary, under make test-docs.
func requireDocs(t *testing.T) string {
	t.Helper()
	if os.Getenv("ASHLAR_DOCS") != "1" {
		t.Skip("needs bin/ashlar and root (make test-docs does not skip it)")
	}
	testenv.RequireRoot(t)
	binary, err := filepath.Abs(filepath.Join(root, "bin/ashlar"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(binary); err != nil {
		t.Fatalf("%v; make test-docs builds it", err)
	}
	return binary
}

const (
	// readyScript waits for a daemon, and fails without one.
	readyScript = "for _ in $(seq 200); do ashlar pool list >/dev/null 2>&1 && break || sleep 0.1; done\nashlar pool list >/dev/null\n"

	// nodeScript makes the node of a page: $daemon is its daemon, $peer another server.
	nodeScript = "ashlar serve --data-dir /var/lib/ashlar --default-pool 10GiB &\ndaemon=$!\n" + readyScript +
		"ashlar volume create data --size 1GiB --pool default\nashlar snapshot create data@monday\n" +
		"truncate -s 64M x.img\nashlar export --listen 127.0.0.2:10809 --name x x.img &\npeer=$!\n" +
		"for _ in $(seq 200); do nbdinfo --size nbd://host/x >/dev/null 2>&1 && break || sleep 0.1; done\n"

	// endScript ends the daemon, and what else listens.
	endScript = "kill $daemon $peer\nwait $daemon\n[ -z \"$peer\" ] || wait $peer\npeer=\n"
)

// script makes one bash script of the blocks of a page. Before each line it says the
// line's number on descriptor 3, which is how the test knows where it is.
func script(blocks []block, repository string) string {
	var b strings.Builder
	b.WriteString("set -e -o pipefail\nwork=$PWD\nunset ASHLAR_SERVER\n")
	node := false
	for _, block := range blocks {
		if block.node && !node {
			fmt.Fprintf(&b, "echo %d >&3\ncd \"$work\"\n%s", block.line, nodeScript)
			node = true
		}
		directory := "$work"
		if block.repository {
			directory = repository
		}
		fmt.Fprintf(&b, "cd \"%s\"\n", directory)
		for i, line := range block.joined() {
			parts := commands(line)
			leftOut := slices.ContainsFunc(parts, func(words []string) bool {
				return len(words) > 0 && slices.Contains(block.without, words[0])
			})
			if strings.TrimSpace(line) == "" || leftOut {
				continue
			}
			line = strings.TrimPrefix(strings.TrimSpace(line), "$ ")
			fmt.Fprintf(&b, "echo %d >&3\n", block.line+i)
			if block.daemon {
				line, _, _ = strings.Cut(line, " #")
				fmt.Fprintf(&b, "%s%s &\ndaemon=$!\n%s", endScript, line, readyScript)
				continue
			}
			fmt.Fprintf(&b, "%s\n", line)
			if ready := readiness(parts); ready != "" {
				fmt.Fprintf(&b, "for _ in $(seq 200); do %s && break || sleep 0.1; done\n", ready)
			}
		}
	}
	b.WriteString("echo end >&3\n")
	return b.String()
}

// readiness is a command that succeeds once what the line started in the background
// answers, "" where it started nothing.
func readiness(parts [][]string) string {
	if len(parts) < 2 || len(parts[len(parts)-1]) > 0 || len(parts[len(parts)-2]) < 2 { // no & at the end
		return ""
	}
	words := parts[len(parts)-2]
	switch i := slices.Index(words, "--socket"); {
	case words[0] != "ashlar":
	case words[1] == "serve":
		return "ashlar pool list >/dev/null 2>&1"
	case words[1] == "export" && i > 0 && i+1 < len(words):
		return "test -S '" + words[i+1] + "'"
	}
	return ""
}

// runPage runs the blocks, each line for at most a time. Its error begins with the number of the line that failed.
func runPage(t *testing.T, binary string, blocks []block, lineLimit time.Duration) error {
	t.Helper()
	repository, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	scratch, err := os.MkdirTemp("/var/tmp", "ashlar-docs-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(scratch)
	bin := filepath.Join(scratch, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(binary, filepath.Join(bin, "ashlar")); err != nil {
		t.Fatal(err)
	}
	writeCertificates(t, filepath.Join(scratch, "etc"))
	file := filepath.Join(scratch, "page.sh")
	if err := os.WriteFile(file, []byte(script(blocks, repository)), 0o644); err != nil {
		t.Fatal(err)
	}
	machine, err := filepath.Abs("testdata/machine.sh")
	if err != nil {
		t.Fatal(err)
	}
	positions, positionsEnd, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer positions.Close()
	ctx, cancel := context.WithTimeout(t.Context(), pageLimit)
	defer cancel()
	var output strings.Builder
	// The first process of a pid namespace takes the others with it when it ends.
	command := exec.CommandContext(ctx, "unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", machine, scratch, "bash", file)
	command.Env = append(os.Environ(), "PATH="+bin+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin")
	command.Stdout, command.Stderr = &output, &output
	command.ExtraFiles = []*os.File{positionsEnd}
	input, err := command.StdinPipe() // its end is the machine's
	if err != nil {
		t.Fatal(err)
	}
	command.Cancel = input.Close
	command.WaitDelay = leaveLimit
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	_ = positionsEnd.Close() // the child has it
	at := make(chan string)
	go func() { // ends when nothing of the page runs any more
		defer close(at)
		for scanner := bufio.NewScanner(positions); scanner.Scan(); {
			at <- scanner.Text()
		}
	}()
	line, slow := "0", false
	timer := time.NewTimer(lineLimit)
	defer timer.Stop()
	for open := true; open; {
		var now string
		select {
		case now, open = <-at:
			if open {
				line = now
				timer.Reset(lineLimit)
			}
		case <-timer.C:
			slow = true
			cancel()
		}
	}
	err = command.Wait()
	switch {
	case line == "end" && err == nil:
		return nil
	case line == "end":
		return fmt.Errorf("%s: what the page left does not go away: %w\n%s", line, err, output.String())
	case slow:
		return fmt.Errorf("%s: does not end within %v\n%s", line, lineLimit, output.String())
	}
	if _, numberErr := strconv.Atoi(line); numberErr != nil {
		return fmt.Errorf("%s: %w", line, numberErr)
	}
	return fmt.Errorf("%s: %v\n%s", line, err, output.String())
}
