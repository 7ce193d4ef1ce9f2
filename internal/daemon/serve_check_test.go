package daemon

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/engine/enginetest"
	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/nbd"
)

// TestCheckSaysWhatServeWouldSay: with the same words.
func TestCheckSaysWhatServeWouldSay(t *testing.T) {
	dir := t.TempDir()
	file := testenv.SparseFile(t, filepath.Join(dir, "file"), 10)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }() // accepts nothing
	for name, change := range map[string]func(*ServeConfig){
		"data directory":    func(c *ServeConfig) { c.DataDir = filepath.Join(file, "below") },
		"control socket":    func(c *ServeConfig) { c.Socket = file },
		"nbd socket":        func(c *ServeConfig) { c.NBDSockets = []string{file} },
		"a socket twice":    func(c *ServeConfig) { c.NBDSockets = []string{dir + "/s", dir + "/s"} },
		"address":           func(c *ServeConfig) { c.Listen = []string{taken.Addr().String()} },
		"default address":   func(c *ServeConfig) { c.ListenDefault = taken.Addr().String() },
		"no address":        func(c *ServeConfig) { c.Listen = []string{"nowhere"} },
		"plain text":        func(c *ServeConfig) { c.Listen = []string{"0.0.0.0:0"} },
		"metrics":           func(c *ServeConfig) { c.Metrics = "192.0.2.1:1" },
		"metrics, taken":    func(c *ServeConfig) { c.Metrics = taken.Addr().String() },
		"reactors":          func(c *ServeConfig) { c.Reactors.CPUs = []int{1000} },
		"too few CPUs":      func(c *ServeConfig) { c.Reactors = ReactorConfig{Reactors: 3, CPUs: []int{0}} },
		"engine":            func(c *ServeConfig) { c.Reactors.Engine = "steam" },
		"TLS":               func(c *ServeConfig) { c.TLS = nbd.TLSForced },
		"depth":             func(c *ServeConfig) { c.Depth = 1000 },
		"collector":         func(c *ServeConfig) { c.OTLPEndpoint = "nonsense" },
		"options in json":   func(c *ServeConfig) { c.Options = func() {} },
		"control, no place": func(c *ServeConfig) { c.Socket = filepath.Join(file, "s") },
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			fake := &enginetest.Fake{}
			defer func() {
				if err := fake.Close(); err != nil {
					t.Error(err)
				}
			}()
			config := ServeConfig{
				DataDir: filepath.Join(t.TempDir(), "data"), Socket: filepath.Join(dir, "control"), Log: quiet(), Layout: fake,
				Reactors: ReactorConfig{Poll: reactor.PollOff},
			}
			change(&config)
			checked := config.Check()
			served := Serve(t.Context(), config)
			if checked == nil || served == nil {
				t.Fatalf("Check: %v\nServe: %v", checked, served)
			}
			if name != "data directory" && checked.Error() != served.Error() {
				t.Errorf("Check: %v\nServe: %v", checked, served)
			}
			if _, err := os.Lstat(filepath.Join(dir, "control")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a socket is left: %v", err)
			}
		})
	}
}

// TestCheckLeavesARunningDaemonAlone: what it has is free, or goes on; what others have
// is not.
func TestCheckLeavesARunningDaemonAlone(t *testing.T) {
	fake := &enginetest.Fake{}
	n := newNode(t, fake, func(c *ServeConfig) { c.DefaultPool = 0 })
	var listening, metrics string
	for _, a := range n.addresses.NBD {
		if a.Network() == "tcp" {
			listening = a.String()
		}
	}
	metrics = n.addresses.HTTP.String()
	_, port, err := net.SplitHostPort(metrics)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*ServeConfig)
		want   string // "": nothing is wrong
	}{
		"as it is":                 {func(*ServeConfig) {}, ""},
		"metrics where it has NBD": {func(c *ServeConfig) { c.Listen, c.Metrics = nil, listening }, ""},
		"NBD where it has metrics": {func(c *ServeConfig) { c.Listen, c.Metrics = []string{metrics}, "" }, ""},
		"on all addresses":         {func(c *ServeConfig) { c.Listen, c.Metrics, c.InsecurePlaintext = []string{"0.0.0.0:" + port}, "", true }, ""},
		"sockets exchanged":        {func(c *ServeConfig) { c.Socket, c.NBDSockets = c.NBDSockets[0], []string{c.Socket} }, ""},
		"metrics where NBD stays":  {func(c *ServeConfig) { c.Metrics = listening }, listening},
		"a socket twice":           {func(c *ServeConfig) { c.NBDSockets = append(c.NBDSockets, c.NBDSockets[0]) }, "another server answers"},
		"another data directory":   {func(c *ServeConfig) { c.DataDir = filepath.Join(n.dir, "other") }, "another server answers"},
	} {
		t.Run(name, func(t *testing.T) {
			config := n.config
			config.Log = quiet()
			c.change(&config)
			err := config.Check()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	if code, _ := n.get("/healthz"); code != 200 {
		t.Errorf("the daemon answers %d", code)
	}
	n.stop()
	config := n.config
	config.Socket = filepath.Join(n.dir, "run", "control.sock")
	if err := config.Check(); err != nil { // of this process still, and free
		t.Error(err)
	}
	path := filepath.Join(n.config.DataDir, heldName)
	for text, want := range map[string]string{"{": path, `{"PID": 0}`: "", `{"PID": 99999999, "Sockets": [{"Key": "passed 0 control", "Network": "tcp"}]}`: ""} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := config.Check(); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestCheckOfPassedSockets: what a service manager once passed goes on.
func TestCheckOfPassedSockets(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }() // accepts nothing
	dir := t.TempDir()
	config := ServeConfig{DataDir: dir, ListenDefault: taken.Addr().String(), Reactors: ReactorConfig{Poll: reactor.PollOff}}
	for name, want := range map[string]string{"nbd": "", "control": "--control-tls-cert"} {
		held := fmt.Sprintf(`{"PID": %d, "Sockets": [{"Key": "passed 0 %s", "Network": "tcp", "Address": "127.0.0.1:7"}]}`, os.Getpid(), name)
		if err := os.WriteFile(filepath.Join(dir, heldName), []byte(held), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := config.Check(); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	config.ControlTLS = &tls.Config{}
	config.ListenDefault = ""
	if err := config.Check(); err != nil {
		t.Error(err)
	}
}

func TestHeldSocketsOverlap(t *testing.T) {
	for _, c := range []struct {
		held heldSocket
		want socket
		yes  bool
	}{
		{heldSocket{Network: "tcp", Address: "127.0.0.1:80"}, socket{network: "tcp", address: "127.0.0.1:80"}, true},
		{heldSocket{Network: "tcp", Address: "127.0.0.1:80"}, socket{network: "tcp", address: "127.0.0.2:80"}, false},
		{heldSocket{Network: "tcp", Address: "127.0.0.1:80"}, socket{network: "tcp", address: "127.0.0.1:81"}, false},
		{heldSocket{Network: "tcp", Address: "127.0.0.1:80"}, socket{network: "tcp", address: ":80"}, true},
		{heldSocket{Network: "tcp", Address: "[::]:80"}, socket{network: "tcp", address: "127.0.0.1:80"}, true},
		{heldSocket{Network: "tcp", Address: "x"}, socket{network: "tcp", address: "127.0.0.1:80"}, false},
		{heldSocket{Network: "tcp", Address: "127.0.0.1:80"}, socket{network: "tcp", address: "x"}, false},
		{heldSocket{Network: "unix", Address: "/a/b"}, socket{network: "unix", address: "/a/./b"}, true},
		{heldSocket{Network: "unix", Address: "/a/b"}, socket{network: "unix", address: "/a/c"}, false},
		{heldSocket{Network: "unix", Address: "/a/b"}, socket{network: "tcp", address: "127.0.0.1:80"}, false},
	} {
		if got := c.held.overlaps(c.want); got != c.yes {
			t.Errorf("%v and %v %v: %v", c.held, c.want.network, c.want.address, got)
		}
	}
}

func TestCheckWritable(t *testing.T) {
	dir := t.TempDir()
	file := testenv.SparseFile(t, filepath.Join(dir, "file"), 10)
	for path, want := range map[string]string{
		dir: "", filepath.Join(dir, "to", "come"): "", file: "no directory", filepath.Join(file, "x"): "not a directory", "/proc/self": "cannot be written to",
	} {
		if err := CheckWritable(path); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
}
