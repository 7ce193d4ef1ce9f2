//go:build linux

package uring

import (
	"testing"
	"unsafe"
)

// TestStructuresHaveTheKernelsLayout holds the sizes and offsets of
// include/uapi/linux/io_uring.h.
func TestStructuresHaveTheKernelsLayout(t *testing.T) {
	var (
		s SQE
		c CQE
		p setupParams
		q sqOffsets
		k cqOffsets
		g getEventsArg
		r rsrcRegister
		u rsrcUpdate2
		h probeHeader
		o probeOp
	)
	for _, test := range []struct {
		name      string
		got, want uintptr
	}{
		{"sizeof sqe", unsafe.Sizeof(s), 64},
		{"sqe.opcode", unsafe.Offsetof(s.Opcode), 0},
		{"sqe.flags", unsafe.Offsetof(s.Flags), 1},
		{"sqe.ioprio", unsafe.Offsetof(s.IOPrio), 2},
		{"sqe.fd", unsafe.Offsetof(s.FD), 4},
		{"sqe.off", unsafe.Offsetof(s.Offset), 8},
		{"sqe.addr", unsafe.Offsetof(s.Addr), 16},
		{"sqe.len", unsafe.Offsetof(s.Length), 24},
		{"sqe.rw_flags", unsafe.Offsetof(s.OpFlags), 28},
		{"sqe.user_data", unsafe.Offsetof(s.UserData), 32},
		{"sqe.buf_index", unsafe.Offsetof(s.BufIndex), 40},
		{"sqe.personality", unsafe.Offsetof(s.Personality), 42},
		{"sqe.file_index", unsafe.Offsetof(s.FileSlot), 44},
		{"sqe.addr3", unsafe.Offsetof(s.Addr3), 48},
		{"sizeof cqe", unsafe.Sizeof(c), 16},
		{"cqe.user_data", unsafe.Offsetof(c.UserData), 0},
		{"cqe.res", unsafe.Offsetof(c.Result), 8},
		{"cqe.flags", unsafe.Offsetof(c.Flags), 12},
		{"sizeof params", unsafe.Sizeof(p), 120},
		{"params.cq_entries", unsafe.Offsetof(p.CQEntries), 4},
		{"params.flags", unsafe.Offsetof(p.Flags), 8},
		{"params.sq_thread_cpu", unsafe.Offsetof(p.SQThreadCPU), 12},
		{"params.sq_thread_idle", unsafe.Offsetof(p.SQThreadIdle), 16},
		{"params.features", unsafe.Offsetof(p.Features), 20},
		{"params.wq_fd", unsafe.Offsetof(p.WQFd), 24},
		{"params.sq_off", unsafe.Offsetof(p.SQOff), 40},
		{"params.cq_off", unsafe.Offsetof(p.CQOff), 80},
		{"sizeof sqring_offsets", unsafe.Sizeof(q), 40},
		{"sqring_offsets.flags", unsafe.Offsetof(q.Flags), 16},
		{"sqring_offsets.dropped", unsafe.Offsetof(q.Dropped), 20},
		{"sqring_offsets.array", unsafe.Offsetof(q.Array), 24},
		{"sqring_offsets.user_addr", unsafe.Offsetof(q.UserAddr), 32},
		{"sizeof cqring_offsets", unsafe.Sizeof(k), 40},
		{"cqring_offsets.overflow", unsafe.Offsetof(k.Overflow), 16},
		{"cqring_offsets.cqes", unsafe.Offsetof(k.CQEs), 20},
		{"cqring_offsets.flags", unsafe.Offsetof(k.Flags), 24},
		{"cqring_offsets.user_addr", unsafe.Offsetof(k.UserAddr), 32},
		{"sizeof getevents_arg", unsafe.Sizeof(g), 24},
		{"getevents_arg.sigmask_sz", unsafe.Offsetof(g.SigmaskSize), 8},
		{"getevents_arg.min_wait_usec", unsafe.Offsetof(g.MinWait), 12},
		{"getevents_arg.ts", unsafe.Offsetof(g.Timeout), 16},
		{"sizeof timespec", unsafe.Sizeof(timespec{}), 16},
		{"sizeof rsrc_register", unsafe.Sizeof(r), 32},
		{"rsrc_register.flags", unsafe.Offsetof(r.Flags), 4},
		{"rsrc_register.data", unsafe.Offsetof(r.Data), 16},
		{"rsrc_register.tags", unsafe.Offsetof(r.Tags), 24},
		{"sizeof rsrc_update2", unsafe.Sizeof(u), 32},
		{"rsrc_update2.data", unsafe.Offsetof(u.Data), 8},
		{"rsrc_update2.tags", unsafe.Offsetof(u.Tags), 16},
		{"rsrc_update2.nr", unsafe.Offsetof(u.Count), 24},
		{"sizeof iovec", unsafe.Sizeof(iovec{}), 16},
		{"sizeof probe", unsafe.Sizeof(h), 16},
		{"probe.ops_len", unsafe.Offsetof(h.OpsLen), 1},
		{"sizeof probe_op", unsafe.Sizeof(o), 8},
		{"probe_op.flags", unsafe.Offsetof(o.Flags), 2},
	} {
		if test.got != test.want {
			t.Errorf("%s is %d, want %d", test.name, test.got, test.want)
		}
	}
}
