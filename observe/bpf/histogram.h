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

/* log2_of is the number of the highest bit of v that is set; 0 for 0. */
INLINE u32 log2_of(u64 v)
{
	u32 r = 0;

	if (v >> 32) { v >>= 32; r = 32; }
	if (v >> 16) { v >>= 16; r += 16; }
	if (v >> 8) { v >>= 8; r += 8; }
	if (v >> 4) { v >>= 4; r += 4; }
	if (v >> 2) { v >>= 2; r += 2; }
	return r + (v >> 1);
}

/* record counts a duration. Nobody else writes h meanwhile: it is of one CPU and one
 * program, or of a thread that is on one CPU at a time. */
INLINE void record(struct histogram *h, u64 ns)
{
	u64 v = (ns - (ns > 0)) >> UNIT_BITS;
	u32 i = v;

	if (v >= 8) {
		u32 shift = log2_of(v) - 3;

		i = (shift << 3) + (u32)(v >> shift); /* (shift + 1) * 8 + the bits below the highest */
	}
	if (i >= BUCKETS)
		i = BUCKETS - 1;
	h->counts[i]++;
	h->sum += ns;
}

#endif
