// Package writelog reads the log that the device-mapper target log-writes keeps of
// what was written to a device, and does it again on another, as far as one likes.
// The format is that of drivers/md/dm-log-writes.c; Debian does not package the
// replay-log of xfstests, which does the same.
package writelog
