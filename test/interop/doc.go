// Package interop runs bin/ashlar against other people's NBD programs: libnbd
// (nbdinfo, nbdcopy, nbdsh), qemu, nbd-client and fio, all as Debian packages
// them. It knows Ashlar only as a stranger does, by its command line and the
// wire.
//
// The tests run in `make interop`, which builds the binary and installs the
// programs; elsewhere they skip. In testdata, commands.py, negotiation.py and
// extended.py are libnbd scripts in which each function is a case of its own.
//
// Debian 12 has libnbd 1.14 and qemu 7.2, which know neither extended headers nor
// opt_set_meta_context. foreign-root.sh keeps those of Debian 13 beside them, libnbd
// 1.22 and qemu 10, without installing anything; extended_test.go runs the scripts
// and programs in them too. Those tests skip where the programs are not kept yet and no
// mirror is in reach.
package interop
