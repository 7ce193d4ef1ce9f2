//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * How long chosen threads of one process are off their CPUs, and how long it takes
 * from their being woken to their running.
 */
#include "histogram.h"

char terms[] SEC("license") = "Dual BSD/GPL";

const volatile s32 process; /* as the first namespace counts */

/* A thread is on one CPU at a time, and the scheduler orders what it reports of it:
 * nothing here is written by two at once. */
struct thread {
	/* sched_switch */
	u64 off; /* since when it is off its CPU, in nanoseconds; 0: it is on one */
	u64 preempted; /* it was taken off while it could run */
	struct histogram off_cpu; /* all of the time off a CPU */
	struct histogram waiting; /* that part of off_cpu in which it could run throughout */
	struct histogram wakeup; /* from being woken to running */
	/* sched_wakeup */
	u64 woken; /* when, in nanoseconds; 0: not since it went off its CPU */
};

struct {
	NUMBER(type, BPF_MAP_TYPE_HASH);
	NUMBER(max_entries, 512);
	NUMBER(map_flags, BPF_F_NO_PREALLOC);
	TYPE(key, s32); /* thread id, as its own namespace counts */
	TYPE(value, struct thread);
} threads SEC(".maps");

INLINE struct thread *thread_of(struct task_struct *task)
{
	struct pid *pid = task->thread_pid;
	s32 id = task->pid;
	u32 level = pid->level;

	if (level) /* struct upid is 16 bytes: a number and a pointer */
		read_kernel(&id, sizeof(id), (char *)&pid->numbers + (u64)level * 16);
	return map_lookup(&threads, &id);
}

SEC("tp_btf/sched_switch")
int sched_switch(u64 *ctx)
{
	struct task_struct *prev = (void *)ctx[1], *next = (void *)ctx[2];
	struct thread *t;
	u64 now = 0;

	if (prev->tgid == process) {
		t = thread_of(prev);
		if (t) {
			t->woken = 0;
			t->preempted = (u8)ctx[0] || !(u32)ctx[3];
			t->off = now = clock_ns();
		}
	}
	if (next->tgid == process) {
		t = thread_of(next);
		if (t && t->off) {
			if (!now)
				now = clock_ns();
			record(&t->off_cpu, now - t->off);
			if (t->preempted)
				record(&t->waiting, now - t->off);
			else if (t->woken && t->woken <= now)
				record(&t->wakeup, now - t->woken);
			t->off = 0;
		}
	}
	return 0;
}

SEC("tp_btf/sched_wakeup")
int sched_wakeup(u64 *ctx)
{
	struct task_struct *task = (void *)ctx[0];
	struct thread *t;

	if (task->tgid != process)
		return 0;
	t = thread_of(task);
	if (t && t->off)
		t->woken = clock_ns();
	return 0;
}
