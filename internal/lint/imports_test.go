package lint

import (
	"slices"
	"strings"
	"testing"
)

// Names for sets of packages that several rows use.
var (
	// base has no opinion about storage; everything may use it.
	base = []string{"internal/invariant", "internal/units", "internal/blockdev", "internal/crc32c"}
	// waist is what an export or a store sees of Ashlar.
	waist = []string{"datapath", "datapath/reactor", "datapath/uring", "datapath/ring", "datapath/buf", "datapath/histogram", "datapath/rate"}
	// devices are the stores and filters every test may stand on.
	devices = []string{"datapath/filter", "datapath/memdev", "datapath/nulldev", "datapath/filedev"}
	// testing-only packages; see onlyTests.
	forTests = []string{"internal/testenv", "internal/authority", "datapath/devtest", "engine/disk/memdisk", "engine/disk/faultdisk", "engine/enginetest", "replication/replicationtest"}
)

// row says which packages of this module a package may import, and why no more.
// The first row whose pattern fits a package is its row.
type row struct {
	pkg string
	may [][]string // sets, beside internal/invariant, which is open to all
	why string
}

var policy = []row{
	{"internal/invariant", nil, "everybody stands on it"},
	{"internal/units", nil, "numbers and words only"},
	{"internal/blockdev", nil, "it reads what the kernel shows"},
	{"internal/crc32c", nil, "numbers only"},
	{"internal/flusher", [][]string{{"datapath/reactor"}}, "it tells the kernel what this process is; whom it serves is others' business"},
	{"internal/testenv", nil, "tests of every layer use it"},
	{"internal/authority", nil, "tests of every layer that speaks TLS use it"},
	{"internal/lint", nil, "it reads source, it does not link it"},

	{"datapath/ring", nil, "a queue of anything; knows nothing of requests"},
	{"datapath/buf", nil, "memory; knows nothing of who fills it"},
	{"datapath/histogram", nil, "counts of anything; knows nothing of requests"},
	{"datapath/rate", nil, "times and counts; who waits is of any type"},
	{"datapath/uring", nil, "the kernel's interface, nothing above it"},
	{"datapath/reactor", [][]string{{"datapath/ring", "datapath/buf", "datapath/uring"}},
		"the loop runs any poller; it does not know what a request is"},
	{"datapath", [][]string{{"datapath/reactor", "datapath/ring", "datapath/buf", "datapath/uring"}},
		"the waist knows neither clients nor disks"},
	{"datapath/devtest", [][]string{base, waist, devices, {"internal/testenv"}},
		"the suite judges devices through the waist"},
	{"datapath/filter", [][]string{base, waist}, "a filter works over any device, so it names none"},
	{"datapath/memdev", [][]string{base, waist}, "a store knows only the waist"},
	{"datapath/nulldev", [][]string{base, waist}, "a store knows only the waist"},
	{"datapath/filedev", [][]string{base, waist}, "a store knows only the waist"},

	{"engine/disk", [][]string{base, waist}, "the seam under the pool: blocks, not extents"},
	{"engine/disk/...", [][]string{base, waist, {"engine/disk"}}, "an implementation of the seam"},
	{"engine/pool/...", [][]string{base, waist, {"engine/disk/...", "engine/pool/..."}},
		"the pool lays out disks; which volumes exist is the engine's"},
	{"engine/...", [][]string{base, waist, devices, {"engine/..."}},
		"what exists on this node; copies and clients are others' work"},

	{"replication/core", nil, "decisions only, so that a model checker can run every one"},
	{"replication/replicationpb", nil, "generated"},
	{"replication/replicationtest", [][]string{base, waist, devices, {"replication/...", "datapath/devtest", "internal/testenv"}}, "the test rig of replication"},
	{"replication/...", [][]string{base, waist, {"replication/..."}},
		"a replica is any Device: the engine is handed in, not reached for"},

	{"nbd/...", [][]string{base, waist, {"nbd/..."}}, "an export knows only the waist"},
	{"ublk/...", [][]string{base, waist, {"ublk/..."}}, "an export knows only the waist"},
	{"fuse/...", [][]string{base, waist, {"fuse/...", "internal/flusher"}}, "an export knows only the waist"},

	{"observe/...", [][]string{base, waist, {"observe/..."}}, "it watches through the waist and the kernel; it steers nothing"},
	{"cluster/...", [][]string{base, {"cluster/..."}},
		"what should exist on which node; the daemon carries it out"},
	{"control/controlpb", nil, "generated"},
	{"control/...", [][]string{base, {"control/...", "cluster/..."}},
		"the API of a daemon; the daemon implements it"},
	{"csi/...", [][]string{base, {"csi/...", "control/..."}},
		"it translates Kubernetes to the control API, and lives and dies apart from the data path"},

	{"internal/daemon", [][]string{base, waist, devices, {"engine/...", "replication/...", "nbd/...", "ublk/...", "fuse/...", "cluster/...", "control/...", "observe/...", "internal/flusher"}},
		"the one place that joins exports and stores"},
	{"internal/metamorphic", [][]string{base, waist, devices, forTests, {"engine/...", "replication/...", "nbd/...", "ublk/...", "fuse/...", "internal/daemon"}},
		"it runs the whole against a model"},
	{"internal/background", nil, "it runs before everything else"},
	{"internal/report", [][]string{{"control/controlpb"}}, "it explains samples; it does not fetch them"},
	{"internal/doctor", [][]string{base, waist, {"ublk/...", "nbd/...", "control/...", "engine/pool"}},
		"it looks at the host for what the daemon will need, by the probes the daemon uses"},
	{"cmd/...", [][]string{base, waist, devices, {"internal/daemon", "internal/background", "internal/flusher", "internal/report", "internal/doctor", "control/...", "csi/...", "nbd/...", "ublk/...", "fuse/...", "observe/...", "benchmarks/...", "tools/..."}},
		"a command line names what it wants; the daemon joins stores and exports"},

	{"benchmarks/...", [][]string{base, waist, devices, {"benchmarks/...", "nbd/...", "ublk/...", "control/...", "engine/pool", "internal/testenv", "tools/fio-profiles"}},
		"a rig outside the product, measured through public doors"},
	{"tools/metricsdoc", [][]string{{"internal/daemon", "csi"}}, "it writes the page of what the daemon and the driver register"},
	{"tools/...", [][]string{base, {"tools/..."}}, "tools of the repository, not of the product"},
	{"test/...", [][]string{base, {"test/...", "internal/testenv"}},
		"these tests use Ashlar as strangers do: the binary, other people's clients, the kernel"},
}

// testsMayAlso lists what test files may import beyond their package's row.
var testsMayAlso = [][]string{base, devices, forTests, waist}

// ban forbids imports from outside the module, or repeats a rule of the design
// that holds through other packages too.
type ban struct {
	pkgs  []string
	never []string
	why   string
}

const grpc = "google.golang.org/grpc/..."

var bans = []ban{
	{[]string{"datapath", "datapath/..."}, []string{"net", "net/...", grpc},
		"the data path carries requests; sockets belong to exports"},
	{[]string{"replication/core"}, []string{"net", "net/...", "time", "os", "os/...", "sync", "sync/...", grpc, "math/rand", "math/rand/v2", "crypto/rand"},
		"a step is a function of its event: no clock, network, file, lock or chance, or the model checker lies"},
	{[]string{"nbd/...", "ublk/...", "fuse/..."}, []string{module + "/engine/...", module + "/replication/..."},
		"every export works over every store, so it may know none"},
	{[]string{"engine/..."}, []string{module + "/replication/...", module + "/nbd/...", module + "/ublk/...", module + "/fuse/..."},
		"what lies on this node does not depend on who reads it or who copies it"},
	{[]string{"replication/..."}, []string{module + "/engine/..."},
		"copies stay equal over any Device"},
	{[]string{"datapath/...", "engine/...", "nbd/...", "ublk/...", "fuse/...", "replication/core"}, []string{"k8s.io/...", "go.etcd.io/...", "github.com/spf13/..."},
		"control decides per volume; what runs per request links none of it"},
	{[]string{"csi/..."}, []string{module + "/datapath/..."},
		"the data plane never lives in the CSI pod"},
}

// directBans hold for a package's own imports only: what it imports from this
// module may use them.
var directBans = []ban{
	{[]string{"datapath", "datapath/ring", "datapath/buf", "datapath/uring", "datapath/filter", "datapath/memdev", "datapath/nulldev", "datapath/filedev"},
		[]string{"log", "log/slog"},
		"the data path logs nothing: it counts (a reactor may say which engine it got)"},
}

// onlyTests lists packages that product code must not link.
var onlyTests = append([]string{"testing", "testing/...", "pgregory.net/rapid", "go.uber.org/goleak"}, prefixed(forTests)...)

func prefixed(pkgs []string) []string {
	var full []string
	for _, p := range pkgs {
		full = append(full, module+"/"+p)
	}
	return full
}

func rowOf(dir string) *row {
	for i := range policy {
		if matches(dir, policy[i].pkg) {
			return &policy[i]
		}
	}
	return nil
}

func (r *row) allows(target string, test bool) bool {
	sets := r.may
	if test {
		sets = slices.Concat(sets, testsMayAlso)
	}
	return target == "internal/invariant" || slices.ContainsFunc(sets, func(set []string) bool { return matches(target, set...) })
}

func TestImportsFollowTheLayers(t *testing.T) {
	tr := readTree(t)
	for _, dir := range tr.dirs() {
		if rowOf(dir) == nil {
			t.Errorf("package %s has no row in the import policy (internal/lint/imports_test.go); add one with its reason", dir)
		}
	}
	for _, f := range tr.files {
		r := rowOf(f.dir())
		if r == nil {
			continue
		}
		for i, imported := range f.imports {
			target, ok := local(imported)
			if !ok || target == f.dir() || r.allows(target, f.test) {
				continue
			}
			t.Errorf("%s: %s may not import %s: %s", tr.at(f.syntax.Imports[i]), f.dir(), target, r.why)
		}
	}
}

func TestBannedImportsStayOutDirectlyAndThroughOthers(t *testing.T) {
	tr := readTree(t)
	graph := make(map[string]map[string]string) // package of this module -> import -> position
	for _, f := range tr.files {
		if f.test {
			continue
		}
		if graph[f.dir()] == nil {
			graph[f.dir()] = make(map[string]string)
		}
		for i, imported := range f.imports {
			graph[f.dir()][imported] = tr.at(f.syntax.Imports[i])
		}
	}
	for dir := range graph {
		for _, b := range bans {
			if matches(dir, b.pkgs...) {
				if way := wayTo(graph, dir, b.never); way != nil {
					t.Errorf("%s may not import %s: %s", strings.Join(way[:len(way)-1], " -> "), way[len(way)-1], b.why)
				}
			}
		}
		for _, b := range directBans {
			for imported, position := range graph[dir] {
				if matches(dir, b.pkgs...) && matches(imported, b.never...) {
					t.Errorf("%s: %s may not import %s: %s", position, dir, imported, b.why)
				}
			}
		}
	}
}

// wayTo finds the shortest chain of imports inside the module from dir to one
// of never.
func wayTo(graph map[string]map[string]string, dir string, never []string) []string {
	type step struct {
		dir string
		way []string
	}
	seen := map[string]bool{dir: true}
	for queue := []step{{dir, []string{dir}}}; len(queue) > 0; queue = queue[1:] {
		at := queue[0]
		for imported, position := range graph[at.dir] {
			if matches(imported, never...) {
				return append(slices.Clone(at.way), imported+" ("+position+")")
			}
			if target, ok := local(imported); ok && !seen[target] {
				seen[target] = true
				queue = append(queue, step{target, append(slices.Clone(at.way), target)})
			}
		}
	}
	return nil
}

func TestProductCodeDoesNotLinkTestCode(t *testing.T) {
	tr := readTree(t)
	for _, f := range tr.files {
		if f.test || matches(f.dir(), forTests...) || matches(f.dir(), "internal/metamorphic", "test/...", "benchmarks/...") {
			continue
		}
		for i, imported := range f.imports {
			if matches(imported, onlyTests...) {
				t.Errorf("%s: %s is for tests", tr.at(f.syntax.Imports[i]), imported)
			}
		}
	}
}

// TestPolicyWouldCatch breaks the design on paper and wants each break noticed.
func TestPolicyWouldCatch(t *testing.T) {
	for _, tt := range []struct {
		from, to string
		test     bool
		allowed  bool
	}{
		{"nbd", "datapath", false, true},
		{"nbd", "engine", false, false},
		{"nbd", "engine", true, false},
		{"nbd", "datapath/memdev", false, false},
		{"nbd", "datapath/memdev", true, true},
		{"nbd", "ublk", false, false},
		{"ublk", "replication", false, false},
		{"fuse", "engine/pool", false, false},
		{"engine", "replication", false, false},
		{"engine", "nbd", false, false},
		{"engine/pool", "engine/disk", false, true},
		{"engine/pool", "engine", false, false},
		{"engine/disk", "engine/pool", false, false},
		{"replication", "engine", false, false},
		{"replication/core", "replication", false, false},
		{"replication/core", "internal/invariant", false, true},
		{"csi", "control", false, true},
		{"csi", "datapath", false, false},
		{"csi", "cluster", false, false},
		{"datapath", "datapath/reactor", false, true},
		{"datapath/reactor", "datapath", false, false},
		{"datapath/reactor", "datapath/uring", false, true},
		{"datapath/ring", "datapath/buf", false, false},
		{"datapath/filter", "datapath/filedev", false, false},
		{"datapath", "nbd", false, false},
		{"internal/daemon", "nbd", false, true},
		{"internal/daemon", "cmd/ashlar", false, false},
		{"cmd/ashlar", "internal/daemon", false, true},
		{"cmd/ashlar", "engine/pool", false, false},
		{"cluster", "engine", false, false},
		{"observe", "nbd", false, false},
		{"test/interop", "nbd", false, false},
	} {
		r := rowOf(tt.from)
		if r == nil {
			t.Errorf("%s has no row", tt.from)
			continue
		}
		if got := r.allows(tt.to, tt.test); got != tt.allowed {
			t.Errorf("%s -> %s (in a test: %v): allowed %v, want %v", tt.from, tt.to, tt.test, got, tt.allowed)
		}
	}
	graph := map[string]map[string]string{
		"datapath":         {module + "/datapath/reactor": "a.go:1"},
		"datapath/reactor": {module + "/datapath/ring": "b.go:1", "net": "b.go:2"},
	}
	if way := wayTo(graph, "datapath", []string{"net"}); len(way) != 3 {
		t.Errorf("the way from datapath to net was not found: %v", way)
	}
	if !matches("google.golang.org/grpc/codes", grpc) || matches("network", "net", "net/...") {
		t.Error("patterns do not match as meant")
	}
}
