//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What one process submits to its io_uring rings, and how long it takes, by kind.
 */
#include "histogram.h"

char terms[] SEC("license") = "Dual BSD/GPL";

const volatile u32 process; /* as the first namespace counts */

enum request_kind { KIND_READ, KIND_WRITE, KIND_SYNC, KIND_SOCKET, KIND_WAIT, KIND_COMMAND, KIND_OTHER, KINDS };

struct submitted {
	u64 request; /* its address; 0: nobody's. Who makes it that of a request owns the rest */
	u64 begun; /* nanoseconds; 0: has ended */
	u64 kind;
	u64 unused[5]; /* a cache line each */
};

struct kind {
	u64 submitted; /* by the submit program */
	struct histogram time; /* by the complete program: to the first completion */
};

/* A plain array with a hash of ours, as the requests of disks have it (disks.c). A
 * request keeps its slot, since io_uring uses the memory again; another may have it when
 * that has ended. */
#define SLOTS 16384
#define PROBES 2

struct {
	NUMBER(type, BPF_MAP_TYPE_ARRAY);
	NUMBER(max_entries, SLOTS);
	TYPE(key, u32);
	TYPE(value, struct submitted);
} requests SEC(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	NUMBER(max_entries, KINDS);
	TYPE(key, u32);
	TYPE(value, struct kind);
} kinds SEC(".maps");

/* uapi/linux/io_uring.h, enum io_uring_op */
INLINE u32 kind_of(u8 opcode)
{
	switch (opcode) {
	case 1: /* readv */
	case 4: /* read_fixed */
	case 22: /* read */
		return KIND_READ;
	case 2: /* writev */
	case 5: /* write_fixed */
	case 23: /* write */
		return KIND_WRITE;
	case 3: /* fsync */
	case 8: /* sync_file_range */
	case 17: /* fallocate */
		return KIND_SYNC;
	case 9: /* sendmsg */
	case 10: /* recvmsg */
	case 13: /* accept */
	case 16: /* connect */
	case 26: /* send */
	case 27: /* recv */
	case 47: /* send_zc */
	case 48: /* sendmsg_zc */
		return KIND_SOCKET;
	case 6: /* poll_add */
	case 7: /* poll_remove */
	case 11: /* timeout */
	case 12: /* timeout_remove */
	case 15: /* link_timeout */
		return KIND_WAIT;
	case 46: /* uring_cmd */
		return KIND_COMMAND;
	}
	return KIND_OTHER;
}

INLINE struct submitted *slot_at(u32 slot)
{
	slot &= SLOTS - 1;
	return map_lookup(&requests, &slot);
}

INLINE struct submitted *slot_of(u64 request)
{
	u32 first = hash_of(request);

	for (u32 i = 0; i < PROBES; i++) {
		struct submitted *s = slot_at(first + i);

		if (s && s->request == request)
			return s;
	}
	return NULL;
}

/* claim gives a request a slot that is free, or whose request has ended. */
INLINE struct submitted *claim(u64 request)
{
	u32 first = hash_of(request);

	for (u32 i = 0; i < PROBES; i++) {
		struct submitted *s = slot_at(first + i);
		u64 whose;

		if (!s || s->begun)
			continue;
		whose = s->request;
		if (__sync_val_compare_and_swap(&s->request, whose, request) == whose)
			return s;
	}
	return NULL;
}

INLINE int submit(u64 *ctx)
{
	struct io_kiocb *request = (void *)ctx[0];
	struct submitted *s;
	struct kind *k;
	u32 kind;

	if ((u32)(current_ids() >> 32) != process)
		return 0;
	kind = kind_of(request->opcode);
	k = map_lookup(&kinds, &kind);
	if (!k)
		return 0;
	k->submitted++;
	s = slot_of((u64)request);
	if (!s)
		s = claim((u64)request);
	if (s) { /* else its time will not be known */
		s->kind = kind;
		s->begun = clock_ns();
	}
	return 0;
}

SEC("tp_btf/io_uring_submit_req") /* since Linux 6.4 */
int io_uring_submit_req(u64 *ctx)
{
	return submit(ctx);
}

SEC("tp_btf/io_uring_submit_sqe") /* before */
int io_uring_submit_sqe(u64 *ctx)
{
	return submit(ctx);
}

/* A request that completes several times is counted the first time. */
SEC("tp_btf/io_uring_complete")
int io_uring_complete(u64 *ctx)
{
	struct submitted *s = slot_of(ctx[1]);
	struct kind *k;
	u32 kind;

	if (!s || !s->begun)
		return 0;
	kind = s->kind;
	k = map_lookup(&kinds, &kind);
	if (k)
		record(&k->time, clock_ns() - s->begun);
	s->begun = 0;
	return 0;
}
