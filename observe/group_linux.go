//go:build amd64 || arm64

package observe

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"

	"github.com/ashlar-storage/ashlar/observe/bpf"
)

// kernel is what loading needs of the system; tests put another in its place.
type kernel struct {
	types func() (*btf.Spec, error)
	root  string                                        // of the file system: /, but for tests
	edit  func(group string, spec *ebpf.CollectionSpec) // nil, but for tests
}

// load reads the types of the kernel. Its errors are reasons as they are.
func (k *kernel) load() (*btf.Spec, error) {
	if err := missingRights(); err != nil {
		return nil, err
	}
	types, err := k.types()
	if err != nil {
		return nil, errNoBTF
	}
	return types, nil
}

// driver reports whether a driver is there, as a module or built in.
func (k *kernel) driver(name string) bool {
	_, err := os.Stat(filepath.Join(k.root, "sys/module", name))
	return err == nil
}

// group is a set of programs that are there together or not at all. The mutex of its
// observer guards it.
type group struct {
	name     string                               // immutable, like all up to the next line
	module   string                               // whose tracepoints they are; "": the kernel's own
	spec     func() (*ebpf.CollectionSpec, error) // nil: there are no programs, and reason says why
	prepare  func(*ebpf.CollectionSpec) error
	spare    func(*ebpf.CollectionSpec, kernel) error // takes out what is not needed on this host; may be nil
	required [][]string                               // of each list, one program at least
	arm      func() error                             // fills maps before the first event; may be nil
	keep     []string                                 // maps that programs loaded anew go on with

	collection *ebpf.Collection // nil: not loaded
	links      []link.Link
	reason     string   // why it is not observed
	partial    []string // what of it is not
	waits      bool     // for its driver
}

// fail gives up a group.
func (g *group) fail(err error) {
	g.unload()
	g.reason = reasonOf(err)
	g.waits = errors.Is(err, errNoDriver)
}

func (g *group) unload() {
	for _, l := range g.links {
		_ = l.Close() // it closes a descriptor
	}
	if g.collection != nil {
		g.collection.Close()
	}
	g.links, g.collection = nil, nil
}

// load brings the programs into the kernel and attaches them, instead of those that
// were loaded before, if there are any.
func (g *group) load(k kernel, types *btf.Spec) error {
	g.waits = false
	spec, err := g.spec()
	if err != nil {
		return err
	}
	if err := g.prepare(spec); err != nil {
		return err
	}
	if k.edit != nil {
		k.edit(g.name, spec)
	}
	if err := g.dropAbsent(spec, types, k); err != nil {
		return err
	}
	if g.spare != nil {
		if err := g.spare(spec, k); err != nil {
			return err
		}
	}
	options := ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{KernelTypes: types}}
	if g.collection != nil {
		options.MapReplacements = make(map[string]*ebpf.Map)
		for _, name := range g.keep {
			options.MapReplacements[name] = g.collection.Maps[name]
		}
	}
	collection, err := ebpf.NewCollectionWithOptions(spec, options)
	if err != nil {
		return err
	}
	g.unload()
	g.collection = collection
	if g.arm != nil {
		if err := g.arm(); err != nil {
			return err
		}
	}
	for name, p := range g.collection.Programs {
		l, err := link.AttachTracing(link.TracingOptions{Program: p, AttachType: ebpf.AttachTraceRawTp})
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		g.links = append(g.links, l)
	}
	return nil
}

// dropAbsent takes programs out of spec whose tracepoint this kernel does not have.
func (g *group) dropAbsent(spec *ebpf.CollectionSpec, types *btf.Spec, k kernel) error {
	has := func(s *btf.Spec, tracepoint string) bool {
		found, err := s.AnyTypesByName("btf_trace_" + tracepoint)
		return err == nil && len(found) > 0
	}
	var module *btf.Spec
	if g.module != "" {
		if !k.driver(g.module) {
			return fmt.Errorf("%w: the driver %s is not loaded", errNoDriver, g.module)
		}
		module, _ = btf.LoadKernelModuleSpec(g.module) // a driver built into the kernel has none
	}
	absent := make(map[string]bool)
	for name, p := range spec.Programs {
		if !has(types, p.AttachTo) && (module == nil || !has(module, p.AttachTo)) {
			absent[name] = true
			delete(spec.Programs, name)
		}
	}
	for _, alternatives := range g.required {
		if !slices.ContainsFunc(alternatives, func(name string) bool { return !absent[name] }) {
			return fmt.Errorf("%w %s", errNoTracepoint, strings.Join(alternatives, " or "))
		}
		for _, name := range alternatives {
			delete(absent, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(absent)) {
		g.partial = append(g.partial, fmt.Sprintf("%v %s: what it counts stays 0", errNoTracepoint, name))
	}
	return nil
}

// missed is how many events the programs did not count since they were loaded. It is
// 0 where the kernel does not say.
func (g *group) missed() uint64 {
	var n uint64
	for _, p := range g.collection.Programs {
		if s, err := p.Stats(); err == nil {
			n += s.RecursionMisses
		}
	}
	return n
}

// processID asks the kernel for the id of this process as the first pid namespace
// counts.
func processID() (int, error) {
	spec, err := bpf.LoadSelf()
	if err != nil {
		return 0, err
	}
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	id, err := c.Programs[bpf.SelfProgSelf].Run(&ebpf.RunOptions{})
	return int(id), err
}

// scale is how many entries a per-CPU map may have so that it takes about the given
// memory, within bounds.
func scale(memory, value, cpus, least, most int) uint32 {
	return uint32(min(max(memory/(value*cpus), least), most))
}
