package observe

import (
	"fmt"
	"time"
)

// Groups of what is observed: the What of [Unobserved].
const (
	GroupDisks    = "disks"
	GroupReactors = "reactors"
	GroupRings    = "io_uring"
	GroupNBD      = "nbd"
	GroupUblk     = "ublk"
)

// Unobserved says what is not seen, or not all of it, and why.
type Unobserved struct {
	What   string // a group
	Reason string // one sentence, with the remedy where there is one
}

// Snapshot is what was counted since the observer started, or since a driver was
// loaded, a thread was added, a disk came. Two of them, subtracted, are an interval.
type Snapshot struct {
	Time       time.Time
	Started    time.Time
	Disks      []Disk   // by name; those that had a request
	Threads    []Thread // in the order in which they were named
	Rings      []Ring   // kinds of requests that were submitted
	NBD        []NBDDevice
	Unobserved []Unobserved
	Missed     uint64 // events that the programs did not count, and requests without times; some per mille on a busy CPU
}

// Number is the number of a block device.
type Number struct{ Major, Minor uint32 }

// String is MAJOR:MINOR.
func (n Number) String() string { return fmt.Sprintf("%d:%d", n.Major, n.Minor) }

// Disk is one block device as the kernel serves it. Requests to its partitions are
// its requests. Devices that only hand requests on (md, dm) and such without queues
// (zram, brd) do not appear.
type Disk struct {
	Name string // of the kernel: nvme0n1, sda, nbd0
	Number
	Depth      uint64 // requests the driver has now
	Merges     uint64 // requests, and parts of them, that became parts of others
	Operations []DiskOperation
}

// DiskOperation is one kind of request to a disk.
type DiskOperation struct {
	Operation string // read, write, flush, discard, write-zeroes
	Count     uint64 // completed, with or without an error; a few may be without times
	Errors    uint64
	Bytes     uint64 // of those without an error
	Depth     uint64 // requests the driver has now; the kernel may have counted discards among writes
	Merges    uint64
	Requeues  uint64     // requests the driver handed back
	Sizes     [16]uint64 // bucket i: up to 512 << i bytes; the last one: any more
	Queue     Histogram  // from the beginning of a request to its issue
	Service   Histogram  // from issue to completion

	untimed uint64 // that the next time stands for
}

// Thread is one watched thread.
type Thread struct {
	ID      int
	OffCPU  Histogram // from leaving a CPU to running again
	Waiting Histogram // that part of OffCPU in which the thread could run throughout: other threads had its CPU
	Wakeup  Histogram // from being woken to running; a part of the other times
}

// Ring is one kind of request to the io_uring rings of this process.
type Ring struct {
	Kind      string // read, write, sync, socket, wait, command, other
	Submitted uint64
	Time      Histogram // from submission to the first completion
}

// NBDDevice is one device of the kernel's NBD client.
type NBDDevice struct {
	Name string // nbd0
	Number
	Send    Histogram // of a request: header and payload into the socket
	Wait    Histogram // from there to the header of the reply: the way, and the server
	Receive Histogram // of the payload of the reply
}
