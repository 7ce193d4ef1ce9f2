package harness

import (
	"bufio"
	"context"
	"debug/buildinfo"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

// Host is where a benchmark ran.
type Host struct {
	Name     string  `json:"name"`
	CPUModel string  `json:"cpu_model"`
	CPUs     int     `json:"cpus"` // this process may run on
	Memory   uint64  `json:"memory_bytes"`
	Kernel   string  `json:"kernel"`
	OS       string  `json:"os"`
	Go       string  `json:"go_version"`
	Version  string  `json:"ashlar_version"`
	Commit   string  `json:"ashlar_commit"`
	Modified bool    `json:"ashlar_modified,omitempty"` // the tree had changes not committed
	Load1    float64 `json:"load_average"`              // before the benchmark
}

// ReadHost reads the facts of this host and of the ashlar binary measured, whose
// build information is in its file; with an empty path, of the running program.
func ReadHost(binary string) Host {
	h := Host{
		CPUs: runtime.NumCPU(), Kernel: kernelRelease(), OS: runtime.GOOS + "/" + runtime.GOARCH,
		Go: runtime.Version(), Load1: loadAverage(),
		CPUModel: procField("/proc/cpuinfo", "model name"),
	}
	h.Name, _ = os.Hostname() // empty when unknown
	if h.CPUModel == "" {
		h.CPUModel = runtime.GOARCH
	}
	if kb, ok := strings.CutSuffix(procField("/proc/meminfo", "MemTotal"), " kB"); ok {
		n, _ := strconv.ParseUint(strings.TrimSpace(kb), 10, 64) // the kernel prints a number
		h.Memory = n << 10
	}
	if cpus := AllowedCPUs(); len(cpus) > 0 {
		h.CPUs = len(cpus)
	}
	h.readBuild(binary)
	return h
}

// readBuild adds what the binary says of its build.
func (h *Host) readBuild(binary string) {
	info, ok := debug.ReadBuildInfo()
	if binary != "" {
		read, err := buildinfo.ReadFile(binary)
		info, ok = read, err == nil
	}
	if !ok {
		return
	}
	h.Go, h.Version = info.GoVersion, info.Main.Version
	defer h.askVersion(binary) // the Makefile stamps these, not the Go command
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			h.Commit = s.Value
		case "vcs.modified":
			h.Modified = s.Value == "true"
		}
	}
}

// askVersion asks the ashlar binary for its version and commit. Any other answer
// is left aside.
func (h *Host) askVersion(binary string) {
	if binary == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), setupMax)
	defer cancel()
	out, err := exec.CommandContext(ctx, binary, "version", "--output", "json").Output()
	var said struct{ Version, Commit string }
	if err != nil || json.Unmarshal(out, &said) != nil {
		return
	}
	if said.Version != "" {
		h.Version = said.Version
	}
	if said.Commit != "" {
		h.Commit = said.Commit
	}
}

// procField finds "key : value" in a file of /proc.
func procField(path, key string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }() // read-only
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, value, found := strings.Cut(lines.Text(), ":")
		if found && strings.TrimSpace(name) == key {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func loadAverage() float64 {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(string(text), " ")
	load, _ := strconv.ParseFloat(first, 64) // the kernel prints a number
	return load
}

// programVersion is the first line a program prints of its version.
func programVersion(program string, arguments []string) string {
	if program == "" || len(arguments) == 0 {
		return ""
	}
	ctx, cancel := context.WithTimeout(context.Background(), setupMax)
	defer cancel()
	out, _ := exec.CommandContext(ctx, program, arguments...).CombinedOutput() // nbd-server -V fails, yet tells
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}

// ResultName is the file name of a result: date, host, name.
func (r *Result) ResultName() string {
	clean := func(s string) string {
		return strings.Map(func(c rune) rune {
			if c == '-' || c == '_' || c == '.' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' {
				return c
			}
			return '_'
		}, s)
	}
	host := r.Host.Name
	if host == "" {
		host = "host"
	}
	return strings.Join([]string{r.Started.UTC().Format(time.DateOnly), clean(host), clean(r.Name)}, "-") + ".json"
}

// fileSystemOf names the file system of a file that may not exist yet.
func fileSystemOf(path string) string {
	if name := fileSystem(path); name != "" {
		return name
	}
	return fileSystem(filepath.Dir(path))
}

// FileSystem names the file system a path lies on, empty when unknown.
func FileSystem(path string) string { return fileSystemOf(path) }
