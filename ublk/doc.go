// Package ublk exports a device as a block device of the Linux kernel, /dev/ublkbN,
// through the driver ublk_drv (Linux 6.0; Documentation/block/ublk.rst).
//
// The way of one request: the kernel puts a descriptor of it into memory shared
// with the queue and completes the command that waited for it (FETCH_REQ) in the
// ring of the queue's reactor. The queue decodes the descriptor into the slot's
// [datapath.Request], submits it, and ends it with COMMIT_AND_FETCH_REQ, which
// also waits for the slot's next request. Commands lie in the reactor's own ring:
// a queue needs no thread and no wake-up of its own.
//
// Data is copied by the kernel: where it has UBLK_F_USER_COPY (6.5) by a read or
// write of the queue's at /dev/ublkcN, into buffers of the reactor's arena that are
// taken only while a request is in flight; else, and for unprivileged devices, by
// the driver, into memory each slot has of its own.
//
// Where nobody in this process has to see the bytes ([datapath.FixedBuffers]: a file or
// disk past the page cache), they are not copied: the driver registers the memory of each
// request with the reactor's ring (UBLK_F_AUTO_BUF_REG), the request carries its place, and
// the disk moves the bytes. Each request that does not suit is copied as above, and so is
// everything where the driver, the device or the ring's table cannot; [Target.Copies] says
// why. A device made for it can be recovered by a server that copies.
//
// Devices are always made with user recovery and reissue: when the process dies, the
// kernel keeps the device, its mounts and its requests, and [Recover] in another
// process goes on with them; nobody sees an error. The kernel's list of devices is
// the only state: a device carries a [Tag] that says whose it is.
//
// A server must not be the last process of a mount namespace in which its device is
// mounted: its exit would unmount the device and wait for itself
// (https://github.com/ublk-org/ublksrv/pull/186). In a container, mount elsewhere.
//
// The driver knows no serial number and no name of a device; /dev/disk/by-id is for
// whoever attaches it.
//
// Invariants:
//
//  1. Every command of a queue is submitted by the reactor's thread; the kernel
//     knows the queue by that thread.
//  2. A slot is the kernel's (command in flight), the device's (request in flight),
//     or held: never committed, so that the kernel issues it again after recovery.
//  3. /dev/ublkcN is not registered with the ring. Before Linux 6.13 a registered
//     file is let go only after everything that was in flight when it was removed,
//     and the commands of another device may be in flight for ever: DEL_DEV hung.
//  4. What the driver registered in a ring's table leaves it with the answer, or when the
//     queue ends: the kernel gives a request to nobody else before.
//  5. DEL_DEV comes after the last command, the unmapping and the close.
//
// What it leaves to others: which device to export, and when to recover it
// (internal/daemon).
package ublk
