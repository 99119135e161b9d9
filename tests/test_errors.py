"""Checks of options, and what programs print."""

from types import SimpleNamespace

import pytest

from samjax.errors import UserError, check_least, check_positive, check_seed, shown


@pytest.mark.parametrize("value", [0, -2, float("nan"), float("inf")])
def test_numbers_that_are_too_small_or_not_finite(value):
    options = SimpleNamespace(steps=value, unset=None)
    with pytest.raises(UserError, match=f"^--steps must be at least 1, not {value}$"):
        check_least(options, {"unset": 1, "steps": 1})
    with pytest.raises(UserError, match=f"^--steps must be a number above 0, not {value}$"):
        check_positive(options, ("unset", "steps"))


def test_numbers_in_range():
    options = SimpleNamespace(steps=1, lr=1e-9, unset=None)
    check_least(options, {"steps": 1, "unset": 5, "lr": 0})
    check_positive(options, ("steps", "lr", "unset"))


@pytest.mark.parametrize("seed", [-1, 2**32, 99999999999999999999, pytest.param(10**5000, id="long")])
def test_seeds_have_32_bits(seed):
    with pytest.raises(UserError, match=r"^--scene_seed must lie between 0 and 4294967295, not ") as caught:
        check_seed(seed, "--scene_seed")
    assert len(str(caught.value)) < 100
    check_seed(0)
    check_seed(2**32 - 1)


def test_values_that_have_no_short_text_are_shown_as_their_type():
    assert shown(object()) == "an object"
    assert shown({}) == "a dict"
