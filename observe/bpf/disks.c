//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The requests of block devices, by device and operation: how long they wait until
 * the driver has them, how long the driver needs, how many it has.
 *
 * Each counter is written by one program only. A program does not interrupt itself
 * on a CPU, but a completion can interrupt an insertion: so counters need no atomic
 * additions, and the depth of a queue is the difference of counters of several
 * programs.
 */
#include "histogram.h"

char terms[] SEC("license") = "Dual BSD/GPL";

#define SIZES 16 /* bucket i: up to 512 << i bytes; the last one all that are larger */

enum operation_kind { OP_READ, OP_WRITE, OP_FLUSH, OP_DISCARD, OP_ZEROES, OP_NONE };

struct operation_key {
	u32 device; /* major << 20 | minor of the whole disk */
	u32 kind;
};

struct operation {
	/* block_rq_issue */
	u64 issued;
	u64 lost; /* issued again although no completion was seen: it was not reported */
	u64 lost_bytes;
	struct histogram queue;
	/* block_rq_requeue */
	u64 requeued;
	/* block_rq_complete */
	u64 done;
	u64 errors;
	u64 bytes;
	u64 sizes[SIZES];
	struct histogram service;
	/* block_bio_backmerge, block_bio_frontmerge, block_rq_merge */
	u64 back_merges;
	u64 front_merges;
	u64 request_merges;
};

/* A request by its address: drivers use the same memory for a tag again and again,
 * so an entry is made once and reused. */
struct flight {
	u64 inserted; /* nanoseconds; 0: was not */
	u64 issued; /* nanoseconds; 0: the driver does not have it */
	struct operation_key key;
	u32 size; /* bytes, when it was issued */
	u32 failed; /* a part of it ended with an error */
};

struct name {
	char text[32];
};

struct {
	NUMBER(type, BPF_MAP_TYPE_LRU_HASH);
	NUMBER(max_entries, 16384);
	TYPE(key, u64);
	TYPE(value, struct flight);
} flights SEC(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_PERCPU_HASH);
	NUMBER(max_entries, 64); /* the loader sets it */
	TYPE(key, struct operation_key);
	TYPE(value, struct operation);
} operations SEC(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_HASH);
	NUMBER(max_entries, 64); /* the loader sets it */
	TYPE(key, u32);
	TYPE(value, struct name);
} names SEC(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_HASH);
	NUMBER(max_entries, 1024);
	TYPE(key, u32);
	TYPE(value, u32);
} watched SEC(".maps"); /* devices, when only_watched */

struct {
	NUMBER(type, BPF_MAP_TYPE_ARRAY);
	NUMBER(max_entries, 1);
	TYPE(key, u32);
	TYPE(value, struct operation);
} zero SEC(".maps"); /* never written: what a new operation starts as */

u32 only_watched;
u64 refused; /* requests of operations that found no room */

/* kind_of reads include/linux/blk_types.h, enum req_op. */
INLINE u32 kind_of(u32 flags)
{
	switch (flags & 0xff) {
	case 0:
		return OP_READ;
	case 1:
	case 7: /* zone append */
		return OP_WRITE;
	case 2:
		return OP_FLUSH;
	case 3:
	case 5: /* secure erase */
		return OP_DISCARD;
	case 9:
		return OP_ZEROES;
	}
	return OP_NONE; /* of zones, and commands past the block layer */
}

INLINE struct operation *operation_of(struct operation_key *key, struct gendisk *disk)
{
	struct operation *op = map_lookup(&operations, key);
	struct name name = {};
	u32 first = 0;
	void *nothing;

	if (op)
		return op;
	nothing = map_lookup(&zero, &first);
	if (!nothing)
		return NULL;
	map_update(&operations, key, nothing, BPF_NOEXIST);
	op = map_lookup(&operations, key);
	if (!op) {
		__sync_fetch_and_add(&refused, 1);
		return NULL;
	}
	if (!map_lookup(&names, &key->device)) {
		read_kernel(&name, sizeof(name), &disk->disk_name);
		map_update(&names, &key->device, &name, BPF_ANY);
	}
	return op;
}

/* key_of says what to count a request under, false when it is not observed. */
INLINE int key_of(struct operation_key *key, struct gendisk *disk, u32 flags)
{
	if (!disk)
		return 0; /* of a controller, not of a disk */
	key->kind = kind_of(flags);
	if (key->kind == OP_NONE)
		return 0;
	key->device = (u32)disk->major << 20 | (u32)disk->first_minor;
	return !only_watched || map_lookup(&watched, &key->device);
}

SEC("tp_btf/block_rq_insert")
int block_rq_insert(u64 *ctx)
{
	struct request *rq = (void *)ctx[0];
	struct operation_key key;
	u64 address = (u64)rq;
	struct flight *f;

	f = map_lookup(&flights, &address);
	if (f) {
		f->inserted = clock_ns();
		return 0;
	}
	if (key_of(&key, rq->q->disk, rq->cmd_flags)) {
		struct flight new = {.inserted = clock_ns()};

		map_update(&flights, &address, &new, BPF_ANY);
	}
	return 0;
}

SEC("tp_btf/block_rq_issue")
int block_rq_issue(u64 *ctx)
{
	struct request *rq = (void *)ctx[0];
	struct gendisk *disk = rq->q->disk;
	u64 address = (u64)rq, now, began;
	struct operation_key key;
	struct operation *op;
	struct flight *f;

	if (!key_of(&key, disk, rq->cmd_flags))
		return 0;
	op = operation_of(&key, disk);
	if (!op)
		return 0;
	now = clock_ns();
	f = map_lookup(&flights, &address);
	if (!f) {
		struct flight new = {};

		map_update(&flights, &address, &new, BPF_ANY);
		f = map_lookup(&flights, &address);
		if (!f)
			return 0;
	}
	if (f->issued) {
		struct operation *before = map_lookup(&operations, &f->key);

		if (before) {
			before->lost++;
			before->lost_bytes += f->size;
		}
	}
	began = f->inserted ? f->inserted : rq->start_time_ns;
	f->inserted = 0;
	f->issued = now;
	f->key = key;
	f->size = rq->__data_len;
	f->failed = 0;
	op->issued++;
	if (began && began <= now)
		record(&op->queue, now - began);
	return 0;
}

SEC("tp_btf/block_rq_requeue")
int block_rq_requeue(u64 *ctx)
{
	u64 address = ctx[0];
	struct operation *op;
	struct flight *f = map_lookup(&flights, &address);

	if (!f || !f->issued)
		return 0;
	f->issued = 0;
	f->inserted = clock_ns();
	op = map_lookup(&operations, &f->key);
	if (op)
		op->requeued++;
	return 0;
}

/*
 * A request may end in parts: the last one has all bytes that are not done. A write
 * with a flush before or behind it is reported once more, when the sequence ends: it
 * is not with the driver then, and is not counted again.
 */
SEC("tp_btf/block_rq_complete")
int block_rq_complete(u64 *ctx)
{
	struct request *rq = (void *)ctx[0];
	u32 error = (u8)ctx[1], bytes = ctx[2], bucket;
	u64 address = (u64)rq, now;
	struct operation *op;
	struct flight *f;

	f = map_lookup(&flights, &address);
	if (!f)
		return 0;
	f->inserted = 0;
	if (!f->issued)
		return 0;
	if (error)
		f->failed = 1;
	if (bytes < rq->__data_len)
		return 0;
	now = clock_ns();
	op = map_lookup(&operations, &f->key);
	if (op) {
		op->done++;
		if (f->failed)
			op->errors++;
		else
			op->bytes += f->size;
		bucket = log2_of(((u64)f->size - (f->size > 0)) >> 8);
		if (bucket >= SIZES)
			bucket = SIZES - 1;
		op->sizes[bucket]++;
		record(&op->service, now - f->issued);
	}
	f->issued = 0;
	return 0;
}

INLINE struct operation *merged(struct bio *bio)
{
	struct gendisk *disk = bio->bi_bdev->bd_disk;
	struct operation_key key;

	return key_of(&key, disk, bio->bi_opf) ? operation_of(&key, disk) : NULL;
}

SEC("tp_btf/block_bio_backmerge")
int block_bio_backmerge(u64 *ctx)
{
	struct operation *op = merged((void *)ctx[0]);

	if (op)
		op->back_merges++;
	return 0;
}

SEC("tp_btf/block_bio_frontmerge")
int block_bio_frontmerge(u64 *ctx)
{
	struct operation *op = merged((void *)ctx[0]);

	if (op)
		op->front_merges++;
	return 0;
}

/* The request is a part of another one from here on, and ends with that. */
SEC("tp_btf/block_rq_merge")
int block_rq_merge(u64 *ctx)
{
	struct request *rq = (void *)ctx[0];
	struct gendisk *disk = rq->q->disk;
	u64 address = (u64)rq;
	struct operation_key key;
	struct operation *op;
	struct flight *f = map_lookup(&flights, &address);

	if (f)
		f->inserted = 0;
	if (!key_of(&key, disk, rq->cmd_flags))
		return 0;
	op = operation_of(&key, disk);
	if (op)
		op->request_merges++;
	return 0;
}
