"""The handshake, option by option.

usage: negotiation.py SOCKET NAME SIZE OTHER OTHERSIZE; two exports on a unix socket.
"""

import nbd

from cases import argument, equal, fails, need, run

SOCKET, NAME, SIZE, OTHER, OTHERSIZE = argument(1), argument(2), int(argument(3)), argument(4), int(argument(5))


def negotiating():
    """A handle in the middle of its handshake."""
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_unix(SOCKET)
    equal(h.aio_is_negotiating(), True, "negotiating")
    return h


def listed(h):
    names = {}

    def export(name, description):
        names[name] = description
        return 0

    equal(h.opt_list(export), len(names), "count of exports")
    return names


def test_list():
    h = negotiating()
    names = listed(h)
    equal(sorted(names), sorted([NAME, OTHER]), "exports")
    equal(listed(h), names, "a second list")
    h.opt_abort()
    equal(h.aio_is_closed(), True, "closed after abort")


def test_info_then_go_say_the_same():
    h = negotiating()
    for name, size in [(OTHER, OTHERSIZE), (NAME, SIZE)]:
        h.set_export_name(name)
        h.opt_info()
        equal(h.get_size(), size, f"size of {name} by info")
    flags = (h.is_read_only(), h.can_flush(), h.can_trim(), h.can_multi_conn(), h.can_df())
    h.opt_go()
    equal(h.get_size(), SIZE, "size by go")
    equal((h.is_read_only(), h.can_flush(), h.can_trim(), h.can_multi_conn(), h.can_df()), flags, "flags by go")
    equal(len(h.pread(512, 0)), 512, "a read")


def test_unknown_export_leaves_the_handshake_usable():
    h = negotiating()
    h.set_export_name("no such export")
    fails("ENOENT", h.opt_info)
    fails("ENOENT", h.opt_go)
    equal(h.aio_is_negotiating(), True, "negotiating after the refusals")
    h.set_export_name(NAME)
    h.opt_go()
    equal(h.get_size(), SIZE, "size after the refusals")


def test_longest_name():
    h = negotiating()
    h.set_export_name("n" * 4096)
    fails("ENOENT", h.opt_go)
    h.set_export_name(NAME)
    h.opt_go()


def test_full_info():
    h = negotiating()
    h.set_full_info(True)
    h.set_export_name(NAME)
    h.opt_go()
    equal(h.get_canonical_export_name(), NAME, "canonical name")
    try:
        equal(len(h.get_export_description()) > 0, True, "description is not empty")
    except nbd.Error as e:
        equal(e.errno, "ENOTSUP", "no description")


def contexts(h, *queries):
    h.clear_meta_contexts()
    for query in queries:
        h.add_meta_context(query)
    found = []

    def context(name):
        found.append(name)
        return 0

    h.opt_list_meta_context(context)
    return found


def test_list_meta_contexts():
    h = negotiating()
    h.set_export_name(NAME)
    equal("base:allocation" in contexts(h), True, "base:allocation among all")
    equal(contexts(h, "base:"), ["base:allocation"], "base: as a wildcard")
    equal(contexts(h, "base:allocation"), ["base:allocation"], "base:allocation by name")
    equal(contexts(h, "base:nothing"), [], "an unknown leaf")
    equal(contexts(h, "x-nobody:"), [], "an unknown namespace")
    h.set_export_name("no such export")
    h.clear_meta_contexts()
    try:
        h.opt_list_meta_context(lambda name: 0)
    except nbd.Error as e:  # libnbd 1.14 shows every refusal as ENOTSUP, later ones this as ENOENT
        equal("replied with error" in str(e) or e.errno == "ENOENT", True, f"{e} for an unknown export")
    else:
        raise AssertionError("the contexts of an unknown export were listed")
    h.set_export_name(NAME)
    h.opt_go()


def test_contexts_follow_the_export():
    h = negotiating()
    h.add_meta_context("base:allocation")
    h.set_export_name(NAME)
    h.opt_info()
    equal(h.can_meta_context("base:allocation"), True, "after info")
    h.set_export_name(OTHER)
    h.opt_go()
    equal(h.can_meta_context("base:allocation"), True, "after go on another export, negotiated anew")
    h.block_status(4096, 0, lambda *a: 0)


def test_a_wildcard_selects_nothing():
    h = nbd.NBD()
    h.add_meta_context("base:")
    h.set_export_name(NAME)
    h.connect_unix(SOCKET)
    equal(h.can_meta_context("base:"), False, "base: selected")
    equal(len(h.pread(512, 0)), 512, "a read")


def test_set_meta_contexts_by_hand():
    need("opt_set_meta_context")
    h = negotiating()
    h.set_export_name(NAME)
    h.opt_set_meta_context_queries(["base:allocation"], lambda name: 0)
    equal(h.can_meta_context("base:allocation"), True, "selected")
    h.opt_set_meta_context_queries([], lambda name: 0)
    equal(h.can_meta_context("base:allocation"), False, "each call replaces the last")


def test_structured_reply_by_hand():
    need("opt_structured_reply")
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.set_request_structured_replies(False)
    h.connect_unix(SOCKET)
    equal(h.opt_structured_reply(), True, "structured replies")
    equal(h.opt_structured_reply(), False, "structured replies a second time")


def test_extended_headers():
    need("set_request_extended_headers")
    h = nbd.NBD()
    h.set_export_name(NAME)
    h.connect_unix(SOCKET)
    equal(h.get_extended_headers_negotiated(), True, "extended headers")
    equal(len(h.pread(512, 0)), 512, "a read")


def test_extended_headers_not_asked_for():
    need("set_request_extended_headers")
    h = nbd.NBD()
    h.set_export_name(NAME)
    h.set_request_extended_headers(False)
    h.connect_unix(SOCKET)
    equal(h.get_extended_headers_negotiated(), False, "extended headers")
    equal(h.get_structured_replies_negotiated(), True, "structured replies")
    equal(len(h.pread(512, 0)), 512, "a read")


def test_extended_headers_by_hand():
    need("opt_extended_headers")
    for structured in [False, True]:
        h = nbd.NBD()
        h.set_opt_mode(True)
        h.set_request_extended_headers(False)
        h.set_request_structured_replies(structured)
        h.connect_unix(SOCKET)
        equal(h.get_extended_headers_negotiated(), False, "extended headers before")
        equal(h.opt_extended_headers(), True, f"extended headers, structured replies {structured}")
        equal(h.opt_extended_headers(), False, "extended headers a second time")
        equal(h.opt_structured_reply(), False, "structured replies after extended headers")
        h.set_export_name(NAME)
        h.opt_set_meta_context_queries(["base:allocation"], lambda name: 0)
        h.opt_go()
        equal(h.get_extended_headers_negotiated(), True, "extended headers")
        equal(h.can_block_status_payload(), True, "block status with a payload")
        equal(len(h.pread(512, 0)), 512, "a read")


def test_block_status_payload_needs_what_it_stands_on():
    need("can_block_status_payload")
    for extended, context in [(False, True), (True, False)]:
        h = nbd.NBD()
        h.set_export_name(NAME)
        h.set_request_extended_headers(extended)
        if context:
            h.add_meta_context("base:allocation")
        h.connect_unix(SOCKET)
        equal(h.can_block_status_payload(), False, f"payload, extended headers {extended}, contexts {context}")


def test_handshake_flags():
    for flags in [0, nbd.HANDSHAKE_FLAG_NO_ZEROES, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE]:
        h = nbd.NBD()
        h.set_handshake_flags(flags)
        h.set_export_name(NAME)
        h.connect_unix(SOCKET)
        equal(h.get_size(), SIZE, f"size with handshake flags {flags}")
        equal(len(h.pread(512, 0)), 512, "a read")


def test_export_name_option_on_an_unknown_export_drops():
    h = nbd.NBD()
    h.set_handshake_flags(0)
    h.set_export_name("no such export")
    try:
        h.connect_unix(SOCKET)
    except nbd.Error:
        return
    raise AssertionError("connected to an export that does not exist")


def test_a_client_that_leaves_in_the_middle():
    for _ in range(20):
        h = negotiating()
        del h  # closes the socket without a word
    equal(sorted(listed(negotiating())), sorted([NAME, OTHER]), "exports after rude clients")


run(globals())
