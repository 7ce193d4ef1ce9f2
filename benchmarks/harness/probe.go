package harness

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// Names of the cases of RunVolumeCalls and RunOpen.
const (
	VolumeCallsCase = "volume-1tib"
	OpenCase        = "open"
)

const (
	tib = 1 << 40

	clusterBytes = 128 << 10 // one block written in each maps it whole (docs of engine/pool)
	openSlack    = 8         // the pool's file is an eighth larger than what is mapped

	emptyNode = "node-empty" // the peer of RunOpen that has no pool
)

// RunVolumeCalls times the control API: a round makes a thin volume of 1 TiB and
// deletes it, in the Stage's pool, on a connection that stands.
func RunVolumeCalls(ctx context.Context, c Config, s *Stage) (*Result, error) {
	c.Profile = &Profile{Name: VolumeCallsCase}
	r := c.result()
	show := newProgress(c.Progress, c.Terminal)
	defer show.Stop()
	show.Begin(c.Rounds, 0)
	err := s.with(ctx, c.Peers[0].Plan, func(site Site, running *server) error {
		r.Peers[0].Command = running.cmd.Args
		_, _, control := serveArgs(site, "")
		n, err := dialNode(ctx, control)
		if err != nil {
			return err
		}
		defer func() { _ = n.Close() }() // nothing is in flight
		for round := range c.Rounds {
			show.Step(fmt.Sprintf("%s  %d/%d", VolumeCallsCase, round+1, c.Rounds))
			run := RunResult{Case: VolumeCallsCase, Peer: c.Peers[0].Name(), Round: round, Started: time.Now().UTC().Truncate(time.Second), Load1: loadAverage()}
			name := fmt.Sprintf("call-%d", round)
			created, err := n.CreateVolume(ctx, name, tib)
			if err != nil {
				return err
			}
			deleted, err := n.DeleteVolume(ctx, name)
			if err != nil {
				return err
			}
			run.CallCreate, run.CallDelete = micros(created), micros(deleted)
			r.Runs = append(r.Runs, run)
			show.Done(fmt.Sprintf("create %v, delete %v", created.Round(time.Microsecond), deleted.Round(time.Microsecond)))
		}
		return nil
	})
	r.Summarize()
	return r, err
}

// firstBlock waits for the greeting of a server, which may listen before it can
// serve, and reads the first block of an export; with no name it ends there.
func firstBlock(socket, export string) (err error) {
	c, err := net.DialTimeout("unix", socket, startMax)
	if err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if err := c.SetDeadline(time.Now().Add(orderMax)); err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	return readFirstBlock(c, export)
}

// readFirstBlock speaks the NBD protocol as far as that takes: the old way to name
// an export, NBD_OPT_EXPORT_NAME, and one simple reply.
func readFirstBlock(c io.ReadWriter, export string) error {
	const (
		optionMagic  = 0x49484156454f5054 // IHAVEOPT
		requestMagic = 0x25609513
		replyMagic   = 0x67446698
		noZeroes     = 1 << 1
		block        = 4096
	)
	var hello [18]byte
	if _, err := io.ReadFull(c, hello[:]); err != nil {
		return fmt.Errorf("nbd: greeting: %w", err)
	}
	if binary.BigEndian.Uint64(hello[8:]) != optionMagic {
		return errors.New("nbd: the peer does not greet as a newstyle server")
	}
	if export == "" {
		return nil
	}
	send := binary.BigEndian.AppendUint32(nil, uint32(binary.BigEndian.Uint16(hello[16:])&(noZeroes|1)))
	send = binary.BigEndian.AppendUint64(send, optionMagic)
	send = binary.BigEndian.AppendUint32(send, 1) // NBD_OPT_EXPORT_NAME
	send = binary.BigEndian.AppendUint32(send, uint32(len(export)))
	if _, err := c.Write(append(send, export...)); err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	var about [10]byte // size, flags
	if _, err := io.ReadFull(c, about[:]); err != nil {
		return fmt.Errorf("nbd: export %q: %w", export, err)
	}
	var request [28]byte // magic, flags, type 0: read, cookie, offset, length
	binary.BigEndian.PutUint32(request[0:], requestMagic)
	binary.BigEndian.PutUint32(request[24:], block)
	if _, err := c.Write(request[:]); err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	var reply [16 + block]byte
	if _, err := io.ReadFull(c, reply[:]); err != nil {
		return fmt.Errorf("nbd: reply: %w", err)
	}
	if binary.BigEndian.Uint32(reply[0:]) != replyMagic || binary.BigEndian.Uint32(reply[4:]) != 0 {
		return fmt.Errorf("nbd: the read failed (error %d)", binary.BigEndian.Uint32(reply[4:]))
	}
	return nil
}

// allocatedBytes reads what `ashlar volume show --output json` printed.
func allocatedBytes(text []byte) (uint64, error) {
	var volume struct {
		Allocated *uint64 `json:"allocated_bytes"`
	}
	if err := json.Unmarshal(text, &volume); err != nil {
		return 0, err
	}
	if volume.Allocated == nil {
		return 0, errors.New("no allocated_bytes in the description of a volume")
	}
	return *volume.Allocated, nil
}

// RunOpen times the start of a node whose pool has a volume with OpenBytes
// mapped, from the start of the process to the first block read by a client, and
// that of a node without a pool beside it, to its greeting. What the volume adds is
// scaled to 1 TiB.
//
// The pool lies in a sparse file and one block of each cluster is written: that
// makes every map entry, which is what an open reads, in a 32nd of the space.
func RunOpen(ctx context.Context, c Config, s *Stage) (*Result, error) {
	mapped := s.OpenBytes
	if mapped == 0 {
		mapped = OpenBytes
	}
	if len(c.Peers) != 1 {
		return nil, errors.New("bench: open is measured of one peer")
	}
	c.Profile = &Profile{Name: OpenCase}
	r := c.result()
	r.Options.Target.Size = mapped
	r.Peers = append(r.Peers, PeerInfo{Name: emptyNode, About: "the same without a pool", Version: r.Peers[0].Version})
	full, empty := filepath.Join(s.Dir, "open"), filepath.Join(s.Dir, emptyNode)
	image := full + ".img"
	defer func() { _ = os.RemoveAll(full); _ = os.RemoveAll(empty); _ = os.Remove(image) }() // the Stage goes anyway
	planOf := func(dir string) func(Site) (Plan, error) {
		return func(site Site) (Plan, error) {
			site.Poll, site.Reactor = c.Poll, c.Reactors
			argv, nbd, _ := serveArgs(site, dir)
			return Plan{Argv: argv, Ready: "unix:" + nbd, StopMax: closeMax}, nil
		}
	}
	s.say("mapping %d clusters", mapped/clusterBytes)
	err := s.with(ctx, planOf(full), func(site Site, _ *server) error {
		_, nbd, control := serveArgs(site, "")
		if err := runAll(ctx, [][]string{
			site.asking(control, "pool", "create", "open", image, "--size", strconv.FormatUint(mapped+mapped/openSlack, 10)),
			site.asking(control, "volume", "create", mappedVolume, "--size", strconv.FormatUint(mapped, 10)),
			{
				"fio", "--name=map", "--thread", "--ioengine=nbd", "--uri=" + nbdUnix(mappedVolume, nbd).URI,
				"--rw=write:" + strconv.Itoa((clusterBytes-4096)>>10) + "k", "--bs=4k", "--iodepth=128",
				"--number_ios=" + strconv.FormatUint(mapped/clusterBytes, 10), "--end_fsync=1", "--output-format=terse",
			},
		}); err != nil {
			return err
		}
		text, err := outputOf(ctx, site.asking(control, "volume", "show", mappedVolume, "--output", "json"))
		if err != nil {
			return err
		}
		got, err := allocatedBytes(text)
		if err == nil && got != mapped {
			err = fmt.Errorf("%d bytes of %d are mapped", got, mapped)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := s.settle(ctx); err != nil {
		return nil, err
	}
	show := newProgress(c.Progress, c.Terminal)
	defer show.Stop()
	show.Begin(2*c.Rounds, 0)
	for round := range c.Rounds {
		var seconds [2]float64
		for i, dir := range []string{empty, full} {
			peer := &r.Peers[1-i]
			show.Step(fmt.Sprintf("%s  round %d/%d  %s", OpenCase, round+1, c.Rounds, peer.Name))
			run := RunResult{Case: OpenCase, Peer: peer.Name, Round: round, Order: i, Started: time.Now().UTC().Truncate(time.Second), Load1: loadAverage()}
			began := time.Now()
			if err := s.with(ctx, planOf(dir), func(site Site, running *server) error {
				_, nbd, _ := serveArgs(site, "")
				export := mappedVolume
				if dir == empty {
					export = ""
				}
				if err := firstBlock(nbd, export); err != nil {
					return err
				}
				seconds[i] = time.Since(began).Seconds()
				peer.Command = running.cmd.Args
				_, run.ServerResident = treeUse(running.pid)
				return nil
			}); err != nil {
				return r, err
			}
			run.OpenSeconds = seconds[i]
			if dir == full {
				run.OpenBytes = mapped
				run.OpenTiB = seconds[0] + max(seconds[1]-seconds[0], 0)*tib/float64(mapped)
			}
			r.Runs = append(r.Runs, run)
			show.Done(fmt.Sprintf("%.3f s", seconds[i]))
		}
	}
	r.Summarize()
	return r, nil
}
