"""Commands, their flags and their errors.

usage: commands.py URI READONLY-URI FILE; the export is FILE, sparse and new, or
memory when FILE is empty.
"""

import os
import random

import nbd

from cases import Skip, argument, connect, equal, fails, run

URI, READONLY, FILE = argument(1), argument(2), argument(3)
K = 1024
M = 1024 * K
HUGE = 1 << 62


def loose(uri=URI, *contexts):
    """A handle that sends what libnbd would refuse to."""
    return connect(uri, *contexts, strict=0)


# ---- what the server says it can do ---------------------------------------------


def test_flags():
    h = connect(URI)
    for name in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df"]:
        equal(getattr(h, name)(), True, name)
    equal(h.can_cache(), False, "can_cache: neither a file reached directly nor memory has a cache to fill")
    equal(h.is_read_only(), False, "is_read_only")
    equal(h.get_protocol(), "newstyle-fixed", "protocol")
    equal(h.get_structured_replies_negotiated(), True, "structured replies")
    equal(connect(READONLY).is_read_only(), True, "is_read_only of the read-only export")


def test_block_sizes():
    h = connect(URI)
    least = h.get_block_size(nbd.SIZE_MINIMUM)
    preferred = h.get_block_size(nbd.SIZE_PREFERRED)
    most = h.get_block_size(nbd.SIZE_MAXIMUM)
    equal(least & (least - 1), 0, f"minimum {least} as a power of two")
    equal(preferred & (preferred - 1), 0, f"preferred {preferred} as a power of two")
    equal(1 <= least <= 65536, True, f"minimum {least} in 1..65536")
    equal(preferred >= max(least, 512), True, f"preferred {preferred} >= 512")
    equal(most >= M, True, f"maximum {most} >= 1 MiB")


# ---- data -------------------------------------------------------------------------


def test_write_and_read_back():
    h = connect(URI)
    data = os.urandom(M)
    h.pwrite(data, 3 * M)
    equal(bytes(h.pread(M, 3 * M)), data, "what was written")
    h.flush()


def test_unaligned_requests_keep_their_neighbours():
    h = loose()
    at = 8 * M
    h.pwrite(b"a" * 16384, at)
    h.pwrite(b"b" * 3, at + 5)
    h.pwrite(b"c" * 5000, at + 4095)
    h.zero(7, at + 1)
    want = bytearray(b"a" * 16384)
    want[5:8] = b"b" * 3
    want[4095:9095] = b"c" * 5000
    want[1:8] = bytes(7)
    equal(bytes(h.pread(16384, at)), bytes(want), "unaligned changes")
    equal(bytes(h.pread(1, at + 9094)), b"c", "one byte")


def test_first_and_last_byte():
    h = loose()
    size = h.get_size()
    h.pwrite(b"x", 0)
    h.pwrite(b"y", size - 1)
    equal(bytes(h.pread(1, 0)), b"x", "first byte")
    equal(bytes(h.pread(1, size - 1)), b"y", "last byte")
    h.zero(1, 0)
    h.zero(1, size - 1)


def test_fua_on_every_command():
    h = loose()
    h.pwrite(b"f" * 4096, 16 * M, nbd.CMD_FLAG_FUA)
    h.zero(4096, 16 * M + 4096, nbd.CMD_FLAG_FUA)
    h.trim(4096, 16 * M + 8192, nbd.CMD_FLAG_FUA)
    equal(bytes(h.pread(4096, 16 * M, nbd.CMD_FLAG_FUA)), b"f" * 4096, "a read with FUA")
    h.cache(4096, 16 * M, nbd.CMD_FLAG_FUA)
    h.flush(nbd.CMD_FLAG_FUA)


def test_zero_reads_back_as_zeros():
    h = connect(URI)
    at = 20 * M
    for flags in [0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA]:
        h.pwrite(b"z" * M, at)
        h.zero(M - 2 * 4096, at + 4096, flags)
        want = b"z" * 4096 + bytes(M - 8192) + b"z" * 4096
        equal(bytes(h.pread(M, at)), want, f"zero with flags {flags}")


def test_fast_zero_is_fast_or_refused_unchanged():
    h = connect(URI)
    at = 24 * M
    h.pwrite(b"q" * M, at)
    if not h.can_fast_zero():
        fails("EINVAL", loose().zero, M, at, nbd.CMD_FLAG_FAST_ZERO)
        return
    try:
        h.zero(M, at, nbd.CMD_FLAG_FAST_ZERO)
        want = bytes(M)
    except nbd.Error as e:
        equal(e.errno, "ENOTSUP", "refusal of a fast zero")
        want = b"q" * M
    equal(bytes(h.pread(M, at)), want, "after a fast zero")


def test_trim_keeps_the_rest():
    h = connect(URI)
    at = 28 * M
    h.pwrite(b"t" * M, at)
    h.trim(512 * K, at + 256 * K)
    got = bytes(h.pread(M, at))
    equal(got[: 256 * K], b"t" * 256 * K, "before the trimmed range")
    equal(got[768 * K :], b"t" * 256 * K, "after the trimmed range")
    h.trim(1, at)  # a hint smaller than any block


def test_whole_device_effects():
    h = connect(URI)
    size = h.get_size()
    at = 40 * M
    h.pwrite(b"w" * 4096, at)
    if h.can_cache():
        h.cache(min(size, 0xFFFFF000), 0)
    h.zero(min(size - at, 0xFFFFF000), at)
    equal(bytes(h.pread(4096, at)), bytes(4096), "after zeroing far more than a payload may hold")


def test_many_in_flight():
    h = connect(URI)
    chooser = random.Random(1)
    blocks = [bytes([chooser.randrange(256)]) * 4096 for _ in range(256)]
    order = list(range(256))
    chooser.shuffle(order)
    base = 48 * M

    def drain():
        while h.aio_in_flight() > 0:
            h.poll(-1)

    def completed(error):
        equal(error.value, 0, "error of a write")
        return 1

    for i in order:
        h.aio_pwrite(blocks[i], base + 4096 * i, completion=completed)
    drain()
    buffers = {}
    chooser.shuffle(order)
    for i in order:
        buffers[i] = nbd.Buffer(4096)
        h.aio_pread(buffers[i], base + 4096 * i, completion=completed)
    drain()
    for i in order:
        equal(bytes(buffers[i].to_bytearray()), blocks[i], f"block {i}")


def test_flush_on_another_connection():
    a, b = connect(URI), connect(URI)
    a.pwrite(b"m" * 4096, 56 * M)
    b.flush()
    equal(bytes(b.pread(4096, 56 * M)), b"m" * 4096, "a write seen by another connection")


# ---- structured replies -----------------------------------------------------------


def chunks_of(h, count, offset, flags=0):
    chunks = []

    def chunk(data, at, status, error):
        chunks.append((at, len(data), status, bytes(data)))
        return 0

    h.pread_structured(count, offset, chunk, flags)
    return chunks


def test_read_chunks_cover_the_range_once():
    h = connect(URI)
    at = 64 * M
    h.zero(M, at)
    h.pwrite(b"s" * 64 * K, at + 128 * K)
    got, covered = bytearray(b"?" * M), 0
    for where, length, status, data in chunks_of(h, M, at):
        equal(status in (nbd.READ_DATA, nbd.READ_HOLE), True, "chunk kind")
        got[where - at : where - at + length] = data if status == nbd.READ_DATA else bytes(length)
        covered += length
    equal(covered, M, "bytes covered by chunks")
    want = bytearray(M)
    want[128 * K : 192 * K] = b"s" * 64 * K
    equal(bytes(got), bytes(want), "content of the chunks")


def test_df_is_one_chunk():
    h = connect(URI)
    at = 66 * M
    h.zero(64 * K, at)
    h.pwrite(b"d" * 4096, at + 8192)
    chunks = chunks_of(h, 64 * K, at, nbd.CMD_FLAG_DF)
    equal(len(chunks), 1, "content chunks with DF")
    equal(chunks[0][1], 64 * K, "length of the chunk")
    equal(chunks[0][3][8192:12288], b"d" * 4096, "data in the chunk")


def test_without_structured_replies():
    h = connect(URI, setup=lambda h: h.set_request_structured_replies(False))
    equal(h.get_structured_replies_negotiated(), False, "structured replies")
    equal(h.can_df(), False, "DF needs structured replies")
    h.pwrite(b"p" * 4096, 68 * M)
    equal(bytes(h.pread(8192, 68 * M))[:4096], b"p" * 4096, "a simple reply")
    bad = connect(URI, strict=0, setup=lambda h: h.set_request_structured_replies(False))
    fails("EINVAL", bad.pread, 512, bad.get_size())
    fails("ENOSPC", bad.pwrite, bytes(512), bad.get_size())
    equal(len(bad.pread(512, 0)), 512, "a read after errors in simple replies")


# ---- block status -----------------------------------------------------------------


def map_of(h, count, offset, flags=0):
    result = []

    def extent(context, at, entries, error):
        equal(context, nbd.CONTEXT_BASE_ALLOCATION, "context")
        result.append(list(entries))
        return 0

    h.block_status(count, offset, extent, flags)
    equal(len(result), 1, "chunks for one context")
    return list(zip(result[0][::2], result[0][1::2]))


def test_block_status():
    h = connect(URI, nbd.CONTEXT_BASE_ALLOCATION)
    equal(h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION), True, "base:allocation")
    at = 72 * M
    h.trim(4 * M, at)
    h.pwrite(b"b" * M, at + M)
    h.flush()
    position, data = 0, 0
    while position < 4 * M:
        for length, flags in map_of(h, 4 * M - position, at + position):
            equal(length > 0, True, "length of an extent")
            equal(flags & ~3, 0, "flags beyond HOLE and ZERO")
            if flags == 0:
                data += min(length, 4 * M - position)
            overlap = position < 2 * M and position + length > M
            if overlap:
                equal(flags & nbd.STATE_ZERO, 0, f"ZERO at {position}, where data is")
            position += length
            if position >= 4 * M:
                break
    equal(data >= M, True, f"data reported ({data}) covers what was written")


def test_block_status_req_one():
    h = connect(URI, nbd.CONTEXT_BASE_ALLOCATION)
    at = 80 * M
    h.pwrite(b"1" * 64 * K, at)
    extents = map_of(h, 4096, at, nbd.CMD_FLAG_REQ_ONE)
    equal(len(extents), 1, "extents with REQ_ONE")
    equal(extents[0][0] <= 4096, True, f"length {extents[0][0]} <= 4096")


def test_no_hole_keeps_space_provisioned():
    if not FILE:
        raise Skip("no file behind this export")
    h = connect(URI)
    at = 84 * M
    h.trim(M, at)
    h.flush()
    before = os.stat(FILE).st_blocks
    h.zero(M, at, nbd.CMD_FLAG_NO_HOLE)
    h.flush()
    grown = (os.stat(FILE).st_blocks - before) * 512
    equal(grown >= M, True, f"{grown} bytes provisioned by a zero of 1 MiB with NO_HOLE")


# ---- errors: each misuse gets its own, and the connection goes on ------------------


def test_past_the_end():
    h = loose(URI, nbd.CONTEXT_BASE_ALLOCATION)
    size = h.get_size()
    ignore = lambda *a: 0
    for offset, count in [(size, 512), (size - 512, 1024), (size + 4096, 512), (HUGE, 512), ((1 << 63) - 512, 1024)]:
        fails("ENOSPC", h.pwrite, bytes(count), offset)
        fails("ENOSPC", h.zero, count, offset)
        fails("EINVAL", h.pread, count, offset)
        fails("EINVAL", h.trim, count, offset)
        fails("EINVAL", h.cache, count, offset)
        fails("EINVAL", h.block_status, count, offset, ignore)
    equal(len(h.pread(512, 0)), 512, "a read after the errors")


def test_offset_and_length_that_overflow():
    h = loose()
    fails("EINVAL", h.pread, 4096, (1 << 64) - 512)
    fails("ENOSPC", h.pwrite, bytes(4096), (1 << 64) - 512)
    fails("ENOSPC", h.zero, 0xFFFFFFFF, (1 << 64) - 512)
    equal(len(h.pread(512, 0)), 512, "a read after the errors")


def test_flags_where_they_do_not_belong():
    h = loose(URI, nbd.CONTEXT_BASE_ALLOCATION)
    ignore = lambda *a: 0
    fails("EINVAL", h.pwrite, bytes(512), 0, nbd.CMD_FLAG_DF)
    fails("EINVAL", h.pwrite, bytes(512), 0, nbd.CMD_FLAG_NO_HOLE)
    fails("EINVAL", h.pwrite, bytes(512), 0, nbd.CMD_FLAG_FAST_ZERO)
    fails("EINVAL", h.pread, 512, 0, nbd.CMD_FLAG_REQ_ONE)
    fails("EINVAL", h.pread, 512, 0, nbd.CMD_FLAG_NO_HOLE)
    fails("EINVAL", h.trim, 512, 0, nbd.CMD_FLAG_DF)
    fails("EINVAL", h.zero, 512, 0, nbd.CMD_FLAG_REQ_ONE)
    fails("EINVAL", h.flush, nbd.CMD_FLAG_DF)
    fails("EINVAL", h.cache, 512, 0, nbd.CMD_FLAG_REQ_ONE)
    fails("EINVAL", h.block_status, 512, 0, ignore, nbd.CMD_FLAG_NO_HOLE)
    for unknown in [1 << 6, 1 << 10, 1 << 15]:
        fails("EINVAL", h.pread, 512, 0, unknown)
        fails("EINVAL", h.pwrite, bytes(512), 0, unknown)
    equal(len(h.pread(512, 0)), 512, "a read after the errors")


def test_read_only():
    h = loose(READONLY)
    size = h.get_size()
    for offset in [0, size, HUGE]:
        fails("EPERM", h.pwrite, bytes(512), offset)
        fails("EPERM", h.trim, 512, offset)
        fails("EPERM", h.zero, 512, offset)
    equal(len(h.pread(512, 0)), 512, "a read after the errors")


def test_zero_length_keeps_the_connection():
    h = loose(URI, nbd.CONTEXT_BASE_ALLOCATION)
    for call in [
        lambda: h.pread(0, 0),
        lambda: h.pwrite(b"", 0),
        lambda: h.trim(0, 0),
        lambda: h.zero(0, 0),
        lambda: h.cache(0, 0),
        lambda: h.block_status(0, 0, lambda *a: 0),
    ]:
        try:
            call()
        except nbd.Error as e:
            equal(e.errno in ("EINVAL", "ENOSPC"), True, f"{e.errno} for an empty request")
    equal(len(h.pread(512, 0)), 512, "a read after empty requests")


def test_payload_above_the_advertised_maximum():
    h = loose()
    most = h.get_block_size(nbd.SIZE_MAXIMUM)
    if most >= 64 * M:
        return
    # Up to 32 MiB the payload is read and refused, or served; beyond, the
    # connection may be dropped, but the next one works.
    for count in [most + 4096, 33 * M]:
        g = loose()
        for call in [lambda: g.pread(count, 0), lambda: g.pwrite(bytes(count), 0)]:
            try:
                call()
            except nbd.Error as e:
                if count <= 32 * M:
                    equal(e.errno in ("EINVAL", "EOVERFLOW"), True, f"{e.errno} for {count} bytes")
    equal(len(loose().pread(512, 0)), 512, "a read on a new connection")


run(globals())
