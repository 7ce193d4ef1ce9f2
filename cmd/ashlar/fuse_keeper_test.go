package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ashlar-storage/ashlar/fuse/keeper"
)

func TestFuseKeeperRefusesAWrongCommandLine(t *testing.T) {
	for _, args := range [][]string{
		{"fuse-keeper"}, {"fuse-keeper", "--socket", "/run/x", "more"}, {"fuse-keeper", "--socket", "/run/x", "--idle", "-1s"},
		{"fuse-keeper", "--socket", "/run/x", "--log-level", "loud"},
	} {
		var out, errs strings.Builder
		if code := execute(args, strings.NewReader(""), &out, &errs); code != exitUsage {
			t.Errorf("%v: code %d, %s", args, code, errs.String())
		}
	}
	var out, errs strings.Builder
	if code := execute([]string{"fuse-keeper", "--socket", "/proc/none/x"}, strings.NewReader(""), &out, &errs); code != exitFailure {
		t.Errorf("a socket that cannot be: code %d, %s", code, errs.String())
	}
}

func TestFuseKeeperServesUntilItIsIdleOrTold(t *testing.T) {
	before, err := os.ReadFile("/proc/self/oom_score_adj")
	if err == nil {
		t.Cleanup(func() { _ = os.WriteFile("/proc/self/oom_score_adj", before, 0) }) // the command changes it
	}
	for name, args := range map[string][]string{"idle": {"--idle", "50ms"}, "told": nil} {
		socket := filepath.Join(t.TempDir(), "keeper")
		done := make(chan int, 1)
		go func() { // ends with the command
			var out, errs strings.Builder
			done <- execute(append([]string{"fuse-keeper", "--socket", socket}, args...), strings.NewReader(""), &out, &errs)
		}()
		deadline := time.Now().Add(30 * time.Second)
		if name == "told" {
			var k *keeper.Client
			for {
				ctx, cancel := context.WithDeadline(context.Background(), deadline)
				k, err = keeper.Open(ctx, keeper.Options{Socket: socket, Log: slog.New(slog.DiscardHandler)})
				cancel()
				if err == nil || time.Now().After(deadline) {
					break
				}
				time.Sleep(time.Millisecond)
			}
			if err != nil {
				t.Fatal(err)
			}
			_ = k.Close()
			if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case code := <-done:
			if code != exitOK {
				t.Errorf("%s: code %d", name, code)
			}
		case <-time.After(time.Until(deadline)):
			t.Fatalf("%s: it does not end", name)
		}
	}
}
