"""Recognition networks in files as their authors distribute them: conversion, loading, and bad files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from golden_weights import load_fill

pytest.importorskip("torch")
import official_files  # after the line above, which it needs
import torch

from ckpt_convert import __main__ as program
from ckpt_convert import bisenet, convert, tables
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.nets.bisenet import BiSeNetConfig


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the two smaller networks."""
    folder = tmp_path_factory.mktemp("files")
    official_files.write_bisenet(folder / "79999_iter.pth")
    for part in ("encoder", "decoder"):
        official_files.write_ade20k(folder / f"{part}_epoch_20.pth", part)
    return folder


@pytest.fixture(scope="session")
def converted(folder: Path) -> Path:
    convert.convert(folder / "79999_iter.pth", folder / "bisenet")
    return folder / "bisenet"


def test_a_network_is_found_in_its_file(converted, capsys):
    config, variables, manifest = checkpoints.load_network(converted, "bisenet")
    assert config == BiSeNetConfig()
    assert manifest["source"]["file"] == "79999_iter.pth"
    assert "MIT" in manifest["licence"]
    flat = checkpoints.flatten(variables)
    for path, array in flat.items():
        name, layout = tables.find(bisenet.NETWORK.rows, path)
        expected = load_fill().fan_scaled(name, layout.theirs(np.asarray(array)).shape, "A")
        np.testing.assert_array_equal(layout.theirs(np.asarray(array)), expected, err_msg=name)
    assert json.loads((converted / "manifest.json").read_text())["format"] == "samjax bisenet 1"


def test_two_files_in_any_order(folder, tmp_path, capsys):
    parts = [str(folder / f"{part}_epoch_20.pth") for part in ("decoder", "encoder")]
    assert program.main([*parts, str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["file"] == "decoder_epoch_20.pth + encoder_epoch_20.pth"
    assert manifest["format"] == "samjax ade20k 1"
    assert program.main([parts[1], str(tmp_path / "half")]) == 2
    assert "give both" in capsys.readouterr().err
    assert not (tmp_path / "half").exists()


def test_another_network_than_requested_is_an_error(folder, converted, tmp_path, capsys):
    source = str(folder / "79999_iter.pth")
    for network in ("e4e", "invertibility", "mask_rcnn", "generator"):
        assert program.main([source, str(tmp_path / "out"), "--network", network]) == 2, network
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    assert "no e4e encoder in the file" in errors[0]
    assert "no StyleGAN2 generator in the file" in errors[3]
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"holds another network \(face parser\), where a generator is expected"):
        checkpoints.load_generator(converted)
    pair = [str(folder / f"{part}_epoch_20.pth") for part in ("encoder", "decoder")]
    assert program.main([*pair, str(converted)]) == 2
    assert "holds the face parser of 79999_iter.pth" in capsys.readouterr().err


def test_damaged_files_end_in_one_line(folder, tmp_path, capsys):
    data = (folder / "79999_iter.pth").read_bytes()
    for name, content in {
        "half.pth": data[: len(data) // 2],
        "page.pth": b"<!DOCTYPE html><html>Google Drive - Virus scan warning",
        "empty.pth": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert program.main([str(tmp_path / name), str(tmp_path / "out")]) == 2, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert name in error
    assert not (tmp_path / "out").exists()


def test_missing_and_misshapen_arrays_are_listed(folder, tmp_path, capsys):
    state = torch.load(folder / "79999_iter.pth")
    del state["ffm.convblk.bn.running_mean"]
    state["ffm.conv1.weight"] = state["ffm.conv1.weight"][:3].clone()
    state["other"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    assert program.main([str(tmp_path / "other.pth"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    for part in ("1 missing: ffm.convblk.bn.running_mean", "1 unexpected: other", "ffm.conv1.weight [3, "):
        assert part in error


def test_the_files_of_an_epoch_are_one_predictor(tmp_path, capsys):
    rng = np.random.default_rng(0)
    from ckpt_convert import deeplab
    from samjax.nets.deeplab import PredictorConfig

    config = PredictorConfig(("W+", "F10"), blocks=(1, 1, 1, 1), width=4, decoder_width=8, low_level_width=4)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for path, shape in checkpoints.parameter_shapes(config).items():
        name, layout = tables.find(deeplab.ROWS, path)
        part, _, rest = name.partition(".")
        array = layout.theirs(rng.standard_normal(shape).astype(np.float32))
        parts.setdefault(part, {})[f"module.{rest}"] = torch.from_numpy(np.array(array, order="C"))
    paths = []
    for part, state in parts.items():
        paths.append(tmp_path / ("005_main.pt" if part == "sd_base" else f"005_head_{part}.pt"))
        torch.save(state, paths[-1])
    assert program.main([*map(str, paths), str(tmp_path / "out")]) == 0
    assert checkpoints.load_network(tmp_path / "out", "invertibility").config == config
    assert program.main([str(paths[0]), str(tmp_path / "half")]) == 2
    assert "NNN_head_W+.pt" in capsys.readouterr().err
