package harness

import (
	"fmt"
	"path/filepath"
	"strconv"
)

// tgt is the userspace iSCSI target. No fio engine of a distribution speaks
// iSCSI and the kernel's initiator would be part of what is measured, so it is
// measured by `qemu-img bench` only, like any NBD server with that client.
type tgt struct{}

func (tgt) Name() string              { return "tgt" }
func (tgt) About() string             { return "tgtd over iSCSI; needs --client qemu-img" }
func (tgt) Program() (string, string) { return "tgtd", "tgt" }
func (tgt) VersionArgs() []string     { return []string{"--version"} }

func (t tgt) Plan(s Site) (Plan, error) {
	if s.Backing.Kind != BackingFile {
		return Plan{}, unsupported(t, s.Backing)
	}
	const name = "iqn.2026-01.local.ashlar:bench"
	// tgtd keeps several daemons apart by a number of at most 15 bits.
	control := strconv.Itoa(s.Port / 2)
	address := fmt.Sprintf("127.0.0.1:%d", s.Port)
	admin := func(arguments ...string) []string {
		return append([]string{"tgtadm", "-C", control, "--lld", "iscsi"}, arguments...)
	}
	return Plan{
		Argv:  []string{"tgtd", "-f", "-C", control, "--iscsi", "portal=" + address, "--pid-file", filepath.Join(s.Dir, "pid")},
		Ready: "tcp:" + address,
		Setup: [][]string{
			admin("--op", "new", "--mode", "target", "--tid", "1", "-T", name),
			admin("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", s.Backing.Path),
			admin("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"),
		},
		Target: Target{Engine: "iscsi", URI: fmt.Sprintf("iscsi://%s/%s/1", address, name)},
	}, nil
}
