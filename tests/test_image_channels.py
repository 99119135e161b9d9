"""Generators of gray and RGBA images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import evaluate
import find_directions
import generate
import invert
import invert_folder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_encoder
from PIL import Image

from ckpt_convert import convert
from samjax import Pipeline
from samjax.config import Options
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.nets import stylegan2
from samjax.testing import TINY, random_lpips, tiny_generator

CASES = Path(__file__).parent / "cases" / "generators"
GRAY = dataclasses.replace(TINY, img_channels=1)
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("name", "mode"), [("grey", "L"), ("rgba", "RGBA")])
def test_images_are_drawn_as_the_reference_draws_them(name, mode, tmp_path):
    convert.convert(CASES / f"{name}.pkl", tmp_path / "converted")
    out = tmp_path / "out"
    generate.main(generate.Arguments(out, tmp_path / "converted", ws=CASES / f"{name}_ws.npy"))
    drawn, reference = np.load(out / "images.npy"), np.load(CASES / f"{name}_ref.npy")
    # float32 sums in another order; images are clipped as all programs do.
    np.testing.assert_allclose(drawn, np.clip(reference, -1, 1), rtol=0, atol=1e-5)
    with Image.open(out / "ws0000.png") as image:
        assert image.mode == mode


def test_images_that_no_png_holds_are_drawn_as_an_array(tmp_path, capsys):
    config, out = dataclasses.replace(TINY, img_channels=5), tmp_path / "out"
    checkpoints.save_safetensors(tmp_path / "five.safetensors", config, tiny_generator(config))
    generate.main(generate.Arguments(out, tmp_path / "five.safetensors", seeds="0-1"))
    assert [path.name for path in out.iterdir()] == ["images.npy"]
    assert np.load(out / "images.npy").shape == (2, TINY.img_resolution, TINY.img_resolution, 5)
    assert "5 channels are neither gray, RGB nor RGBA: only images.npy is written" in capsys.readouterr().err


def test_a_gray_generator_as_rgb_draws_three_equal_channels():
    params = tiny_generator(GRAY)
    config, made = stylegan2.as_rgb(GRAY, params)
    assert config == TINY
    assert checkpoints.parameter_shapes(TINY) == {k: v.shape for k, v in checkpoints.flatten(made).items()}
    ws = jnp.asarray(np.random.default_rng(0).standard_normal((1, TINY.num_ws, TINY.w_dim), np.float32))
    synthesize = jax.jit(stylegan2.synthesize, static_argnums=0)
    gray, rgb = (synthesize(c, p, ws).image for c, p in ((GRAY, params), (config, made)))
    np.testing.assert_allclose(rgb, np.repeat(gray, 3, -1), rtol=0, atol=1e-6)  # sums in another order
    assert stylegan2.as_rgb(TINY, made)[1] is made


def test_a_gray_generator_inverts_and_edits_in_gray(monkeypatch):
    monkeypatch.setattr("samjax.pipeline.weights.load_lpips", random_lpips)
    generator = checkpoints.LoadedNetwork(GRAY, tiny_generator(GRAY), {})
    notes: list[str] = []
    options = Options(segmenter="slic", lpips_type="alex", num_opt_steps=2)
    sam = Pipeline(generator, options=options, notify=notes.append)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    known = sam.analyze(image, maps=np.zeros((len(sam.layers), *sam.category.target_size), np.float32))
    assert notes == ["the image is inverted in gray, as the generator draws it"]
    luminance = image @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(known.source[..., 0], luminance, rtol=0, atol=1)  # rounding to a level
    result = sam.invert(known)
    edited = sam.edit(result, np.ones((TINY.num_ws, TINY.w_dim)), 2.0)
    for made in (known.source, known.target, np.asarray(result.reconstruction), np.asarray(edited)):
        assert made.shape[-1] == 3
        assert (np.ptp(made, axis=-1) == 0).all()


def test_what_is_neither_rgb_nor_gray_is_refused_before_any_work(tmp_path):
    convert.convert(CASES / "rgba.pkl", tmp_path / "converted")
    message = (
        r"this generator draws images of 4 channels; samjax inverts with generators of RGB and of gray images only"
    )
    with pytest.raises(UserError, match=message):
        Pipeline(checkpoints.load_generator(tmp_path / "converted"))
    sample = ROOT / "samjax" / "demo" / "samples" / "scene0.png"
    generator, out = tmp_path / "converted", tmp_path / "out"
    for program, arguments in (
        (invert, invert.Arguments(gan_weights=generator, image_path=sample, output_path=out)),
        (evaluate, evaluate.Arguments(gan_weights=generator, images=sample.parent, output_path=out)),
        (invert_folder, invert_folder.Arguments(gan_weights=generator, image_folder=sample.parent, output_path=out)),
        (train_encoder, train_encoder.Arguments(gan_weights=generator, output_folder=out)),
        (find_directions, find_directions.Arguments(out, generator)),
    ):
        with pytest.raises(UserError, match=message):
            program.main(arguments)
        assert not out.exists()
