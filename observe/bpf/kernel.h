/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the programs of this folder use of the kernel: the helper functions by
 * their numbers, and of each structure only the fields that are read. The offsets
 * are those of the running kernel: the compiler records every access, and the
 * loader corrects it from the kernel's BTF. All of it holds for Linux 6.1 to 7.3.
 */
#ifndef ASHLAR_KERNEL_H
#define ASHLAR_KERNEL_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int s32;

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define RARE static __attribute__((noinline)) /* what is seldom called costs the rest no registers */
#define NULL ((void *)0)

/* uapi/linux/bpf.h: enum bpf_map_type, flags of maps and updates. */
#define BPF_MAP_TYPE_HASH 1
#define BPF_MAP_TYPE_ARRAY 2
#define BPF_MAP_TYPE_PERCPU_HASH 5
#define BPF_MAP_TYPE_PERCPU_ARRAY 6
#define BPF_MAP_TYPE_LRU_HASH 9
#define BPF_F_NO_PREALLOC 1
#define BPF_ANY 0
#define BPF_NOEXIST 1

/* How a map is described to the loader: a number as the size of an array, a type
 * as what a pointer points to. */
#define NUMBER(name, value) int(*name)[value]
#define TYPE(name, type) type *name

/* uapi/linux/bpf.h: the helper functions, by number. */
static void *(*const map_lookup)(void *map, const void *key) = (void *)1;
static long (*const map_update)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static u64 (*const clock_ns)(void) = (void *)5; /* CLOCK_MONOTONIC */
static u64 (*const current_ids)(void) = (void *)14; /* process << 32 | thread */
static u64 (*const jiffies)(void) = (void *)118; /* a variable of the kernel, read in place */
static long (*const read_kernel)(void *to, u32 size, const void *from) = (void *)113;

/* hash_of takes 32 bits: of a pointer, the verifier lets no more be computed with. */
INLINE u32 hash_of(u32 v) { return (v * 0x9e3779b1U) >> 12; }

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct gendisk {
	int major;
	int first_minor;
	char disk_name[32];
};

struct request_queue {
	struct gendisk *disk;
};

struct block_device {
	struct gendisk *bd_disk;
};

struct bio {
	struct block_device *bi_bdev;
	u32 bi_opf;
};

enum mq_rq_state { MQ_RQ_IDLE, MQ_RQ_IN_FLIGHT, MQ_RQ_COMPLETE };

/* The times are of CLOCK_MONOTONIC; since Linux 6.9, what a thread submits in one go may
 * share one reading of it (blk_time_get_ns). */
struct request {
	struct request_queue *q;
	u32 cmd_flags;
	u32 __data_len; /* bytes that are not done */
	struct block_device *part; /* NULL when it is not part of the statistics */
	u64 start_time_ns; /* 0 or an old one when the queue keeps no statistics */
	u64 io_start_time_ns; /* of the last issue; 0 when nobody has asked for statistics of issues */
	u16 stats_sectors; /* of the last issue, likewise */
	enum mq_rq_state state;
};

struct upid {
	int nr;
};

struct pid {
	u32 level; /* of the innermost namespace */
	struct upid numbers[1];
};

struct task_struct {
	s32 pid; /* of the thread, as the first namespace counts */
	s32 tgid; /* of the process */
	struct pid *thread_pid;
};

struct io_kiocb {
	u8 opcode;
};

#pragma clang attribute pop

#endif
