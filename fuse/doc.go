// Package fuse exports a device as a block device of the Linux kernel for kernels
// with neither ublk nor nbd: the device is one file, the root of a FUSE mount, and a
// loop device with direct I/O is on that file (Documentation/filesystems/fuse.rst,
// loop(4)).
//
// The way of one request: the loop driver's worker reads or writes the file; FUSE
// puts the request into its queue, and the watch of /dev/fuse wakes a reactor. The
// reactor reads the request with one system call (a write's data with it, into memory
// it stays in), gives the [datapath.Request] of a free slot to the device, and answers
// with one system call. INIT and everything about the file itself are answered on the
// spot. Nothing is allocated.
//
// Without page cache between the two: the file is opened FOPEN_DIRECT_IO and the loop
// device uses direct I/O, so that what is cached, and flushed, is the cache of the
// block device, as on any disk. A discard or a write-zeroes of the block device becomes
// a fallocate that punches a hole, which must read as zeros; so it is an
// OpWriteZeroes, which gives space back where the store can. fsync is OpFlush.
//
// A process that is killed takes nothing with it when a keeper (package keeper) holds
// its /dev/fuse: the mount, the loop device, file systems on it, and their requests
// wait. [Recover] in another process takes the descriptor, has the kernel send again
// what was in flight (FUSE_NOTIFY_RESEND, Linux 6.9), and goes on; nobody sees an
// error. Without a keeper, or before Linux 6.9, the kernel fails the requests when the
// server's process ends. The kernel's lists are the only state besides: a mount's
// source is the [Config.Name], and so is the name that the loop device carries.
//
// Invariants:
//
//  1. Memory that /dev/fuse is read into is in place before the call: a page fault in
//     a process that is being killed would fail the request for its client.
//  2. A request that was read is answered once, or never, and then the kernel sends it
//     to whoever recovers.
//  3. The mount exists before the loop device and is removed after it. What is mounted
//     or held is never removed.
//  4. One process serves: the keeper gives a descriptor away only when the connection
//     of its last owner is gone.
//
// Limits:
//
//   - The loop driver has one hardware queue and submits from one thread: about what
//     one reactor serves. More than one queue helps stores that are slow to answer.
//   - Discards, write-zeroes and flushes are waited for by that thread, and hold up
//     what comes after them.
//   - A process waits for itself when it uses its own device: by reading it, by sync(2),
//     which is for all file systems and cannot be killed, or because the kernel wants
//     memory and writes dirty pages of the device back for it. [Start]
//     makes all threads of the process I/O flushers (CAP_SYS_RESOURCE; package
//     flusher), which is the kernel's remedy. No swap on such a device, and no memory
//     of the process swapped to it.
//   - The process opens its own file for a moment in Start, Resize and Stop. Killed in
//     the few microseconds between its reading such a request and its answer, it cannot
//     end, and neither can the locks of its store; it does when the connection is
//     aborted: echo 1 >/sys/fs/fuse/connections/N/abort, N being [Info.Connection].
//   - A server must not be the last process of a mount namespace in which its device is
//     mounted: its exit would unmount the device and wait for itself. And a process that
//     makes itself a mount namespace takes copies of mounts along, which keep a device
//     in use until it ends.
//   - While no process serves, stat and df of the mount wait too.
//   - The partitions of a device are not scanned: partx --add DEVICE does it.
//   - fs.fuse.default_request_timeout and max_request_timeout (Linux 6.15) break
//     connections whose server is away for longer. They have to be 0, as they are.
//   - Under systemd, and in containers, the keeper has to be a unit, or a container, of
//     its own: ending a service ends the processes it started.
//
// What it leaves to others: which device to export, when to recover it
// (internal/daemon), where the keeper runs (cmd/ashlar, deploy).
package fuse
