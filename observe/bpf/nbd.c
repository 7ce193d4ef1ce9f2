//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The kernel's NBD client, by device: sending, waiting for the server, receiving.
 */
#include "histogram.h"

char terms[] SEC("license") = "Dual BSD/GPL";

/* A request by its address; the driver uses the same memory for a tag again. */
struct transfer {
	u64 begun; /* nanoseconds; 0: no request is being sent or waited for */
	u64 sent;
	u64 answered;
	u64 device;
};

struct client {
	struct histogram send; /* nbd_payload_sent: of header and payload */
	struct histogram wait; /* nbd_header_received: until the reply's header */
	struct histogram receive; /* nbd_payload_received: of the reply's payload */
};

struct {
	NUMBER(type, BPF_MAP_TYPE_LRU_HASH);
	NUMBER(max_entries, 16384);
	TYPE(key, u64);
	TYPE(value, struct transfer);
} transfers SEC(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_PERCPU_HASH);
	NUMBER(max_entries, 64); /* the loader sets it */
	TYPE(key, u32); /* major << 20 | minor */
	TYPE(value, struct client);
} clients SEC(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_ARRAY);
	NUMBER(max_entries, 1);
	TYPE(key, u32);
	TYPE(value, struct client);
} nothing SEC(".maps"); /* never written: what a new client starts as */

u64 refused; /* requests of devices that found no room */

SEC("tp_btf/nbd_send_request")
int nbd_send_request(u64 *ctx)
{
	struct request *rq = (void *)ctx[2];
	struct transfer t = {.begun = clock_ns()};
	u64 address = (u64)rq;
	struct gendisk *disk;
	u32 device, first = 0;
	void *zero;

	if (!rq) /* of a module's tracepoints, newer verifiers believe no pointer */
		return 0;
	disk = rq->q->disk;
	if (!disk)
		return 0;
	device = (u32)disk->major << 20 | (u32)disk->first_minor;
	if (!map_lookup(&clients, &device)) {
		zero = map_lookup(&nothing, &first);
		if (!zero)
			return 0;
		if (map_update(&clients, &device, zero, BPF_NOEXIST) && !map_lookup(&clients, &device)) {
			__sync_fetch_and_add(&refused, 1);
			return 0;
		}
	}
	t.device = device;
	map_update(&transfers, &address, &t, BPF_ANY);
	return 0;
}

SEC("tp_btf/nbd_payload_sent")
int nbd_payload_sent(u64 *ctx)
{
	u64 address = ctx[0];
	struct transfer *t = map_lookup(&transfers, &address);
	struct client *c;
	u32 device;

	if (!t || !t->begun || t->sent)
		return 0;
	device = t->device;
	c = map_lookup(&clients, &device);
	if (!c)
		return 0;
	t->sent = clock_ns();
	record(&c->send, t->sent - t->begun);
	return 0;
}

/* The reply can be there before the sender has noticed that it has sent. */
SEC("tp_btf/nbd_header_received")
int nbd_header_received(u64 *ctx)
{
	u64 address = ctx[0];
	struct transfer *t = map_lookup(&transfers, &address);
	struct client *c;
	u32 device;

	if (!t || !t->begun || t->answered)
		return 0;
	device = t->device;
	c = map_lookup(&clients, &device);
	if (!c)
		return 0;
	t->answered = clock_ns();
	record(&c->wait, t->sent && t->sent <= t->answered ? t->answered - t->sent : 0);
	return 0;
}

SEC("tp_btf/nbd_payload_received")
int nbd_payload_received(u64 *ctx)
{
	u64 address = ctx[0];
	struct transfer *t = map_lookup(&transfers, &address);
	struct client *c;
	u32 device;

	if (!t || !t->answered)
		return 0;
	device = t->device;
	c = map_lookup(&clients, &device);
	if (c)
		record(&c->receive, clock_ns() - t->answered);
	t->begun = 0;
	t->answered = 0;
	return 0;
}
