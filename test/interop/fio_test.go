package interop

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

func TestFioVerifies(t *testing.T) {
	requireInterop(t)
	for _, tt := range []struct {
		name       string
		jobs       int
		size       string
		arguments  []string
		exportArgs []string
	}{
		{"random writes, one connection", 1, "64M", []string{"--rw=randwrite", "--bs=4k", "--iodepth=32"}, nil},
		{"random writes, four connections", 4, "32M", []string{"--rw=randwrite", "--bs=4k", "--iodepth=32"}, nil},
		{"four connections on two reactors", 4, "32M", []string{"--rw=randwrite", "--bs=4k", "--iodepth=32"}, []string{"--reactors", "2"}},
		{"mixed sizes from 512 bytes", 2, "32M", []string{"--rw=randwrite", "--bsrange=512-256k", "--bs_unaligned=0", "--blockalign=512", "--iodepth=16"}, nil},
		{"sequential, 1 MiB", 1, "128M", []string{"--rw=write", "--bs=1M", "--iodepth=4"}, nil},
		{"with flushes and trims", 1, "64M", []string{"--rw=randwrite", "--bs=8k", "--iodepth=16", "--fsync=32"}, nil},
		{"busy polling", 1, "32M", []string{"--rw=randwrite", "--bs=4k", "--iodepth=8"}, []string{"--poll", "busy"}},
		{"no polling", 1, "32M", []string{"--rw=randwrite", "--bs=4k", "--iodepth=8"}, []string{"--poll", "off"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := scratch(t)
			s := serve(t, append(tt.exportArgs, sparse(t, dir, "disk", 128*mib))...)
			args := []string{
				"--name=verify", "--ioengine=nbd", "--uri=" + s.uri, "--thread", "--group_reporting", "--output-format=json",
				"--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randrepeat=1", "--eta=never", "--verify_state_save=0",
				fmt.Sprintf("--numjobs=%d", tt.jobs), "--size=" + tt.size, "--offset_increment=" + tt.size,
			}
			report := filepath.Join(dir, "report")
			tool(t, "fio", append(append(args, "--output="+report), tt.arguments...)...)
			out, err := os.ReadFile(report)
			if err != nil {
				t.Fatal(err)
			}
			if begin := bytes.IndexByte(out, '{'); begin > 0 {
				out = out[begin:] // the engine's greeting comes first
			}
			var result struct {
				Jobs []struct {
					Error int `json:"error"`
					Read  struct {
						Bytes int64 `json:"io_bytes"`
					} `json:"read"`
					Write struct {
						Bytes int64 `json:"io_bytes"`
					} `json:"write"`
				} `json:"jobs"`
			}
			if err := json.Unmarshal(out, &result); err != nil {
				t.Fatalf("fio's report: %v", err)
			}
			for _, j := range result.Jobs {
				if j.Error != 0 || j.Write.Bytes == 0 || j.Read.Bytes < j.Write.Bytes {
					t.Errorf("error %d, wrote %d, read back %d", j.Error, j.Write.Bytes, j.Read.Bytes)
				}
			}
		})
	}
}
