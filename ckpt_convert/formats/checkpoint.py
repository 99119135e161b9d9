"""`Checkpoint`, a generator as a format's reader returns it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from samjax.io.arrays import Stored


class Checkpoint(NamedTuple):
    """A generator in a file.

    Attributes:
      format: description of the file.
      naming: the program whose names `arrays` have, a key of `ckpt_convert.stylegan2.NAMINGS`.
      arrays: by the file's own names.
      settings: fields of `StyleGAN2Config` that the file states.
      notes: for users of the converted generator.
    """

    format: str
    naming: str
    arrays: Mapping[str, Stored]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
