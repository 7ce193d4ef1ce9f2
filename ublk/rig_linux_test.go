package ublk_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/buf"
	"github.com/ashlar-storage/ashlar/datapath/filedev"
	"github.com/ashlar-storage/ashlar/datapath/memdev"
	"github.com/ashlar-storage/ashlar/datapath/reactor"
	"github.com/ashlar-storage/ashlar/internal/testenv"
	"github.com/ashlar-storage/ashlar/ublk"
)

// serveVariable makes the test binary a server that can be killed; see serve.
const serveVariable = "ASHLAR_UBLK_SERVE"

const wait = 60 * time.Second // for one step; a guest under emulation is slow

func TestMain(m *testing.M) {
	if what := os.Getenv(serveVariable); what != "" {
		if err := serve(what); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// serve exports a file until standard input ends: "start FILE QUEUES TAG MODE" or
// "recover ID FILE TAG [copying]", MODE being copy, plain or unprivileged. It prints the device's
// id when it is served.
func serve(what string) error {
	f := strings.Fields(what)
	verb, f := f[0], f[1:]
	c := ublk.Config{ID: ublk.AnyID, Queues: 1, Depth: 32}
	var err error
	if verb == "recover" {
		if c.ID, err = strconv.Atoi(f[0]); err != nil {
			return err
		}
		f = f[1:]
	}
	path := f[0]
	if verb == "start" {
		if c.Queues, err = strconv.Atoi(f[1]); err != nil {
			return err
		}
		c.PlainBuffers = f[3] == "plain"
		c.Unprivileged = f[3] == "unprivileged"
		f = f[1:]
	}
	c.Tag = ublk.TagOf(f[1])
	c.Copy = verb == "recover" && len(f) > 2
	d, err := filedev.Open(path, filedev.Options{})
	if err != nil {
		return err
	}
	c.Device = d
	for i := range 2 {
		r, err := reactor.Start(reactor.Config{Name: "serve" + strconv.Itoa(i), Engine: reactor.EngineRing, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return err
		}
		c.Reactors = append(c.Reactors, r)
	}
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	var t *ublk.Target
	if verb == "start" {
		t, err = ublk.Start(ctx, c)
	} else {
		t, err = ublk.Recover(ctx, c)
	}
	if err != nil {
		return err
	}
	fmt.Println(t.ID())
	if line, _ := io.ReadAll(os.Stdin); string(line) == "detach" {
		return t.Detach(ctx)
	}
	return t.Stop(ctx)
}

// server is a serving process.
type server struct {
	*testenv.Child
	id int
}

func startServer(t *testing.T, what string) *server {
	t.Helper()
	return startServerAs(t, what, 0)
}

// startServerAs starts a server under a user's id.
func startServerAs(t *testing.T, what string, user uint32) *server {
	t.Helper()
	s := &server{Child: newServer(what)}
	if user != 0 {
		s.Command.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	}
	s.Start(t)
	var err error
	if s.id, err = strconv.Atoi(s.Said); err != nil {
		s.Kill()
		t.Fatalf("server %q says %q\n%s", what, s.Said, &s.Errors)
	}
	return s
}

func newServer(what string) *testenv.Child { return testenv.NewChild(serveVariable + "=" + what) }

func reactors(t testing.TB, n int) []*reactor.Reactor {
	t.Helper()
	var list []*reactor.Reactor
	for i := range n {
		r, err := reactor.Start(reactor.Config{Name: "r" + strconv.Itoa(i), Engine: reactor.EngineRing, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(r.Stop)
		list = append(list, r)
	}
	return list
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	t.Cleanup(cancel)
	return ctx
}

// start serves c until the end of the test.
func start(t testing.TB, c ublk.Config) *ublk.Target {
	t.Helper()
	testenv.RequireUblk(t)
	if c.Reactors == nil {
		c.Reactors = reactors(t, 1)
	}
	if c.Depth == 0 {
		c.Depth = 32
	}
	c.Device = datapath.Checked(c.Device) // the caller closes what is below
	target, err := ublk.Start(within(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		defer cancel()
		if err := target.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	return target
}

// memory is a device in memory of its own, closed at the end of the test.
func memory(t testing.TB, size uint64) *memdev.Device {
	t.Helper()
	store, err := memdev.NewStore(2 * size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	d, err := memdev.New(memdev.Config{Size: size, SizeMax: 2 * size, Store: store})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// memoryOf is another device on the memory of d.
func memoryOf(t testing.TB, d *memdev.Device) *memdev.Device {
	t.Helper()
	other, err := memdev.New(memdev.Config{Size: d.Info().Size, Store: d.Store()})
	if err != nil {
		t.Fatal(err)
	}
	return other
}

// disk is a block device opened past the page cache.
type disk struct {
	t    testing.TB
	file *os.File
}

func openDisk(t testing.TB, path string) *disk {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{t: t, file: f}
	t.Cleanup(func() { _ = f.Close() }) // closed before where that matters
	return d
}

// aligned is memory for O_DIRECT.
func aligned(t testing.TB, length int) []byte {
	t.Helper()
	b, err := unix.Mmap(-1, 0, (length+buf.PageSize-1)&^(buf.PageSize-1), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) }) // a mapping of ours
	return b[:length]
}

// stamp fills b as version v of the block at offset.
func stamp(b []byte, offset uint64, v uint64) {
	for i := 0; i < len(b); i += 16 {
		binary.LittleEndian.PutUint64(b[i:], offset+uint64(i))
		binary.LittleEndian.PutUint64(b[i+8:], v)
	}
}

// verifier writes and reads blocks of a range and knows what has to be there.
type verifier struct {
	disk     *disk
	base     uint64 // of the range, in bytes
	versions []uint64
	next     uint64
	random   *rand.Rand
	buffer   []byte
	want     []byte
}

const verifyBlock = 4096

func newVerifier(t testing.TB, d *disk, base uint64, blocks int, seed uint64) *verifier {
	return &verifier{disk: d, base: base, versions: make([]uint64, blocks), random: rand.New(rand.NewPCG(seed, base)),
		buffer: aligned(t, 16*verifyBlock), want: make([]byte, 16*verifyBlock)}
}

// step writes or reads one random run of blocks.
func (v *verifier) step() error {
	length := 1 + v.random.IntN(16)
	at := v.random.IntN(len(v.versions) - length + 1)
	if v.random.IntN(2) == 0 {
		return v.read(at, length)
	}
	v.next++
	b := v.buffer[:length*verifyBlock]
	for i := range length {
		offset := v.base + uint64(at+i)*verifyBlock
		stamp(b[i*verifyBlock:(i+1)*verifyBlock], offset, v.next)
	}
	if n, err := v.disk.file.WriteAt(b, int64(v.base)+int64(at)*verifyBlock); err != nil || n != len(b) {
		return fmt.Errorf("write of %d at block %d: %d, %w", len(b), at, n, err)
	}
	for i := range length {
		v.versions[at+i] = v.next
	}
	return nil
}

func (v *verifier) read(at, length int) error {
	b, want := v.buffer[:length*verifyBlock], v.want[:length*verifyBlock]
	if n, err := v.disk.file.ReadAt(b, int64(v.base)+int64(at)*verifyBlock); err != nil || n != len(b) {
		return fmt.Errorf("read of %d at block %d: %d, %w", len(b), at, n, err)
	}
	clear(want)
	for i := range length {
		if version := v.versions[at+i]; version != 0 {
			stamp(want[i*verifyBlock:(i+1)*verifyBlock], v.base+uint64(at+i)*verifyBlock, version)
		}
	}
	if !bytes.Equal(b, want) {
		return errors.New("read gives something else than was written")
	}
	return nil
}

// all reads the whole range.
func (v *verifier) all() error {
	for at := 0; at < len(v.versions); at += 16 {
		if err := v.read(at, min(16, len(v.versions)-at)); err != nil {
			return err
		}
	}
	return nil
}

// verified has several at work on a device at the same time. Each takes so many steps in
// 4 MiB of its own, and then reads all of that.
func verified(t *testing.T, path string, several, steps int, seed uint64) {
	t.Helper()
	var group sync.WaitGroup
	for i := range several {
		group.Go(func() {
			v := newVerifier(t, openDisk(t, path), uint64(i)*4<<20, 1024, seed)
			for range steps {
				if err := v.step(); err != nil {
					t.Error(err)
					return
				}
			}
			if err := v.all(); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
}

// load is six verifiers at work on a device, until the end.
type load struct {
	t     *testing.T
	steps atomic.Int64
	ended atomic.Bool
	group sync.WaitGroup
}

// startLoad begins to work on the first 24 MiB of a device.
func startLoad(t *testing.T, id int, seed uint64) *load {
	l := &load{t: t}
	for i := range 6 {
		l.group.Go(func() { // ends with end, or an error
			v := newVerifier(t, openDisk(t, fmt.Sprintf("/dev/ublkb%d", id)), uint64(i)*4<<20, 1024, seed)
			for !l.ended.Load() {
				if err := v.step(); err != nil {
					t.Error(err)
					return
				}
				l.steps.Add(1)
			}
			if err := v.all(); err != nil {
				t.Error(err)
			}
			_ = v.disk.file.Close() // nothing is dirty past the page cache
		})
	}
	return l
}

// goOn waits for forty more steps.
func (l *load) goOn() {
	for before := l.steps.Load(); l.steps.Load() < before+40 && !l.t.Failed(); {
		time.Sleep(time.Millisecond)
	}
}

// end has each of them read all of its range, and waits for that.
func (l *load) end() {
	l.ended.Store(true)
	l.group.Wait()
}

// command runs a program and wants it to succeed.
func command(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// sysfs reads an attribute of a disk.
func sysfs(t testing.TB, target *ublk.Target, name string) string {
	t.Helper()
	b, err := os.ReadFile("/sys/block/" + strings.TrimPrefix(target.Path(), "/dev/") + "/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}
