// Package vm runs bin/ashlar under real kernel clients in a virtual machine: User
// Mode Linux 6.1 from Debian, which needs neither KVM nor a module on the host.
//
// uml-run.sh boots the guest around one command; kernel-nbd.sh is that command
// for nbd-client and file systems, kernel-attach.sh for the tests of package
// nbd/attach, and for the one of package nbd that attaches with go-nbd's client. The tests run in `make test-uml`, as root; ASHLAR_TEST_LONG=1 has them
// repeat what may fail seldom.
//
// devices.sh is `ashlar attach` as a user uses it, through nbd in User Mode Linux,
// ublk in vm-run.sh and FUSE on the host; cases.sh are its races and leaks. orphans.sh
// is what remains when the daemon is gone, zerocopy.sh disks whose bytes do not pass
// through it; lib.sh is what these scripts share.
//
// lvm.sh is benchmarks/harness beside the thin volumes of LVM, which need the kernel's
// device mapper: whether they can be measured, not how fast they are.
//
// vm-run.sh does the same with Linux 6.12 under qemu's emulation, slower, for what
// User Mode Linux lacks: several CPUs, ublk, eBPF. `make test-vm` runs the tests of
// package ublk in it.
package vm
