"""Processing many items in batches of one size, so that every batch runs the same compiled program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


def rows(count: int, batch_size: int) -> Iterator[np.ndarray]:
    """Indices [batch_size] of each batch of `count` items; the last batch is filled by repeating its last item.

    >>> [index.tolist() for index in rows(5, 2)]
    [[0, 1], [2, 3], [4, 4]]
    """
    for first in range(0, count, batch_size):
        yield np.minimum(np.arange(first, first + batch_size), count - 1)


def take(tree: Any, index: Any) -> Any:
    """Indexes the leading axis of every array in a pytree."""
    index = np.asarray(index) if isinstance(index, list) else index
    return jax.tree.map(lambda x: x[index], tree)


def map_batches(function: Callable[[Any], Any], arrays: Any, batch_size: int) -> Any:
    """Applies a function of a batch to any number of items.

    Args:
      function: takes `arrays` with a leading axis of `batch_size`, and returns a pytree of arrays with that leading
        axis.
      arrays: pytree of arrays [N, ...], N >= 1.
      batch_size: items in one call.

    Returns:
      The function's results for all N items, as NumPy arrays.

    Raises:
      ValueError: there are no items.

    >>> map_batches(lambda x: x + 1, np.arange(3), batch_size=2)
    array([1, 2, 3])
    """
    count = len(jax.tree.leaves(arrays)[0])
    if not count:
        raise ValueError("there are no items")
    parts = [jax.tree.map(np.asarray, function(take(arrays, index))) for index in rows(count, batch_size)]
    return jax.tree.map(lambda *batches: np.concatenate(batches)[:count], *parts)
