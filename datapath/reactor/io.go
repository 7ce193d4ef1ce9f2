package reactor

import "golang.org/x/sys/unix"

// IOOp is what an [IO] asks of the kernel.
type IOOp uint8

// The operations of an IO.
const (
	OpRead      IOOp = iota // pread(FD, Buf, Offset)
	OpWrite                 // pwritev2(FD, Buf, Offset, RWFlags)
	OpFsync                 // fdatasync(FD)
	OpFallocate             // fallocate(FD, Mode, Offset, Length)
	OpFunc                  // Func() on a worker thread; Result is what it returns
	OpCommand               // IORING_OP_URING_CMD number Mode to FD, its command area being Buf
)

// CommandSize is how many bytes of a command fit in an entry of a reactor's ring.
const CommandSize = 16

// IO is one operation of the kernel that completes later, on the reactor.
//
// Ownership: its owner makes it once, sets Done once, and reuses it. Between
// Submit and Done it and Buf belong to the reactor. Of OpCommand, Buf is taken
// within SubmitIO and free again.
//
// An OpCommand is no I/O of the reactor's own: it waits, maybe for days, for what
// a driver has to say (a request of ublk). Like a [Watch] it does not keep the
// reactor spinning.
type IO struct {
	Op      IOOp
	RWFlags uint8  // RWF_* of preadv2(2): RWF_DSYNC for FUA
	Fixed   uint16 // OpRead, OpWrite: 0, or 1 + the place of a driver's buffer, instead of Buf; see Reactor.AddBuffers
	Mode    uint32 // OpFallocate: FALLOC_FL_*; OpCommand: the driver's number of the command
	FD      int
	File    *File // optional: the registered form of FD
	Buf     []byte
	Offset  int64
	Length  int64      // OpFallocate; with Fixed: bytes to move
	Address uint64     // OpCommand: the address in the entry; with Fixed: where in the buffer to begin
	Func    func() int // OpFunc

	// Result is the number of bytes moved, or a negative errno. It is valid in Done.
	Result int
	// Done runs once per submission, on the reactor, never inside Submit.
	Done func(*IO)

	submitted int64 // nanoseconds; for the learned service time
	slot      uint32
}

// Errno is the error of a completed IO, 0 for none.
func (io *IO) Errno() unix.Errno {
	if io.Result >= 0 {
		return 0
	}
	return unix.Errno(-io.Result)
}

// run does the operation on the calling thread and may sleep.
func (io *IO) run() {
	for {
		n, errno := io.call()
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			n = -int(errno)
		}
		io.Result = n
		return
	}
}

// File is a file descriptor as a reactor knows it, registered with the kernel
// where that is possible.
type File struct {
	fd    int
	fixed int // index in the ring's table, -1 when not registered
}

// FD is the descriptor.
func (f *File) FD() int { return f.fd }
