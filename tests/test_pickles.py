"""Reading pickles: nothing runs, names that are not read are inert, and time and memory are bounded."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import functools
import pathlib
import pickle
import re
import struct
import time
import types
import uuid
from typing import Any

import numpy as np
import pytest

from samjax.errors import UserError
from samjax.io import arrays, pickles
from samjax.io.pickles import INERT

START = b"\x80\x04"


def load(body: bytes, *, unknown: Any = "inert", **options: Any) -> Any:
    """The object of the opcodes `body`."""
    view = arrays.View(memoryview(START + body + b"."))
    return pickles.load(view, arrays.python_names(), encoding="latin1", unknown=unknown, **options)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, member: str) -> bytes:
    return text(module) + text(member) + b"\x93"


# --- names ---


class Color(enum.Enum):
    RED = 1


Point = collections.namedtuple("Point", "x y")


class Options:
    """A class of somebody's program, with attributes."""

    def __init__(self) -> None:
        self.batch = 4

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("the state of an object was set")


class Settings(dict):
    """A dictionary with attributes, of somebody's program."""


HARMLESS = {
    "namespace": argparse.Namespace(size=4),
    "simple namespace": types.SimpleNamespace(size=4),
    "options": Options(),
    "settings": Settings(a=1),
    "class": Options,
    "enum": Color.RED,
    "point": Point(1, 2),
    "path": pathlib.PurePosixPath("a/b"),
    "date": datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
    "decimal": decimal.Decimal("1.5"),
    "identity": uuid.UUID(int=5),
    "deque": collections.deque([1, 2], 5),
    "pattern": re.compile("a+"),
    "partial": functools.partial(int, base=2),
    "complex": 1 + 2j,
    "range": range(4),
    "slice": slice(1, 2),
    "function": len,
    "bytearray": bytearray(b"ab"),
}


@pytest.mark.parametrize("protocol", range(6))
def test_harmless_objects_beside_arrays_are_inert(protocol):
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    held = {"weights": weights, **HARMLESS, "after": [1, "two"]}
    view = arrays.View(memoryview(pickle.dumps(held, protocol)))
    found = pickles.load(view, arrays.python_names(), encoding="latin1", unknown="inert")
    np.testing.assert_array_equal(found["weights"].array(), weights)
    assert found["after"] == [1, "two"]
    assert found.keys() == held.keys()
    plain = {"settings": {"a": 1}, "bytearray": bytearray(b"ab")}  # by the first protocols, and by the last
    assert all(found[key] is INERT or found[key] == plain[key] for key in HARMLESS)


def test_containers_of_known_kinds_are_dictionaries():
    held = {
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, a=1),
        "counter": collections.Counter("a"),
    }
    for protocol in range(6):
        found = load(pickle.dumps(held, protocol)[:-1])
        assert found == {key: {"a": 1} for key in held}
    for kind in (("easydict", "EasyDict"), ("munch", "Munch"), ("yacs.config", "CfgNode"), ("dnnlib.util", "EasyDict")):
        assert load(name(*kind) + b")\x81(" + text("a") + b"K\x01u}" + text("x") + b"K\x01sb") == {"a": 1}


def test_nothing_is_kept_in_an_inert_object():
    calls = [b")R", b")\x81", b")}\x92", b"K\x01\x85R"]
    for call in calls:
        body = name("a.b", "C") + call
        assert load(body) is INERT
        assert load(body + b"}" + text("x") + b"K\x01sb") is INERT
        assert load(body + b"(K\x01K\x02u") is INERT
        assert load(body + b"(K\x01e") is INERT
        assert load(body + b"(K\x01\x90") is INERT
        assert load(body + call) is INERT
    assert load(b"(" + name("a.b", "C") + b"K\x01o") is INERT
    assert load(b"(K\x01ia.b\nC\n") is INERT
    with pytest.raises(AttributeError):
        INERT.anything = 1  # type: ignore[attr-defined]


def test_unknown_names_are_collected():
    met: set[str] = set()
    load(b"(" + name("my.options", "A") + name("argparse", "Namespace") + name("my.options", "A.B") + b"l", met=met)
    assert met == {"my.options.A", "my.options.A.B"}
    load(b"(" + b"".join(name("m", f"C{i}") for i in range(1000)) + b"l", met=met)
    assert len(met) == 100


@pytest.mark.parametrize(
    "which",
    [
        ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("builtins", "eval"),
        ("builtins", "exec"), ("builtins", "open"), ("builtins", "__import__"), ("__builtin__", "eval"),
        ("__builtin__", "file"), ("commands", "getoutput"), ("pickle", "loads"), ("shutil", "rmtree"), ("pty", "spawn"),
        ("importlib", "import_module"), ("copyreg", "add_extension"), ("types", "CodeType"), ("functools", "reduce"),
        ("operator", "attrgetter"), ("collections", "_sys.modules"), ("typing", "sys.exit"), ("os.path", "join"),
        ("concurrent.futures.process", "_sendback_result"), ("asyncio", "run"), ("ctypes", "CDLL"), ("time", "sleep"),
    ],
)  # fmt: skip
def test_names_of_the_library_that_run_are_refused(which):
    message = rf"the file names {re.escape('.'.join(which))}, which no checkpoint needs: refused; nothing in it was run"
    for body in (name(*which), f"c{which[0]}\n{which[1]}\n".encode(), f"(i{which[0]}\n{which[1]}\n".encode()):
        with pytest.raises(UserError, match=message):
            load(body + text("echo") + b"\x85R")


def test_strict_readers_know_no_other_names():
    with pytest.raises(UserError, match=r"the pickle names argparse\.Namespace, which is not on the allow list"):
        load(name("argparse", "Namespace") + b")R", unknown="refuse")


@pytest.mark.parametrize(
    "body",
    [
        text("x") + b")" + b"\x85" * 100_000 + b"\x93",  # hashing this name would crash the process
        b"]" + text("x") + b"\x93",
        text("x") + b"C\x01y\x93",
        name("os\0", "system"),
        name("\x1b[31mred", "x"),
        name("a", "b\u202ec"),
        name("a b", "c"),
        name("a", ""),
        name("a..b", "c"),
        name("a" * 201, "c"),
        b"c\xff\nx\n",
    ],
)
def test_names_that_are_none_are_refused(body):
    with pytest.raises(UserError, match="not a readable pickle") as caught:
        load(body + b")R")
    assert len(str(caught.value)) < 200


# --- keys ---


def test_entries_with_keys_that_are_not_plain_are_dropped():
    deep = b")" + b"\x85" * 20_000  # hashing it would crash the process
    odd = [deep, name("a", "B"), b"]", b"}", text("k" * 1025), b"\x8a\x0a" + b"\x7f" * 10]
    for key in odd:
        assert load(b"}(" + text("a") + b"K\x01" + key + b"K\x02K\x05K\x03u") == {"a": 1, 5: 3}
        assert load(b"}" + key + b"K\x02s") == {}
        assert load(b"(" + key + b"K\x02d") == {}
        assert load(b"\x8f(" + key + b"K\x02\x90") == {2}
        assert load(b"(" + key + b"K\x02\x91") == frozenset({2})
        assert load(name("collections", "OrderedDict") + b"](" + key + b"K\x01\x86K\x02K\x03\x86e\x85R") == {2: 3}
        assert load(name("builtins", "set") + b"](" + key + b"K\x02e\x85R") == {2}


# --- time and memory ---

DOUBLED = {
    "lists": b"]q\0" + b"".join(b"0](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)),
    "tuples": b")q\0" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)),
    "dictionaries": b"}q\0" + b"".join(b"0}(K\x01h%cK\x02h%cuq%c" % (i, i, i + 1) for i in range(60)),
    "itself": b"]q\0h\0a",
    "itself in a tuple": b"]q\0h\0\x85a",
    "itself in a dictionary": b"}q\0K\x01h\0s",
    "deep lists": b"]" * 1000 + b"a" * 999,
    "deep tuples": b")" + b"\x85" * 30_000,
    "deep dictionaries": b"}K\x01" * 1000 + b"N" + b"s" * 1000,
}


@pytest.mark.parametrize("body", DOUBLED.values(), ids=DOUBLED)
def test_what_is_returned_can_be_walked(body):
    before = time.process_time()
    for around in (b"%b", b"}(" + text("g_ema") + b"%bu", b"(%bK\x01l"):
        with pytest.raises(UserError, match=r"again and again|contains itself|nested more than 64 deep"):
            load(around.replace(b"%b", body))
    assert time.process_time() - before < 5


def test_objects_are_counted(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OBJECTS", 1000)
    load(b"(" + b"]" * 900 + b"l")
    load(b"(" + b"K\x05" * 2000 + b"l")
    with pytest.raises(UserError, match="more than 1,000 objects"):
        load(b"(" + b"]" * 1000 + b"l")


def test_parts_may_be_shared():
    shared = load(b"(]q\0(K\x01K\x02e" + b"h\0" * 10_000 + b"l")
    assert shared == [[1, 2]] * 10_001


TWO_MB = text("x" * 2_000_000) + b"q\0"
GREEDY = {
    "lists": b"]" * 150_000,
    "dictionaries": b"}" * 150_000,
    "sets": b"\x8f" * 150_000,
    "tuples": b"N" + b"\x85" * 150_000,
    "marks": b"(" * 150_000,
    "the memo": b"N" + b"\x94" * 150_000,
    "integers": b"M\xff\xff" * 150_000,
    "entries": b"}(" + b"".join(b"M%bN" % struct.pack("<H", i % 65536) for i in range(60_000)) + b"u",
    "copies of a list": b"](" + b"N" * 100_000 + b"eq\0" + name("builtins", "list") + b"q\1" + b"h\1h\0\x85R" * 1000,
    "copies of pairs": b"](" + b"(K\1K\2t" * 9999 + b"eq\0" + name("builtins", "dict") + b"q\1" + b"h\1h\0\x85R" * 999,
    "copies of a set": b"](" + b"N" * 100_000 + b"eq\0" + name("builtins", "set") + b"q\1" + b"h\1h\0\x85R" * 1000,
    "encoded text": TWO_MB + name("_codecs", "encode") + b"q\1" + b"h\1h\0\x85R" * 1000,
    "arrays of the same data": TWO_MB
    + name("numpy.core.multiarray", "_reconstruct") + b"q\1" + name("numpy", "dtype") + text("u1") + b"\x85Rq\2"
    + b"h\1)R(K\1J\x80\x84\x1e\0\x85h\2\x89h\0tb" * 1000,
    "calls": name("collections", "OrderedDict") + b"q\1" + b"h\1)R0" * 100_000,
    "bytes that are copied": b"\x96" + struct.pack("<Q", 40_000_000) + b"a" * 40_000_000,
}  # fmt: skip


@pytest.mark.parametrize("body", GREEDY.values(), ids=GREEDY)
def test_memory_is_limited_by_the_size_of_the_file(body, monkeypatch):
    monkeypatch.setattr(pickles, "_BASE", 2**20)  # so that small files show it
    before = time.process_time()
    with pytest.raises(UserError, match="far more memory than the file has bytes"):
        load(body, size=min(len(body), 2_000_100))
    assert time.process_time() - before < 5


@pytest.mark.parametrize(
    "body",
    [
        b"\x8e" + struct.pack("<Q", 2**62), b"\x8d" + struct.pack("<Q", 2**62), b"\x96" + struct.pack("<Q", 2**62),
        b"B" + struct.pack("<I", 2**32 - 1), b"X" + struct.pack("<I", 2**32 - 1), b"T" + struct.pack("<I", 2**31),
        b"\x8b" + struct.pack("<I", 2**31) + b"a", b"\x8b" + struct.pack("<I", 100_000) + b"\x7f" * 100_000,
        b"I" + b"1" * 5000 + b"\n", text("\U0001f600" + "x" * 2_000_000), b"g5\n", b"h\x05",
        b"0", b"e", b"a", b"R", b"b",
    ],
)  # fmt: skip
def test_sizes_and_places_that_are_not_there_are_refused(body):
    with pytest.raises(UserError, match="not a readable pickle"):
        load(body)


def test_large_arrays_fit(monkeypatch):
    """What a file has is never more than is allowed, in any of the ways in which programs pickle bytes."""
    monkeypatch.setattr(pickles, "_BASE", 100_000)
    weights = np.random.default_rng(0).integers(0, 256, 4_000_000, np.uint8)
    for protocol in (2, 4, 5):
        data = pickle.dumps({"weights": weights}, protocol)
        view = arrays.View(memoryview(data))
        found = pickles.load(view, arrays.python_names(), encoding="latin1", size=len(data))
        np.testing.assert_array_equal(found["weights"].array(), weights)
