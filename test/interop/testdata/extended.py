"""Extended headers: one request for more than 4 GiB, and block status with a payload.

usage: extended.py URI METRICS CONTEXT...; the export is new and sparse, 12 GiB, and
offers the contexts; METRICS is the URL of its server's metrics.
"""

import urllib.request

import nbd

from cases import Skip, argument, arguments, connect, equal, fails, run

URI, METRICS, CONTEXTS = argument(1), argument(2), arguments(3)
K = 1024
M = 1024 * K
G = 1024 * M
SIZE = 12 * G
LONG = 6 * G  # no request of 32 bits has this length
HUGE = (1 << 63) - 4096
BASE = nbd.CONTEXT_BASE_ALLOCATION


def extended(*contexts, strict=None):
    h = connect(URI, *contexts, strict=strict)
    equal(h.get_extended_headers_negotiated(), True, "extended headers")
    equal(h.get_size(), SIZE, "size")
    return h


def loose(*contexts):
    """A handle that sends what libnbd would refuse to."""
    return extended(*contexts, strict=0)


class Requests:
    """How many requests of an operation the server got since it was made."""

    def __init__(self, operation):
        self.name = f'nbd_requests_total{{op="{operation}"}}'
        self.before = self.now()

    def now(self):
        with urllib.request.urlopen(METRICS) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(self.name):
                    return int(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {self.name}")

    def wants(self, count, what):
        equal(self.now() - self.before, count, f"requests for {what}")


def islands(h, offsets, byte):
    """Writes a block at each offset."""
    for offset in offsets:
        h.pwrite(byte * 4096, offset)


def holds(h, offsets, byte, what):
    for offset in offsets:
        equal(bytes(h.pread(4096, offset)), byte * 4096, f"{what}, at {offset}")


def status(h, count, offset, flags=0, only=None):
    """The extents of each context, and what a status of them covers, by its name."""
    found = {}

    def extents(context, at, entries, error):
        equal(at, offset, "offset of a status")
        equal(context in found, False, f"a second chunk of {context}")
        found[context] = list(entries)
        return 0

    if only is None:
        h.block_status_64(count, offset, extents, flags)
    else:
        h.block_status_filter(count, offset, only, extents, flags)
    for context, entries in found.items():
        equal(len(entries) > 0 and all(length > 0 for length, _ in entries), True, f"extents of {context} with a length")
    return found


def joined(entries):
    result = []
    for length, state in entries:
        if result and result[-1][1] == state:
            result[-1] = (result[-1][0] + length, state)
        else:
            result.append((length, state))
    return result


def whole(h, count, ask):
    """The map of the whole export, asked for count bytes at a time."""
    entries, position = [], 0
    while position < SIZE:
        for length, state in ask(h, min(count, SIZE - position), position):
            length = min(length, SIZE - position)
            entries.append((length, state))
            position += length
    return joined(entries)


def base(h, count, offset):
    return status(h, count, offset)[BASE]


# ---- one request of more than 4 GiB -----------------------------------------------


def test_block_status_of_everything_is_one_request():
    h = extended(*CONTEXTS)
    counted = Requests("extents")
    found = status(h, SIZE, 0)
    counted.wants(1, "a status of 12 GiB")
    equal(sorted(found), sorted(CONTEXTS), "contexts that were answered")
    for context, entries in found.items():
        equal(len(entries), 1, f"extents of {context} in an export nobody has written to")
        equal(entries[0][0], SIZE, f"length of that extent of {context}")
    equal(found[BASE][0][1], nbd.STATE_HOLE | nbd.STATE_ZERO, "its state")


def test_trim():
    h = extended(BASE)
    around, within = [G - 4096, G + LONG], [G, G + LONG // 2, G + LONG - 4096]
    islands(h, around + within, b"t")
    counted = Requests("discard")
    h.trim(LONG, G)
    counted.wants(1, "a trim of 6 GiB")
    holds(h, around, b"t", "what lies beside a trim")
    found = status(h, LONG, G)[BASE]
    equal(joined(found), [(LONG, nbd.STATE_HOLE | nbd.STATE_ZERO)], "the trimmed range")
    h.trim(SIZE, 0, nbd.CMD_FLAG_FUA)
    equal(base(h, SIZE, 0), [(SIZE, nbd.STATE_HOLE | nbd.STATE_ZERO)], "the export, trimmed whole")
    counted.wants(2, "both trims")


def test_zero():
    h = extended(BASE)
    around, within = [2 * G - 4096, 2 * G + LONG], [2 * G, 5 * G + 8192, 2 * G + LONG - 4096]
    for flags in [0, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_FAST_ZERO]:
        islands(h, around + within, b"z")
        counted = Requests("write-zeroes")
        try:
            h.zero(LONG, 2 * G, flags)
            want = b"\0"
        except nbd.Error as e:
            equal((e.errno, flags), ("ENOTSUP", nbd.CMD_FLAG_FAST_ZERO), "refusal of a zero")
            want = b"z"
        counted.wants(1, "a zero of 6 GiB")
        holds(h, around, b"z", f"what lies beside a zero with flags {flags}")
        holds(h, within, want, f"a zero with flags {flags}")
    h.trim(SIZE, 0)


def test_cache():
    h = loose()
    h.cache(LONG, G)  # a hint, whatever the export makes of it
    equal(len(h.pread(512, 0)), 512, "a read after it")


def test_block_status_in_pieces_says_the_same():
    h = extended(BASE)
    islands(h, [0, 4 * G - 4096, 4 * G, 9 * G, SIZE - 4096], b"s")
    h.flush()
    want = whole(h, SIZE, base)
    equal(sum(length for length, state in want if not state & nbd.STATE_ZERO) >= 5 * 4096, True, "data that was found")
    equal(max(length for length, _ in want) > 1 << 32, True, "an extent above 4 GiB")
    for count in [LONG, 3 * G, 4 * G + 4096]:
        equal(whole(h, count, base), want, f"the map, asked for {count} bytes at a time")

    def narrow(h, count, offset):
        found = []
        h.block_status(count, offset, lambda context, at, entries, error: found.extend(zip(entries[::2], entries[1::2])) or 0)
        return found

    compact = connect(URI, BASE, setup=lambda h: h.set_request_extended_headers(False))
    equal(compact.get_extended_headers_negotiated(), False, "extended headers")
    equal(whole(compact, 3 * G, narrow), want, "the map, by compact headers")
    h.trim(SIZE, 0)


def test_req_one():
    h = extended(*CONTEXTS)
    h.pwrite(b"1" * M, 8 * G)
    h.flush()
    for context, entries in status(h, LONG, 3 * G, nbd.CMD_FLAG_REQ_ONE).items():
        equal(len(entries), 1, f"extents of {context} with REQ_ONE")
        equal(entries[0][0] <= LONG, True, f"length {entries[0][0]} of {context} within the request")
    h.trim(SIZE, 0)


def test_long_requests_among_others():
    h = extended(BASE)
    h.pwrite(b"m" * 4096, 11 * G)

    def completed(error):
        equal(error.value, 0, "error of a request")
        return 1

    buffers, maps = [nbd.Buffer(4096) for _ in range(32)], []

    def extents(context, at, entries, error):
        maps.append(sum(length for length, _ in entries))
        return 0

    for i, buffer in enumerate(buffers):
        h.aio_pread(buffer, 11 * G, completion=completed)
        [h.aio_trim, h.aio_zero][i % 2](LONG, i * G // 8, completion=completed)
        h.aio_block_status_64(LONG, 0, extents, completion=completed)
    while h.aio_in_flight() > 0:
        h.poll(-1)
    for i, buffer in enumerate(buffers):
        equal(bytes(buffer.to_bytearray()), b"m" * 4096, f"read {i}")
    equal(len(maps), len(buffers), "maps")
    h.trim(SIZE, 0)


# ---- block status with a payload ---------------------------------------------------


def test_filter():
    h = extended(*CONTEXTS)
    equal(h.can_block_status_payload(), True, "block status with a payload")
    islands(h, [0, 5 * G, 10 * G], b"f")
    h.flush()
    want = status(h, SIZE, 0)
    chosen = [[c] for c in CONTEXTS] + [CONTEXTS, CONTEXTS[1:] or CONTEXTS, list(reversed(CONTEXTS))]
    for only in chosen:
        counted = Requests("extents")
        found = status(h, SIZE, 0, only=only)
        counted.wants(1, f"a status of {only}")
        equal(sorted(found), sorted(only), "contexts that were answered")
        for context in only:
            equal(found[context], want[context], f"{context} of {only}")
    one = status(h, LONG, 4096, nbd.CMD_FLAG_REQ_ONE, only=CONTEXTS[-1:])
    equal([len(entries) for entries in one.values()], [1], "extents with REQ_ONE")
    h.trim(SIZE, 0)


def test_filter_tells_contexts_apart():
    dirty = [c for c in CONTEXTS if c.startswith("qemu:dirty-bitmap:")]
    if not dirty:
        raise Skip("no dirty bitmap here")
    h = extended(*CONTEXTS)
    h.zero(M, 5 * G, nbd.CMD_FLAG_NO_HOLE)  # allocated, and zeros as in the snapshot
    h.pwrite(b"d" * M, 7 * G)
    h.flush()

    def at(entries, offset):
        position = 0
        for length, state in entries:
            if position <= offset < position + length:
                return state
            position += length
        raise AssertionError(f"nothing about {offset} in {entries}")

    found = status(h, SIZE, 0, only=[BASE, dirty[0]])
    for context, offset, want in [
        (BASE, 4 * G, nbd.STATE_HOLE | nbd.STATE_ZERO),
        (BASE, 7 * G, 0),
        (dirty[0], 4 * G, 0),
        (dirty[0], 7 * G, nbd.STATE_DIRTY),
        (dirty[0], 9 * G, 0),
    ]:
        equal(at(found[context], offset), want, f"{context} at {offset}")
    equal(at(found[BASE], 5 * G) & nbd.STATE_HOLE, 0, "HOLE where a zero with NO_HOLE was")
    h.trim(SIZE, 0)


def test_filter_that_is_wrong():
    h = loose(*CONTEXTS)
    ignore = lambda *a: 0
    fails("EINVAL", h.block_status_filter, G, 0, [], ignore, nbd.CMD_FLAG_PAYLOAD_LEN)
    fails("EINVAL", h.block_status_filter, G, 0, [BASE, BASE], ignore, nbd.CMD_FLAG_PAYLOAD_LEN)
    fails("EINVAL", h.block_status_filter, G, 0, [BASE] * 4096, ignore, nbd.CMD_FLAG_PAYLOAD_LEN)
    for offset, count in [(SIZE, 512), (0, SIZE + 1), (HUGE, LONG), (LONG, HUGE)]:
        fails("EINVAL", h.block_status_filter, count, offset, [BASE], ignore, nbd.CMD_FLAG_PAYLOAD_LEN)
    for unknown in [nbd.CMD_FLAG_FAST_ZERO, 1 << 10]:
        fails("EINVAL", h.block_status_filter, G, 0, [BASE], ignore, nbd.CMD_FLAG_PAYLOAD_LEN | unknown)
    equal(list(status(h, G, 0, nbd.CMD_FLAG_PAYLOAD_LEN, only=[BASE])), [BASE], "contexts of a filter after the errors")


def test_filter_where_nothing_was_negotiated():
    h = loose()
    equal(h.can_block_status_payload(), False, "block status with a payload")
    fails("EINVAL", h.block_status_64, G, 0, lambda *a: 0)
    equal(len(h.pread(512, 0)), 512, "a read after it")


# ---- errors: each misuse gets its own, and the connection goes on --------------------


def test_past_the_end():
    h = loose(*CONTEXTS)
    ignore = lambda *a: 0
    for offset, count in [(0, SIZE + 1), (G, SIZE), (SIZE, LONG), (SIZE - 512, LONG), (0, HUGE), (G, HUGE), (HUGE, HUGE)]:
        fails("ENOSPC", h.zero, count, offset)
        fails("ENOSPC", h.zero, count, offset, nbd.CMD_FLAG_FAST_ZERO)
        fails("EINVAL", h.trim, count, offset)
        fails("EINVAL", h.cache, count, offset)
        fails("EINVAL", h.block_status_64, count, offset, ignore)
    for offset, count in [((1 << 64) - G, LONG), (G, (1 << 64) - G), ((1 << 64) - 1, (1 << 64) - 1)]:
        fails("ENOSPC", h.zero, count, offset)
        fails("EINVAL", h.trim, count, offset)
    equal(len(h.pread(512, 0)), 512, "a read after the errors")


def test_flags_where_they_do_not_belong():
    h = loose(*CONTEXTS)
    for flag in [nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE, 1 << 6, 1 << 15]:
        fails("EINVAL", h.trim, LONG, 0, flag)
        fails("EINVAL", h.zero, LONG, 0, flag)
        fails("EINVAL", h.cache, LONG, 0, flag)
    for flag in [nbd.CMD_FLAG_DF, nbd.CMD_FLAG_NO_HOLE, 1 << 6, 1 << 15]:
        fails("EINVAL", h.block_status_64, LONG, 0, lambda *a: 0, flag)
    equal(len(h.pread(512, 0)), 512, "a read after the errors")


def test_writes_with_and_without_the_flag_of_their_payload():
    # Extended headers want PAYLOAD_LEN on a write; a client that leaves it out is understood.
    h = loose()
    for flags in [nbd.CMD_FLAG_PAYLOAD_LEN, 0, nbd.CMD_FLAG_PAYLOAD_LEN | nbd.CMD_FLAG_FUA]:
        data = bytes([flags + 1]) * 70000
        h.pwrite(data, 7 * G + 1, flags)
        equal(bytes(h.pread(70000, 7 * G + 1)), data, f"what was written with flags {flags}")
    for flags in [nbd.CMD_FLAG_PAYLOAD_LEN, 0]:
        fails("EINVAL", h.pwrite, bytes(512), 0, flags | nbd.CMD_FLAG_DF)
        fails("ENOSPC", h.pwrite, bytes(512), SIZE, flags)
    equal(bytes(h.pread(70000, 7 * G + 1)), data, "what was written, after the errors")
    h.trim(SIZE, 0)


def test_libnbd_keeps_to_what_was_negotiated():
    h = extended()
    fails("ENOSPC", h.trim, SIZE, G)  # libnbd's own answer; the server's is EINVAL
    fails("EINVAL", h.trim, LONG, 0, nbd.CMD_FLAG_NO_HOLE)
    fails("ENOTSUP", h.block_status_filter, G, 0, [BASE], lambda *a: 0)
    compact = connect(URI, BASE, setup=lambda h: h.set_request_extended_headers(False))
    fails("ERANGE", compact.trim, LONG, 0)
    equal(len(compact.pread(512, 0)), 512, "a read after it")


run(globals())
