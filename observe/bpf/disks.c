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

/* A request that waits or is with the driver. */
struct flight {
	u64 request; /* its address; 0: nobody's. Who makes it that of a request owns the rest */
	u64 inserted; /* nanoseconds; 0: was not */
	u64 issued; /* nanoseconds; 0: the driver does not have it */
	u32 place; /* of its operation */
	u32 size; /* bytes, when it was issued */
	u32 failed; /* a part of it ended with an error */
	u32 unused[7]; /* a cache line each: requests of several CPUs do not meet in one */
};

struct name {
	char text[32];
};

/*
 * Both tables are looked at for every request, so they are plain arrays with a hash of
 * ours, which costs a tenth of the kernel's hash maps: an entry is in one of the PROBES
 * slots behind the one that its hash names.
 */
#define FLIGHTS 16384
#define FLIGHT_PROBES 2
#define PLACES 1024
#define PLACE_PROBES 16

/* A completion that was not seen leaves its request behind; others may have the slot
 * after this time. Nanoseconds. */
#define FLIGHT_MAX 120000000000ULL

struct {
	NUMBER(type, BPF_MAP_TYPE_ARRAY);
	NUMBER(max_entries, FLIGHTS);
	TYPE(key, u32);
	TYPE(value, struct flight);
} flights SEC(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	NUMBER(max_entries, PLACES); /* the loader sets it */
	TYPE(key, u32); /* a place */
	TYPE(value, struct operation);
} operations SEC(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_ARRAY);
	NUMBER(max_entries, PLACES); /* the loader sets it, to a power of two */
	TYPE(key, u32); /* a place */
	TYPE(value, u64); /* device and kind, as packed by pack, or that with PAUSED; 0: free */
} places SEC(".maps");

u32 places_mask; /* the loader sets it: max_entries of places, less one */

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

#define USED (1ULL << 63)
#define PAUSED (1ULL << 62) /* its counts stay, and no more are added */

INLINE u64 pack(u32 device, u32 kind) { return USED | (u64)device << 3 | kind; }

/* claim_place gives an operation its counters; PLACES when there is no room. */
INLINE u32 claim_place(u64 packed, u32 device, struct gendisk *disk)
{
	u32 first = hash_of(packed);
	struct name name = {};

	for (u32 i = 0; i < PLACE_PROBES; i++) {
		u32 place = (first + i) & places_mask;
		u64 *holds = map_lookup(&places, &place), was;

		if (!holds)
			continue;
		was = __sync_val_compare_and_swap(holds, 0, packed);
		if (was && was != packed)
			continue;
		if (!map_lookup(&names, &device)) {
			read_kernel(&name, sizeof(name), &disk->disk_name);
			map_update(&names, &device, &name, BPF_ANY);
		}
		return place;
	}
	return PLACES;
}

/* place_of says where the operation of a request is counted, PLACES when it is not. */
INLINE u32 place_of(struct gendisk *disk, u32 flags)
{
	u32 kind = kind_of(flags), device, first;
	u64 packed;

	if (!disk || kind == OP_NONE)
		return PLACES; /* of a controller, not of a disk */
	device = (u32)disk->major << 20 | (u32)disk->first_minor;
	packed = pack(device, kind);
	first = hash_of(packed);
	for (u32 i = 0; i < PLACE_PROBES; i++) {
		u32 place = (first + i) & places_mask;
		u64 *holds = map_lookup(&places, &place);

		if (holds && (*holds & ~PAUSED) == packed)
			return *holds & PAUSED ? PLACES : place;
	}
	if (only_watched && !map_lookup(&watched, &device))
		return PLACES;
	first = claim_place(packed, device, disk);
	if (first == PLACES)
		__sync_fetch_and_add(&refused, 1);
	return first;
}

/* counters_of are those of this CPU. */
INLINE struct operation *counters_of(u32 place)
{
	struct operation *op;

	if (place >= PLACES)
		return NULL;
	op = map_lookup(&operations, &place);
	if (!op)
		__sync_fetch_and_add(&refused, 1);
	return op;
}

INLINE struct flight *flight_at(u32 slot)
{
	slot &= FLIGHTS - 1;
	return map_lookup(&flights, &slot);
}

INLINE struct flight *flight_of(u64 request)
{
	u32 first = hash_of(request);

	for (u32 i = 0; i < FLIGHT_PROBES; i++) {
		struct flight *f = flight_at(first + i);

		if (f && f->request == request)
			return f;
	}
	return NULL;
}

/* lose counts a request whose completion was not seen. */
INLINE void lose(struct operation *op, u32 size)
{
	if (op) {
		op->lost++;
		op->lost_bytes += size;
	}
}

/* claim_flight makes a slot that of a request that has none. With now 0 none is taken
 * from another. */
INLINE struct flight *claim_flight(u64 request, u64 now)
{
	u32 first = hash_of(request);

	for (u32 i = 0; i < FLIGHT_PROBES; i++) {
		struct flight *f = flight_at(first + i);

		if (!f || __sync_val_compare_and_swap(&f->request, 0, request))
			continue;
		f->inserted = 0;
		f->issued = 0;
		return f;
	}
	for (u32 i = 0; i < FLIGHT_PROBES; i++) {
		struct flight *f = flight_at(first + i);
		u64 whose, since;

		if (!f)
			continue;
		whose = f->request;
		since = f->issued ? f->issued : f->inserted;
		if (!whose || !since || now < since + FLIGHT_MAX || __sync_val_compare_and_swap(&f->request, whose, request) != whose)
			continue;
		if (f->issued)
			lose(counters_of(f->place), f->size);
		f->inserted = 0;
		f->issued = 0;
		return f;
	}
	return NULL;
}

/* release gives the slot back: from here on it is somebody else's. */
INLINE void release(struct flight *f) { __sync_lock_test_and_set(&f->request, 0); }

SEC("tp_btf/block_rq_insert")
int block_rq_insert(u64 *ctx)
{
	struct request *rq = (void *)ctx[0];
	struct flight *f;
	u64 now;

	f = flight_of((u64)rq);
	if (!f && place_of(rq->q->disk, rq->cmd_flags) == PLACES)
		return 0;
	now = clock_ns();
	if (!f)
		f = claim_flight((u64)rq, 0);
	if (f)
		f->inserted = now;
	return 0;
}

SEC("tp_btf/block_rq_issue")
int block_rq_issue(u64 *ctx)
{
	struct request *rq = (void *)ctx[0];
	u32 place = place_of(rq->q->disk, rq->cmd_flags);
	struct operation *op = counters_of(place);
	struct flight *f;
	u64 now, began;

	if (!op)
		return 0;
	now = clock_ns();
	op->issued++;
	f = flight_of((u64)rq);
	if (f && f->issued)
		lose(counters_of(f->place), f->size);
	if (!f)
		f = claim_flight((u64)rq, now);
	began = f && f->inserted ? f->inserted : rq->start_time_ns;
	if (began && began <= now)
		record(&op->queue, now - began);
	if (!f) { /* its completion will not be known as such */
		lose(op, rq->__data_len);
		return 0;
	}
	f->inserted = 0;
	f->issued = now;
	f->place = place;
	f->size = rq->__data_len;
	f->failed = 0;
	return 0;
}

SEC("tp_btf/block_rq_requeue")
int block_rq_requeue(u64 *ctx)
{
	struct flight *f = flight_of(ctx[0]);
	struct operation *op;

	if (!f || !f->issued)
		return 0;
	f->issued = 0;
	f->inserted = clock_ns();
	op = counters_of(f->place);
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
	struct flight *f = flight_of((u64)rq);
	struct operation *op;

	if (!f)
		return 0;
	if (!f->issued) {
		release(f);
		return 0;
	}
	if (error)
		f->failed = 1;
	if (bytes < rq->__data_len)
		return 0;
	op = counters_of(f->place);
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
		record(&op->service, clock_ns() - f->issued);
	}
	release(f);
	return 0;
}

INLINE struct operation *merged(struct bio *bio)
{
	return counters_of(place_of(bio->bi_bdev->bd_disk, bio->bi_opf));
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
	struct operation *op = counters_of(place_of(rq->q->disk, rq->cmd_flags));
	struct flight *f = flight_of((u64)rq);

	if (f && !f->issued)
		release(f);
	if (op)
		op->request_merges++;
	return 0;
}
