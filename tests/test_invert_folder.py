"""Single-layer inversions of a folder: the authors' layout, resumed, divided over devices, shared by processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from samjax.io import checkpoints, datasets, images
from samjax.nets import stylegan2

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
LAYERS = ("W+", "F4", "F6")


@pytest.fixture(scope="module")
def invert_folder():
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import invert_folder

        yield invert_folder
    finally:
        sys.path.remove(str(EXPERIMENTS))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A generator of 64 px and three photographs."""
    folder = tmp_path_factory.mktemp("inputs")
    config = stylegan2.StyleGAN2Config(64, z_dim=8, w_dim=8, mapping_layers=2, channel_base=256, channel_max=8)
    checkpoints.save_safetensors(folder / "own.safetensors", config, stylegan2.init(config, key=jax.random.key(0)))
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / "photos" / f"p{i}.png")
    return folder


def _arguments(invert_folder, inputs, output, **changes):
    values = {
        "image_folder": inputs / "photos", "gan_weights": inputs / "own.safetensors", "output_path": output,
        "num_opt_steps": 3, "lpips_type": "alex", "batch_size": 2,
    }  # fmt: skip
    return invert_folder.Arguments(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(invert_folder, inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    invert_folder.main(_arguments(invert_folder, inputs, output, save_latents=True))
    return output


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def test_the_layout_is_the_authors(finished):
    found = datasets.find(finished)
    assert found.latent_names == LAYERS
    assert [example.name for example in found.examples] == ["p0", "p1", "p2"]
    assert images.image_size(finished / "F4" / "p1" / "final" / "input.png") == (64, 64)
    assert images.image_size(finished / "F4" / "p1" / "final" / "reconstruction.png") == (64, 64)
    with np.load(finished / "F6" / "p2" / "final" / "latents.npz") as saved:
        assert saved["F6"].shape == (32, 32, 8)
    assert not list(finished.rglob("*.part"))


def test_what_is_finished_is_skipped_and_the_rest_comes_out_the_same(invert_folder, inputs, finished, tmp_path, capsys):
    invert_folder.main(_arguments(invert_folder, inputs, tmp_path))
    (tmp_path / "F4" / "p1" / "final" / "reconstruction.png").unlink()
    kept = (tmp_path / "F6" / "p1" / "final" / "reconstruction.png").stat().st_mtime_ns
    capsys.readouterr()
    invert_folder.main(_arguments(invert_folder, inputs, tmp_path))
    assert "resuming: 8 of 9" in capsys.readouterr().out
    assert (tmp_path / "F6" / "p1" / "final" / "reconstruction.png").stat().st_mtime_ns == kept
    whole, again = pictures(finished), pictures(tmp_path)
    assert whole.keys() == again.keys()
    for name, data in whole.items():
        if name.endswith("reconstruction.png"):
            one, other = (np.asarray(Image.open(folder / name)).astype(int) for folder in (finished, tmp_path))
            assert np.abs(one - other).max() <= 1, name  # another neighbour in the batch: float32 sums may differ
        else:
            assert data == again[name], name


def test_a_bad_image_is_skipped_and_said(invert_folder, inputs, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "broken.png").write_bytes(b"no picture")
    Image.open(inputs / "photos" / "p0.png").save(photos / "whole.png")
    with pytest.raises(SystemExit) as caught:
        invert_folder.main(_arguments(invert_folder, inputs, tmp_path / "out", image_folder=photos))
    assert caught.value.code == 1
    assert "skipped" in (error := capsys.readouterr().err)
    assert "broken.png" in error
    assert [example.name for example in datasets.find(tmp_path / "out").examples] == ["whole"]


def test_bad_input_is_found_before_work(invert_folder, inputs, tmp_path):
    twins = tmp_path / "twins"
    twins.mkdir()
    for ending in ("png", "jpg"):
        Image.new("RGB", (40, 40)).save(twins / f"a.{ending}")
    (tmp_path / "empty").mkdir()
    for changes, message in (
        ({"image_folder": tmp_path / "none"}, "no folder"),
        ({"image_folder": tmp_path / "empty"}, "no images"),
        ({"image_folder": twins}, "the same results"),
        ({"batch_size": 3}, "does not divide by the 2 devices"),
        ({"latent_names": "W+,F10"}, "F10"),
        ({"coordinator": "localhost:1"}, "all three"),
    ):
        with pytest.raises(invert_folder.UserError, match=message):
            invert_folder.main(_arguments(invert_folder, inputs, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def command(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        sys.executable, str(EXPERIMENTS / "invert_folder.py"), "--image_folder", str(inputs / "photos"),
        "--gan_weights", str(inputs / "own.safetensors"), "--output_path", str(output), "--num_opt_steps", "3",
        "--lpips_type", "alex", "--batch_size", "1", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_and_started_again_it_loses_nothing(inputs, tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    subprocess.run(command(inputs, alone), check=True, capture_output=True)
    rng = np.random.default_rng(0)
    for _ in range(3):
        process = subprocess.Popen(command(inputs, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(5, 25))
        before = {name: data for name, data in pictures(killed).items() if name.endswith("reconstruction.png")}
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = pictures(killed)
        assert all(after[name] == data for name, data in before.items())
    subprocess.run(command(inputs, killed), check=True, capture_output=True)
    assert pictures(killed) == pictures(alone)


@pytest.mark.slow
def test_two_processes_share_a_folder(inputs, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ["--coordinator", address, "--num_processes", "2", "--process_id"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(command(inputs, tmp_path / "shared", *flags, str(i)), env=environment) for i in range(2)
    ]
    assert [process.wait(timeout=600) for process in running] == [0, 0]
    subprocess.run(command(inputs, tmp_path / "alone"), check=True, capture_output=True)
    assert pictures(tmp_path / "shared") == pictures(tmp_path / "alone")
