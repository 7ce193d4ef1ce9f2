package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/ashlar-storage/ashlar/control"
	"github.com/ashlar-storage/ashlar/csi"
	"github.com/ashlar-storage/ashlar/internal/daemon"
)

type csiFlags struct {
	mode               string
	endpoint           string
	controlSocket      string
	nodeID             string
	kubeletDir         string
	registrationSocket string
	kubeletEndpoint    string
	timeout            time.Duration
	metrics            string
	logFlags
}

func newCSICommand() *cobra.Command {
	f := &csiFlags{}
	c := &cobra.Command{
		Use:   "csi [flags]",
		Short: "Run the CSI driver of a node, for Kubernetes",
		Long: `CSI serves the Container Storage Interface as ` + csi.Name + `, and asks the daemon
of this node (ashlar serve) for volumes, snapshots and devices. It is not on the way
of any data: it can be killed and started again under pods that write.

--mode controller serves volumes and snapshots, --mode node serves mounts, and
--mode all both. Volumes lie on the node whose driver made them: each node runs a
driver with a provisioner and a snapshotter of its own (--node-deployment), and the
topology key ` + csi.TopologyKey + ` tells the scheduler.

The parameters of a StorageClass and of a VolumeAttributesClass, what is supported
and what errors mean: docs/csi.md.

SIGTERM and SIGINT end it after the calls under way.`,
		Example: `  # on a node, beside the daemon
  ashlar csi --node-id "$NODE_NAME" \
      --endpoint unix:///var/lib/kubelet/plugins/` + csi.Name + `/csi.sock \
      --registration-socket /var/lib/kubelet/plugins_registry/` + csi.Name + `-reg.sock`,
		Args: noArguments,
		RunE: func(*cobra.Command, []string) error { return f.run() },
	}
	flags := c.Flags()
	flags.StringVar(&f.mode, "mode", string(csi.ModeAll), "controller, node or all")
	flags.StringVar(&f.endpoint, "endpoint", "unix:///run/ashlar/csi.sock", "serve on this socket, unix:///PATH")
	flags.StringVar(&f.controlSocket, "control-socket", "", "the daemon: unix:///PATH or a path (default $"+serverVariable+", else "+control.DefaultAddress+")")
	flags.StringVar(&f.nodeID, "node-id", "", "name of this node in the cluster (default the host's name)")
	flags.StringVar(&f.kubeletDir, "kubelet-dir", "/var/lib/kubelet", "the kubelet's directory, the same here as for the kubelet")
	flags.StringVar(&f.registrationSocket, "registration-socket", "", "register with the kubelet through this socket, in its plugins_registry (default: a node-driver-registrar does)")
	flags.StringVar(&f.kubeletEndpoint, "kubelet-endpoint", "", "path of the endpoint as the kubelet sees it (default the same)")
	flags.DurationVar(&f.timeout, "timeout", time.Minute, "give up a call of the daemon after this")
	flags.StringVar(&f.metrics, "metrics", "", "serve /metrics, /healthz and /debug/pprof by HTTP on this loopback HOST:PORT")
	f.logFlags.add(c)
	flags.Lookup("log-level").Usage = "debug, info, warn or error (default info)"
	completeWords(c, "mode", "controller", "node", "all")
	_ = c.MarkFlagDirname("kubelet-dir") // fails for an unknown flag only
	return c
}

// config is what the flags ask for.
func (f *csiFlags) config() (csi.Config, error) {
	if f.controlSocket == "" {
		f.controlSocket = os.Getenv(serverVariable)
	}
	if f.controlSocket == "" {
		f.controlSocket = control.DefaultAddress
	}
	if f.nodeID == "" {
		name, err := os.Hostname()
		if err != nil {
			return csi.Config{}, fmt.Errorf("the host's name: %w; give --node-id", err)
		}
		f.nodeID = name
	}
	network, target, err := control.ParseAddress(f.controlSocket)
	switch {
	case err != nil:
		return csi.Config{}, usagef("--control-socket: %w", err)
	case network != "unix":
		return csi.Config{}, usagef("--control-socket %s: must be a unix socket, for the driver mounts what its own node's daemon attaches", f.controlSocket)
	case f.timeout <= 0:
		return csi.Config{}, usagef("--timeout %v: must be more than 0", f.timeout)
	case f.registrationSocket != "" && !filepath.IsAbs(f.registrationSocket):
		return csi.Config{}, usagef("--registration-socket %s: must be an absolute path", f.registrationSocket)
	case f.registrationSocket == "" && f.kubeletEndpoint != "":
		return csi.Config{}, usagef("--kubelet-endpoint goes with --registration-socket")
	case f.registrationSocket != "" && f.mode == string(csi.ModeController):
		return csi.Config{}, usagef("--registration-socket: a driver without the node service has nothing to register")
	}
	if f.logLevel == "" {
		f.logLevel = "info" // a daemon tells of changes of state
		if f.verbose {
			f.logLevel = "debug"
		}
	}
	log, err := f.logger()
	return csi.Config{
		Mode: csi.Mode(f.mode), Endpoint: f.endpoint, Control: "unix://" + target, NodeID: f.nodeID, KubeletDir: f.kubeletDir,
		RegistrationSocket: f.registrationSocket, KubeletEndpoint: strings.TrimPrefix(f.kubeletEndpoint, "unix://"),
		Version: version, Timeout: f.timeout, Log: log,
	}, err
}

func (f *csiFlags) run() error {
	config, err := f.config()
	if err != nil {
		return err
	}
	klog.SetSlogLogger(config.Log) // of k8s.io/mount-utils, which tells what it mounts
	driver, err := csi.New(config)
	if err != nil {
		return &usageError{err}
	}
	if f.metrics != "" {
		_, stop, err := daemon.StartHTTP(f.metrics, daemon.Healthy, driver.Metrics())
		if err != nil {
			return fmt.Errorf("--metrics: %w", err)
		}
		defer stop()
	}
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	ended := make(chan struct{})
	defer close(ended)
	go func() { // ends with the command
		select {
		case s := <-signals:
			stop(errors.New(s.String()))
		case <-ended:
		}
	}()
	return driver.Serve(ctx)
}
