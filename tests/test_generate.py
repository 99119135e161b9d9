"""Drawing images, with a tiny generator: names, numbers, and messages about bad input."""

import sys
from pathlib import Path

import generate
import jax
import numpy as np
import pytest
from PIL import Image

from samjax import cli, generation
from samjax.errors import UserError
from samjax.io import checkpoints, images
from samjax.nets import stylegan2
from samjax.testing import tiny_generator

CONFIG = stylegan2.StyleGAN2Config(8, z_dim=6, w_dim=5, mapping_layers=1, channel_base=32, channel_max=4)
LABELED = stylegan2.StyleGAN2Config(8, z_dim=6, w_dim=5, mapping_layers=1, channel_base=32, channel_max=4, c_dim=3)


@pytest.fixture(scope="module")
def generators(tmp_path_factory):
    """A directory with a generator and one that has classes."""
    directory = tmp_path_factory.mktemp("generators")
    for name, config in (("plain", CONFIG), ("labeled", LABELED)):
        checkpoints.save_safetensors(directory / f"{name}.safetensors", config, tiny_generator(config))
    return directory


@pytest.fixture
def draw(generators, tmp_path):
    """Runs the program and returns images.npy."""

    def run(**options):
        options = {"generator": generators / "plain.safetensors", "output_path": tmp_path / "out", **options}
        generate.main(generate.Arguments(**options))
        return np.load(options["output_path"] / "images.npy")

    return run


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("7", [7]), ("5, 1-2,5", [5, 1, 2]), ("4294967295", [2**32 - 1])]
)
def test_seeds(text, seeds):
    assert generation.parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("a", "cannot be read"),
        ("1,,2", "cannot be read"),
        ("-1", "cannot be read"),
        ("1.5", "cannot be read"),
        ("٣", "cannot be read"),
        ("7-3", "write 3-7"),
        ("4294967296", "largest seed"),
        ("0-99999999", "more than 10,000"),
        ("0-9999,10000", "more than 10,000"),
    ],
)
def test_bad_seeds(text, message):
    with pytest.raises(UserError, match=message):
        generation.parse_seeds(text)


def test_z_of_a_seed():
    """The first numbers of NumPy's legacy generator with seed 0, from which every StyleGAN2 program draws."""
    z = generation.random_z(0, 512)
    np.testing.assert_allclose(z[:3], [1.7640524, 0.4001572, 0.978738], rtol=1e-6)
    assert z.shape == (512,)


def test_images_from_seeds(draw, generators, tmp_path):
    made = draw(seeds="3-7", truncation_psi=0.5, batch_size=2)
    assert made.shape == (5, 8, 8, 3)
    assert made.dtype == np.float32
    assert np.abs(made).max() <= 1
    config, params, _ = checkpoints.load_generator(generators / "plain.safetensors")
    z = np.stack([generation.random_z(seed, 6) for seed in range(3, 8)])
    expected = jax.jit(
        lambda z: stylegan2.synthesize(config, params, stylegan2.map_z(config, params, z, truncation_psi=0.5)).image
    )(z).clip(-1, 1)
    assert np.abs(made - expected).max() < 1e-5  # another batch size adds in another order
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["grid.png", "images.npy", *(f"seed000{i}.png" for i in range(3, 8))]
    )
    for i, image in enumerate(made):
        pixels = np.asarray(Image.open(out / f"seed000{i + 3}.png"))
        np.testing.assert_array_equal(pixels, images.to_uint8(image))
    grid = np.asarray(Image.open(out / "grid.png"))
    assert grid.shape == (16, 24, 3)
    np.testing.assert_array_equal(grid[8:, 8:16], images.to_uint8(made[4]))
    assert (grid[8:, 16:] == 255).all()


def test_styles_instead_of_seeds(draw, tmp_path):
    ws = np.random.default_rng(0).standard_normal((2, CONFIG.num_ws, 5))
    np.save(tmp_path / "two.npy", ws)
    np.save(tmp_path / "one.npy", ws[1].astype(np.float16))
    both, one = draw(ws=tmp_path / "two.npy", batch_size=1), draw(ws=tmp_path / "one.npy")
    assert (tmp_path / "out" / "ws0001.png").exists()
    assert np.abs(one[0] - both[1]).max() < 0.05  # half precision
    assert np.abs(both[0] - both[1]).max() > 0.05


def test_random_noise_belongs_to_the_seed(draw):
    first, again = draw(seeds="1,2", noise="random"), draw(seeds="2,1", noise="random")
    assert np.abs(first - again[::-1]).max() < 1e-5
    assert np.abs(first - draw(seeds="1,2", noise="none")).max() > 0.01


def test_classes(draw, generators):
    labeled = generators / "labeled.safetensors"
    zero, two = (draw(generator=labeled, seeds="0", class_idx=i) for i in (0, 2))
    assert np.abs(zero - two).max() > 1e-3
    every = draw(generator=labeled, seeds="0-2")
    np.testing.assert_allclose(every[0], zero[0], atol=1e-5)  # the seeds take the classes in turn
    for class_idx in (3, -1):
        with pytest.raises(UserError, match="has the classes 0 to 2"):
            draw(generator=labeled, class_idx=class_idx)
    with pytest.raises(UserError, match="no classes"):
        draw(class_idx=0)


class Trap:
    """Unpickling it would end the process."""

    def __reduce__(self):
        return sys.exit, (99,)


def test_bad_styles(draw, tmp_path):
    path = tmp_path / "ws.npy"
    right = np.zeros((1, CONFIG.num_ws, 5), np.float32)
    cases = [
        (np.zeros((1, 3, 5), np.float32), r"has shape \(1, 3, 5\); this generator takes \(N, 4, 5\) or \(4, 5\)"),
        (right[:0], r"has shape \(0, 4, 5\)"),
        (right.astype(np.int32), "int32, but styles are floats"),
        (np.full_like(right, np.nan), "not finite"),
        (np.full_like(right, 1e300, np.float64), "not finite"),
        (np.array([Trap()], object), "arrays of Python objects are not read"),
    ]
    for array, message in cases:
        np.save(path, array, allow_pickle=True)
        with pytest.raises(UserError, match=message):
            draw(ws=path)
    path.write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(UserError, match="damaged"):
        draw(ws=path)
    with pytest.raises(UserError, match="no such file"):
        draw(ws=tmp_path / "none.npy")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": "0", "ws": Path("x.npy")}, "exclude each other"),
        ({"ws": Path("x.npy"), "truncation_psi": 0.5}, "act on seeds"),
        ({"truncation_psi": float("nan")}, "must be a number"),
        ({"truncation_cutoff": 5}, "between 0 and this generator's 4"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_bad_options(draw, options, message):
    with pytest.raises(UserError, match=message):
        draw(**options)


def test_nothing_is_left_of_a_failed_run(draw, generators, tmp_path):
    config, params, _ = checkpoints.load_generator(generators / "plain.safetensors")
    broken = jax.tree.map(lambda x: x * np.float32(1e30), params)
    checkpoints.save_safetensors(tmp_path / "broken.safetensors", config, broken)
    with pytest.raises(UserError, match="not finite"):
        draw(generator=tmp_path / "broken.safetensors")
    assert list((tmp_path / "out").iterdir()) == []


def test_large_grids_are_reduced():
    grid = generation.Grid(10_000, 64)
    assert grid.image.shape == (4000, 4000, 3)
    grid.add(np.zeros((64, 64), np.uint8))
    assert (grid.image[:40, :40] == 0).all()
    assert (grid.image[:, 40:] == 255).all()


def test_command_line(generators, tmp_path, monkeypatch, capsys):
    """One line and exit code 2 for a directory that cannot be written."""
    (tmp_path / "file").write_text("")
    flags = {"--generator": generators / "plain.safetensors", "--output_path": tmp_path / "file"}
    monkeypatch.setattr(sys, "argv", ["generate.py", *(str(part) for flag in flags.items() for part in flag)])
    with pytest.raises(SystemExit) as stop:
        cli.run(generate.Arguments, generate.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the output directory")
    assert error.count("\n") == 1
