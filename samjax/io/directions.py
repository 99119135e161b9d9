"""Reading directions in W+ from files, as samjax and other programs write them. Nothing in a file is executed.

- SAM, InterFaceGAN, samjax: one direction, an array of one or all styles.
- AnyCost GAN and others: a dictionary or a stack of directions.
- GANSpace, also as e4e and PTI distribute it: principal components, which are scaled to one standard deviation each.
- SeFa (rosinality's factor.pt): the columns of a matrix.

Components of GANSpace and SeFa are ranked. They act on all styles, or on a range of them; see `parse_components`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from samjax.errors import UserError, escaped
from samjax.io import files, folders, styles, values

FIRST_COMPONENTS = 8
"""How many components of a file are read unless some are chosen."""

MAX_DIRECTIONS = 1000
"""Files with more directions are rejected."""

_MOST_STYLES = 18  # of generators of 1024 px, for which ranges of components may be meant
_KEYS = ("direction", "directions", "boundary", "boundaries")
# Names of components and standard deviations: in e4e's files, and in those that GANSpace itself writes.
_GANSPACE = (("comp", "std"), ("lat_comp", "lat_stdev"))
_SEFA = "eigvec"


class Component(NamedTuple):
    """A component of GANSpace or SeFa, and the styles on which it acts.

    Attributes:
      number: from 0.
      first, end: the first style, from 0, and the one after the last; all if None.
    """

    number: int
    first: int | None = None
    end: int | None = None


def parse_components(texts: Sequence[str]) -> tuple[Component, ...]:
    """Parses components such as "16:3-6": the component 16 in the styles 3, 4 and 5.

    Ranges end before their second number, as in the editors of GANSpace and e4e, so that their published edits can be
    copied. "16:3" is the component in one style, and "16" in all.

    Raises:
      UserError: another syntax, an empty range, or styles that no generator has.

    >>> parse_components(["0:0-5", "16"])
    (Component(number=0, first=0, end=5), Component(number=16, first=None, end=None))
    """
    found = []
    for text in texts:
        match = re.fullmatch(r"([0-9]{1,4})(?::([0-9]{1,4})(?:-([0-9]{1,4}))?)?", text.strip(), re.ASCII)
        if match is None:
            raise UserError(
                f"--components {text[:60]!r} cannot be read: give component:first-end, such as 0:0-5 16:3-6 22:9-11"
            )
        first = None if match[2] is None else int(match[2])
        end = None if first is None else first + 1 if match[3] is None else int(match[3])
        if first is not None and end is not None and not first < end <= _MOST_STYLES:
            raise UserError(
                f"--components {text}: {first}-{end} is not a range of styles: give the first, from 0, and the one"
                f" after the last, up to {_MOST_STYLES}"
            )
        found.append(Component(int(match[1]), first, end))
    return tuple(found)


def read(path: str | Path, num_ws: int, w_dim: int, *, components: Sequence[Component] = ()) -> dict[str, np.ndarray]:
    """Reads the directions in a file.

    Args:
      path: path of a file with one of `samjax.io.values.SUFFIXES`, in any case.
      num_ws: number of styles that the generator takes.
      w_dim: dimension of a style.
      components: which components of a GANSpace or SeFa file to return; by default the `FIRST_COMPONENTS` in all
        styles. Styles that the generator does not have are left out of a range.

    Returns:
      {name: [num_ws, w_dim] float32}; the name is that of the file without its suffix, followed by the key or the
      number of one of several directions. Names are safe for files.

    Raises:
      UserError: the file is missing or damaged, holds no directions of this generator or values that are not finite, or
        lacks a component.
    """
    return _read(Path(path), num_ws, w_dim, components)[0]


def read_one(path: str | Path, num_ws: int, w_dim: int) -> np.ndarray:
    """Reads the direction in a file that holds one.

    Returns:
      [num_ws, w_dim] float32.

    Raises:
      UserError: as `read`; or the file holds several directions.
    """
    found = read(path, num_ws, w_dim)
    if len(found) > 1:
        names = ", ".join(list(found)[:5]) + (", …" if len(found) > 5 else "")
        raise UserError(f"{path}: holds {len(found)} directions: use one by its name in --edits_folder ({names})")
    return next(iter(found.values()))


def read_folder(
    folder: str | Path,
    num_ws: int,
    w_dim: int,
    *,
    components: Sequence[Component] = (),
    notify: Callable[[str], None] | None = None,
) -> dict[str, np.ndarray]:
    """Reads all directions in a directory; hidden files are passed over.

    Args:
      folder: directory of the files.
      num_ws: number of styles that the generator takes.
      w_dim: dimension of a style.
      components: as in `read`; those of every GANSpace or SeFa file.
      notify: called with a line about the files with other suffixes, if there are any.

    Returns:
      {name: [num_ws, w_dim] float32}, sorted by file name.

    Raises:
      UserError: `folder` is not a directory, holds no directions, or one of them cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory: give --edits_folder a directory of directions")
    paths, others = folders.list_files(folder, values.SUFFIXES)
    if not paths:
        raise UserError(f"{folder} holds no directions ({values.listed()})")
    if others and notify:
        notify(others)
    read_files = [_read(path, num_ws, w_dim, components) for path in paths]
    if components and not any(ranked for _, ranked in read_files):
        raise UserError(f"{folder} holds no file of GANSpace or SeFa: leave --components out")
    return styles.named(pair for found, _ in read_files for pair in found.items())


def check(array: np.ndarray, num_ws: int, w_dim: int, where: str | Path) -> np.ndarray:
    """Checks an array that is one direction, and broadcasts it over the styles.

    Args:
      array: array of shape (1, num_ws, w_dim), (num_ws, w_dim), (1, w_dim), (w_dim,) or (w_dim, 1).
      num_ws: number of styles that the generator takes.
      w_dim: dimension of a style.
      where: what messages call the array.

    Returns:
      [num_ws, w_dim] float32.

    Raises:
      UserError: if the array has another shape, does not hold numbers, or holds values that are not finite.
    """
    with values.naming(where):
        found = _split(array, num_ws, w_dim)
        if len(found) > 1:
            raise UserError(f"shape {array.shape} does not fit this generator; it is that of {len(found)} directions")
        return _finite(found[0])


# --- within a file ---

_Pairs = Iterator[tuple[str, np.ndarray]]


def _read(path: Path, num_ws: int, w_dim: int, chosen: Sequence[Component]) -> tuple[dict[str, np.ndarray], bool]:
    """The directions in a file, and whether they are components."""
    held = values.read(path)
    with values.naming(path):
        ranked = _components(held, w_dim)
        if ranked is None:
            found = _directions(held, num_ws, w_dim, path.stem)
        else:
            found = _choose(ranked, chosen, num_ws, path.stem)
        made = styles.named((files.safe_name(name), _finite(direction)) for name, direction in found)
        return made, ranked is not None


def _components(held: Any, w_dim: int) -> np.ndarray | None:
    """The components [N, w_dim] in a file of GANSpace or SeFa; None for other files."""
    if not isinstance(held, Mapping):
        return None
    if (matrix := values.array(held.get(_SEFA))) is not None:
        if matrix.shape != (w_dim, w_dim) or not _is_numeric(matrix):
            raise UserError(
                f"the matrix {_SEFA} has shape {matrix.shape}, but this generator's styles have {w_dim} entries"
            )
        return matrix.T
    for names in _GANSPACE:
        components, deviations = (values.array(held.get(name)) for name in names)
        if components is None or deviations is None:
            continue
        count = deviations.size
        if not count or components.size != count * w_dim or not _is_numeric(components) or not _is_numeric(deviations):
            raise UserError(
                f"{names[0]} of shape {components.shape} and {count} standard deviations are no components for this"
                f" generator, whose styles have {w_dim} entries"
            )
        return components.reshape(count, w_dim).astype(np.float64) * deviations.reshape(count, 1).astype(np.float64)
    return None


def _choose(ranked: np.ndarray, components: Sequence[Component], num_ws: int, name: str) -> _Pairs:
    """The components that are wanted, each in its styles."""
    for number, first, end in components or [Component(i) for i in range(min(FIRST_COMPONENTS, len(ranked)))]:
        if number >= len(ranked):
            raise UserError(f"has no component {number}: its components are 0 to {len(ranked) - 1}")
        direction = np.broadcast_to(ranked[number], (num_ws, ranked.shape[1]))
        own = f"{name}_{number:02d}"
        if first is not None and end is not None:
            if first >= num_ws:
                raise UserError(f"--components {number}:{first}-{end}: this generator has the styles 0 to {num_ws - 1}")
            inside = (np.arange(num_ws) >= first) & (np.arange(num_ws) < end)
            direction = np.where(inside[:, None], direction, 0)
            own += f"_{first}-{end}" if end > first + 1 else f"_{first}"
        yield own, direction


def _directions(held: Any, num_ws: int, w_dim: int, name: str) -> _Pairs:
    """The directions in any other file."""
    found = ((keys, array) for keys, array in values.find(held, _KEYS) if not keys or array.size > 1)
    arrays = list(itertools.islice(found, MAX_DIRECTIONS + 1))  # without single numbers
    if not arrays:
        raise UserError("holds no arrays of numbers: give directions, or GANSpace's components (comp and std)")
    if len(arrays) > MAX_DIRECTIONS:
        raise UserError(f"holds more than the {MAX_DIRECTIONS:,} directions that are read")
    for keys, array in arrays:
        try:
            rows = _split(array, num_ws, w_dim)
        except UserError as error:
            if len(arrays) == 1:
                raise
            names = ", ".join(escaped("_".join(keys), 40) for keys, _ in arrays[:5])
            raise UserError(
                f"holds {len(arrays)} arrays ({names}), not all of them directions ({error}): name the direction"
                " 'direction'"
            ) from error
        own = "_".join((name, *keys)) if len(arrays) > 1 else name
        if len(rows) > MAX_DIRECTIONS:
            raise UserError(f"holds {len(rows):,} directions, more than the {MAX_DIRECTIONS:,} that are read")
        yield from zip(styles.numbered(own, len(rows)), rows, strict=True)


def _split(array: np.ndarray, num_ws: int, w_dim: int) -> np.ndarray:
    """The directions in an array, a view [N, num_ws, w_dim]."""
    if not _is_numeric(array):
        raise UserError(f"holds {array.dtype} and not numbers; a direction is an array of floats")
    found = styles.split(array.T if array.shape == (w_dim, 1) else array, num_ws, w_dim)
    if found is None:
        raise UserError(
            f"shape {array.shape}{styles.mismatch(array, num_ws, w_dim)} does not fit this generator; a direction has"
            f" shape (1, {num_ws}, {w_dim}), ({num_ws}, {w_dim}), (1, {w_dim}) or ({w_dim},)"
        )
    return found


def _is_numeric(array: np.ndarray) -> bool:
    return array.dtype.kind in "iu" or values.is_float(array.dtype)


def _finite(direction: np.ndarray) -> np.ndarray:
    return values.finite(direction, "; a direction needs numbers everywhere")
