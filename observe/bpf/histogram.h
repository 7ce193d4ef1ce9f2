/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Counts of durations. Up to 1024 ns a bucket is 128 ns wide; above, each power of
 * two is cut into 8 buckets, up to 2^35 ns (34 s); the last bucket takes everything
 * longer. Bucket i takes (upper(i-1), upper(i)], so a power of two is the last value
 * of its bucket. observe/histogram.go has the same table.
 */
#ifndef ASHLAR_HISTOGRAM_H
#define ASHLAR_HISTOGRAM_H

#include "kernel.h"

#define UNIT_BITS 7
#define BUCKETS 208

struct histogram {
	u64 sum; /* nanoseconds */
	u64 counts[BUCKETS];
};

/* The number of the highest bit of a byte that is set. */
static const u8 highest_bits[256] = {
	[2 ... 3] = 1, [4 ... 7] = 2, [8 ... 15] = 3, [16 ... 31] = 4,
	[32 ... 63] = 5, [64 ... 127] = 6, [128 ... 255] = 7,
};

INLINE u32 highest_bit(u32 v)
{
	asm("" : "+r"(v)); /* so that the mask stays, which the verifier wants to see */
	return highest_bits[v & 255];
}

/* log2_of is the number of the highest bit of v that is set; 0 for 0. The branches go the
 * same way for all that is about as large; a tree of them down to single bits does not. */
INLINE u32 log2_of(u32 v)
{
	if (v < 1 << 8)
		return highest_bit(v);
	if (v < 1 << 16)
		return 8 + highest_bit(v >> 8);
	if (v < 1 << 24)
		return 16 + highest_bit(v >> 16);
	return 24 + highest_bit(v >> 24);
}

/* record counts a duration, as so many. Nobody else writes h meanwhile: it is of one CPU
 * and one program, or of a thread that is on one CPU at a time. */
INLINE void record_many(struct histogram *h, u64 ns, u64 events)
{
	u64 v = (ns - (ns > 0)) >> UNIT_BITS;
	u32 i = v;

	if (v >> 28)
		i = BUCKETS - 1;
	else if (v >= 8) {
		u32 shift = log2_of(v) - 3;

		i = (shift << 3) + ((u32)v >> shift); /* (shift + 1) * 8 + the bits below the highest */
	}
	asm("" : "+r"(i)); /* the verifier wants to see this too */
	if (i >= BUCKETS)
		i = BUCKETS - 1;
	h->counts[i] += events;
	h->sum += ns * events;
}

INLINE void record(struct histogram *h, u64 ns) { record_many(h, ns, 1); }

#endif
