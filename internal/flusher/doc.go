// Package flusher keeps a process from waiting for itself.
//
// A process that asks the kernel for memory may be made to write dirty pages back
// first. Where those are pages of a block device that this very process serves, or
// whose server cannot come back without it, nobody ever answers. The kernel's remedy is
// to declare the process an I/O flusher (PR_SET_IO_FLUSHER, Linux 5.6, with
// CAP_SYS_RESOURCE; prctl(2)): memory it asks for is then never freed by I/O.
//
// Whoever serves a block device of its own host calls [Become] before it does: package
// fuse, the daemon for ublk and the kernel's nbd driver, and the keeper, without which
// no daemon goes on with a device attached through FUSE.
//
// What it leaves to others: a process must not use its own device, and its memory must
// not be swapped to it.
package flusher
