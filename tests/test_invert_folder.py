"""Single-layer inversions of a directory: the authors' layout, resuming, several devices and processes."""

from __future__ import annotations

import subprocess

import invert_folder as program
import numpy as np
import pytest
from killing import environment, folder_command, images_of, kill_data_making, run_as_two, write_images
from PIL import Image

from samjax.errors import UserError
from samjax.io import images
from samjax.training import data as datasets

LAYERS = ("W+", "F4", "F6")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("inputs"), 3)


def arguments(inputs, output, **changes):
    values = {
        "image_folder": inputs / "images", "gan_weights": inputs / "own.safetensors", "output_path": output,
        "num_opt_steps": 3, "lpips_type": "alex", "batch_size": 2,
    }  # fmt: skip
    return program.Arguments(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    program.main(arguments(inputs, output, save_latents=True))
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
    """Their training finds files by replacing parts of the path like this."""
    paths = sorted(map(str, finished.glob("W+/*/final/reconstruction.png")))
    assert len(paths) == 3
    for path in paths:
        with Image.open(path.replace("reconstruction.png", "input.png")) as given:
            assert (given.mode, given.size) == ("RGB", (64, 64))
        for layer in LAYERS:
            with Image.open(path.replace("/W+/", f"/{layer}/")) as made:
                assert (made.mode, made.size) == ("RGB", (64, 64))


def test_finished_inversions_are_skipped_and_others_come_out_the_same(inputs, finished, tmp_path, capsys):
    program.main(arguments(inputs, tmp_path))
    (tmp_path / "F4" / "p1" / "final" / "reconstruction.png").unlink()
    kept = (tmp_path / "F6" / "p1" / "final" / "reconstruction.png").stat().st_mtime_ns
    capsys.readouterr()
    program.main(arguments(inputs, tmp_path))
    assert "resuming: 8 of 9" in capsys.readouterr().out
    assert (tmp_path / "F6" / "p1" / "final" / "reconstruction.png").stat().st_mtime_ns == kept
    whole, again = images_of(finished), images_of(tmp_path)
    assert whole.keys() == again.keys()
    for name, data in whole.items():
        if name.endswith("reconstruction.png"):
            one, other = (np.asarray(Image.open(folder / name)).astype(int) for folder in (finished, tmp_path))
            assert np.abs(one - other).max() <= 1, name  # other items in the batch change float32 rounding
        else:
            assert data == again[name], name


def test_inversions_of_other_settings_are_not_resumed(inputs, finished):
    for changes, names in (({"num_opt_steps": 4}, "num_opt_steps"), ({"fit": "crop"}, "fit")):
        with pytest.raises(UserError, match=rf"results of other settings \({names}\): choose another --output_path"):
            program.main(arguments(inputs, finished, **changes))
    program.main(arguments(inputs, finished, latent_names="W+,F4", batch_size=4))  # nothing is left to do


def test_a_bad_image_is_skipped_and_reported(inputs, tmp_path, capsys):
    directory = tmp_path / "images"
    directory.mkdir()
    (directory / "broken.png").write_bytes(b"not an image")
    Image.open(inputs / "images" / "p0.png").save(directory / "whole.png")
    with pytest.raises(SystemExit) as caught:
        program.main(arguments(inputs, tmp_path / "out", image_folder=directory))
    assert caught.value.code == 1
    assert "skipped" in (error := capsys.readouterr().err)
    assert "broken.png" in error
    assert [example.name for example in datasets.find(tmp_path / "out").examples] == ["whole"]


def test_bad_input_is_found_before_work(inputs, tmp_path):
    twins = tmp_path / "twins"
    twins.mkdir()
    for ending in ("png", "jpg"):
        Image.new("RGB", (40, 40)).save(twins / f"a.{ending}")
    (tmp_path / "empty").mkdir()
    for changes, message in (
        ({"image_folder": tmp_path / "none"}, "not a directory"),
        ({"image_folder": tmp_path / "empty"}, "no images"),
        ({"image_folder": twins}, "the same results"),
        ({"batch_size": 3}, "does not divide evenly over the 2 devices"),
        ({"latent_names": "W+,F10"}, "F10"),
        ({"coordinator": "localhost:1"}, "all three"),
        ({"image_folder": tmp_path}, "--output_path .* lies in --image_folder"),
        ({"image_folder": tmp_path / "out"}, "--output_path .* lies in --image_folder"),
    ):
        with pytest.raises(UserError, match=message):
            program.main(arguments(inputs, tmp_path / "out", **changes))
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
def test_killed_and_restarted_it_loses_nothing(inputs, env, alone, tmp_path):
    assert kill_data_making(inputs, tmp_path / "killed", alone, 3, env) > 0


@pytest.mark.slow
def test_two_processes_share_a_directory(inputs, env, alone, tmp_path):
    run_as_two(folder_command, inputs, tmp_path, env)
    assert images_of(tmp_path) == images_of(alone)
