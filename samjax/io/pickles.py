"""Reading untrusted pickles without executing anything in them.

A pickle is a program: it names functions and classes and calls them. `load` interprets this program. It creates plain
values only, and resolves names in the caller's allow list only, to the harmless stand-ins given there. Any other name
is an error.

It does not use `pickle.Unpickler`, which cannot do three things: keep large byte strings as views of the file, so that
the arrays of a checkpoint are not copied and those that are not needed not read; forbid setting attributes of objects,
and calling anything that is not on the list; and stop with an error at a file that exhausts the machine (deeply nested
keys, endless opcodes, sizes beyond the file).
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from samjax.errors import UserError

Allowed = Mapping[tuple[str, str], Callable[..., Any]]

MAX_OPCODES = 5_000_000
"""Far more than any checkpoint has; the limit bounds the memory that a file can allocate."""

_PLAIN_KEYS = (str, bytes, int, float, type(None))
_MARK = object()


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
        self, file: Source, allowed: Allowed, persistent_load: Callable[[Any], Any] | None, encoding: str
    ) -> None:
        self.file = file
        self.allowed = allowed
        self.callables = {id(value) for value in allowed.values()}
        self.persistent_load = persistent_load
        self.encoding = encoding
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

    # Reading.

    def read(self, size: int) -> bytes | memoryview:
        data = self.file.read(size)
        if len(data) != size:
            raise _Malformed("it ends early")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.read(struct.calcsize("<" + form)))[0]

    def line(self) -> bytes:
        line = bytes(self.file.readline())
        if not line.endswith(b"\n"):
            raise _Malformed("it ends early")
        return line[:-1]

    def text(self, form: str) -> str:
        return str(self.read(self.number(form)), "utf-8", "surrogatepass")

    def old_string(self, data: bytes | memoryview) -> str | bytes:
        """A string of Python 2, which may be text or data."""
        return bytes(data) if self.encoding == "bytes" else str(data, self.encoding)

    # The stack.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                values = self.stack[start + 1 :]
                del self.stack[start:]
                return values
        raise _Malformed("a mark is missing")

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise _Malformed(f"a {kind.__name__} is missing")
        return self.stack[-1]

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    # Values.

    def find(self, module: Any, name: Any) -> Any:
        try:
            return self.allowed[module, name]
        except (KeyError, TypeError):
            what = f"{str(module)[:80]}.{str(name)[:80]}"
            raise UserError(
                f"the pickle names {what}, which is not on the allow list: nothing was run, nothing was read"
            ) from None

    def call(self, function: Any, args: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
        # Only the stand-ins themselves are called, even though only they could have put callables on the stack.
        if id(function) not in self.callables or not isinstance(args, tuple):
            raise _Malformed("a call of something that is not on the allow list")
        return function(*args, **(kwargs or {}))

    def new(self, cls: Any, args: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
        if isinstance(cls, type) and id(cls) in self.callables and isinstance(args, tuple):
            return cls.__new__(cls, *args, **(kwargs or {}))
        return self.call(cls, args, kwargs)

    def build(self) -> None:
        state, value = self.stack.pop(), self.stack[-1]
        if isinstance(value, dict):
            return  # attributes of a dictionary, such as the `_metadata` of torch's state dicts
        # Only a method that the stand-in's class defines; attributes are never set.
        set_state = getattr(type(value), "__setstate__", None)
        if set_state is None or isinstance(value, type):
            raise _Malformed(f"state for a {type(value).__name__}")
        set_state(value, state)

    def append(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def set_items(self, values: list[Any]) -> None:
        fill(self.top(dict), values)

    def add_items(self, values: list[Any]) -> None:
        self.top(set).update(plain_keys(values))


def plain_keys(keys: list[Any]) -> list[Any]:
    """Checks that `keys` have plain types, and returns them; hashing a deeply nested tuple would crash the process.

    Raises:
      ValueError: if one has another type.
    """
    for key in keys:
        if not isinstance(key, _PLAIN_KEYS):
            raise ValueError(f"a key of the kind {type(key).__name__}")
    return keys


def fill(mapping: dict[Any, Any], values: list[Any]) -> dict[Any, Any]:
    """Updates `mapping` with alternating keys and values, and returns it.

    Raises:
      ValueError: if a key has no plain type, or a value is missing.
    """
    mapping.update(zip(plain_keys(values[0::2]), values[1::2], strict=True))
    return mapping


def _long(data: bytes | memoryview) -> int:
    return int.from_bytes(data, "little", signed=True)


def _integer(line: bytes) -> int | bool:
    return line == b"01" if line in (b"00", b"01") else int(line)  # protocol 0's booleans


def _quoted(line: bytes) -> bytes:
    line = line.strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise _Malformed("a string without quotes")
    return codecs.escape_decode(line[1:-1])[0]


def _persistent(machine: _Machine, identity: Any) -> None:
    if machine.persistent_load is None:
        raise _Malformed("a reference to data outside of the pickle")
    machine.push(machine.persistent_load(identity))


def _frozen(machine: _Machine) -> None:
    machine.push(frozenset(plain_keys(machine.since_mark())))


def _tuple(machine: _Machine, size: int) -> None:
    if len(machine.stack) < size:
        raise _Malformed("a value is missing")
    machine.stack[-size:] = [tuple(machine.stack[-size:])]


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.push(machine.find(module, name))


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
    b"(": lambda m: m.push(_MARK),
    b"0": lambda m: m.stack.pop(),
    b"1": lambda m: m.since_mark(),
    b"2": lambda m: m.push(m.stack[-1]),
    # Plain values.
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": lambda m: m.push(_integer(m.line())),
    b"J": lambda m: m.push(m.number("i")),
    b"K": lambda m: m.push(m.number("B")),
    b"M": lambda m: m.push(m.number("H")),
    b"L": lambda m: m.push(int(m.line().rstrip(b"L"))),
    b"\x8a": lambda m: m.push(_long(m.read(m.number("B")))),
    b"\x8b": lambda m: m.push(_long(m.read(m.number("I")))),
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
    b"\x96": lambda m: m.push(bytearray(m.read(m.number("Q")))),
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
    b"d": lambda m: m.push(fill({}, m.since_mark())),
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
    b"g": lambda m: m.push(m.memo[int(m.line())]),
    b"h": lambda m: m.push(m.memo[m.number("B")]),
    b"j": lambda m: m.push(m.memo[m.number("I")]),
    # Names and calls.
    b"c": lambda m: m.push(m.find(m.line().decode(), m.line().decode())),
    b"\x93": _stack_global,
    b"R": _reduce,
    b"b": lambda m: m.build(),
    b"\x81": _newobj,
    b"\x92": _newobj_ex,
    b"i": _inst,
    b"o": _obj,
    b"P": lambda m: _persistent(m, str(m.line(), "ascii")),
    b"Q": lambda m: _persistent(m, m.stack.pop()),
}


def load(
    file: Source,
    allowed: Allowed,
    *,
    persistent_load: Callable[[Any], Any] | None = None,
    encoding: str = "ASCII",
) -> Any:
    """Reads one pickled object from `file`, whose position is then right after the object.

    Args:
      file: open for reading in binary mode; see `Source`.
      allowed: (module, name) to the stand-in, which is called with any arguments that the file has. State is passed to
        the `__setstate__` of the stand-in's class.
      persistent_load: as in `pickle.Unpickler`.
      encoding: of Python 2 strings; "latin1" for old NumPy arrays.

    Returns:
      The object. Keys of dictionaries and members of sets have plain types only.

    Raises:
      UserError: if the file names something else, is not a pickle, or ends early.
    """
    try:
        return _Machine(file, allowed, persistent_load, encoding).run()
    except UserError:
        raise
    except _Malformed as error:
        raise UserError(f"not a readable pickle ({error}): damaged, or not whole?") from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(f"not a readable pickle ({type(error).__name__}: {error}): damaged, or not whole?") from error
