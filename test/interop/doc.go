// Package interop runs bin/ashlar against other people's NBD programs: libnbd
// (nbdinfo, nbdcopy, nbdsh), qemu, nbd-client and fio, all as Debian packages
// them. It knows Ashlar only as a stranger does, by its command line and the
// wire.
//
// The tests run in `make interop`, which builds the binary and installs the
// programs; elsewhere they skip. In testdata, commands.py and negotiation.py are
// libnbd scripts in which each function is a case of its own.
//
// Debian 12 has libnbd 1.14, which knows neither extended headers nor
// opt_set_meta_context: those cases are in the scripts and run with libnbd 1.18
// and later; until then the tests beside the nbd package cover them.
package interop
