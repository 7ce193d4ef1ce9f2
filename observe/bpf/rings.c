//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What one process submits to its io_uring rings, and how long it takes, by kind.
 */
#include "histogram.h"
#include "sample.h"

char terms[] SEC("license") = "Dual BSD/GPL";

const volatile u32 process; /* as the first namespace counts */

enum request_kind { KIND_READ, KIND_WRITE, KIND_SYNC, KIND_SOCKET, KIND_WAIT, KIND_COMMAND, KIND_OTHER, KINDS };

struct submitted {
	u64 request; /* its address; 0: nobody's. Who makes it that of a request owns the rest */
	u64 begun; /* nanoseconds; 0: has ended */
	u64 kind;
	u64 events; /* that its time stands for */
	u64 unused[4]; /* a cache line each */
};

struct kind {
	u64 submitted; /* by the submit program, as the next one */
	struct sample sample;
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

/* The kinds of uapi/linux/io_uring.h, enum io_uring_op, each with one added; 0: other. */
static const u8 kinds_of[64] = {
	[1] = KIND_READ + 1, /* readv */
	[2] = KIND_WRITE + 1, /* writev */
	[3] = KIND_SYNC + 1, /* fsync */
	[4] = KIND_READ + 1, /* read_fixed */
	[5] = KIND_WRITE + 1, /* write_fixed */
	[6] = KIND_WAIT + 1, /* poll_add */
	[7] = KIND_WAIT + 1, /* poll_remove */
	[8] = KIND_SYNC + 1, /* sync_file_range */
	[9] = KIND_SOCKET + 1, /* sendmsg */
	[10] = KIND_SOCKET + 1, /* recvmsg */
	[11] = KIND_WAIT + 1, /* timeout */
	[12] = KIND_WAIT + 1, /* timeout_remove */
	[13] = KIND_SOCKET + 1, /* accept */
	[15] = KIND_WAIT + 1, /* link_timeout */
	[16] = KIND_SOCKET + 1, /* connect */
	[17] = KIND_SYNC + 1, /* fallocate */
	[22] = KIND_READ + 1, /* read */
	[23] = KIND_WRITE + 1, /* write */
	[26] = KIND_SOCKET + 1, /* send */
	[27] = KIND_SOCKET + 1, /* recv */
	[46] = KIND_COMMAND + 1, /* uring_cmd */
	[47] = KIND_SOCKET + 1, /* send_zc */
	[48] = KIND_SOCKET + 1, /* sendmsg_zc */
};

INLINE u32 kind_of(u8 opcode)
{
	u32 kind = opcode < 64 ? kinds_of[opcode] : 0;

	return kind ? kind - 1 : KIND_OTHER;
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
	u32 kind, events;

	if ((u32)(current_ids() >> 32) != process)
		return 0;
	kind = kind_of(request->opcode);
	k = map_lookup(&kinds, &kind);
	if (!k)
		return 0;
	k->submitted++;
	events = sampled(&k->sample);
	if (!events)
		return 0;
	s = slot_of((u64)request);
	if (!s)
		s = claim((u64)request);
	if (s) { /* else its time will not be known */
		s->kind = kind;
		s->events = events;
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
		record_many(&k->time, clock_ns() - s->begun, s->events);
	s->begun = 0;
	return 0;
}
