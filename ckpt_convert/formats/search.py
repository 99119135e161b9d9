"""Finding the generator in the contents of a file, whatever it is wrapped in."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ckpt_convert import foreign, stylegan2
from ckpt_convert.formats import nvidia, state_dicts, tensorflow
from ckpt_convert.formats.checkpoint import Checkpoint, is_name
from samjax.errors import UserError, with_article
from samjax.io.arrays import Stored

_MAX_DEPTH = 8  # of dictionaries in dictionaries; programs use three
_AVERAGED = re.compile(r"(?<![a-z])(ema|avg|averaged?|smooth|shadow|Gs)(?![a-z])")
NAMINGS = {**stylegan2.NAMINGS, **foreign.NAMINGS}
"""The tables of all programs, by the program."""


class _Found(NamedTuple):
    """A generator in a file.

    Attributes:
      place: where it is, such as "g_ema" or "state_dict/decoder"; "" for the file itself.
      read: returns it.
    """

    place: str
    read: Callable[[], Checkpoint]

    @property
    def averaged(self) -> bool:
        return _AVERAGED.search(self.place) is not None


def find(held: Any, unknown: Sequence[str] = ()) -> Checkpoint:
    """Finds the generator in the contents of a file: the averaged one, if there are several.

    Args:
      held: nested dictionaries and sequences with arrays and networks in them.
      unknown: names of the classes that the file refers to and that are not read.

    Raises:
      UserError: if there is none, or it is of a kind that samjax does not support.
    """
    found = {each.place: each for each in _generators(held)}
    if not found:
        raise UserError(_what_else(held, unknown))
    chosen = next((each for each in found.values() if each.averaged), next(iter(found.values())))
    checkpoint = chosen.read()
    if len(found) == 1:
        return checkpoint
    why = "the averaged one" if chosen.averaged else "the first one"
    note = f"the file holds {len(found)} generators ({_listed(list(found))}): {chosen.place}, {why}, is converted"
    return checkpoint._replace(notes=(*checkpoint.notes, note))


def _generators(held: Any) -> Iterator[_Found]:
    markers = {name: naming.marker for name, naming in NAMINGS.items() if naming.marker}
    for path, value, outer in _walk(held):
        place = "/".join(path)
        if isinstance(value, nvidia.Module):
            if nvidia.is_generator(value):
                yield _Found(place, lambda value=value, place=place: nvidia.checkpoint(value, place))
        elif isinstance(value, tensorflow.Network):
            if tensorflow.is_generator(value):
                yield _Found(place, lambda value=value, place=place: tensorflow.checkpoint(value, place))
        elif isinstance(value, Mapping):
            for naming, prefix in state_dicts.places(value, markers):
                where = "/".join([*path, *_shown([prefix.rstrip("./")])]).strip("/")
                arguments = (value, naming, prefix, outer, where)
                yield _Found(where, lambda arguments=arguments: _state_dict(*arguments))


def _state_dict(
    state: Mapping[Any, Any], naming: str, prefix: str, outer: Sequence[Mapping[Any, Any]], where: str
) -> Checkpoint:
    table = NAMINGS[naming]
    average = table.find("mapping/w_avg")[0]
    what = f"{where or 'state dict'} of {table.format}"
    checkpoint = state_dicts.checkpoint(state, naming, prefix, outer, what, average)
    if known := _refusal(checkpoint.arrays):  # relatives of StyleGAN2 have its names, among others
        raise UserError(known)
    return checkpoint._replace(notes=(table.note,) if table.note else ())


def _refusal(arrays: Mapping[str, Stored]) -> str | None:
    return foreign.refusal(arrays, {name: array.shape for name, array in arrays.items()})


def _walk(held: Any) -> Iterator[tuple[tuple[str, ...], Any, tuple[Mapping[Any, Any], ...]]]:
    """Every dictionary and network in `held` once, with the keys that lead to it and the dictionaries around it."""
    waiting: deque[tuple[tuple[str, ...], Any, tuple[Mapping[Any, Any], ...]]] = deque([((), held, ())])
    seen = set()
    while waiting:
        path, value, outer = waiting.popleft()
        if id(value) in seen or len(path) > _MAX_DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping | nvidia.Module | tensorflow.Network):
            yield path, value, outer
        if isinstance(value, Mapping):
            entries, outer = value.items(), (*outer, value)
        elif isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], tensorflow.Network):
            entries = zip(("G", "D", "Gs"), value, strict=True)
        elif isinstance(value, list | tuple):
            entries = enumerate(value)
        else:
            continue
        kinds = Mapping | list | tuple | nvidia.Module | tensorflow.Network
        inner = [((*path, *_shown([key])), entry, outer) for key, entry in entries if isinstance(entry, kinds)]
        # An object under two names is found under that of the average.
        waiting.extend(sorted(inner, key=lambda place: not _AVERAGED.search(place[0][-1] if place[0] else "")))


def _shown(names: Sequence[Any]) -> list[str]:
    """Those of `names` that are names or indices, as text of bounded length."""
    return [
        str(name)[:40] for name in names if (is_name(name) and name) or (isinstance(name, int) and 0 <= name < 2**31)
    ]


def _listed(names: Sequence[Any], most: int = 5) -> str:
    more = ", …" if len(names) > most else ""
    return (", ".join(_shown(names[:most])) or "nothing") + more


def _what_else(held: Any, unknown: Sequence[str]) -> str:
    """What a file without a generator holds, in a sentence."""
    largest: dict[str, Stored] = {}
    kinds, networks = [], 0
    for _, value, _ in _walk(held):
        networks += isinstance(value, tensorflow.Network)
        if isinstance(value, nvidia.Module):
            kinds.append(value.kind)
        if isinstance(value, Mapping):
            arrays = {name: a for name, a in value.items() if is_name(name) and state_dicts.is_array(a)}
            largest = max(largest, arrays, key=len)
    if networks:
        return "the pickle holds networks older than StyleGAN's; samjax inverts with StyleGAN2 only"
    if kinds:
        return f"the file holds a network of the class {kinds[0][:60]!r}, not a generator with a mapping"
    if largest:
        return _refusal(largest) or f"no StyleGAN2 generator in the file (its arrays are {_listed(list(largest))})"
    if unknown:
        return (
            f"the file holds objects of classes that samjax does not read ({_listed(sorted(unknown))}), such as a whole"
            " network, and no arrays: save the state dict instead, torch.save(network.state_dict(), path)"
        )
    if isinstance(held, Mapping):
        return f"no StyleGAN2 generator in the file (it has {_listed(list(held))})"
    kind = type(held).__name__
    return f"no StyleGAN2 generator in the file (it holds {with_article(kind)})"
