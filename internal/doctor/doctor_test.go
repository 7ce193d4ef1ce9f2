package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"github.com/ashlar-storage/ashlar/nbd/attach"
	"github.com/ashlar-storage/ashlar/ublk"
)

// files are those of a host, by path.
type files map[string]string

const mountinfo = `22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw
36 22 0:31 / /srv/my\040data rw - btrfs /dev/sda rw,subvol=/
37 22 0:32 / /tmp rw - tmpfs tmpfs rw
nonsense
`

// healthy is a host that lacks nothing: one disk in use, one free.
func healthy() (*Host, files) {
	f := files{
		"proc/self/status":                  "Name:\tashlar\nCapEff:\t000001ffffffffff\n",
		"proc/self/cgroup":                  "0::/system.slice/ashlar.service\n",
		"proc/self/mountinfo":               mountinfo,
		"proc/swaps":                        "Filename\tType\tSize\tUsed\tPriority\n",
		"sys/kernel/btf/vmlinux":            "BTF",
		"dev/fuse":                          "",
		"dev/loop-control":                  "",
		"dev/ublk-control":                  "",
		"lib/modules/6.12.1/modules.dep":    "kernel/drivers/block/ublk_drv.ko.xz:\nkernel/drivers/block/nbd.ko.xz:\n",
		"var/lib/ashlar/options.json":       "{}",
		"run/systemd/system/x":              "",
		"run/ashlar/x":                      "",
		"usr/local/bin/ashlar":              "",
		"etc/ashlar/serve.yaml":             "",
		"etc/systemd/system/ashlar.service": "[Service]\n# a comment\nExecStart=/usr/local/bin/ashlar serve --config /etc/ashlar/serve.yaml\n",

		"sys/fs/cgroup/cgroup.controllers":                     "cpu memory pids",
		"sys/fs/cgroup/system.slice/memory.max":                "max",
		"sys/fs/cgroup/system.slice/ashlar.service/memory.max": "max",
		"sys/fs/cgroup/system.slice/ashlar.service/cpu.max":    "max 100000",
		"sys/fs/cgroup/system.slice/ashlar.service/pids.max":   "4915",
		"sys/block/loop0/size":                                 "0",
		"sys/block/sr0/size":                                   "100",
		"sys/block/vdz/size":                                   "0",
		"sys/block/nvme0n1/nvme0n1p2/partition":                "2",
		"sys/block/nvme0n1/nvme0n1p2/dev":                      "259:2",
	}
	f.disk("nvme0n1", "259:0")
	f.disk("nvme1n1", "259:4")
	h := &Host{
		Release: func() (string, string, error) { return "6.12.1", "x86_64", nil },
		Ring:    func() error { return nil }, Ublk: func() error { return nil }, NBD: func() error { return nil },
		Limit: func(Resource) (uint64, uint64, error) { return Unlimited, Unlimited, nil },
		Filesystem: func(string) (Filesystem, error) {
			return Filesystem{Magic: 0xEF53, Size: 100 << 30, Free: 40 << 30}, nil
		},
		Direct:   func(string) error { return nil },
		Reflink:  func(string) error { return syscall.EOPNOTSUPP },
		Writable: func(string) error { return nil },
		ReadDisk: func(string, []byte) error { return nil },
		Listen:   func(string) error { return nil },
		Daemon: func(socket string) (string, error) {
			return "", &fs.PathError{Op: "stat", Path: socket, Err: syscall.ENOENT}
		},
		Clock:   func() (bool, error) { return true, nil },
		Foreign: func([]byte) string { return "" },
	}
	return h, f
}

// disk adds a disk without a fault.
func (f files) disk(name, dev string) {
	for file, text := range map[string]string{
		"dev": dev, "size": "3907029168", "queue/logical_block_size": "512", "queue/physical_block_size": "4096", "queue/rotational": "0",
		"queue/write_cache": "write through", "queue/fua": "0", "queue/scheduler": "[none] mq-deadline", "queue/discard_max_bytes": "2199023255040",
	} {
		f["sys/block/"+name+"/"+file] = text
	}
}

func (f files) root() fs.FS {
	m := fstest.MapFS{}
	for path, text := range f {
		m[path] = &fstest.MapFile{Data: []byte(text)}
	}
	return m
}

var options = Options{DataDir: "/var/lib/ashlar", Listen: []string{"127.0.0.1:10809"}, Metrics: "127.0.0.1:9120", Socket: "/run/ashlar/control.sock", Buffers: 64 << 20}

func TestAHealthyHost(t *testing.T) {
	h, f := healthy()
	h.Root = f.root()
	checked := map[string]bool{}
	for _, finding := range Examine(h, options) {
		checked[finding.Check] = true
		if finding.Level != OK || finding.Remedy != "" {
			t.Errorf("%+v", finding)
		}
	}
	for _, c := range checks {
		if !checked[c.name] {
			t.Errorf("%s said nothing", c.name)
		}
	}
}

var errDenied = &fs.PathError{Op: "open", Path: "/x", Err: syscall.EACCES}

func TestFindings(t *testing.T) {
	const unitFile = "etc/systemd/system/ashlar.service"
	cgroup := func(file string) string { return "sys/fs/cgroup/system.slice/ashlar.service/" + file }
	queue := func(file string) string { return "sys/block/nvme1n1/queue/" + file }
	none := func() error { return fmt.Errorf("%w (needs Linux 6.0)", ublk.ErrUnsupported) }
	fail := func(err error) func() error { return func() error { return err } }
	for _, tt := range []struct {
		name   string
		change func(h *Host, f files, o *Options)
		check  string
		level  Level
		text   string
		remedy string // part of it
	}{
		{"an old kernel", func(h *Host, _ files, _ *Options) {
			h.Release = func() (string, string, error) { return "5.4.0-42-generic", "x86_64", nil }
		},
			"kernel", Warning, "Linux 5.4.0-42-generic on x86_64 is too old for io_uring", "newer"},
		{"a kernel before ublk", func(h *Host, _ files, _ *Options) {
			h.Release = func() (string, string, error) { return "5.15.0", "x86_64", nil }
		},
			"kernel", OK, "ublk needs 6.0", ""},
		{"an odd release", func(h *Host, _ files, _ *Options) {
			h.Release = func() (string, string, error) { return "next", "x86_64", nil }
		},
			"kernel", Note, "no number", ""},
		{"no release", func(h *Host, _ files, _ *Options) {
			h.Release = func() (string, string, error) { return "", "", ErrUnknown }
		},
			"kernel", Note, "could not be looked at", ""},

		{"io_uring turned off", func(h *Host, f files, _ *Options) {
			h.Ring = fail(syscall.EPERM)
			f["proc/sys/kernel/io_uring_disabled"] = "2\n"
		},
			"io_uring", Warning, "turned off (kernel.io_uring_disabled = 2)", "sysctl"},
		{"io_uring for root", func(h *Host, f files, _ *Options) {
			h.Ring = fail(syscall.EPERM)
			f["proc/sys/kernel/io_uring_disabled"] = "1\n"
		},
			"io_uring", Warning, "privileged processes only", "sysctl"},
		{"io_uring forbidden", func(h *Host, _ files, _ *Options) { h.Ring = fail(syscall.EPERM) },
			"io_uring", Warning, "no ublk: operation not permitted", "seccomp"},

		{"a module not loaded", func(h *Host, f files, _ *Options) { h.Ublk = none; delete(f, "dev/ublk-control") },
			"ublk", Note, "the module ublk_drv is there and not loaded", "modprobe ublk_drv"},
		{"a kernel without the module", func(h *Host, f files, _ *Options) {
			h.Ublk = none
			delete(f, "dev/ublk-control")
			delete(f, "lib/modules/6.12.1/modules.dep")
		},
			"ublk", Note, "no module ublk_drv", "CONFIG_BLK_DEV_UBLK"},
		{"ublk unsupported otherwise", func(h *Host, _ files, _ *Options) { h.Ublk = none },
			"ublk", Note, "needs Linux 6.0", ""},
		{"ublk forbidden", func(h *Host, _ files, _ *Options) { h.Ublk = fail(errDenied) },
			"ublk", Note, "ublk could not be looked at: permission denied", "sudo"},
		{"a kernel that breaks on ublk", func(h *Host, _ files, _ *Options) {
			h.Ublk = fail(&ublk.KernelError{Release: "6.18.4", Reason: "oops", Sources: []string{"https://example.org/1"}})
		}, "ublk", Warning, "6.18.4, which is known to break on it (https://example.org/1)", "without the fault"},

		{"nbd not loaded", func(h *Host, _ files, _ *Options) { h.NBD = fail(attach.ErrNoDriver) },
			"nbd", Note, "the module nbd is there and not loaded", "modprobe nbd"},
		{"nbd forbidden", func(h *Host, _ files, _ *Options) { h.NBD = fail(errDenied) },
			"nbd", Note, "could not be looked at", "sudo"},
		{"nbd too old", func(h *Host, _ files, _ *Options) { h.NBD = fail(errors.New("needs Linux 4.12")) },
			"nbd", Note, "needs Linux 4.12", ""},
		{"nbd that forgets", func(h *Host, _ files, _ *Options) {
			h.Release = func() (string, string, error) { return "5.10.0", "x86_64", nil }
		}, "nbd", Note, "do not outlive the daemon", "5.14"},
		{"FUSE that forgets", func(h *Host, _ files, _ *Options) {
			h.Release = func() (string, string, error) { return "6.1.176", "x86_64", nil }
		}, "fuse", Note, "fail when the daemon is killed", "6.9"},
		{"neither FUSE nor loop", func(_ *Host, f files, _ *Options) {
			delete(f, "dev/fuse")
			delete(f, "dev/loop-control")
		}, "fuse", Note, "no loop devices", "CONFIG_BLK_DEV_LOOP"},
		{"only modules of FUSE", func(h *Host, f files, _ *Options) {
			h.Ublk, h.NBD = fail(ublk.ErrUnsupported), fail(attach.ErrNoDriver)
			delete(f, "dev/fuse")
			f["lib/modules/6.12.1/modules.dep"] = "kernel/fs/fuse/fuse.ko.xz:\nkernel/drivers/block/loop.ko.xz:\n"
		}, "fuse", Warning, "no way to make a block device", "modprobe -a fuse loop"},
		{"only the module nbd", func(h *Host, f files, _ *Options) {
			h.Ublk, h.NBD = fail(ublk.ErrUnsupported), fail(attach.ErrNoDriver)
			delete(f, "dev/loop-control")
			f["lib/modules/6.12.1/modules.dep"] = "kernel/drivers/block/nbd.ko.xz:\n"
		}, "fuse", Warning, "no way to make a block device", "modprobe nbd"},
		{"no module at all", func(h *Host, f files, _ *Options) {
			h.Ublk, h.NBD = fail(ublk.ErrUnsupported), fail(attach.ErrNoDriver)
			delete(f, "dev/loop-control")
			delete(f, "lib/modules/6.12.1/modules.dep")
		}, "fuse", Warning, "no way to make a block device", "use a kernel with"},
		{"no FUSE", func(_ *Host, f files, _ *Options) { delete(f, "dev/fuse") },
			"fuse", Note, "no devices through FUSE", "CONFIG_FUSE_FS"},
		{"no loop", func(_ *Host, f files, _ *Options) { delete(f, "dev/loop-control") },
			"fuse", Note, "no loop devices", "CONFIG_BLK_DEV_LOOP"},
		{"no way at all", func(h *Host, f files, _ *Options) {
			h.Ublk, h.NBD = none, fail(attach.ErrNoDriver)
			delete(f, "dev/fuse")
		},
			"fuse", Warning, "no way to make a block device", "modprobe"},

		{"a user without rights", func(h *Host, f files, _ *Options) {
			h.UID = 1000
			f["proc/self/status"] = "CapEff:\t0000000000000000\n"
		},
			"capabilities", Note, "this user has no CAP_BPF: disks and reactors are not observed", "AmbientCapabilities=CAP_BPF"},
		{"root in a container", func(_ *Host, f files, _ *Options) { f["proc/self/status"] = "CapEff:\t00000000a80425fb\n" },
			"capabilities", Warning, "root has no CAP_SYS_ADMIN here", "AmbientCapabilities=CAP_SYS_ADMIN"},
		{"root bound to limits", func(_ *Host, f files, _ *Options) { f["proc/self/status"] = "CapEff:\t000001fffeffffff\n" },
			"capabilities", Warning, "root has no CAP_SYS_RESOURCE here: ", "AmbientCapabilities=CAP_SYS_RESOURCE"},
		{"root bound to modes", func(_ *Host, f files, _ *Options) { f["proc/self/status"] = "CapEff:\t000001fffffffffd\n" },
			"capabilities", Warning, "root has no CAP_DAC_OVERRIDE here: ", "AmbientCapabilities=CAP_DAC_OVERRIDE"},
		{"no /proc", func(_ *Host, f files, _ *Options) { delete(f, "proc/self/status") },
			"capabilities", Note, "could not be read", ""},
		{"no BTF", func(_ *Host, f files, _ *Options) { delete(f, "sys/kernel/btf/vmlinux") },
			"observation", Warning, "does not describe its types", "CONFIG_DEBUG_INFO_BTF"},

		{"little locked memory", func(h *Host, f files, _ *Options) {
			f["proc/self/status"] = "CapEff:\t0000000000000000\n"
			h.Limit = func(Resource) (uint64, uint64, error) { return 8 << 20, 1 << 20, nil }
		}, "limits", Warning, "limited to 8MiB, less than the 64MiB of buffers", "LimitMEMLOCK"},
		{"enough locked memory", func(_ *Host, f files, _ *Options) { f["proc/self/status"] = "CapEff:\t0000000000000000\n" },
			"limits", OK, "locked memory suffices", ""},
		{"unknown locked memory", func(h *Host, f files, _ *Options) {
			f["proc/self/status"] = ""
			h.Limit = func(Resource) (uint64, uint64, error) { return 0, 0, ErrUnknown }
		}, "limits", Note, "the limit of locked memory could not be looked at", ""},
		{"few files", func(h *Host, _ files, _ *Options) {
			h.Limit = func(Resource) (uint64, uint64, error) { return 1024, 1024, nil }
		},
			"limits", Warning, "only 1024 open files", "LimitNOFILE"},
		{"some files", func(h *Host, _ files, _ *Options) {
			h.Limit = func(Resource) (uint64, uint64, error) { return 1024, 10000, nil }
		},
			"limits", Note, "10000 open files", "LimitNOFILE"},
		{"few threads", func(_ *Host, f files, _ *Options) { f[cgroup("pids.max")] = "50" },
			"limits", Warning, "/system.slice/ashlar.service allows 50 threads", "TasksMax"},

		{"little memory", func(_ *Host, f files, _ *Options) { f["sys/fs/cgroup/system.slice/memory.max"] = "134217728" },
			"cgroup", Warning, "the cgroup /system.slice is limited to 128MiB of memory", "MemoryMax"},
		{"little CPU", func(_ *Host, f files, _ *Options) { f["sys/fs/cgroup/cpu.max"] = "50000 100000" },
			"cgroup", Warning, "the cgroup / is limited to 0.5 CPUs: a reactor that has used them up stands still for the rest of each 100 ms", "CPUQuota"},
		{"enough CPU", func(_ *Host, f files, _ *Options) { f[cgroup("cpu.max")] = "400000 100000" },
			"cgroup", OK, "no cgroup limits", ""},
		{"cgroups of old", func(_ *Host, f files, _ *Options) { f["proc/self/cgroup"] = "9:memory:/x\n" },
			"cgroup", Note, "no cgroup version 2", ""},

		{"no disks", func(_ *Host, f files, _ *Options) {
			for path := range f {
				if strings.HasPrefix(path, "sys/block/nvme") {
					delete(f, path)
				}
			}
		}, "disks", Note, "no disks were found", ""},
		{"a mounted partition", nil,
			"disks", OK, "nvme0n1: 1.8TiB, no spindle, blocks of 512 and 4096 bytes, no volatile write cache, scheduler none; nvme0n1p2 is mounted at /", ""},
		{"an empty disk", nil,
			"disks", OK, "it is empty: ashlar pool create NAME /dev/nvme1n1", ""},
		{"a volatile cache", func(_ *Host, f files, _ *Options) { f[queue("write_cache")] = "write back" },
			"disks", Note, "nvme1n1 has a volatile write cache", "power-loss"},
		{"a volatile cache with FUA", func(_ *Host, f files, _ *Options) { f[queue("write_cache")] = "write back"; f[queue("fua")] = "1" },
			"disks", OK, "a volatile write cache with FUA", ""},
		{"an unknown cache", func(_ *Host, f files, _ *Options) { delete(f, queue("write_cache")) },
			"disks", OK, "a write cache of unknown kind", ""},
		{"a scheduler", func(_ *Host, f files, _ *Options) { f[queue("scheduler")] = "none [mq-deadline] kyber" },
			"disks", Note, "the I/O scheduler mq-deadline", "echo none > /sys/block/nvme1n1/queue/scheduler"},
		{"a disk that rotates", func(_ *Host, f files, _ *Options) { f[queue("rotational")] = "1" },
			"disks", Note, "nvme1n1 says that it rotates", "without a spindle"},
		{"large blocks", func(_ *Host, f files, _ *Options) { f[queue("logical_block_size")] = "16384" },
			"disks", Warning, "blocks of 16384 bytes", "nvme format"},
		{"no discards", func(_ *Host, f files, _ *Options) { f[queue("discard_max_bytes")] = "0" },
			"disks", Note, "takes no discards", ""},
		{"mounted by name", func(_ *Host, f files, _ *Options) { f.disk("sda", "8:0") },
			"disks", OK, "sda is mounted at /srv/my data", ""},
		{"swap", func(_ *Host, f files, _ *Options) { f["proc/swaps"] += "/dev/nvme1n1  partition\t1\t0\t-2\n" },
			"disks", OK, "nvme1n1 is swap space", ""},
		{"held by another", func(_ *Host, f files, _ *Options) { f["sys/block/nvme1n1/holders/dm-0/x"] = "" },
			"disks", OK, "nvme1n1 is part of dm-0", ""},
		{"partitions", func(_ *Host, f files, _ *Options) { f["sys/block/nvme1n1/nvme1n1p1/partition"] = "1" },
			"disks", OK, "it has 1 partitions, none in use", ""},
		{"a foreign disk", func(h *Host, _ files, _ *Options) { h.Foreign = func([]byte) string { return "an XFS file system" } },
			"disks", OK, "it holds an XFS file system", ""},
		{"a disk that may not be read", func(h *Host, _ files, _ *Options) { h.ReadDisk = func(string, []byte) error { return errDenied } },
			"disks", Note, "what is on it could not be looked at: permission denied", "sudo"},
		{"a disk that udev knows", func(h *Host, f files, _ *Options) {
			h.ReadDisk = func(string, []byte) error { return errDenied }
			f["run/udev/data/b259:4"] = "S:disk\nE:ID_FS_TYPE=LVM2_member\n"
		}, "disks", OK, "it holds LVM2_member", ""},

		{"no data directory", func(_ *Host, f files, o *Options) { o.DataDir = "/var/lib/other/data" },
			"data-dir", Note, "/var/lib/other/data is not there yet", "mkdir"},
		{"none, and none can be made", func(h *Host, f files, o *Options) {
			o.DataDir = "/var/lib/other"
			h.Writable = func(dir string) error {
				if dir != "/var/lib" {
					t.Errorf("looked at %s", dir)
				}
				return syscall.EROFS
			}
		}, "data-dir", Failure, "not there yet, and this user cannot make files in /var/lib: read-only", "writable"},
		{"a directory of root's", func(h *Host, _ files, _ *Options) { h.UID = 1000; h.Writable = func(string) error { return errDenied } },
			"data-dir", Note, "this user cannot make files in /var/lib/ashlar: permission denied", "sudo"},
		{"a directory nobody writes to", func(h *Host, _ files, _ *Options) { h.Writable = func(string) error { return syscall.EROFS } },
			"data-dir", Failure, "cannot make files", "--data-dir"},
		{"unknown", func(h *Host, _ files, _ *Options) { h.Writable = func(string) error { return ErrUnknown } },
			"data-dir", Note, "cannot be told", ""},
		{"NFS", func(h *Host, _ files, _ *Options) { h.Filesystem = holds(0x6969, 1<<40, false) },
			"data-dir", Failure, "is on NFS", "local disk"},
		{"tmpfs", func(h *Host, _ files, _ *Options) { h.Filesystem = holds(0x01021994, 1<<40, false) },
			"data-dir", Warning, "is on tmpfs", "trial"},
		{"Btrfs", func(h *Host, _ files, _ *Options) { h.Filesystem = holds(0x9123683E, 1<<40, false) },
			"data-dir", Note, "copies on write", "XFS"},
		{"another", func(h *Host, _ files, _ *Options) { h.Filesystem = holds(0x1234, 1<<40, false) },
			"data-dir", OK, "kind 0x1234 with 1TiB", ""},
		{"read-only", func(h *Host, _ files, _ *Options) { h.Filesystem = holds(0xEF53, 1<<40, true) },
			"data-dir", Failure, "is read-only", "remount"},
		{"full", func(h *Host, _ files, _ *Options) { h.Filesystem = holds(0xEF53, 1<<20, false) },
			"data-dir", Failure, "has 1MiB free", "free some space"},
		{"nearly full", func(h *Host, _ files, _ *Options) { h.Filesystem = holds(0xEF53, 1<<29, false) },
			"data-dir", Warning, "only 512MiB free", "free some space"},
		{"no file system", func(h *Host, _ files, _ *Options) {
			h.Filesystem = func(string) (Filesystem, error) { return Filesystem{}, errDenied }
		},
			"data-dir", Note, "could not be looked at", "sudo"},
		{"no O_DIRECT", func(h *Host, _ files, _ *Options) { h.Direct = func(string) error { return syscall.EINVAL } },
			"data-dir", Note, "takes no O_DIRECT (invalid argument)", "ext4"},
		{"reflinks", func(h *Host, _ files, _ *Options) { h.Reflink = func(string) error { return nil } },
			"data-dir", OK, "ext4 with 40GiB of 100GiB free, takes O_DIRECT, copies files by sharing blocks", ""},

		{"a port in use", func(h *Host, _ files, _ *Options) { h.Listen = func(string) error { return syscall.EADDRINUSE } },
			"ports", Failure, "127.0.0.1:10809 for NBD is in use by another program", "ss -ltnp 'sport = :10809'"},
		{"a daemon that runs", func(h *Host, _ files, _ *Options) {
			h.Listen = func(string) error { return &net.OpError{Err: syscall.EADDRINUSE} }
			h.Daemon = func(string) (string, error) { return "v1", nil }
		}, "ports", OK, "127.0.0.1:9120 for metrics is in use, while a daemon runs", ""},
		{"the version", func(h *Host, _ files, _ *Options) { h.Daemon = func(string) (string, error) { return "v1", nil } },
			"ports", OK, "a daemon answers on /run/ashlar/control.sock (version v1)", ""},
		{"a port of root's", func(h *Host, _ files, o *Options) { h.Listen = func(string) error { return syscall.EACCES } },
			"ports", Note, "may not listen on 127.0.0.1:10809", "1024"},
		{"an address of another", func(h *Host, _ files, o *Options) {
			h.Listen = func(string) error {
				return &net.OpError{Op: "listen", Err: errors.New("cannot assign requested address")}
			}
		}, "ports", Failure, "cannot be listened on: cannot assign requested address", "address of this host"},
		{"a socket of root's", func(h *Host, _ files, _ *Options) { h.Daemon = func(string) (string, error) { return "", errDenied } },
			"ports", Note, "the control socket /run/ashlar/control.sock could not be looked at", "sudo"},
		{"a socket left behind", func(_ *Host, f files, _ *Options) { f["run/ashlar/control.sock"] = "" },
			"ports", Note, "no daemon answers on it", "systemctl start"},
		{"no directory for it", func(_ *Host, f files, _ *Options) { delete(f, "run/ashlar/x") },
			"ports", Note, "/run/ashlar is not there", "RuntimeDirectory"},

		{"a clock on its own", func(h *Host, _ files, _ *Options) { h.Clock = func() (bool, error) { return false, nil } },
			"clock", Note, "not synchronized", "timedatectl"},
		{"no clock", func(h *Host, _ files, _ *Options) { h.Clock = func() (bool, error) { return false, ErrUnknown } },
			"clock", Note, "could not be looked at", ""},

		{"no systemd", func(_ *Host, f files, _ *Options) { delete(f, "run/systemd/system/x") },
			"service", Note, "systemd does not run here", ""},
		{"no unit", func(_ *Host, f files, _ *Options) { delete(f, unitFile) },
			"service", Note, "is not installed", "systemctl enable"},
		{"a unit without its binary", func(_ *Host, f files, _ *Options) { delete(f, "usr/local/bin/ashlar") },
			"service", Failure, "starts /usr/local/bin/ashlar, which is not there", "ExecStart"},
		{"a unit without its configuration", func(_ *Host, f files, _ *Options) { delete(f, "etc/ashlar/serve.yaml") },
			"service", Failure, "/etc/ashlar/serve.yaml, which is not there", "serve.yaml"},
		{"a unit that forbids something", func(_ *Host, f files, _ *Options) { f[unitFile] += "CapabilityBoundingSet=~CAP_SYS_ADMIN CAP_BPF\n" },
			"service", Note, "has no CAP_BPF in its CapabilityBoundingSet", "systemctl edit"},
		{"a unit that forbids to be above limits", func(_ *Host, f files, _ *Options) {
			f[unitFile] += "CapabilityBoundingSet=CAP_DAC_OVERRIDE CAP_SYS_ADMIN\n"
		},
			"service", Note, "has no CAP_SYS_RESOURCE in its CapabilityBoundingSet: ", "systemctl edit"},
		{"a unit that is root's", func(_ *Host, f files, _ *Options) {
			f[unitFile] += "CapabilityBoundingSet=CAP_DAC_OVERRIDE CAP_SYS_ADMIN CAP_SYS_RESOURCE\n"
		},
			"service", OK, "is installed", ""},
		{"a unit without rights", func(_ *Host, f files, _ *Options) {
			f[unitFile] += "CapabilityBoundingSet=CAP_DAC_OVERRIDE CAP_IPC_LOCK\n"
		},
			"service", Note, "has no CAP_SYS_ADMIN in its CapabilityBoundingSet", "systemctl edit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, f := healthy()
			o := options
			if tt.change != nil {
				tt.change(h, f, &o)
			}
			h.Root = f.root()
			var others []string
			for _, finding := range Examine(h, o) {
				if finding.Check != tt.check {
					continue
				}
				if finding.Level == tt.level && strings.Contains(finding.Text, tt.text) && strings.Contains(finding.Remedy, tt.remedy) && (finding.Remedy == "") == (tt.remedy == "") {
					return
				}
				others = append(others, fmt.Sprintf("%s: %s (%s)", finding.Level, finding.Text, finding.Remedy))
			}
			t.Errorf("not found; of %s there is\n\t%s", tt.check, strings.Join(others, "\n\t"))
		})
	}
}

// TestTheUnitHasTheCapabilitiesThatAreLookedAt: what the unit allows is what the daemon
// uses, and so what is looked at.
func TestTheUnitHasTheCapabilitiesThatAreLookedAt(t *testing.T) {
	b, err := os.ReadFile("../../deploy/systemd/ashlar.service")
	if err != nil {
		t.Fatal(err)
	}
	var allowed []string
	for line := range strings.Lines(string(b)) {
		if names, found := strings.CutPrefix(line, "CapabilityBoundingSet="); found {
			allowed = strings.Fields(names)
		}
	}
	for _, name := range allowed {
		if !slices.ContainsFunc(capabilities, func(c capability) bool { return c.name == name }) {
			t.Errorf("the unit allows %s, and it is not looked at", name)
		}
	}
	for _, c := range capabilities {
		if c.unit && !slices.Contains(allowed, c.name) {
			t.Errorf("the unit does not allow %s", c.name)
		}
	}
}

func holds(magic int64, free uint64, readOnly bool) func(string) (Filesystem, error) {
	return func(string) (Filesystem, error) {
		return Filesystem{Magic: magic, Size: 1 << 40, Free: free, ReadOnly: readOnly}, nil
	}
}

// TestAnEmptyHost: without any file, and with nothing that works, there are findings
// and no panic, and nothing is good.
func TestAnEmptyHost(t *testing.T) {
	err := errors.New("no")
	fail := func() error { return err }
	failDir := func(string) error { return err }
	h := &Host{
		Root: fstest.MapFS{}, UID: 1000, Release: func() (string, string, error) { return "", "", err }, Ring: fail, Ublk: fail, NBD: fail,
		Limit: func(Resource) (uint64, uint64, error) { return 0, 0, err }, Filesystem: func(string) (Filesystem, error) { return Filesystem{}, err },
		Direct: failDir, Reflink: failDir, Writable: failDir, ReadDisk: func(string, []byte) error { return err }, Listen: failDir,
		Daemon: func(string) (string, error) { return "", err }, Clock: func() (bool, error) { return true, err }, Foreign: func([]byte) string { return "" },
	}
	findings := Examine(h, options)
	if Count(findings, OK) > 0 || Count(findings, Failure) == 0 || Count(findings, Note)+Count(findings, Warning)+Count(findings, Failure) != len(findings) {
		t.Errorf("%+v", findings)
	}
	Examine(h, Options{})
}

// TestThisHost looks at the machine the tests run on: whatever it is, every check says
// something, and the data directory of the test is as good as it is.
func TestThisHost(t *testing.T) {
	dir := t.TempDir()
	h := This()
	o := Options{DataDir: dir, Listen: []string{"127.0.0.1:0"}, Socket: filepath.Join(dir, "none.sock"), Buffers: 1 << 20}
	said := map[string]bool{}
	for _, f := range Examine(h, o) {
		said[f.Check] = true
		t.Logf("%-8s %-12s %s", f.Level, f.Check, f.Text)
		if f.Text == "" || strings.HasSuffix(f.Text, ".") {
			t.Errorf("%+v is no sentence without a full stop", f)
		}
	}
	for _, c := range checks {
		if !said[c.name] {
			t.Errorf("%s said nothing", c.name)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("something was left: %v, %v", left, err)
	}
}

// FuzzKernelFiles: files of a kernel that is not known yet make no check fail.
func FuzzKernelFiles(f *testing.F) {
	f.Add(mountinfo, "0::/a/b\n", "CapEff:\tff\n", "none [kyber]")
	f.Add("1 2 3 4 5 - ", "0::", "CapEff:", "[")
	f.Add("- - - - - - - -", "0::/../..\n", "", "]")
	f.Fuzz(func(t *testing.T, mounts, cgroup, status, scheduler string) {
		h, all := healthy()
		all["proc/self/mountinfo"], all["proc/self/cgroup"], all["proc/self/status"] = mounts, cgroup, status
		all["sys/block/nvme1n1/queue/scheduler"], all["sys/block/nvme1n1/size"], all["sys/fs/cgroup/cpu.max"] = scheduler, status, scheduler
		h.Root = all.root()
		for _, finding := range Examine(h, options) {
			if finding.Text == "" || finding.Check == "" {
				t.Errorf("%+v", finding)
			}
		}
	})
}

func TestSizes(t *testing.T) {
	for v, want := range map[uint64]string{0: "0B", 1023: "1023B", 1536: "1.5KiB", 64 << 20: "64MiB", 2000398934016: "1.8TiB", Unlimited: "unlimited", 1 << 60: "1EiB"} {
		if got := sizeOf(v); got != want {
			t.Errorf("%d is %q, want %q", v, got, want)
		}
	}
}
