package fuse_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/fuse"
	"github.com/ashlar-storage/ashlar/internal/testenv"
)

// kills is how often a server is killed under a file system: 50 with ASHLAR_TEST_LONG.
func kills() int {
	if os.Getenv("ASHLAR_TEST_LONG") != "" {
		return 50
	}
	return 4
}

// seed is of the random choices of a test, and printed.
func seed(t testing.TB) uint64 {
	s := uint64(time.Now().UnixNano())
	t.Logf("seed %d", s)
	return s
}

// TestKilledServerUnderFileSystem kills a server again and again under programs that
// write to a mounted file system, sync, and read back. No call of theirs may fail, and
// every byte that was synced is there at the end, as the file system's own check finds.
func TestKilledServerUnderFileSystem(t *testing.T) {
	for _, tt := range []struct {
		name, pack string
		make       []string
		check      []string
		queues     int
	}{
		{"ext4", "e2fsprogs", []string{"mkfs.ext4", "-q", "-F"}, []string{"fsck.ext4", "-fn"}, 1},
		{"xfs", "xfsprogs", []string{"mkfs.xfs", "-q", "-f"}, []string{"xfs_repair", "-n"}, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			require(t)
			testenv.RequireCommand(t, tt.make[0], tt.pack)
			requireResend(t)
			random := rand.New(rand.NewPCG(seed(t), 0))
			file := testenv.TempFileOn(t, t.TempDir(), 512<<20)
			dir, where := t.TempDir(), t.TempDir()
			socket, _ := startKeeper(t)
			arguments := fmt.Sprintf("kill/%d/%s %s %s %s %d", os.Getpid(), tt.name, file, dir, socket, tt.queues)
			s := startServer(t, "start %s", arguments)
			path := s.Said
			run(t, tt.make[0], append(tt.make[1:], path)...)
			run(t, "mount", path, where)

			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			var group sync.WaitGroup
			var rounds atomic.Int64
			errs := make(chan error, 8)
			const writers = 3
			for i := range writers {
				stream := random.Uint64()
				group.Go(func() {
					if err := writeAndCheck(ctx, where, i, stream, &rounds); err != nil {
						errs <- err
					}
				})
			}
			for i := range kills() {
				seen := rounds.Load()
				for deadline := time.Now().Add(wait); rounds.Load() < seen+3; time.Sleep(time.Millisecond) {
					if time.Now().After(deadline) {
						t.Fatalf("after kill %d the writers do not go on", i)
					}
					select {
					case err := <-errs:
						t.Fatal(err)
					default:
					}
				}
				time.Sleep(time.Duration(random.IntN(30)) * time.Millisecond)
				s.Kill()
				if i%4 == 3 {
					time.Sleep(200 * time.Millisecond) // a daemon does not come back at once
				}
				s = startServer(t, "recover %s", arguments)
				if s.Said != path {
					t.Fatalf("recovered as %s, was %s", s.Said, path)
				}
			}
			cancel()
			group.Wait()
			close(errs)
			for err := range errs {
				t.Error(err)
			}
			t.Logf("%d rounds of writing, %d kills", rounds.Load(), kills())
			if table, _ := os.ReadFile("/proc/self/mountinfo"); !strings.Contains(string(table), where+" rw") {
				t.Errorf("the file system went read-only:\n%s", table)
			}
			run(t, "umount", where)
			run(t, tt.check[0], append(tt.check[1:], path)...)
			run(t, "mount", path, where)
			for i := range writers {
				if err := checkFiles(where, i); err != nil {
					t.Error(err)
				}
			}
			run(t, "umount", where)
			s.End(t, "stop")
			if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
				t.Errorf("left behind: %v, %v", entries, err)
			}
		})
	}
}

func requireResend(t testing.TB) {
	t.Helper()
	if err := fuse.Recoverable(); err != nil {
		t.Skipf("needs Linux 6.9: %v", err)
	}
}

// record is what a writer writes: a block that says who, where, and which round.
func record(block []byte, writer int, index, round uint64, random uint64) {
	r := rand.New(rand.NewPCG(random, round<<32|index))
	for i := 64; i+8 <= len(block); i += 8 {
		binary.LittleEndian.PutUint64(block[i:], r.Uint64())
	}
	binary.LittleEndian.PutUint64(block[32:], uint64(writer))
	binary.LittleEndian.PutUint64(block[40:], index)
	binary.LittleEndian.PutUint64(block[48:], round)
	binary.LittleEndian.PutUint64(block[56:], random)
	sum := sha256.Sum256(block[32:])
	copy(block, sum[:])
}

const (
	recordSize  = 16 << 10
	recordCount = 64
)

// writeAndCheck overwrites records of a file in rounds, half of the writers past the
// page cache, syncs after each round, and reads back what it wrote. Beside it, it makes
// and removes files.
func writeAndCheck(ctx context.Context, dir string, writer int, random uint64, rounds *atomic.Int64) error {
	flags := os.O_CREATE | os.O_RDWR
	if writer%2 == 0 {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(filepath.Join(dir, fmt.Sprint("data", writer)), flags, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // synced
	memory, err := unix.Mmap(-1, 0, 2*recordSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(memory) }() // ours
	block, back := memory[:recordSize], memory[recordSize:]
	r := rand.New(rand.NewPCG(random, 1))
	for round := uint64(1); ctx.Err() == nil; round++ {
		for range 16 {
			index := r.Uint64N(recordCount)
			record(block, writer, index, round, random)
			if _, err := f.WriteAt(block, int64(index)*recordSize); err != nil {
				return fmt.Errorf("round %d: %w", round, err)
			}
			if _, err := f.ReadAt(back, int64(index)*recordSize); err != nil {
				return fmt.Errorf("round %d: %w", round, err)
			}
			if string(back) != string(block) {
				return fmt.Errorf("round %d: record %d of writer %d is not what was written", round, index, writer)
			}
		}
		if err := f.Sync(); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		name := filepath.Join(dir, fmt.Sprintf("file%d-%d", writer, round%8))
		_ = os.Remove(name) // the first is not there
		if err := os.WriteFile(name, block[:1000+round%1000], 0o600); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		rounds.Add(1)
	}
	return nil
}

// checkFiles reads what a writer wrote: each record is a whole one.
func checkFiles(dir string, writer int) error {
	b, err := os.ReadFile(filepath.Join(dir, fmt.Sprint("data", writer)))
	if err != nil {
		return err
	}
	want := make([]byte, recordSize)
	count := 0
	for at := 0; at+recordSize <= len(b); at += recordSize {
		got := b[at : at+recordSize]
		round := binary.LittleEndian.Uint64(got[48:])
		if round == 0 {
			continue // never written
		}
		count++
		record(want, writer, uint64(at/recordSize), round, binary.LittleEndian.Uint64(got[56:]))
		if string(got) != string(want) {
			return fmt.Errorf("record %d of writer %d is torn or another's", at/recordSize, writer)
		}
	}
	if count == 0 {
		return fmt.Errorf("writer %d wrote nothing", writer)
	}
	return nil
}
