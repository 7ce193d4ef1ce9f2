// Package doctor looks at a host for what a daemon will need there, before there is
// one: the kernel and its drivers, rights and limits, disks, the data directory, ports.
//
// A check is a function of a [Host] and [Options] that returns findings. A Host is the
// files of a system and a few calls, so that every check is tested on systems that do
// not exist; [This] is the one the process runs on. [Examine] runs all checks.
//
// Checks change nothing: what is tried in the data directory is an unnamed file, and
// disks are only read. They need no daemon and no rights; what could not be looked at
// is a finding too, and never counts as good.
package doctor
