"""`UserError`, the exception for errors that the user can correct, what may stand in its message, and common checks."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MOST = 4000  # characters of a message; lists of wrong names are the longest


class UserError(Exception):
    """Bad input: one line that says what is wrong and what to do. Programs print it and exit with code 2.

    Control characters, which names of files and their contents may have, are escaped, and the length is bounded.

    Attributes:
      details: further lines, such as a list of files with their addresses.
    """

    def __init__(self, message: str = "", details: Sequence[str] = ()) -> None:
        super().__init__(escaped(message))
        self.details = tuple(map(escaped, details))

    @property
    def shown(self) -> str:
        """The text for a terminal."""
        return "\n".join([str(self), *(f"  {line}" for line in self.details)])


def escaped(text: str, most: int = _MOST) -> str:
    r"""`text` in one line that is safe to print: control characters become `\x1b`, and the middle is left out if long.

    Args:
      text: any text.
      most: characters of the result, about.
    """
    if len(text) > most:
        text = f"{text[: most // 2]} … {text[-most // 2 :]}"
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else repr(char)[1:-1] for char in text
    )


def shown(value: Any) -> str:
    """A value from a file for a message: short whatever it is, and in little time.

    Numbers, the beginning of texts, and short sequences of these are shown; of everything else, the type.
    """
    if isinstance(value, tuple | list) and len(value) <= 8 and not any(isinstance(v, tuple | list) for v in value):
        inner = ", ".join(map(shown, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, str | bytes):
        return repr(value if len(value) <= 60 else value[:60]) + ("…" if len(value) > 60 else "")
    if isinstance(value, int) and value.bit_length() > 200:  # Python takes long to write larger ones
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, int | float):
        return str(value)
    return with_article(type(value).__name__)


def with_article(noun: str) -> str:
    """`noun` after "a" or "an"."""
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"


def brief(error: BaseException) -> str:
    """Why something failed, in a few words, for the message of a `UserError`."""
    if isinstance(error, LookupError):  # whose text is a value from the file
        return type(error).__name__
    return escaped(" ".join(str(error).split()), 120) or type(error).__name__


def check_types(options: Any, hints: Mapping[str, Any]) -> None:
    """Checks that the fields of a dataclass have the types of their annotations.

    Annotations may be Literal, bool, int, float, str, Path, None, tuples of one type, and unions of these. NumPy's
    scalars are numbers, and text is a path.

    Args:
      options: a dataclass.
      hints: field to annotation, as `typing.get_type_hints` returns them.

    Raises:
      UserError: a field has another type, or a value that Literal does not list.
    """
    for field in dataclasses.fields(options):
        value, hint = getattr(options, field.name), hints[field.name]
        if not _fits(value, hint):
            raise UserError(f"--{field.name} must be {_described(hint)}, not {shown(value)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return isinstance(value, str | int) and value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(each, arguments[0]) for each in value)
    if hint in (int, float):
        kinds = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kinds) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str | Path)
    return value is None if hint in (None, type(None)) else not isinstance(hint, type) or isinstance(value, hint)


def _described(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(filter(None, [", ".join(map(str, arguments[:-1])), str(arguments[-1])]))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(each) for each in arguments if each is not type(None))
    if origin is tuple:
        return f"a sequence, each {_described(arguments[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def check_least(options: Any, least: Mapping[str, float]) -> None:
    """Checks that options are at least as large as they have to be, and finite; None passes.

    Args:
      options: an object with the options as attributes.
      least: name of an option to its least value.

    Raises:
      UserError: an option is smaller, infinite or NaN.
    """
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"--{name} must be at least {low}, not {value}")


def check_positive(options: Any, names: Sequence[str]) -> None:
    """Checks that options are above 0 and finite; None passes. Arguments and errors are those of `check_least`."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} must be a number above 0, not {value}")


def check_seed(seed: int, flag: str = "--seed") -> None:
    """Checks a seed, of which random generators take 32 bits.

    Raises:
      UserError: the seed is negative or above 2^32 - 1.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"{flag} must lie between 0 and 4294967295, not {shown(seed)}")
