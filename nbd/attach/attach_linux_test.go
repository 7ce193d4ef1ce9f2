package attach

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/nbd"
)

func TestConnectTellsTheKernelEverything(t *testing.T) {
	k, d := newFakeKernel(t)
	s := newFakeServer(t)
	device := attached(t, d, s.config())
	r := k.last(commandConnect)
	const flags = nbd.FlagHasFlags | nbd.FlagSendFlush | nbd.FlagSendFUA | nbd.FlagSendTrim | nbd.FlagSendWriteZeroes | nbd.FlagCanMultiConn
	if r.index != nil || r.size != 64<<20 || r.blockSize != 512 || r.timeout == nil || *r.timeout != 0 || r.flags != uint64(flags) || r.clientFlags != 0 ||
		r.deadTimeout != 300 || r.backend != "pool/data" || len(r.sockets) != 4 {
		t.Errorf("the kernel was told %+v", r)
	}
	want := Device{Index: 0, Path: "/dev/nbd0", Backend: "pool/data", PID: os.Getpid(), Size: 64 << 20, BlockSize: 512, Cached: true, FUA: true, Discard: true, InFlight: 3}
	if fmt.Sprint(device) != fmt.Sprint(want) {
		t.Errorf("got  %+v\nwant %+v", device, want)
	}
	if got := text(k.path("sys/block/nbd0/queue/io_timeout")); got != "10000" {
		t.Errorf("requests are sent again after %s ms", got)
	}
	if s.live() != 4 {
		t.Errorf("%d connections are open", s.live())
	}
	if err := d.Disconnect(t.Context(), 0, DisconnectOptions{}); err != nil {
		t.Error(err)
	}
	eventually(t, "no descriptor is left here", func() bool { return s.live() == 0 })
}

func TestConnectFollowsItsConfig(t *testing.T) {
	five, nine := Index(3), Index(900)
	for _, tt := range []struct {
		name   string
		server func(*fakeServer)
		config func(*Config)
		check  func(Device, fakeRequest) bool
		timer  string
	}{
		{"one connection where flushes do not cover all", func(s *fakeServer) { s.flags &^= nbd.FlagCanMultiConn }, func(*Config) {},
			func(_ Device, r fakeRequest) bool { return len(r.sockets) == 1 }, "1000"},
		{"connections", nil, func(c *Config) { c.Connections = 7 },
			func(_ Device, r fakeRequest) bool { return len(r.sockets) == 7 }, "10000"},
		{"timeouts, rounded up", nil, func(c *Config) { c.DeadTimeout, c.RetryAfter = 1500*time.Millisecond, 250*time.Millisecond },
			func(_ Device, r fakeRequest) bool { return r.deadTimeout == 2 }, "250"},
		{"no end of waiting", nil, func(c *Config) { c.DeadTimeout = Never },
			func(_ Device, r fakeRequest) bool { return r.deadTimeout == 9223372037 }, "10000"},
		{"a block size", nil, func(c *Config) { c.BlockSize = 4096 },
			func(d Device, r fakeRequest) bool { return r.blockSize == 4096 && d.BlockSize == 4096 }, "10000"},
		{"the server's block size", func(s *fakeServer) { s.block = 2048 }, func(*Config) {},
			func(d Device, r fakeRequest) bool { return r.blockSize == 2048 }, "10000"},
		{"whole blocks", func(s *fakeServer) { s.size = 10<<20 + 4095 }, func(c *Config) { c.BlockSize = 4096 },
			func(d Device, r fakeRequest) bool { return r.size == 10<<20 && d.Size == 10<<20 }, "10000"},
		{"read-only", nil, func(c *Config) { c.ReadOnly = true },
			func(d Device, r fakeRequest) bool { return d.ReadOnly && r.flags&uint64(nbd.FlagReadOnly) != 0 }, "10000"},
		{"a read-only server", func(s *fakeServer) { s.flags |= nbd.FlagReadOnly }, func(*Config) {},
			func(d Device, _ fakeRequest) bool { return d.ReadOnly }, "10000"},
		{"an index", nil, func(c *Config) { c.Index = &five },
			func(d Device, _ fakeRequest) bool { return d.Index == 3 && d.Path == "/dev/nbd3" }, "10000"},
		{"an index beyond those there are", nil, func(c *Config) { c.Index = &nine },
			func(d Device, _ fakeRequest) bool { return d.Index == 900 }, "10000"},
		{"a name", nil, func(c *Config) { c.Backend = "another name" },
			func(d Device, _ fakeRequest) bool { return d.Backend == "another name" }, "10000"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k, d := newFakeKernel(t)
			s := newFakeServer(t)
			if tt.server != nil {
				s.alter(tt.server)
			}
			c := s.config()
			tt.config(&c)
			device := attached(t, d, c)
			if !tt.check(device, k.last(commandConnect)) {
				t.Errorf("%+v\n%+v", device, k.last(commandConnect))
			}
			if got := text(k.path("sys/block/" + device.Index.String() + "/queue/io_timeout")); got != tt.timer {
				t.Errorf("requests are sent again after %s ms, want %s", got, tt.timer)
			}
		})
	}
}

func TestConnectErrors(t *testing.T) {
	zero := Index(0)
	is := func(want error) func(error) bool { return func(err error) bool { return errors.Is(err, want) } }
	for _, tt := range []struct {
		name   string
		before func(*fakeKernel, *Driver, *fakeServer)
		config func(*Config)
		check  func(error) bool
		text   string
	}{
		{"no dial", nil, func(c *Config) { c.Dial = nil }, nil, "no Dial"},
		{"connections", nil, func(c *Config) { c.Connections = 65 }, nil, "want 1 to 64"},
		{"block size", nil, func(c *Config) { c.BlockSize = 1000 }, nil, "blocks of 1000 bytes"},
		{"dead timeout", nil, func(c *Config) { c.DeadTimeout = time.Millisecond }, nil, "dead timeout"},
		{"name with a line break", nil, func(c *Config) { c.Backend = "a\nb" }, nil, "line break"},
		{"server gone", func(_ *fakeKernel, _ *Driver, s *fakeServer) { s.stop() }, nil, is(ErrServer), "connect: "},
		{"unknown export", func(_ *fakeKernel, _ *Driver, s *fakeServer) { s.unknown = true }, nil,
			func(err error) bool { return errors.Is(err, ErrServer) && errors.As(err, new(*nbd.OptionError)) }, "unknown export"},
		{"large blocks", func(_ *fakeKernel, _ *Driver, s *fakeServer) { s.block = 8192 }, nil, is(ErrServer), "blocks of 8192 bytes"},
		{"smaller blocks than the server's", func(_ *fakeKernel, _ *Driver, s *fakeServer) { s.block = 4096 },
			func(c *Config) { c.BlockSize = 512 }, is(ErrServer), "blocks of 4096 bytes"},
		{"nothing to attach", func(_ *fakeKernel, _ *Driver, s *fakeServer) { s.size = 511 }, nil, is(ErrServer), "511 bytes"},
		{"an export that changes", func(_ *fakeKernel, _ *Driver, s *fakeServer) { s.changing = true }, nil, is(ErrServer), "changes"},
		{"permission", func(k *fakeKernel, _ *Driver, _ *fakeServer) { k.fail[commandConnect] = []error{unix.EPERM} }, nil, is(ErrPermission), "CAP_SYS_ADMIN"},
		{"permission to ask", func(k *fakeKernel, _ *Driver, _ *fakeServer) { k.fail[commandStatus] = []error{unix.EPERM} }, nil, is(ErrPermission), "CAP_SYS_ADMIN"},
		{"a refusal", func(k *fakeKernel, _ *Driver, _ *fakeServer) { k.fail[commandConnect] = []error{unix.EINVAL} }, nil, is(unix.EINVAL), "connect: invalid argument"},
		{"attached twice", func(_ *fakeKernel, d *Driver, s *fakeServer) {
			if _, err := d.Connect(context.Background(), s.config()); err != nil {
				panic(err)
			}
		}, nil, func(err error) bool {
			twice := new(AttachedError)
			return errors.As(err, &twice) && twice.Device.Path == "/dev/nbd0"
		}, "pool/data is attached already, as /dev/nbd0"},
		{"index attached", func(_ *fakeKernel, d *Driver, s *fakeServer) {
			c := s.config()
			c.Backend = "another"
			if _, err := d.Connect(context.Background(), c); err != nil {
				panic(err)
			}
		}, func(c *Config) { c.Index = &zero }, func(err error) bool {
			taken := new(InUseError)
			return errors.As(err, &taken) && taken.Index == 0 && errors.Is(err, syscall.EBUSY)
		}, "nbd0 is in use"},
		{"index open", func(k *fakeKernel, _ *Driver, _ *fakeServer) { k.devices[0].open = true },
			func(c *Config) { c.Index = &zero }, func(err error) bool { return errors.As(err, new(*InUseError)) }, "nbd0 is in use"},
		{"stale node", func(k *fakeKernel, _ *Driver, _ *fakeServer) { k.file("nodes/nbd0", "43:7") }, nil, func(err error) bool {
			stale := new(StaleNodeError)
			return errors.As(err, &stale) && stale.Path == "/dev/nbd0"
		}, "/dev/nbd0 is 43:7 and should be block device 43:0 (remove it and run: mknod /dev/nbd0 b 43 0)"},
		{"no node", func(k *fakeKernel, _ *Driver, _ *fakeServer) { k.file("nodes/other", "") }, nil,
			func(err error) bool { return errors.As(err, new(*StaleNodeError)) }, "is missing"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k, d := newFakeKernel(t)
			s := newFakeServer(t)
			if tt.before != nil {
				tt.before(k, d, s)
			}
			c := s.config()
			if tt.config != nil {
				tt.config(&c)
			}
			before, live := k.count(commandConnect), s.live()
			_, err := d.Connect(t.Context(), c)
			if err == nil || tt.check != nil && !tt.check(err) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("%v", err)
			}
			eventually(t, "no connection is left", func() bool { return s.live() == live })
			if errors.As(err, new(*StaleNodeError)) && k.devices[0].connected {
				t.Error("it stayed attached")
			}
			if tt.name == "index attached" && k.count(commandConnect) != before+1 {
				t.Error("it tried again")
			}
		})
	}
}

func TestConnectWaitsForAPassingOpen(t *testing.T) {
	k, d := newFakeKernel(t)
	s := newFakeServer(t)
	k.fail[commandConnect] = []error{unix.EBUSY, unix.EBUSY} // udev looks at it
	c := s.config()
	c.Index = new(Index)
	if device := attached(t, d, c); device.Index != 0 || k.count(commandConnect) != 3 {
		t.Errorf("%v after %d tries", device, k.count(commandConnect))
	}
}

func TestConnectEndsWithItsContext(t *testing.T) {
	k, d := newFakeKernel(t)
	s := newFakeServer(t)
	ctx, cancel := context.WithCancel(t.Context())
	c := s.config()
	c.Dial = func(context.Context) (*net.UnixConn, error) {
		cancel()
		return Unix(s.address)(context.Background())
	}
	if _, err := d.Connect(ctx, c); !errors.Is(err, context.Canceled) || k.count(commandConnect) != 0 {
		t.Errorf("%v", err)
	}
}

func TestConnectOnAKernelWithoutNames(t *testing.T) {
	k, d := newFakeKernel(t)
	k.old = true
	s := newFakeServer(t)
	device := attached(t, d, s.config())
	if device.Backend != "" {
		t.Errorf("%+v", device)
	}
	if err := d.Disconnect(t.Context(), device.Index, DisconnectOptions{}); err != nil {
		t.Error(err)
	}
}

func TestListIsRebuiltFromTheKernel(t *testing.T) {
	k, d := newFakeKernel(t)
	s := newFakeServer(t)
	c := s.config()
	c.Index = new(Index)
	*c.Index = 2
	attached(t, d, c)
	c.Index, c.Backend = nil, "other"
	attached(t, d, c)
	k.devices[1].open = true // in the driver's status like an attached one

	later := newDriver(k, d.host, Options{})
	devices, err := later.List()
	if err != nil || len(devices) != 2 || devices[0].Path != "/dev/nbd0" || devices[0].Backend != "other" || devices[1].Path != "/dev/nbd2" {
		t.Errorf("%+v, %v", devices, err)
	}
	if device, err := later.Find("pool/data"); err != nil || device.Index != 2 {
		t.Errorf("%+v, %v", device, err)
	}
	for _, name := range []string{"", "none"} {
		if _, err := later.Find(name); !errors.Is(err, ErrNotAttached) {
			t.Errorf("%q: %v", name, err)
		}
	}
	for from, want := range map[Index]Index{0: 3, 3: 3, 700: 700} {
		if free, err := later.FreeIndex(from); err != nil || free != want {
			t.Errorf("free from %v on: %v, %v", from, free, err)
		}
	}
	if _, err := later.Status(3); !errors.Is(err, ErrNotAttached) {
		t.Errorf("%v", err)
	}
	k.fail[commandStatus] = []error{unix.EPERM, unix.EPERM, unix.EPERM}
	_, listErr := later.List()
	_, findErr := later.Find("x")
	_, freeErr := later.FreeIndex(0)
	for _, err := range []error{listErr, findErr, freeErr} {
		if !errors.Is(err, ErrPermission) {
			t.Errorf("%v", err)
		}
	}
}

func TestReconfigureReplacesTheDead(t *testing.T) {
	k, d := newFakeKernel(t)
	s := newFakeServer(t)
	device := attached(t, d, s.config())
	k.lose(device.Index, 3)
	eventually(t, "the server sees it", func() bool { return s.live() == 1 })
	s.alter(func(s *fakeServer) { s.size = 96<<20 + 100 })
	device, err := d.Reconfigure(t.Context(), device.Index, s.config())
	if err != nil || device.Size != 96<<20 || k.alive(device.Index) != 4 {
		t.Errorf("%+v, %v, %d connections", device, err, k.alive(device.Index))
	}
	eventually(t, "the one too many is closed", func() bool { return s.live() == 4 })
	if r := k.last(commandReconfigure); r.size != 96<<20 || r.backend != "pool/data" || r.deadTimeout != 300 || r.timeout != nil || len(r.sockets) != 4 {
		t.Errorf("%+v", r)
	}
	if _, err = d.Reconfigure(t.Context(), device.Index, s.config()); err != nil || k.last(commandReconfigure).size != 0 {
		t.Errorf("%v, %+v", err, k.last(commandReconfigure))
	}
}

func TestReconfigureRefusesAnotherExport(t *testing.T) {
	for _, tt := range []struct {
		name  string
		alter func(*fakeServer)
		want  error
		text  string
	}{
		{"smaller", func(s *fakeServer) { s.size -= 512 }, ErrMismatch, "67108352 bytes, and /dev/nbd0 has 67108864"},
		{"read-only", func(s *fakeServer) { s.flags |= nbd.FlagReadOnly }, ErrMismatch, "read-only"},
		{"larger blocks", func(s *fakeServer) { s.block = 4096 }, ErrMismatch, "blocks of 4096 bytes"},
		{"no flush", func(s *fakeServer) { s.flags &^= nbd.FlagSendFlush }, ErrMismatch, "no flush"},
		{"no FUA", func(s *fakeServer) { s.flags &^= nbd.FlagSendFUA }, ErrMismatch, "no FUA"},
		{"no trim", func(s *fakeServer) { s.flags &^= nbd.FlagSendTrim }, ErrMismatch, "no trim"},
		{"gone", func(s *fakeServer) { s.unknown = true }, ErrServer, "unknown export"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k, d := newFakeKernel(t)
			s := newFakeServer(t)
			device := attached(t, d, s.config())
			s.alter(tt.alter)
			_, err := d.Reconfigure(t.Context(), device.Index, s.config())
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) || k.count(commandReconfigure) != 0 {
				t.Errorf("%v", err)
			}
			eventually(t, "no more connections than before", func() bool { return s.live() == 4 })
		})
	}
	k, d := newFakeKernel(t)
	s := newFakeServer(t)
	device := attached(t, d, s.config())
	c := s.config()
	c.Backend = "another"
	if _, err := d.Reconfigure(t.Context(), device.Index, c); !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "has pool/data") {
		t.Errorf("%v", err)
	}
	if _, err := d.Reconfigure(t.Context(), device.Index, Config{}); err == nil {
		t.Error("a config without Dial")
	}
	if _, err := d.Reconfigure(t.Context(), 3, s.config()); !errors.Is(err, ErrNotAttached) {
		t.Errorf("%v", err)
	}
	k.fail[commandReconfigure] = []error{unix.EPERM, unix.EINVAL}
	if _, err := d.Reconfigure(t.Context(), device.Index, s.config()); !errors.Is(err, ErrPermission) {
		t.Errorf("%v", err)
	}
	if _, err := d.Reconfigure(t.Context(), device.Index, s.config()); !errors.Is(err, unix.EINVAL) || errors.Is(err, ErrNotAttached) {
		t.Errorf("%v", err)
	}
}

func TestResize(t *testing.T) {
	k, d := newFakeKernel(t)
	s := newFakeServer(t)
	index := attached(t, d, s.config()).Index
	for _, tt := range []struct {
		size, want uint64
		asked      int // commands so far
		err        error
	}{
		{128 << 20, 128 << 20, 1, nil},
		{128<<20 + 511, 128 << 20, 1, nil}, // no whole block more
		{64 << 20, 0, 1, ErrMismatch},
		{1 << 40, 1 << 40, 2, nil},
	} {
		device, err := d.Resize(index, tt.size)
		if !errors.Is(err, tt.err) || device.Size != tt.want || k.count(commandReconfigure) != tt.asked {
			t.Errorf("%d: %+v, %v", tt.size, device, err)
		}
	}
	if r := k.last(commandReconfigure); r.size != 1<<40 || r.backend != "pool/data" || len(r.sockets) != 0 || r.deadTimeout != 0 {
		t.Errorf("%+v", r)
	}
	if _, err := d.Resize(3, 1<<20); !errors.Is(err, ErrNotAttached) {
		t.Errorf("%v", err)
	}
	k.fail[commandReconfigure] = []error{unix.EPERM}
	if _, err := d.Resize(index, 1<<41); !errors.Is(err, ErrPermission) {
		t.Errorf("%v", err)
	}
}

func TestDisconnectRefusesWhatIsUsed(t *testing.T) {
	const mounts = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
	for _, tt := range []struct {
		name   string
		before func(*fakeKernel)
		text   string
		force  bool // too
	}{
		{"mounted", func(k *fakeKernel) {
			k.file("proc/self/mountinfo", mounts+"30 22 43:0 / /srv/my\\040data rw,noatime shared:1 - ext4 /dev/nbd0 rw\n31 22 43:0 / /also rw - ext4 /dev/nbd0 rw\n")
		}, "/dev/nbd0 is mounted on /srv/my data, /also", true},
		{"a partition mounted", func(k *fakeKernel) {
			k.sysfs(0, "nbd0p2/dev", "43:2")
			k.file("proc/self/mountinfo", mounts+"30 22 43:2 / /srv rw - xfs /dev/nbd0p2 rw\n")
		}, "is mounted on /srv", true},
		{"btrfs, which has a number of its own", func(k *fakeKernel) {
			k.file("proc/self/mountinfo", mounts+"30 22 0:45 /sub /srv rw - btrfs /dev/nbd0 rw\n")
		}, "is mounted on /srv", true},
		{"swap", func(k *fakeKernel) {
			k.file("proc/swaps", "Filename Type Size Used Priority\n/dev/nbd0 partition 65532 0 -2\n")
		}, "is mounted on swap", true},
		{"device mapper", func(k *fakeKernel) {
			k.sysfs(0, "holders/dm-3", "")
			k.file("sys/block/dm-3/dm/name", "vg-root\n")
		}, "is in use by dm-3 (vg-root)", true},
		{"RAID over a partition", func(k *fakeKernel) {
			k.sysfs(0, "nbd0p1/dev", "43:1")
			k.sysfs(0, "nbd0p1/holders/md0", "")
		}, "is in use by md0", true},
		{"another namespace", func(k *fakeKernel) { k.claims = &os.PathError{Op: "open", Path: "/dev/nbd0", Err: unix.EBUSY} },
			"in use by a program, or mounted in another namespace", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k, d := newFakeKernel(t)
			device := attached(t, d, newFakeServer(t).config())
			tt.before(k)
			for _, o := range []DisconnectOptions{{}, {Force: true}} {
				if o.Force && !tt.force {
					continue
				}
				err := d.Disconnect(t.Context(), device.Index, o)
				if !errors.As(err, new(*BusyError)) || !errors.Is(err, syscall.EBUSY) || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("%+v: %v", o, err)
				}
			}
			if k.count(commandDisconnect) != 0 {
				t.Error("the kernel was asked all the same")
			}
		})
	}
}

func TestDisconnectErrors(t *testing.T) {
	k, d := newFakeKernel(t)
	s := newFakeServer(t)
	if err := d.Disconnect(t.Context(), 0, DisconnectOptions{}); !errors.Is(err, ErrNotAttached) {
		t.Errorf("not attached: %v", err)
	}
	index := attached(t, d, s.config()).Index
	k.fail[commandDisconnect] = []error{unix.EPERM}
	if err := d.Disconnect(t.Context(), index, DisconnectOptions{}); !errors.Is(err, ErrPermission) {
		t.Errorf("no permission: %v", err)
	}
	k.claims = &os.PathError{Op: "open", Path: "/dev/nbd0", Err: unix.EIO}
	if err := d.Disconnect(t.Context(), index, DisconnectOptions{}); !errors.Is(err, unix.EIO) {
		t.Errorf("device does not open: %v", err)
	}
	k.claims = nil
	k.file("nodes/nbd0", "8:0") // syncing somebody else's disk would be of no use
	if err := d.Disconnect(t.Context(), index, DisconnectOptions{}); !errors.As(err, new(*StaleNodeError)) {
		t.Errorf("stale node: %v", err)
	}
	if err := os.Rename(k.path("proc/self/mountinfo"), k.path("mountinfo")); err != nil {
		t.Fatal(err)
	}
	if err := d.Disconnect(t.Context(), index, DisconnectOptions{Force: true}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("mounts unknown: %v", err)
	}
	if err := os.Rename(k.path("mountinfo"), k.path("proc/self/mountinfo")); err != nil {
		t.Fatal(err)
	}
	if err := d.Disconnect(t.Context(), index, DisconnectOptions{Force: true}); err != nil {
		t.Errorf("force: %v", err)
	}
}

func TestDisconnectOfADeadServerNeedsForce(t *testing.T) {
	k, d := newFakeKernel(t)
	index := attached(t, d, newFakeServer(t).config()).Index
	k.syncs = make(chan struct{})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := d.Disconnect(ctx, index, DisconnectOptions{})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "force") || k.count(commandDisconnect) != 0 {
		t.Errorf("%v", err)
	}
	if err := d.Disconnect(t.Context(), index, DisconnectOptions{Force: true}); err != nil {
		t.Error(err)
	}
	close(k.syncs) // the kernel fails the I/O when its server is gone
}

func TestDisconnectWaitsForTheLastUser(t *testing.T) {
	k, d := newFakeKernel(t)
	index := attached(t, d, newFakeServer(t).config()).Index
	k.held = true
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := d.Disconnect(ctx, index, DisconnectOptions{}); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "still has it open") {
		t.Errorf("%v", err)
	}
	time.AfterFunc(20*time.Millisecond, func() { k.release(index) })
	if err := d.Disconnect(t.Context(), index, DisconnectOptions{Force: true}); err != nil {
		t.Error(err)
	}
}

func TestErrorsNameTheRemedy(t *testing.T) {
	for err, want := range map[error]string{
		ErrNoDriver: "modprobe nbd", ErrPermission: "CAP_SYS_ADMIN",
		&KernelError{What: "backend identifier", Since: "5.14"}: "backend identifier: not supported by this kernel (needs Linux 5.14)",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
	if !errors.Is(&KernelError{}, errors.ErrUnsupported) {
		t.Error("KernelError is no ErrUnsupported")
	}
}

func TestDeviceNumber(t *testing.T) {
	dir := t.TempDir()
	if _, err := deviceNumber(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	if got, err := deviceNumber(dir); err != nil || got != "no block device" {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := deviceNumber("/dev/null"); err != nil || got != "no block device" {
		t.Errorf("%q, %v", got, err)
	}
}
