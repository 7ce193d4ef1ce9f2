package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/ashlar-storage/ashlar/internal/units"
)

// Stage is a directory on a disk with what the peers of a pool's bars serve.
type Stage struct {
	Dir      string
	Size     uint64 // of each volume and file served
	Ashlar   string // the binary
	CPUs     []int  // of the servers
	Progress io.Writer

	LVMDevice string // a block device that LVM may overwrite, else it gets a file; on the same disk

	ChainLength int           // snapshots of the chain; 0: ChainLength
	OpenBytes   uint64        // mapped for RunOpen; 0: OpenBytes
	Settle      time.Duration // rest for the disk when all is written; 0: settle
}

// What the bars are stated in.
const (
	ChainLength = 100
	OpenBytes   = 64 << 30
)

const (
	// poolFileFactor is the size of the pool's file in volumes: one mapped, a fresh
	// one, the chain (a quarter, and what was written between its snapshots), and a
	// quarter more for each snapshot taken under load, six in a run.
	poolFileFactor = 12

	settle = 3 * time.Second // above the pool's own, which writes what has changed after one

	chainRate = 2000                  // writes a second between the snapshots of the chain
	chainStep = 20 * time.Millisecond // from one to the next
)

// Backing is what Run is given.
func (s *Stage) Backing() Backing {
	return Backing{Kind: BackingPool, Path: s.Dir, Size: s.Size}
}

// Prepare makes the directory, which must not exist, and in it what the peers
// need: the exported file and the pool's file, both written to the last block so
// that no allocation of the file system is measured; the mapped volume, filled from
// one end to the other; the chain; the qcow2 images; LVM's physical volume, its thin pool
// and a volume in it.
func (s *Stage) Prepare(ctx context.Context, peers []Peer) (err error) {
	if s.Size < SizeMin {
		return tooSmall(s.Dir, s.Size)
	}
	if err := lookProgram("fio", "fio"); err != nil {
		return err
	}
	for _, p := range peers {
		if err := lookProgram(p.Program()); err != nil {
			return err
		}
	}
	if err := os.Mkdir(s.Dir, 0o700); err != nil {
		return fmt.Errorf("stage: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("stage: %w", err), s.Remove())
		}
	}()
	needs := func(match func(Peer) bool) bool { return slices.ContainsFunc(peers, match) }
	if needs(func(p Peer) bool { return p.Name() == stagedExport{}.Name() || p.Name() == nbdkitCow{}.Name() }) {
		s.say("writing %s, %s", exportFile, units.FormatSize(s.Size))
		if err := fillFile(filepath.Join(s.Dir, exportFile), s.Size); err != nil {
			return err
		}
	}
	if needs(func(p Peer) bool { _, ok := p.(poolVolume); return ok }) {
		s.say("writing %s, %s, and a volume in it", poolFile, units.FormatSize(poolFileFactor*s.Size))
		if err := fillFile(filepath.Join(s.Dir, poolFile), poolFileFactor*s.Size); err != nil {
			return err
		}
		chain := needs(func(p Peer) bool { v, ok := p.(poolVolume); return ok && v.volume == chainVolume })
		if err := s.preparePool(ctx, chain); err != nil {
			return err
		}
	}
	for _, p := range peers {
		q, ok := p.(qcow2)
		if !ok {
			continue
		}
		s.say("writing %s", filepath.Base(q.image(s.Dir)))
		if err := runBounded(ctx, q.create(q.image(s.Dir), s.Size)); err != nil {
			return err
		}
		if err := s.with(ctx, q.Plan, func(_ Site, q *server) error {
			return runBounded(ctx, fillArgs(q.target, 100))
		}); err != nil {
			return err
		}
	}
	for _, p := range peers {
		l, ok := p.(lvmThin)
		if !ok {
			continue
		}
		s.say("a thin pool of LVM, and a volume in it")
		if err := l.prepare(ctx, s); err != nil {
			return err
		}
		if err := s.with(ctx, l.Plan, func(_ Site, q *server) error {
			return runBounded(ctx, fillArgs(q.target, 100))
		}); err != nil {
			return err
		}
	}
	return s.settle(ctx)
}

func (s *Stage) say(format string, arguments ...any) {
	if s.Progress != nil {
		fmt.Fprintf(s.Progress, "stage: "+format+"\n", arguments...)
	}
}

// settle lets the disk finish what it was given.
func (s *Stage) settle(ctx context.Context) error {
	if err := runBounded(ctx, []string{"sync"}); err != nil {
		return err
	}
	rest := s.Settle
	if rest == 0 {
		rest = settle
	}
	select {
	case <-time.After(rest):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Remove removes the directory and all in it, and what LVM has on its block device.
func (s *Stage) Remove() error {
	given := lvmThin{on: thisMachine}.giveBack(context.Background(), s)
	return errors.Join(given, os.RemoveAll(s.Dir))
}

// with starts a server, does something with it, and stops it.
func (s *Stage) with(ctx context.Context, plan func(Site) (Plan, error), do func(Site, *server) error) (err error) {
	// A short path: a unix socket's has at most 107 bytes.
	dir, err := os.MkdirTemp("", "ashlar-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	site := Site{Dir: dir, Backing: s.Backing(), Ashlar: s.Ashlar, CPUs: s.CPUs}
	p, err := plan(site)
	if err != nil {
		return err
	}
	running, err := startServer(ctx, p, s.CPUs)
	if err != nil {
		return err
	}
	defer func() {
		running.Stop()
		err = errors.Join(err, running.left)
	}()
	if err = do(site, running); err != nil {
		if text := running.output.String(); text != "" {
			err = fmt.Errorf("%w; the server said: %s", err, text)
		}
	}
	return err
}

// preparePool makes the pool, the mapped volume, and the chain.
func (s *Stage) preparePool(ctx context.Context, chain bool) error {
	plan := func(site Site) (Plan, error) {
		argv, nbd, _ := serveArgs(site, filepath.Join(s.Dir, nodeDir))
		return Plan{Argv: argv, Ready: "unix:" + nbd, StopMax: closeMax}, nil
	}
	return s.with(ctx, plan, func(site Site, _ *server) error {
		_, nbd, control := serveArgs(site, "")
		names := []string{mappedVolume}
		// The file is full of random bytes, which the pool would rather not destroy.
		orders := [][]string{site.asking(control, "pool", "create", "--force", poolName, filepath.Join(s.Dir, poolFile))}
		if chain {
			names = append(names, chainVolume)
		}
		for _, name := range names {
			percent := 100
			if name == chainVolume {
				percent = filledPercent
			}
			orders = append(orders,
				site.asking(control, "volume", "create", name, "--size", strconv.FormatUint(s.Size, 10)),
				fillArgs(nbdUnix(name, nbd), percent))
		}
		if err := runAll(ctx, orders); err != nil || !chain {
			return err
		}
		return s.forgeChain(ctx, nbd, control)
	})
}

// forgeChain takes the snapshots of the chain while something writes.
func (s *Stage) forgeChain(ctx context.Context, nbd, control string) error {
	length := s.ChainLength
	if length == 0 {
		length = ChainLength
	}
	s.say("a chain of %d snapshots", length)
	n, err := dialNode(ctx, control)
	if err != nil {
		return err
	}
	defer func() { _ = n.Close() }() // nothing is in flight
	writing, cancel := context.WithCancel(ctx)
	writer := exec.CommandContext(writing, "fio", "--name=between", "--thread", "--ioengine=nbd",
		"--uri="+nbdUnix(chainVolume, nbd).URI, "--rw=randwrite", "--bs=4k", "--iodepth=4", "--norandommap",
		"--rate_iops="+strconv.Itoa(chainRate), "--size="+strconv.Itoa(filledPercent)+"%",
		"--time_based", "--runtime="+fioTime(orderMax), "--output-format=terse")
	said := new(tail)
	writer.Stdout, writer.Stderr = said, said
	writer.WaitDelay = time.Second
	if err := startOn(writer, nil); err != nil {
		cancel()
		return fmt.Errorf("fio: %w", err)
	}
	early := make(chan struct{})
	go func() { // ends with the writer
		_ = writer.Wait() // it is killed at the end; an early end is noticed below
		close(early)
	}()
	defer func() { cancel(); <-early }()
	for i := range length {
		select {
		case <-early:
			return fmt.Errorf("fio ended before the chain was made: %s", said)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(chainStep):
		}
		if _, err := n.CreateSnapshot(ctx, chainVolume, fmt.Sprintf("s%d", i)); err != nil {
			return err
		}
	}
	return nil
}
