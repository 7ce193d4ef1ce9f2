package csi

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

func TestWrongConfigurationsAreRefused(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"mode":     func(c *Config) { c.Mode = "both" },
		"endpoint": func(c *Config) { c.Endpoint = "relative" },
		"tcp":      func(c *Config) { c.Endpoint = "127.0.0.1:1" },
		"control":  func(c *Config) { c.Control = "nowhere" },
		"no node":  func(c *Config) { c.NodeID = "" },
		"a node":   func(c *Config) { c.NodeID = "a/b" },
		"kubelet":  func(c *Config) { c.KubeletDir = "here" },
	} {
		c := Config{Mode: ModeAll, Endpoint: "unix:///x", Control: "unix:///y", NodeID: "n", KubeletDir: "/k"}
		change(&c)
		if d, err := New(c); err == nil {
			t.Errorf("%s: accepted as %+v", name, d.config)
		}
	}
}

func TestServeTellsWhyItCannot(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]Config{
		"a file is there":           {Endpoint: "unix://" + file},
		"a folder is a file":        {Endpoint: "unix://" + file + "/x"},
		"the path is too long":      {Endpoint: "unix://" + filepath.Join(dir, strings.Repeat("x", 120))},
		"registration":              {Endpoint: "unix://" + filepath.Join(dir, "s"), RegistrationSocket: file},
		"something cannot go there": {Endpoint: "unix:///proc/x"},
	} {
		c.Mode, c.Control, c.NodeID, c.Log = ModeAll, "unix://"+filepath.Join(dir, "none"), "n", newRigLog()
		d, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Serve(t.Context()); err == nil {
			t.Errorf("%s: served", name)
		}
	}
}

// TestALateDriverLeavesItsSuccessorsSocket: one that ends after the next has begun.
func TestALateDriverLeavesItsSuccessorsSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	late, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	next, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := late.Close(); err != nil {
		t.Error(err)
	}
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("the successor is out of reach: %v", err)
	} else {
		_ = c.Close()
	}
	if err := next.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket stays: %v", err)
	}
}

func TestModesOfferTheirServices(t *testing.T) {
	for _, mode := range Modes {
		r := newRig(t, func(c *Config) { c.Mode = mode })
		_, err := r.ControllerGetCapabilities(t.Context(), &spec.ControllerGetCapabilitiesRequest{})
		_, nodeErr := r.NodeGetCapabilities(t.Context(), &spec.NodeGetCapabilitiesRequest{})
		if (err == nil) != (mode != ModeNode) || (nodeErr == nil) != (mode != ModeController) {
			t.Errorf("%s: controller %v, node %v", mode, err, nodeErr)
		}
		i, err := r.GetPluginInfo(t.Context(), &spec.GetPluginInfoRequest{})
		if err != nil || i.GetName() != Name || i.GetVendorVersion() != "v0" {
			t.Errorf("%v, %v", i, err)
		}
		c, err := r.GetPluginCapabilities(t.Context(), &spec.GetPluginCapabilitiesRequest{})
		if wantCount := map[Mode]int{ModeAll: 6, ModeController: 6, ModeNode: 2}[mode]; err != nil || len(c.GetCapabilities()) != wantCount {
			t.Errorf("%s: %v, %v", mode, c, err)
		}
		if err := r.end(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(strings.TrimPrefix(r.config.Endpoint, "unix://")); err == nil {
			t.Errorf("%s: the socket stays", mode)
		}
	}
}

func TestTheKubeletIsTold(t *testing.T) {
	var socket string
	r := newRig(t, func(c *Config) {
		socket = strings.TrimPrefix(c.Endpoint, "unix://") + "-reg"
		c.RegistrationSocket, c.KubeletEndpoint = socket, "/as/the/kubelet/sees/it"
	})
	conn, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() // nothing is in flight
	c := registration.NewRegistrationClient(conn)
	i, err := c.GetInfo(t.Context(), &registration.InfoRequest{})
	if err != nil || i.GetName() != Name || i.GetEndpoint() != "/as/the/kubelet/sees/it" || i.GetType() != registration.CSIPlugin || len(i.GetSupportedVersions()) != 1 {
		t.Errorf("%v, %v", i, err)
	}
	for _, s := range []*registration.RegistrationStatus{{PluginRegistered: true}, {Error: "wrong driver"}} {
		if _, err := c.NotifyRegistrationStatus(t.Context(), s); err != nil {
			t.Error(err)
		}
	}
	for _, text := range []string{"registered with the kubelet", "wrong driver"} {
		if !strings.Contains(r.log.String(), text) {
			t.Errorf("the log does not say %q:\n%s", text, r.log)
		}
	}
}

func TestSecretsAreNotLogged(t *testing.T) {
	const secret = "correct-horse-battery"
	r := newRig(t, nil)
	v := r.create("v", gib, func(q *spec.CreateVolumeRequest) { q.Secrets = map[string]string{secretPassphrase: secret} })
	secrets := map[string]string{secretPassphrase: secret}
	_, _ = r.NodeStageVolume(t.Context(), &spec.NodeStageVolumeRequest{VolumeId: v.GetVolumeId(), StagingTargetPath: "relative", VolumeCapability: mountCapability(""), Secrets: secrets}) // refused
	_, _ = r.CreateSnapshot(t.Context(), &spec.CreateSnapshotRequest{Name: "s", SourceVolumeId: v.GetVolumeId(), Secrets: secrets})                                                        // made
	_, _ = r.NodeExpandVolume(t.Context(), &spec.NodeExpandVolumeRequest{VolumeId: v.GetVolumeId(), VolumePath: "/x", Secrets: secrets})                                                   // refused
	log := r.log.String()
	if strings.Contains(log, secret) {
		t.Errorf("the secret is in the log:\n%s", log)
	}
	if !strings.Contains(log, "method=NodeStageVolume code=InvalidArgument") || !strings.Contains(log, "volume="+v.GetVolumeId()) || !strings.Contains(log, "name=v") {
		t.Errorf("the log does not tell of calls:\n%s", log)
	}
}

func TestACallThatPanicsEndsAlone(t *testing.T) {
	r := newRig(t, nil)
	_, err := r.driver.unary(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: "/csi.v1.Node/Break"}, func(context.Context, any) (any, error) { panic("broken") })
	want(t, "a panic", err, codes.Internal, "a bug")
	if !strings.Contains(r.log.String(), "broken") {
		t.Errorf("the log does not tell of the panic:\n%s", r.log)
	}
}

func TestProblemsOfAnyKindHaveACode(t *testing.T) {
	for err, code := range map[error]codes.Code{
		nil: codes.OK, context.Canceled: codes.Canceled, context.DeadlineExceeded: codes.DeadlineExceeded, os.ErrExist: codes.Internal, missing("x"): codes.InvalidArgument,
	} {
		want(t, "problem", problem(err), code, "")
	}
}

func TestALockIsForOne(t *testing.T) {
	l := newKeyLocks()
	unlock, err := l.lock("a", "b", "a")
	if err != nil {
		t.Fatal(err)
	}
	_, err = l.lock("c", "b")
	want(t, "held", err, codes.Aborted, "b: another call")
	if free, err := l.lock("c"); err != nil {
		t.Errorf("a lock that was refused holds others: %v", err)
	} else {
		free()
	}
	unlock()
	if unlock, err = l.lock("b"); err != nil {
		t.Fatal(err)
	}
	unlock()
}
