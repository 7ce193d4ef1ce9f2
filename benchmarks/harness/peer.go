package harness

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Peer is something that can be measured.
type Peer interface {
	Name() string
	About() string
	// Program is the executable the peer needs, and Package the Debian package
	// that has it; both empty when it needs none.
	Program() (program, debianPackage string)
	// VersionArgs make the program print its version.
	VersionArgs() []string
	// Plan says how to start the peer at a site. It starts nothing.
	Plan(Site) (Plan, error)
}

// Site is where a peer is to run.
type Site struct {
	Dir     string // empty, the peer's own
	Backing Backing
	Port    int    // a free TCP port, for peers that cannot do without
	Ashlar  string // the ashlar binary
	Poll    string // --poll of ashlar; empty keeps its default
	Reactor int    // --reactors of ashlar; 0 keeps its default
	CPUs    []int  // where the server runs; empty is anywhere

	// Of peers that work in the directory of a Stage.
	Volume         Volume        // what they are to serve
	Writes         bool          // the load changes it
	SnapshotPeriod time.Duration // between two snapshots, for the peer that takes them
}

// Plan is a server before it is started.
type Plan struct {
	Argv    []string          // empty: no process to start
	Files   map[string]string // written first; path to content
	PIDFile string            // set when the server detaches and writes its id there
	Ready   string            // "unix:PATH" or "tcp:ADDRESS" that answers once the server runs
	Setup   [][]string        // commands run when ready
	Target  Target            // what the client connects to

	// Kernel, unless nil, makes the target in the kernel; there is no Argv then. On
	// error nothing of it is left.
	Kernel func(ctx context.Context) (kernelTarget, error)

	StopMax time.Duration // patience after SIGTERM; 0: stopMax

	Before [][]string // commands run before the start
	After  [][]string // commands run when the client is done, before the server is stopped
	// During, unless nil, is called as the client starts and returns soon after ctx
	// ends, with how long each thing it asked of the server took.
	During func(ctx context.Context) ([]time.Duration, error)
}

// Target is what a client is pointed at.
type Target struct {
	Engine string // of fio: nbd, io_uring, libaio
	URI    string // for nbd and iscsi
	Path   string // for the others
}

// peers is the table of what can be measured, in the order it is shown.
var peers = []Peer{
	ashlar{name: "ashlar", about: "this binary's export, defaults"},
	ashlar{name: "ashlar-r2", about: "the same with 2 reactors", reactors: 2},
	ashlar{name: "ashlar-busy", about: "the same, polling always, pinned", poll: "busy", pin: true},
	ashlar{name: "ashlar-auto", about: "the same, polling for a learned budget, pinned", poll: "auto", pin: true},
	ashlar{name: "ashlar-off", about: "the same, never polling, pinned", poll: "off", pin: true},
	nbdkit{name: "nbdkit-1", threads: 1},
	nbdkit{name: "nbdkit-16", threads: 16},
	qemuNBD{name: "qemu-nbd-native", aio: "native", cache: "none"},
	qemuNBD{name: "qemu-nbd-io_uring", aio: "io_uring", cache: "none"},
	qemuNBD{name: "qemu-nbd-threads", aio: "threads", cache: "writeback"},
	nbdServer{},
	tgt{},
	raw{},
	served{},
	poolVolume{name: "pool", about: "a volume of ashlar serve, defaults"},
	poolVolume{name: "pool-unobserved", about: "the same, with nothing observed", flags: []string{"--stages=false", "--slow-io=0", "--observe=none"}},
	poolVolume{name: "pool-observed", about: "the same, with everything observed", flags: []string{"--slow-io=1s", "--metrics=127.0.0.1:0", "--observe=disks,reactors,io_uring,nbd,ublk"}},
	poolVolume{name: "pool-snapshots", about: "the same while a snapshot is taken every second", snapshots: true},
	poolVolume{name: "pool-chain", about: "a volume with many snapshots, something written between any two", volume: chainVolume},
	stagedExport{},
	qcow2{name: "qcow2-prealloc", options: []string{"-o", "preallocation=metadata"}},
	qcow2{name: "qcow2-thin"},
	nbdkitCow{},
	lvmThin{on: thisMachine},
}

// groups are names that stand for several peers.
var groups = map[string][]string{
	"nbdkit":   {"nbdkit-1", "nbdkit-16"},
	"qemu-nbd": {"qemu-nbd-native", "qemu-nbd-io_uring"},
}

// PeerNames lists every name FindPeers accepts.
func PeerNames() []string {
	var names []string
	for group := range groups {
		names = append(names, group)
	}
	slices.Sort(names)
	for _, p := range peers {
		_, hidden := p.(served)
		if _, staged := p.(stagedPeer); !hidden && !staged {
			names = append(names, p.Name())
		}
	}
	return names
}

// FindPeers gives the peers of the names, groups resolved, doubles dropped.
func FindPeers(names ...string) ([]Peer, error) {
	var found []Peer
	for _, name := range names {
		members := groups[name]
		if members == nil {
			members = []string{name}
		}
		for _, member := range members {
			i := slices.IndexFunc(peers, func(p Peer) bool { return p.Name() == member })
			if i < 0 {
				return nil, fmt.Errorf("no peer is called %q (have %s)", name, strings.Join(PeerNames(), ", "))
			}
			if !slices.ContainsFunc(found, func(p Peer) bool { return p.Name() == member }) {
				found = append(found, peers[i])
			}
		}
	}
	return found, nil
}

// Available tells why a peer cannot run on this host, nil when it can. That a
// program is not installed is not asked here.
func Available(p Peer) error {
	if x, ok := p.(interface{ available() error }); ok {
		return x.available()
	}
	return nil
}

// unsupported says that a peer cannot serve a backing.
func unsupported(p Peer, b Backing) error {
	return fmt.Errorf("%s cannot serve %s (%s)", p.Name(), b, b.Kind)
}

func nbdUnix(export, socket string) Target {
	return Target{Engine: "nbd", URI: "nbd+unix:///" + export + "?socket=" + socket}
}
