"""Runs the functions of a script whose names begin with test_, one after the
other, and prints one line for each: "ok NAME", "skip NAME: reason" or
"FAIL NAME: reason".  The Go test that started the script reads these lines.

Scripts use libnbd's Python bindings (Debian package python3-libnbd), as nbdsh
does.
"""

import sys
import traceback

import nbd


class Skip(Exception):
    """Raised by a case that this libnbd cannot run."""


def argument(number):
    """Argument number of the script, from 1."""
    return sys.argv[number]


def arguments(number):
    """That argument and all that follow it."""
    return sys.argv[number:]


def connect(uri, *contexts, strict=None, setup=None):
    """A handle connected to uri."""
    h = nbd.NBD()
    for context in contexts:
        h.add_meta_context(context)
    if strict is not None:
        h.set_strict_mode(strict)
    if setup:
        setup(h)
    h.connect_uri(uri)
    return h


def fails(want, call, *args):
    """Wants call to fail with the errno named, and says what came instead."""
    shown = ", ".join(f"{len(a)} bytes" if isinstance(a, bytes) else str(a) for a in args)
    try:
        call(*args)
    except nbd.Error as e:
        if e.errno != want:
            raise AssertionError(f"{call.__name__}({shown}): got {e.errno} ({e.string}), want {want}") from None
        return
    raise AssertionError(f"{call.__name__}({shown}): succeeded, want {want}")


def equal(got, want, what):
    if got != want:
        show = lambda v: repr(v) if len(repr(v)) < 200 else repr(v)[:200] + "..."
        raise AssertionError(f"{what}: got {show(got)}, want {show(want)}")


def need(name):
    """Skips the case when this libnbd lacks a method."""
    if not hasattr(nbd.NBD, name):
        raise Skip(f"libnbd {nbd.NBD().get_version()} has no {name}")


def run(names):
    """Runs the cases among names (a script's globals())."""
    failed = False
    for name, case in list(names.items()):
        if not name.startswith("test_"):
            continue
        try:
            case()
        except Skip as e:
            print(f"skip {name}: {e}")
        except Exception as e:
            failed = True
            at = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.name == name]
            print(f"FAIL {name}, line {at[-1] if at else '?'}: {' '.join(str(e).split())[:400]} ({type(e).__name__})")
        else:
            print(f"ok {name}")
        sys.stdout.flush()
    sys.exit(1 if failed else 0)
