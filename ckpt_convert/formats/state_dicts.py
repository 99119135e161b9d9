"""State dicts of generators: arrays by name, under any prefix, in rosinality's, NVIDIA's or another program's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ckpt_convert.formats import safetensors
from ckpt_convert.formats.checkpoint import Checkpoint, is_name
from samjax.errors import UserError
from samjax.io.arrays import Loaded, PickledArray, Stored
from samjax.io.torch_files import Tensor

_AVERAGES = ("latent_avg", "mean_latent")  # the mean style, kept beside the state dict


def is_array(value: Any) -> bool:
    """Whether `value` is an array in a file."""
    return isinstance(value, Tensor | PickledArray | Loaded | safetensors.Array)


def places(state: Mapping[Any, Any], markers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Finds generators among the arrays of a dictionary.

    Args:
      state: a dictionary with anything in it.
      markers: naming to the name that marks its generators; see `ckpt_convert.stylegan2.Naming`.

    Yields:
      The naming and the prefix of each generator's names, such as "decoder." or "".
    """
    for name, value in state.items():
        if is_name(name) and is_array(value):
            for naming, marker in markers.items():
                prefix = name.removesuffix(marker)
                if prefix != name and (not prefix or prefix.endswith((".", "/"))):
                    yield naming, prefix


def checkpoint(
    state: Mapping[Any, Any], naming: str, prefix: str, outer: Sequence[Mapping[Any, Any]], what: str, average: str
) -> Checkpoint:
    """Reads a generator that `places` found.

    Args:
      state: the dictionary.
      naming: the program whose names it has.
      prefix: prefix of its names.
      outer: the dictionaries around `state`, outermost first, one of which may hold the mean style.
      what: description of the file.
      average: the naming's name for the mean style.
    """
    arrays: dict[str, Stored] = {
        name[len(prefix) :]: value
        for name, value in state.items()
        if is_name(name) and name.startswith(prefix) and is_array(value)
    }
    for holder in (state, *reversed(outer)):
        for name in _AVERAGES:
            if average not in arrays and is_array(holder.get(name)):
                arrays[average] = holder[name]
    if average in arrays:
        arrays[average] = _one_style(arrays[average])
    return Checkpoint(what, naming, arrays, {})


class _Row:
    """The first row of an array whose rows are equal; see `arrays.Stored`."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self._stored.shape[-1:]

    def array(self) -> np.ndarray:
        rows = self._stored.array().reshape(-1, self._stored.shape[-1])
        if not len(rows) or not np.array_equal(rows, np.broadcast_to(rows[0], rows.shape)):
            raise UserError("the file has a different mean style for each layer; samjax's generator has one for all")
        return rows[0]


def _one_style(average: Stored) -> Stored:
    """The mean style once; encoders repeat it for every style."""
    return _Row(average) if len(average.shape) > 1 else average
