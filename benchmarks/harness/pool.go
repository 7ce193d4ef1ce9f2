package harness

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Volume is the state of what the peers of a Stage serve.
type Volume string

// The states of a volume.
const (
	VolumeMapped Volume = ""       // every block was written before
	VolumeFresh  Volume = "fresh"  // empty, a new one for each run
	VolumeFilled Volume = "filled" // a new one for each run, its first quarter written
)

// Names in the directory of a Stage.
const (
	exportFile   = "export.img"
	poolFile     = "pool.img"
	nodeDir      = "node" // the data directory of ashlar serve
	poolName     = "rig"
	mappedVolume = "data"
	chainVolume  = "chain"
)

// filledPercent is the part of a volume that VolumeFilled and the chain have
// written; the jobs on them say size=25%.
const filledPercent = 25

// snapshotPeriod is the bar's: a snapshot every second.
const snapshotPeriod = time.Second

// stagedPeer is a peer that works in the directory of a Stage.
type stagedPeer interface {
	Peer
	staged()
}

// ownPeer is a peer that is this project's.
type ownPeer interface{ ours() }

// fillArgs write the first percent of a target once, from one end to the other.
func fillArgs(t Target, percent int) []string {
	argv := append([]string{"fio", "--name=fill", "--thread"}, fioArgs(t)...)
	if t.Engine != "nbd" {
		argv = append(argv, "--direct=1")
	}
	return append(argv, "--rw=write", "--bs=128k", "--iodepth=16",
		"--size="+strconv.Itoa(percent)+"%", "--end_fsync=1", "--output-format=terse")
}

// serveArgs start a node on sockets in dir.
func serveArgs(s Site, dataDir string) (argv []string, nbd, control string) {
	nbd, control = filepath.Join(s.Dir, "s"), filepath.Join(s.Dir, "c")
	argv = []string{
		s.Ashlar, "serve", "--data-dir", dataDir, "--socket", control, "--nbd-socket", nbd,
		"--pid-file", filepath.Join(s.Dir, "pid"), "--log-level", "warn",
	}
	if s.Reactor > 0 {
		argv = append(argv, "--reactors", strconv.Itoa(s.Reactor))
	}
	if s.Poll != "" {
		argv = append(argv, "--poll", s.Poll)
	}
	return argv, nbd, control
}

// asking is a command of the ashlar tool to the node behind a socket.
func (s Site) asking(control string, words ...string) []string {
	return append(append([]string{s.Ashlar}, words...), "--server", "unix://"+control)
}

// poolVolume is a volume of a pool that ashlar serve serves.
type poolVolume struct {
	name, about string
	volume      string // empty: the mapped one, or one of its own
	snapshots   bool   // taken during the load
	flags       []string
}

func (p poolVolume) Name() string            { return p.name }
func (p poolVolume) About() string           { return p.about }
func (poolVolume) Program() (string, string) { return "", "" } // the site names the binary
func (poolVolume) VersionArgs() []string     { return nil }
func (poolVolume) staged()                   {}
func (poolVolume) ours()                     {}

func (p poolVolume) Plan(s Site) (Plan, error) {
	if s.Backing.Kind != BackingPool {
		return Plan{}, unsupported(p, s.Backing)
	}
	if s.Ashlar == "" {
		return Plan{}, fmt.Errorf("%s: no binary to start; build bin/ashlar and name it", p.name)
	}
	argv, nbd, control := serveArgs(s, filepath.Join(s.Backing.Path, nodeDir))
	name := p.volume
	if name == "" {
		name = mappedVolume
	}
	plan := Plan{Argv: append(argv, p.flags...), Ready: "unix:" + nbd, StopMax: closeMax}
	if s.Volume != VolumeMapped {
		name = "run-" + filepath.Base(s.Dir) // a name of its own: what a failed run left costs only space
		plan.Setup = [][]string{s.asking(control, "volume", "create", name, "--size", strconv.FormatUint(s.Backing.Size, 10))}
		plan.After = [][]string{s.asking(control, "volume", "delete", name, "--snapshots", "--yes", "--wait")}
	}
	plan.Target = nbdUnix(name, nbd)
	if s.Volume == VolumeFilled {
		plan.Setup = append(plan.Setup, fillArgs(plan.Target, filledPercent))
	}
	if p.snapshots {
		if s.Volume == VolumeMapped {
			return Plan{}, fmt.Errorf("%s: snapshots of the mapped volume would stay; it needs a volume of its own", p.name)
		}
		period := s.SnapshotPeriod
		if period == 0 {
			period = snapshotPeriod
		}
		plan.During = snapshotsDuring(control, name, period)
	}
	return plan, nil
}

// stagedExport is `ashlar export` of the Stage's file, whose blocks were all
// written before, whatever the others are to serve: the pool is compared with
// the plain file.
type stagedExport struct{}

func (stagedExport) Name() string { return "export" }
func (stagedExport) About() string {
	return "ashlar export of a fully written file on the same disk, defaults"
}
func (stagedExport) Program() (string, string) { return "", "" } // the site names the binary
func (stagedExport) VersionArgs() []string     { return nil }
func (stagedExport) staged()                   {}
func (stagedExport) ours()                     {}

func (e stagedExport) Plan(s Site) (Plan, error) {
	if s.Backing.Kind != BackingPool {
		return Plan{}, unsupported(e, s.Backing)
	}
	s.Backing = Backing{Kind: BackingFile, Path: filepath.Join(s.Backing.Path, exportFile), Size: s.Backing.Size}
	return ashlar{name: e.Name()}.Plan(s)
}

// qcow2 is qemu-nbd on a qcow2 image: thin, with snapshots, without checksums.
type qcow2 struct {
	name    string
	options []string // of qemu-img create
}

func (q qcow2) Name() string { return q.name }
func (q qcow2) About() string {
	return strings.Join(append([]string{"qemu-nbd --cache=none --aio=native on a qcow2 image"}, q.options...), " ")
}
func (qcow2) Program() (string, string) { return "qemu-nbd", "qemu-utils" }
func (qcow2) VersionArgs() []string     { return []string{"--version"} }
func (qcow2) staged()                   {}

// image is the fully written image of the Stage.
func (q qcow2) image(dir string) string { return filepath.Join(dir, q.name+".img") }

func (q qcow2) create(path string, size uint64) []string {
	argv := append([]string{"qemu-img", "create", "-q", "-f", "qcow2"}, q.options...)
	return append(argv, path, strconv.FormatUint(size, 10))
}

func (q qcow2) Plan(s Site) (Plan, error) {
	if s.Backing.Kind != BackingPool {
		return Plan{}, unsupported(q, s.Backing)
	}
	socket := filepath.Join(s.Dir, "s")
	plan := Plan{Ready: "unix:" + socket, Target: nbdUnix("", socket)}
	image := q.image(s.Backing.Path)
	if s.Volume != VolumeMapped {
		image = filepath.Join(s.Backing.Path, q.name+"-run.img")
		plan.Before = [][]string{q.create(image, s.Backing.Size)}
		plan.After = [][]string{{"rm", "-f", image}} // the server still has it open
	}
	if s.Volume == VolumeFilled {
		plan.Setup = [][]string{fillArgs(plan.Target, filledPercent)}
	}
	plan.Argv = []string{"qemu-nbd", "-k", socket, "-t", "-e", "16", "-f", "qcow2", "--cache=none", "--aio=native", image}
	return plan, nil
}

// nbdkitCow is nbdkit's cow filter over the Stage's file: writes go to an overlay
// in a temporary file, through the page cache, and are gone at the end.
type nbdkitCow struct{}

func (nbdkitCow) Name() string { return "nbdkit-cow" }
func (nbdkitCow) About() string {
	return "nbdkit --filter=cow, --threads 16, over a fully written file; no O_DIRECT: its overlay is page cache"
}
func (nbdkitCow) Program() (string, string) { return "nbdkit", "nbdkit" }
func (nbdkitCow) VersionArgs() []string     { return []string{"--version"} }
func (nbdkitCow) staged()                   {}

func (n nbdkitCow) Plan(s Site) (Plan, error) {
	if s.Backing.Kind != BackingPool {
		return Plan{}, unsupported(n, s.Backing)
	}
	socket := filepath.Join(s.Dir, "s")
	plan := Plan{Ready: "unix:" + socket, Target: nbdUnix("", socket)}
	plan.Argv = []string{
		"env", "TMPDIR=" + s.Backing.Path, "nbdkit", "-f", "-U", socket, "--threads", "16", "--filter=cow",
		"file", filepath.Join(s.Backing.Path, exportFile), "cache=none",
	}
	switch {
	case s.Volume == VolumeMapped && s.Writes: // overwrites are of what the overlay has
		plan.Setup = [][]string{fillArgs(plan.Target, 100)}
	case s.Volume == VolumeFilled:
		plan.Setup = [][]string{fillArgs(plan.Target, filledPercent)}
	}
	return plan, nil
}
