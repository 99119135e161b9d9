"""The evaluation over a folder, on a tiny generator."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from samjax.io import checkpoints
from samjax.nets import stylegan2


@pytest.fixture(scope="module")
def evaluate():
    sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
    try:
        import evaluate

        yield evaluate
    finally:
        sys.path.pop(0)


def test_a_folder_gives_a_table_and_is_resumed(evaluate, tmp_path, capsys):
    config = stylegan2.StyleGAN2Config(64, z_dim=8, w_dim=8, mapping_layers=2, channel_base=256, channel_max=8)
    checkpoints.save_safetensors(tmp_path / "own.safetensors", config, stylegan2.init(config, key=jax.random.key(0)))
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    np.save(tmp_path / "up.npy", rng.standard_normal(8).astype(np.float32))
    args = evaluate.Arguments(
        images=tmp_path / "images",
        gan_weights=tmp_path / "own.safetensors",
        output_path=tmp_path / "out",
        thresholds=(0.3, 2.0),
        num_opt_steps=2,
        lpips_type="alex",
        edit=tmp_path / "up.npy",
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


def test_a_generator_of_ones_own_needs_images(evaluate, tmp_path):
    config = stylegan2.StyleGAN2Config(8, z_dim=4, w_dim=4, mapping_layers=1, channel_base=32, channel_max=4)
    checkpoints.save_safetensors(tmp_path / "own.safetensors", config, stylegan2.init(config, key=jax.random.key(0)))
    with pytest.raises(evaluate.UserError, match="--images"):
        evaluate.main(evaluate.Arguments(gan_weights=tmp_path / "own.safetensors", output_path=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
