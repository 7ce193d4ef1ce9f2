//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Who runs this: the process id as the first pid namespace counts, which a process
 * in a container cannot know otherwise. It is run by hand and never attached.
 */
#include "kernel.h"

char terms[] SEC("license") = "Dual BSD/GPL";

SEC("raw_tp")
int self(void *ctx)
{
	return current_ids() >> 32;
}
