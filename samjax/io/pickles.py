"""Reading untrusted pickles without executing anything in them.

A pickle is a program: it names functions and classes and calls them. `load` interprets this program. It creates plain
values only, and resolves names in the caller's allow list only, to the harmless stand-ins given there. Any other name
is an error or, where the caller wishes, an inert stand-in. A name never resolves to a real object.

It does not use `pickle.Unpickler`, which cannot do three things: keep large byte strings as views of the file, so that
the arrays of a checkpoint are not copied and those that are not needed not read; forbid setting attributes of objects,
and calling anything that is not on the list; and stop with an error at a file that exhausts the machine (deeply nested
keys, endless opcodes, sizes beyond the file).

Time and memory are linear in the size of the file: every opcode counts, and whatever it allocates or passes to a
stand-in is taken from a budget of bytes. What `load` returns may be walked: it has at most `MAX_OBJECTS` containers, no
deeper in each other than `MAX_DEPTH`, does not contain itself, and is not much larger where parts that occur in several
places are counted in each.
"""

from __future__ import annotations

import codecs
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np

from samjax.errors import UserError, brief

Allowed = Mapping[tuple[str, str], Any]

MAX_OPCODES = 3_000_000
"""Far more than any checkpoint has; the limit bounds the time that a file can take."""
MAX_DEPTH = 64
"""Of containers in containers; programs use a dozen."""
MAX_OBJECTS = 300_000
"""Containers; checkpoints have thousands."""
_SHARED = 100_000  # values that come of counting parts wherever they occur, beside four times those that a file has

# The budget of bytes: this much, and so many times the size of the file.
_BASE, _SHARE = 64 * 2**20, 3
# What is taken from it beside the sizes of values: for a place in a list, for an entry of a dictionary, a set or the
# memo, and for a call of a stand-in, which may build objects of several parts.
_SLOT, _ENTRY, _CALL = 16, 100, 1000

_MAX_NAME = 200  # characters of a module's or a class's name
_MAX_KEY = 1024  # characters of a key: comparing longer ones again and again would take time
_MAX_INTEGER = 1024  # bytes
_MAX_TEXT = 2**20  # bytes of a text with characters beyond Latin-1, which memory holds at up to four times the size
_MAX_MET = 100
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
_MARK = object()

# Names of Python's library that are harmless to meet, and that programs save beside weights. None stands for all names
# of a module. Other names of the library are what attacks consist of.
_HARMLESS: Mapping[str, frozenset[str] | None] = {
    **dict.fromkeys(
        ("argparse", "array", "collections", "dataclasses", "datetime", "decimal", "enum", "fractions", "ipaddress",
         "itertools", "math", "numbers", "optparse", "pathlib", "random", "typing", "uuid", "weakref", "zoneinfo"),
    ),
    "_codecs": frozenset({"encode"}),
    "copyreg": frozenset({"_reconstructor", "__newobj__"}),
    "functools": frozenset({"partial"}),
    "logging": frozenset({"getLogger", "Logger", "RootLogger"}),
    "operator": frozenset({"itemgetter"}),
    "re": frozenset({"_compile", "RegexFlag"}),
    "time": frozenset({"struct_time"}),
    "types": frozenset({"SimpleNamespace", "MappingProxyType", "NoneType"}),
    "builtins": frozenset({
        "Ellipsis", "NotImplemented", "abs", "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset",
        "getattr", "int", "len", "list", "max", "min", "object", "range", "reversed", "round", "set", "slice", "sorted",
        "str", "sum", "tuple", "type", "zip", "enumerate", "xrange", "long", "unicode", "basestring",
        "Exception", "KeyboardInterrupt", "RuntimeError", "TypeError", "ValueError",
    }),
}  # fmt: skip
_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_LIBRARY = sys.stdlib_module_names | {
    "__builtin__", "cPickle", "cStringIO", "commands", "compiler", "copy_reg", "dl", "exceptions", "new", "os2",
    "popen2", "rexec", "sets", "thread", "urllib2",
}  # fmt: skip


class Inert:
    """Stand-in for whatever a file holds and samjax does not read: it keeps nothing, and does nothing.

    There is one, `INERT`. It can be called, and given state, items and values, like any object in a pickle.
    """

    __slots__ = ()

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return self

    def __repr__(self) -> str:
        return "INERT"


INERT = Inert()


class Source(Protocol):
    """The input of `load`: a file opened in binary mode, or anything with these two methods.

    `read` may return a memoryview, as which byte strings of the pickle are then returned.
    """

    def read(self, size: int, /) -> bytes | memoryview: ...

    def readline(self) -> bytes: ...


class _Malformed(Exception):
    """The bytes are not a pickle, or a pickle with features that no checkpoint uses."""


class _Machine:
    """The stack machine of the pickle protocols 0 to 5."""

    def __init__(
        self,
        file: Source,
        allowed: Allowed,
        persistent_load: Callable[[Any], Any] | None,
        encoding: str,
        budget: int,
        met: set[str] | None,
    ) -> None:
        self.file = file
        self.allowed = allowed
        self.callables = {id(value) for value in allowed.values()}
        self.persistent_load = persistent_load
        self.encoding = encoding
        self.budget = budget
        self.met = met
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            code = bytes(self.read(1))
            if code == b".":
                return self.stack.pop()
            try:
                operation = _OPERATIONS[code]
            except KeyError:
                raise _Malformed(f"unknown opcode {code!r}") from None
            operation(self)
        raise _Malformed(f"more than {MAX_OPCODES:,} steps")

    # The budget.

    def spend(self, size: int) -> None:
        self.budget -= size
        if self.budget < 0:
            raise _Malformed("its objects would take far more memory than the file has bytes")

    def check(self, size: int) -> None:
        """Checks that `size` could be spent, before something of that size is made."""
        if size > self.budget:
            self.spend(size)

    # Reading.

    def read(self, size: int) -> bytes | memoryview:
        data = self.file.read(size)
        if len(data) != size:
            raise _Malformed("it ends early")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.read(struct.calcsize("<" + form)))[0]

    def integer(self, size: int) -> int:
        if size > _MAX_INTEGER:
            raise _Malformed(f"an integer of {size:,} bytes")
        return int.from_bytes(self.read(size), "little", signed=True)

    def line(self) -> bytes:
        line = bytes(self.file.readline())
        if not line.endswith(b"\n"):
            raise _Malformed("it ends early")
        return line[:-1]

    def text(self, form: str) -> str:
        data = self.read(self.number(form))
        self.check(len(data))
        if len(data) > _MAX_TEXT and np.frombuffer(data, np.uint8).max() > 0xC3:  # beyond Latin-1, in UTF-8
            raise _Malformed(f"a text of {len(data):,} bytes")
        return str(data, "utf-8", "surrogatepass")

    def old_string(self, data: bytes | memoryview) -> str | bytes:
        """A string of Python 2, which may be text or data."""
        self.check(len(data))
        return bytes(data) if self.encoding == "bytes" else str(data, self.encoding)

    def array(self, size: int) -> bytearray:
        self.check(size)
        return bytearray(self.read(size))

    # The stack.

    def push(self, value: Any) -> None:
        """Pushes a value that was made."""
        self.spend(sys.getsizeof(value) + _SLOT)
        self.stack.append(value)

    def refer(self, value: Any) -> None:
        """Pushes a value that exists."""
        self.spend(_SLOT)
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                values = self.stack[start + 1 :]
                del self.stack[start:]
                return values
        raise _Malformed("a mark is missing")

    def top(self, kind: type) -> Any:
        """The value on top, of a kind; None if it keeps nothing."""
        value = self.stack[-1]
        if isinstance(value, kind):
            return value
        if value is not INERT:
            raise _Malformed(f"a {kind.__name__} is missing")
        return None

    def memoize(self, index: int) -> None:
        self.spend(_ENTRY)
        self.memo[index] = self.stack[-1]

    # Values.

    def find(self, module: Any, name: Any) -> Any:
        # Checked first: hashing a deep tuple would crash the process, and control characters go into messages.
        for part in (module, name):
            if not isinstance(part, str) or len(part) > _MAX_NAME or not _NAME.fullmatch(part):
                raise _Malformed("the name of a class is not a name")
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        if self.met is None:
            raise UserError(
                f"the pickle names {module}.{name}, which is not on the allow list: nothing was run, nothing was read"
            )
        if not _in_library(module):
            if len(self.met) < _MAX_MET:
                self.met.add(f"{module}.{name}")
        elif not _is_harmless(module, name):
            raise UserError(
                f"the file names {module}.{name}, which no checkpoint needs: refused; nothing in it was run"
            )
        return INERT

    def call(self, function: Any, args: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
        if function is INERT:
            return INERT
        # Only the stand-ins themselves are called, even though only they could have put callables on the stack.
        if id(function) not in self.callables or not isinstance(args, tuple):
            raise _Malformed("a call of something that is not on the allow list")
        self.spend(_CALL + sum(map(_extent, args)))
        result = function(*args, **(kwargs or {}))
        if not any(result is arg for arg in args):
            self.spend(_unpacked(result))
        return result

    def new(self, cls: Any, args: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
        if isinstance(cls, type) and id(cls) in self.callables and isinstance(args, tuple):
            self.spend(_CALL + sum(map(_extent, args)))
            return cls.__new__(cls, *args, **(kwargs or {}))
        return self.call(cls, args, kwargs)

    def build(self) -> None:
        state, value = self.stack.pop(), self.stack[-1]
        if value is INERT or isinstance(value, dict | list | set | frozenset):
            return  # attributes of a dictionary, such as the `_metadata` of torch's state dicts
        # Only a method that the stand-in's class defines; attributes are never set.
        set_state = getattr(type(value), "__setstate__", None)
        if set_state is None or isinstance(value, type):
            raise _Malformed(f"state for a {type(value).__name__}")
        self.spend(_CALL + (sum(map(_extent, state)) if isinstance(state, tuple) else _extent(state)))
        set_state(value, state)
        self.spend(_unpacked(value))

    def append(self, values: list[Any]) -> None:
        self.spend(_SLOT * len(values))
        if (found := self.top(list)) is not None:
            found.extend(values)

    def set_items(self, values: list[Any]) -> None:
        self.spend(_ENTRY * len(values))
        if (found := self.top(dict)) is not None:
            fill(found, values)

    def add_items(self, values: list[Any]) -> None:
        self.spend(_ENTRY * len(values))
        if (found := self.top(set)) is not None:
            found.update(filter(is_plain, values))

    def persistent(self, identity: Any) -> None:
        if self.persistent_load is None:
            raise _Malformed("a reference to data outside of the pickle")
        self.spend(_CALL)
        self.refer(self.persistent_load(identity))


def _in_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARY


def _is_harmless(module: str, name: str) -> bool:
    module = _PYTHON2.get(module, module)
    top = module.partition(".")[0]
    names = _HARMLESS.get(module, None if _HARMLESS.get(top, ()) is None else ())
    return "." not in name and (names is None or name in names)


def _extent(value: Any) -> int:
    """The cost of what a stand-in may do with an argument: look at its bytes, or copy its entries."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        return len(value) // 8
    return _ENTRY * len(value) if isinstance(value, tuple | list | dict | set | frozenset) else 0


def _unpacked(value: Any) -> int:
    """The size of an array: several may share their data, or repeat it, and take more than the file has."""
    return getattr(value, "nbytes", 0)


def is_plain(key: Any) -> bool:
    """Whether `key` may be a key of a dictionary: hashing or comparing others takes long, or crashes the process."""
    if isinstance(key, str | bytes):
        return len(key) <= _MAX_KEY
    return key is None or isinstance(key, float) or (isinstance(key, int) and key.bit_length() <= 64)


def fill(mapping: dict[Any, Any], values: list[Any]) -> dict[Any, Any]:
    """Updates `mapping` with alternating keys and values, and returns it; entries whose keys are not plain are dropped.

    Raises:
      ValueError: if a value is missing.
    """
    mapping.update(pair for pair in zip(values[0::2], values[1::2], strict=True) if is_plain(pair[0]))
    return mapping


def _parts(value: Any) -> Iterator[Any]:
    """What a container or a stand-in holds, if it may hold anything."""
    if isinstance(value, dict):
        return iter(value.values())
    if isinstance(value, tuple | list):
        return iter(value)
    is_leaf = isinstance(value, type) or hasattr(value, "nbytes")
    held = None if is_leaf else getattr(value, "__dict__", None)
    return iter(held.values() if isinstance(held, dict) else ())


def _bounded(value: Any) -> Any:
    """Returns `value` if all that it holds can be walked in a time that is linear in its size; else, _Malformed."""
    sizes: dict[int, int] = {}  # with parts counted wherever they occur; 0 while it is being walked
    walked = 0
    path = [(value, _parts(value), 1)]
    sizes[id(value)] = 0
    while path:
        holder, parts, size = path.pop()
        for part in parts:
            walked += 1
            if part is None or isinstance(part, (str, bytes, int, float)):
                size += 1
            elif (known := sizes.get(id(part))) is None:
                path.append((holder, parts, size))
                path.append((part, _parts(part), 1))
                sizes[id(part)] = 0
                break
            elif known:
                size += known
            else:
                raise _Malformed("an object that contains itself")
        else:
            sizes[id(holder)] = size
            if path:
                path[-1] = (*path[-1][:2], path[-1][2] + size)
        if len(path) > MAX_DEPTH:
            raise _Malformed(f"its objects are nested more than {MAX_DEPTH} deep")
    if len(sizes) > MAX_OBJECTS:
        raise _Malformed(f"more than {MAX_OBJECTS:,} objects")
    if sizes[id(value)] > _SHARED + 4 * walked:
        raise _Malformed("its objects contain each other again and again")
    return value


def _integer(line: bytes) -> int | bool:
    return line == b"01" if line in (b"00", b"01") else int(line)  # protocol 0's booleans


def _quoted(line: bytes) -> bytes:
    line = line.strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise _Malformed("a string without quotes")
    return codecs.escape_decode(line[1:-1])[0]


def _dictionary(machine: _Machine) -> None:
    values = machine.since_mark()
    machine.push({})
    machine.set_items(values)


def _frozen(machine: _Machine) -> None:
    values = machine.since_mark()
    machine.spend(_ENTRY * len(values))
    machine.push(frozenset(filter(is_plain, values)))


def _tuple(machine: _Machine, size: int) -> None:
    if len(machine.stack) < size:
        raise _Malformed("a value is missing")
    values = tuple(machine.stack[-size:])
    del machine.stack[-size:]
    machine.push(values)


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.refer(machine.find(module, name))


def _reduce(machine: _Machine) -> None:
    args, function = machine.stack.pop(), machine.stack.pop()
    machine.push(machine.call(function, args))


def _newobj(machine: _Machine) -> None:
    args, cls = machine.stack.pop(), machine.stack.pop()
    machine.push(machine.new(cls, args))


def _newobj_ex(machine: _Machine) -> None:
    kwargs, args, cls = machine.stack.pop(), machine.stack.pop(), machine.stack.pop()
    machine.push(machine.new(cls, args, kwargs))


def _inst(machine: _Machine) -> None:
    cls = machine.find(machine.line().decode(), machine.line().decode())
    machine.push(machine.call(cls, tuple(machine.since_mark())))


def _obj(machine: _Machine) -> None:
    cls, *args = machine.since_mark()
    machine.push(machine.call(cls, tuple(args)))


def _appends(machine: _Machine) -> None:
    values = machine.since_mark()
    machine.append(values)


def _set_items(machine: _Machine) -> None:
    values = machine.since_mark()
    machine.set_items(values)


def _add_items(machine: _Machine) -> None:
    values = machine.since_mark()
    machine.add_items(values)


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


_OPERATIONS: Mapping[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.number("B"),  # the protocol, which the opcodes tell too
    b"\x95": lambda m: m.number("Q"),  # a frame: a hint for buffering
    b"(": lambda m: m.refer(_MARK),
    b"0": lambda m: m.stack.pop(),
    b"1": lambda m: m.since_mark(),
    b"2": lambda m: m.refer(m.stack[-1]),
    # Plain values.
    b"N": lambda m: m.refer(None),
    b"\x88": lambda m: m.refer(True),
    b"\x89": lambda m: m.refer(False),
    b"I": lambda m: m.push(_integer(m.line())),
    b"J": lambda m: m.push(m.number("i")),
    b"K": lambda m: m.push(m.number("B")),
    b"M": lambda m: m.push(m.number("H")),
    b"L": lambda m: m.push(int(m.line().rstrip(b"L"))),
    b"\x8a": lambda m: m.push(m.integer(m.number("B"))),
    b"\x8b": lambda m: m.push(m.integer(m.number("I"))),
    b"F": lambda m: m.push(float(m.line())),
    b"G": lambda m: m.push(struct.unpack(">d", m.read(8))[0]),
    b"S": lambda m: m.push(m.old_string(_quoted(m.line()))),
    b"T": lambda m: m.push(m.old_string(m.read(m.number("I")))),
    b"U": lambda m: m.push(m.old_string(m.read(m.number("B")))),
    b"V": lambda m: m.push(str(m.line(), "raw-unicode-escape")),
    b"X": lambda m: m.push(m.text("I")),
    b"\x8c": lambda m: m.push(m.text("B")),
    b"\x8d": lambda m: m.push(m.text("Q")),
    b"B": lambda m: m.push(m.read(m.number("I"))),
    b"C": lambda m: m.push(bytes(m.read(m.number("B")))),
    b"\x8e": lambda m: m.push(m.read(m.number("Q"))),
    b"\x96": lambda m: m.push(m.array(m.number("Q"))),
    # Containers.
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"\x85": lambda m: _tuple(m, 1),
    b"\x86": lambda m: _tuple(m, 2),
    b"\x87": lambda m: _tuple(m, 3),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.since_mark()),
    b"a": lambda m: m.append([m.stack.pop()]),
    b"e": _appends,
    b"}": lambda m: m.push({}),
    b"d": _dictionary,
    b"s": _set_item,
    b"u": _set_items,
    b"\x8f": lambda m: m.push(set()),
    b"\x90": _add_items,
    b"\x91": _frozen,
    # The memo.
    b"p": lambda m: m.memoize(int(m.line())),
    b"q": lambda m: m.memoize(m.number("B")),
    b"r": lambda m: m.memoize(m.number("I")),
    b"\x94": lambda m: m.memoize(len(m.memo)),
    b"g": lambda m: m.refer(m.memo[int(m.line())]),
    b"h": lambda m: m.refer(m.memo[m.number("B")]),
    b"j": lambda m: m.refer(m.memo[m.number("I")]),
    # Names and calls.
    b"c": lambda m: m.refer(m.find(m.line().decode(), m.line().decode())),
    b"\x93": _stack_global,
    b"R": _reduce,
    b"b": lambda m: m.build(),
    b"\x81": _newobj,
    b"\x92": _newobj_ex,
    b"i": _inst,
    b"o": _obj,
    b"P": lambda m: m.persistent(str(m.line(), "ascii")),
    b"Q": lambda m: m.persistent(m.stack.pop()),
}


def looks_like(data: bytes | memoryview) -> bool:
    """Whether `data` starts like a pickle of the protocols from 2 on; no program that is read used an older one."""
    return data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def load(
    file: Source,
    allowed: Allowed,
    *,
    persistent_load: Callable[[Any], Any] | None = None,
    encoding: str = "ASCII",
    size: int = 0,
    unknown: Literal["refuse", "inert"] = "refuse",
    met: set[str] | None = None,
) -> Any:
    """Reads one pickled object from `file`, whose position is then right after the object.

    Args:
      file: open for reading in binary mode; see `Source`.
      allowed: (module, name) to the stand-in, which is called with any arguments that the file has. State is passed to
        the `__setstate__` of the stand-in's class. A result with `nbytes` is an array that takes that much unpacked.
      persistent_load: as in `pickle.Unpickler`.
      encoding: of Python 2 strings; "latin1" for old NumPy arrays.
      size: of the file in bytes, in proportion to which its objects may take memory.
      unknown: what to do with a name that is not in `allowed`: refuse the file, or let `INERT` stand for it. Names of
        Python's own library that run something are always refused.
      met: a set, to which up to 100 unknown names outside of Python's library are added.

    Returns:
      The object. Keys of dictionaries and members of sets are short and of plain types; others are dropped.

    Raises:
      UserError: if the file names something else, is not a pickle, ends early, or would take too much time or memory.
    """
    met = None if unknown == "refuse" else set() if met is None else met
    try:
        return _bounded(_Machine(file, allowed, persistent_load, encoding, _BASE + _SHARE * size, met).run())
    except UserError:
        raise
    except _Malformed as error:
        raise UserError(f"not a readable pickle ({error}): damaged, or not whole?") from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(f"not a readable pickle ({brief(error)}): damaged, or not whole?") from error
