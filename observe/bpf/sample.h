/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What happens often is not timed every time: reading the clock and finding buckets costs
 * more than counting. Up to pace events in a tick of the scheduler (1 to 10 ms) are all
 * timed, then about one of 4, and from 4 times that pace on one of 16. What is timed
 * stands for itself and for those before it that were not.
 */
#ifndef ASHLAR_SAMPLE_H
#define ASHLAR_SAMPLE_H

#include "kernel.h"

const volatile u32 pace; /* the loader sets it; 0: every event is timed */

struct sample {
	u64 tick; /* the last one in which there was an event */
	u32 seen; /* events in it */
	u32 shift; /* one of 1 << shift is timed */
	u32 phase; /* moves by the golden ratio, so that what comes in batches is met anywhere */
	u32 waiting; /* not timed since the last one that was */
};

/* sampled says for how many events the present one is timed; 0: it is not. Nobody else
 * writes s meanwhile. */
INLINE u32 sampled(struct sample *s)
{
	u64 now;
	u32 events;

	if (!pace)
		return 1;
	now = jiffies();
	if (s->tick != now) {
		s->shift = s->tick + 1 != now || s->seen <= pace ? 0 : s->seen <= 4 * pace ? 2 : 4;
		s->tick = now;
		s->seen = 0;
	}
	s->seen++;
	s->waiting++;
	s->phase += 0x9e3779b1U;
	if (s->shift && s->phase >> (32 - s->shift))
		return 0;
	events = s->waiting;
	s->waiting = 0;
	return events;
}

#endif
