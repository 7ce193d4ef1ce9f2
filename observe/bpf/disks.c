//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The requests of block devices, by device and operation: how long they wait until
 * the driver has them, how long the driver needs, how many it has.
 *
 * There are two ways to know the times, and the loader chooses one. Where the kernel
 * keeps them itself (kernel_times), what runs for every request is its completion, and
 * it alone. Elsewhere the programs keep them: in a table of the requests that are under
 * way, which begin with their insertion or issue.
 *
 * Each counter is written by one program only. A program does not interrupt itself
 * on a CPU, but a completion can interrupt an insertion: so counters need no atomic
 * additions, and the depth of a queue is the difference of counters of several
 * programs.
 */
#include "histogram.h"
#include "sample.h"

char terms[] SEC("license") = "Dual BSD/GPL";

#define SIZES 16 /* bucket i: up to 512 << i bytes; the last one all that are larger */

enum operation_kind { OP_READ, OP_WRITE, OP_FLUSH, OP_DISCARD, OP_ZEROES, OP_NONE };

/* What every request needs comes first, in as few cache lines as can be. */
struct operation {
	/* block_rq_issue; with kernel_times, block_rq_complete */
	u64 issued;
	/* block_rq_complete */
	u64 done;
	u64 bytes;
	struct sample sample; /* with kernel_times */
	u64 sizes[SIZES];
	struct histogram service;
	/* block_rq_issue; with kernel_times, block_rq_complete */
	struct histogram queue;
	/* block_rq_complete */
	u64 errors;
	/* block_rq_issue */
	u64 lost; /* issued again although no completion was seen: it was not reported */
	u64 lost_bytes;
	/* block_rq_requeue */
	u64 requeued; /* it takes back what issued counted */
	u64 handed_back; /* the same with kernel_times, where issued does not count it */
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

/* kernel_times: the loader has seen that the kernel notes when each request began and
 * when the driver got it, as the statistics of a disk (iostats) and its writeback
 * throttling (wbt_lat_usec) make it do. */
const volatile u32 kernel_times;

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

const volatile u32 places_mask; /* the loader sets it: max_entries of places, less one */

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
u32 untimed; /* with kernel_times: a request had none */
u64 refused; /* requests of operations that found no room */

/* The kind of each operation of include/linux/blk_types.h, enum req_op, up to 15: four
 * bits each. 7 is an append to a zone, 5 a secure erase. */
#define KINDS                                                                          \
	(0x5555550000000000ULL | (u64)OP_ZEROES << 36 | (u64)OP_NONE << 32 |           \
	 (u64)OP_WRITE << 28 | OP_NONE << 24 | OP_DISCARD << 20 | OP_NONE << 16 |      \
	 OP_DISCARD << 12 | OP_FLUSH << 8 | OP_WRITE << 4 | OP_READ)
_Static_assert(OP_NONE == 5, "KINDS has it as a number");

/* kind_of is OP_NONE for operations of zones, and for commands past the block layer. */
INLINE u32 kind_of(u32 flags)
{
	u32 op = flags & 0xff;

	return op < 16 ? KINDS >> (op * 4) & 15 : OP_NONE;
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

/* seek_place is place_of for what is not at its first place. */
RARE u32 seek_place(struct gendisk *disk, u32 device, u64 packed)
{
	u32 first = hash_of(packed);

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

/* place_of says where an operation of a disk is counted, PLACES when it is not. */
INLINE u32 place_of(struct gendisk *disk, u32 kind)
{
	u32 device, place;
	u64 packed, *holds;

	if (!disk || kind == OP_NONE)
		return PLACES; /* of a controller, not of a disk */
	device = (u32)disk->major << 20 | (u32)disk->first_minor;
	packed = pack(device, kind);
	place = hash_of(packed) & places_mask;
	holds = map_lookup(&places, &place);
	if (holds && *holds == packed)
		return place;
	return seek_place(disk, device, packed);
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

/* begun_of is when a request began, 0 when nobody has noted it. With the statistics of the
 * queue switched off, Linux 6.18 leaves there what it was when the memory was last used
 * (blk_account_io_start). Flushes of the kernel's own are no part of them, and
 * have the time nevertheless (blk_rq_init). */
INLINE u64 begun_of(struct request *rq, u32 kind) { return rq->part || kind == OP_FLUSH ? rq->start_time_ns : 0; }

SEC("tp_btf/block_rq_insert")
int block_rq_insert(u64 *ctx)
{
	struct request *rq = (void *)ctx[0];
	struct flight *f;
	u64 now;

	f = flight_of((u64)rq);
	if (!f && place_of(rq->q->disk, kind_of(rq->cmd_flags)) == PLACES)
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
	u32 kind = kind_of(rq->cmd_flags), place = place_of(rq->q->disk, kind);
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
	began = f && f->inserted ? f->inserted : begun_of(rq, kind);
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
	struct request *rq = (void *)ctx[0];
	struct operation *op;
	struct flight *f;

	if (kernel_times) {
		op = rq->state == MQ_RQ_IDLE ? NULL : counters_of(place_of(rq->q->disk, kind_of(rq->cmd_flags)));
		if (op)
			op->handed_back++;
		return 0;
	}
	f = flight_of((u64)rq);
	if (!f || !f->issued)
		return 0;
	f->issued = 0;
	f->inserted = clock_ns();
	op = counters_of(f->place);
	if (op)
		op->requeued++;
	return 0;
}

/* count_end counts a request that has ended. */
INLINE void count_end(struct operation *op, u32 size, u32 error)
{
	u32 bucket = log2_of((size - (size > 0)) >> 8);

	op->done++;
	if (error)
		op->errors++;
	else
		op->bytes += size;
	if (bucket >= SIZES)
		bucket = SIZES - 1;
	op->sizes[bucket]++;
}

/*
 * ended counts a request by the times that the kernel has noted. Without any data, only
 * a flush is one: what else has none is a write whose flushes are done (below), or the
 * request of a flush to a disk that needs none. What the driver has not begun
 * (MQ_RQ_IDLE) is not counted: it failed on its way. A part that fails while others are
 * to come is an error of its own, since nothing remembers it.
 */
INLINE int ended(struct request *rq, u32 error, u32 bytes)
{
	u32 left = rq->__data_len, kind = kind_of(rq->cmd_flags), size;
	u64 begun, issued, now;
	struct operation *op;
	u32 events;

	if (bytes < left && !error)
		return 0;
	if ((!left && kind != OP_FLUSH) || rq->state == MQ_RQ_IDLE)
		return 0;
	op = counters_of(place_of(rq->q->disk, kind));
	if (!op)
		return 0;
	if (bytes < left) {
		op->errors++;
		return 0;
	}
	size = (u32)rq->stats_sectors << 9; /* when it was issued; the lower bits, of large ones */
	if (size < left)
		size = left;
	op->issued++;
	count_end(op, size, error);
	events = sampled(&op->sample);
	if (!events)
		return 0;
	begun = begun_of(rq, kind);
	issued = rq->io_start_time_ns;
	now = clock_ns();
	if (issued)
		record_many(&op->service, issued < now ? now - issued : 0, events);
	if (issued && begun)
		record_many(&op->queue, begun < issued ? issued - begun : 0, events);
	else
		untimed = 1;
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
	u32 error = (u8)ctx[1], bytes = ctx[2];
	struct operation *op;
	struct flight *f;

	if (kernel_times)
		return ended(rq, error, bytes);
	f = flight_of((u64)rq);
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
		count_end(op, f->size, f->failed);
		record(&op->service, clock_ns() - f->issued);
	}
	release(f);
	return 0;
}

INLINE struct operation *merged(struct bio *bio)
{
	return counters_of(place_of(bio->bi_bdev->bd_disk, kind_of(bio->bi_opf)));
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
	struct operation *op = counters_of(place_of(rq->q->disk, kind_of(rq->cmd_flags)));
	struct flight *f = kernel_times ? NULL : flight_of((u64)rq);

	if (f && !f->issued)
		release(f);
	if (op)
		op->request_merges++;
	return 0;
}
