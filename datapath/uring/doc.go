// Package uring is io_uring as a reactor needs it: one ring, used by the one
// thread that made it, set up with the best flags the running kernel takes, and
// nothing allocated between submission and completion.
//
// What a kernel can do is found by trying (a ladder of setup flags) and by
// asking (IORING_REGISTER_PROBE), never by its version. The structures are the
// kernel's (include/uapi/linux/io_uring.h); their layout is checked by tests.
//
// The package knows rings and entries. What an entry means to a device or a
// socket is the reactor's business.
package uring
