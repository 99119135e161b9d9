"""Batches of one size over any number of items."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samjax import batching


@given(st.integers(0, 40), st.integers(1, 9))
def test_every_item_comes_once_and_only_the_last_is_repeated(count, batch_size):
    batches = list(batching.rows(count, batch_size))
    assert all(len(batch) == batch_size for batch in batches)
    flat = np.concatenate(batches) if batches else np.zeros(0, int)
    assert flat[:count].tolist() == list(range(count))
    assert set(flat[count:].tolist()) <= {count - 1}
    assert len(flat) - count < batch_size


@given(st.integers(1, 20), st.integers(1, 7))
def test_a_function_of_batches_is_one_of_all_items(count, batch_size):
    sizes = set()

    def function(tree):
        sizes.add(len(tree["x"]))
        return tree["x"] * 2, {"y": tree["y"] + 1}

    x, y = np.arange(count, dtype=np.float32), np.arange(2 * count, dtype=np.float32).reshape(count, 2)
    doubled, more = batching.map_batches(function, {"x": x, "y": y}, batch_size)
    np.testing.assert_array_equal(doubled, 2 * x)
    np.testing.assert_array_equal(more["y"], y + 1)
    assert sizes == {batch_size}


def test_no_items_are_an_error():
    with pytest.raises(ValueError, match="no items"):
        batching.map_batches(lambda x: x, np.zeros((0, 2)), 1)
