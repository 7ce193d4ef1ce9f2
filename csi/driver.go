package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"k8s.io/mount-utils"

	"github.com/ashlar-storage/ashlar/control"
)

// Name is the name of the driver, in StorageClass.provisioner and CSIDriver.
const Name = "csi.ashlar.io"

// TopologyKey is the label of a Kubernetes node, and the segment of a topology,
// that says on which node a volume lies.
const TopologyKey = "topology.ashlar.io/node"

// Mode says which services a driver offers.
type Mode string

// The modes.
const (
	ModeController Mode = "controller" // volumes and snapshots
	ModeNode       Mode = "node"       // mounts
	ModeAll        Mode = "all"        // both, as one pod per node wants it
)

// Modes are all modes.
var Modes = []Mode{ModeController, ModeNode, ModeAll}

// nodeIDMax is what the specification gives a node id.
const nodeIDMax = 256

// Config says what a driver is. Mode, Endpoint, Control, NodeID and Log are
// required.
type Config struct {
	Mode     Mode
	Endpoint string // unix:///PATH of the socket to serve on
	Control  string // address of the daemon, see control.Dial
	NodeID   string // this node's name, the value of TopologyKey

	// KubeletDir is where the kubelet keeps pods and staged volumes. Mounts under it
	// that nobody can use any more are taken away when the driver starts.
	KubeletDir string
	// RegistrationSocket is where the kubelet looks for drivers; "": a
	// node-driver-registrar does it. KubeletEndpoint is the path of Endpoint as the
	// kubelet sees it; "": the same.
	RegistrationSocket string
	KubeletEndpoint    string

	Version string
	Timeout time.Duration // of one call of the daemon; 0: a minute
	Log     *slog.Logger
	Ready   func() // called when clients can connect; may be nil

	// Of tests; nil: the host's.
	Mounter mount.Interface
	Command Command
}

// Driver serves the Container Storage Interface. Its services may be called from
// any goroutine.
type Driver struct {
	config  Config // immutable
	log     *slog.Logger
	daemon  *daemon
	locks   *keyLocks
	metrics *metrics
	node    *host
}

// check says what is wrong with a configuration.
func (c *Config) check() error {
	known := false
	for _, m := range Modes {
		known = known || c.Mode == m
	}
	network, _, err := control.ParseAddress(c.Endpoint)
	switch {
	case !known:
		return fmt.Errorf("csi: mode %q: must be controller, node or all", c.Mode)
	case err != nil:
		return fmt.Errorf("csi: endpoint: %w", err)
	case network != "unix":
		return fmt.Errorf("csi: endpoint %s: must be unix:///PATH", c.Endpoint)
	case c.NodeID == "":
		return errors.New("csi: the node id is missing: give the name of this node")
	case len(c.NodeID) > nodeIDMax || !validNode(c.NodeID):
		return fmt.Errorf("csi: node id %q: must be 1 to %d of a-z A-Z 0-9 - _ . and begin and end with a letter or digit", c.NodeID, nodeIDMax)
	case c.KubeletDir != "" && !filepath.IsAbs(c.KubeletDir):
		return fmt.Errorf("csi: kubelet directory %q: must be absolute", c.KubeletDir)
	}
	if _, _, err := control.ParseAddress(c.Control); err != nil {
		return fmt.Errorf("csi: control socket: %w", err)
	}
	return nil
}

// New makes a driver. It does not need the daemon yet: calls that do are answered
// UNAVAILABLE until it is there.
func New(c Config) (*Driver, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	if c.Timeout == 0 {
		c.Timeout = time.Minute
	}
	if c.Command == nil {
		c.Command = execCommand
	}
	if c.Mounter == nil {
		c.Mounter = mount.New("")
	}
	d := &Driver{config: c, log: c.Log, daemon: newDaemon(c.Control, c.Timeout), locks: newKeyLocks(), metrics: newMetrics()}
	d.node = newHost(c.Mounter, c.Command, c.Log)
	return d, nil
}

// drainPatience is how long calls may go on when the driver ends. Whoever asked
// asks again, so cutting one loses nothing.
const drainPatience = 10 * time.Second

// Serve serves until ctx ends, then waits for the calls under way and returns nil.
// It removes its sockets, but not those of a driver that has taken their place.
func (d *Driver) Serve(ctx context.Context) error {
	defer d.daemon.close()
	var servers []*grpc.Server
	var group sync.WaitGroup
	ended := make(chan error, 2)
	serve := func(path string, register func(*grpc.Server)) error {
		l, err := listen(path)
		if err != nil {
			return err
		}
		s := grpc.NewServer(grpc.ChainUnaryInterceptor(d.unary), grpc.ChainStreamInterceptor(d.stream))
		register(s)
		servers = append(servers, s)
		group.Go(func() { // ends with Stop
			if err := s.Serve(l); err != nil {
				ended <- fmt.Errorf("csi: socket %s: %w", path, err)
			}
		})
		return nil
	}
	_, path, _ := control.ParseAddress(d.config.Endpoint) // checked by New
	err := serve(path, d.register)
	cleaning, stopCleaning := context.WithCancel(ctx)
	defer stopCleaning()
	if err == nil {
		group.Go(func() { d.clean(cleaning) }) // ends with its context
	}
	if err == nil && d.config.RegistrationSocket != "" && d.config.Mode != ModeController {
		err = serve(d.config.RegistrationSocket, d.registration(path).register)
	}
	if err == nil {
		d.log.Info("serving", "endpoint", d.config.Endpoint, "mode", d.config.Mode, "node", d.config.NodeID, "control", d.config.Control)
		if d.config.Ready != nil {
			d.config.Ready()
		}
		select {
		case <-ctx.Done():
			d.log.Info("stopping", "reason", context.Cause(ctx))
		case err = <-ended:
		}
	}
	stopCleaning()
	cut := time.AfterFunc(drainPatience, func() {
		for _, s := range servers {
			s.Stop()
		}
	})
	defer cut.Stop()
	for _, s := range servers {
		s.GracefulStop()
	}
	group.Wait()
	return err
}

// register adds the services of the mode.
func (d *Driver) register(s *grpc.Server) {
	spec.RegisterIdentityServer(s, &identity{driver: d})
	if d.config.Mode != ModeNode {
		spec.RegisterControllerServer(s, &controller{driver: d})
		spec.RegisterGroupControllerServer(s, &groupController{driver: d})
		spec.RegisterSnapshotMetadataServer(s, &snapshotMetadata{driver: d})
	}
	if d.config.Mode != ModeController {
		spec.RegisterNodeServer(s, &node{driver: d})
	}
}

// listen listens on a socket of this user's, in the place of one that an earlier
// driver left.
func listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("csi: socket %s: %w", path, err)
	}
	if s, err := os.Lstat(path); err == nil && s.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("csi: %s is there and is no socket: give another path", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("csi: socket %s: %w", path, err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("csi: socket %s: %w", path, err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	own := &socket{Listener: l, path: path}
	err = os.Chmod(path, 0o600)
	if err == nil {
		own.info, err = os.Lstat(path)
	}
	if err != nil {
		_ = l.Close() // unused
		return nil, fmt.Errorf("csi: socket %s: %w", path, err)
	}
	return own, nil
}

// socket is a listener whose name is removed with it, unless a later driver listens
// there by now.
type socket struct {
	net.Listener
	path string
	info fs.FileInfo
}

// Close implements [net.Listener]. The name goes first: while the socket is open, nobody
// else has its inode.
func (s *socket) Close() error {
	if now, err := os.Lstat(s.path); err == nil && os.SameFile(now, s.info) {
		_ = os.Remove(s.path) // a name that is left is taken by the next driver
	}
	return s.Listener.Close()
}
