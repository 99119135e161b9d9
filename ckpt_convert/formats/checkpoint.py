"""`Checkpoint`, a generator as a format's reader returns it, and what the readers take for a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from samjax.io.arrays import Stored

MAX_NAME = 200
"""Longest name of an array or a part of a network. A file could refer to a longer one any number of times."""


def is_name(value: Any) -> TypeGuard[str]:
    """Whether `value` is text short enough to be a name."""
    return isinstance(value, str) and len(value) <= MAX_NAME


class Checkpoint(NamedTuple):
    """A generator in a file.

    Attributes:
      format: description of the file.
      naming: the program whose names `arrays` have, a key of `ckpt_convert.stylegan2.NAMINGS`.
      arrays: by the file's own names.
      settings: fields of `StyleGAN2Config` that the file states.
      notes: notes for users of the converted generator.
    """

    format: str
    naming: str
    arrays: Mapping[str, Stored]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
