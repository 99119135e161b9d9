"""Fingerprints, and the one check that results were made with the same settings."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from samjax.config import InversionConfig
from samjax.errors import UserError
from samjax.io.provenance import check_settings, fingerprint


def test_fingerprints_tell_values_apart():
    values = [
        None, 0, 0.0, "0", b"0", True, Path("0"), (), [], {}, [0, [1]], [[0], 1], {"a": 1}, {"b": 1}, {"a": 2},
        np.zeros(3), np.zeros(3, np.float32), np.zeros((3, 1)), np.array([0, 0, 1.0]), InversionConfig(),
        InversionConfig(7),
    ]  # fmt: skip
    prints = [fingerprint(value) for value in values]
    assert len(set(prints)) == len(values) - 1  # an empty tuple is an empty list
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in prints)
    assert prints == [fingerprint(value) for value in values]


def test_what_is_equal_has_one_fingerprint():
    tree = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": {"c": 1}}
    same = {"b": {"c": 1}, "a": jnp.arange(6.0).reshape(2, 3)}
    assert fingerprint(tree) == fingerprint(same)
    assert fingerprint(np.asfortranarray(tree["a"])) == fingerprint(tree["a"])
    with pytest.raises(TypeError, match="object"):
        fingerprint(object())


def test_settings_are_written_once_and_then_compared(tmp_path):
    path, settings = tmp_path / "run" / "settings.json", {"steps": 3, "lr": 0.1, "data": [Path("x"), None]}
    check_settings(path, settings, "--output_path")
    written = path.read_bytes()
    check_settings(path, dict(reversed(settings.items())), "--output_path")
    assert path.read_bytes() == written
    check_settings(path, {**settings, "seed": 2}, "--output_path")  # there are no results yet
    check_settings(path, settings, "--output_path")
    (tmp_path / "run" / "result.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"run holds results of other settings \(lr, seed\): choose another --output_"):
        check_settings(path, {**settings, "lr": 0.2, "seed": 1}, "--output_path")
    for damaged in ("", "[1, 2", "[" * 100_000):
        path.write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            check_settings(path, settings, "--output_path")
    with pytest.raises(UserError, match=r"result\.png is a file: give a directory"):
        check_settings(tmp_path / "run" / "result.png" / "settings.json", settings, "directory")
    path.write_text("[]")
    with pytest.raises(UserError, match="other settings"):
        check_settings(path, settings, "--output_path")
