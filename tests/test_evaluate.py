"""The evaluations over a folder, on tiny networks."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.nets import deeplab, e4e, stylegan2
from samjax.nets.deeplab import PredictorConfig


@pytest.fixture(scope="module")
def evaluate():
    with scripts():
        import evaluate

        yield evaluate


@pytest.fixture(scope="module")
def learned():
    with scripts():
        import evaluate_learned

        yield evaluate_learned


@contextlib.contextmanager
def scripts():
    sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
    try:
        yield
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A generator of 64 px and two images."""
    folder = tmp_path_factory.mktemp("inputs")
    config = stylegan2.StyleGAN2Config(64, z_dim=8, w_dim=8, mapping_layers=2, channel_base=256, channel_max=8)
    checkpoints.save_safetensors(folder / "own.safetensors", config, stylegan2.init(config, key=jax.random.key(0)))
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / "images" / f"{name}.png")
    np.save(folder / "up.npy", rng.standard_normal(8).astype(np.float32))
    return folder


def test_a_folder_gives_a_table_and_is_resumed(evaluate, inputs, tmp_path, capsys):
    args = evaluate.Arguments(
        images=inputs / "images",
        gan_weights=inputs / "own.safetensors",
        output_path=tmp_path / "out",
        thresholds=(0.3, 2.0),
        num_opt_steps=2,
        lpips_type="alex",
        edit=inputs / "up.npy",
    )
    evaluate.main(args)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(table["mean"]) == ["W+", "F4", "F6", "SAM 0.3", "SAM 2"]
    # At threshold 2 every segment takes W+: the same inversion as W+'s own.
    for figure in ("psnr", "ssim", "lpips", "edit"):
        assert table["mean"]["SAM 2"][figure] == pytest.approx(table["mean"]["W+"][figure], rel=1e-4)
    assert "| SAM 2 |" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("[ab]_*.json")}
    assert len(before) == 2
    evaluate.main(args)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_a_generator_of_ones_own_needs_images(evaluate, learned, inputs, tmp_path):
    for script in (evaluate, learned):
        with pytest.raises(UserError, match="--images"):
            script.main(script.Arguments(gan_weights=inputs / "own.safetensors", output_path=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """An encoder and a predictor with random weights."""
    folder, key = tmp_path_factory.mktemp("networks"), jax.random.key(0, impl="rbg")
    encoder = e4e.E4EConfig(10, 8, widths=(4, 4, 8, 8), blocks=(1, 1, 1, 1), head_width=4, head_depth=2)
    predictor = PredictorConfig(
        ("W+", "F4", "F6"), blocks=(1, 1, 1, 1), width=4, decoder_width=8, low_level_width=4
    )  # fmt: skip
    for name, module, config in (("encoder", e4e, encoder), ("predictor", deeplab, predictor)):
        checkpoints.save_safetensors(folder / f"{name}.safetensors", config, module.init(config, key=key))
    return {"e4e_path": folder / "encoder.safetensors", "inv_model_path": folder / "predictor.safetensors"}


@pytest.mark.slow
def test_learned_networks_are_held_against_measuring(learned, inputs, networks, tmp_path, capsys):
    args = learned.Arguments(
        images=inputs / "images", gan_weights=inputs / "own.safetensors", output_path=tmp_path, num_opt_steps=2,
        lpips_type="alex", threshold=5.0, **networks,
    )  # fmt: skip
    learned.main(args)
    printed = capsys.readouterr().out
    # At threshold 5 every segment takes W+, whatever the maps.
    assert "| predicted | 100.0% |" in printed
    assert "area by measured maps: W+ 100%, F4 0%, F6 0%" in printed
    rows = json.loads((tmp_path / "table.json").read_text())["images"]
    assert len(rows) == 2
    for row in rows.values():
        assert row["lpips_measured"] == row["lpips_predicted"]
        assert row["mean_w"] == pytest.approx(row["mean_sam"], rel=1e-5)
        assert row["half_w"] == pytest.approx(row["half_sam"], rel=1e-5)
        assert row["segment_error"] > 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[ab]_*.json")}
    learned.main(args)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("[ab]_*.json")}
    assert capsys.readouterr().out == printed
