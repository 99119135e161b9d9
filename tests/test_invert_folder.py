"""Single-layer inversions of a folder: the authors' layout, resumed, divided over devices, shared by processes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from killing import EXPERIMENTS, environment, folder_command, kill_data_making, pictures, run_as_two, write_photos
from PIL import Image

from samjax.io import datasets, images

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
    return write_photos(tmp_path_factory.mktemp("inputs"), 3)


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


def test_the_layout_is_the_authors(finished):
    found = datasets.find(finished)
    assert found.latent_names == LAYERS
    assert [example.name for example in found.examples] == ["p0", "p1", "p2"]
    assert images.image_size(finished / "F4" / "p1" / "final" / "input.png") == (64, 64)
    assert images.image_size(finished / "F4" / "p1" / "final" / "reconstruction.png") == (64, 64)
    with np.load(finished / "F6" / "p2" / "final" / "latents.npz") as saved:
        assert saved["F6"].shape == (32, 32, 8)
    assert not list(finished.rglob("*.part"))


def test_the_authors_loader_finds_every_pair(finished):
    """Their training lists the folder and goes from one file to the others so."""
    paths = sorted(map(str, finished.glob("W+/*/final/reconstruction.png")))
    assert len(paths) == 3
    for path in paths:
        with Image.open(path.replace("reconstruction.png", "input.png")) as given:
            assert (given.mode, given.size) == ("RGB", (64, 64))
        for layer in LAYERS:
            with Image.open(path.replace("/W+/", f"/{layer}/")) as made:
                assert (made.mode, made.size) == ("RGB", (64, 64))


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


# --- real processes ---


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return environment(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def alone(inputs, env, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    subprocess.run(folder_command(inputs, output), check=True, capture_output=True, env=env)
    return output


@pytest.mark.slow
def test_killed_and_started_again_it_loses_nothing(inputs, env, alone, tmp_path):
    assert kill_data_making(inputs, tmp_path / "killed", alone, 3, env) > 0


@pytest.mark.slow
def test_two_processes_share_a_folder(inputs, env, alone, tmp_path):
    run_as_two(folder_command, inputs, tmp_path, env)
    assert pictures(tmp_path) == pictures(alone)
