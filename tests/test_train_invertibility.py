"""Training of a predictor from files: its output, resuming, and the input it rejects.

Tests marked slow start processes: killed ones, one with eight devices, two connected ones.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import train_invertibility as program
from killing import environment, kill_training, metrics_of, run_as_two, training_command, write_data
from PIL import Image

from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.nets import deeplab
from samjax.testing import tiny_predictor_config
from samjax.training import checkpoints as runs
from samjax.training import predictor, recipes

TINY = tiny_predictor_config()


@pytest.fixture(scope="module", autouse=True)
def small_predictor():
    usual, recipes.PREDICTOR_PRESETS["small"] = recipes.PREDICTOR_PRESETS["small"], TINY
    yield
    recipes.PREDICTOR_PRESETS["small"] = usual


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "train", 6)
    write_data(folder / "val", 3, seed=1)
    return folder


def arguments(data, output, **changes):
    values = {
        "dataset_folder_train": data / "train", "dataset_folder_val": data / "val", "output_folder": output,
        "preset": "small", "lpips_type": "alex", "target_H": 64, "target_W": 64, "batch_size": 4, "num_steps": 6,
        "val_frequency": 3, "save_frequency": 2, "log_frequency": 1,
    }  # fmt: skip
    return program.Arguments(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    program.main(arguments(data, output))
    return output


def predictor_of(directory: Path) -> dict[str, np.ndarray]:
    config, variables, _ = checkpoints.load_network(directory / "predictor", "invertibility")
    assert config == TINY
    return checkpoints.flatten(variables)


def test_a_run_leaves_a_predictor_metrics_and_figures(finished):
    rows = metrics_of(finished)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert all(0 <= row["val_same_layer"] <= 1 for row in rows if "val_loss" in row)
    assert predictor_of(finished)
    for name in ("curve.png", "figures/000003.png", "figures/000006.png"):
        with Image.open(finished / name) as figure:
            assert min(figure.size) > 100
    assert list((finished / "tensorboard").iterdir())


def test_the_result_is_the_best_state_by_validation(finished):
    rows = [row for row in metrics_of(finished) if "val_loss" in row]
    best = min(rows, key=lambda row: row["val_loss"])["step"]
    _, _, manifest = checkpoints.load_network(finished / "predictor", "invertibility")
    assert manifest["source_format"].endswith(f"step {best}")
    assert {int(path.name) for path in (finished / "checkpoints").iterdir()} == {best, 6}


@pytest.mark.parametrize("stop", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_as_if_it_had_not_been_stopped(data, finished, tmp_path, monkeypatch, stop):
    calls, step = [], predictor.step

    def stopping(*args):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(predictor, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        program.main(arguments(data, tmp_path))
    assert not (tmp_path / "predictor").exists()
    program.main(arguments(data, tmp_path))
    assert len(calls) < 6 + stop  # it did not start again
    assert metrics_of(tmp_path) == metrics_of(finished)
    chex.assert_trees_all_equal(predictor_of(finished), predictor_of(tmp_path))


def test_a_finished_run_is_not_run_again(data, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    program.main(arguments(data, tmp_path / "run"))
    assert "resuming after step 6 of 6" in capsys.readouterr().out
    assert metrics_of(tmp_path / "run") == metrics_of(finished)


def test_training_can_start_from_another_predictor(data, finished, tmp_path):
    program.main(arguments(data, tmp_path, init=finished / "predictor"))
    first, later = metrics_of(finished)[0], metrics_of(tmp_path)[0]
    assert later["loss"] != first["loss"]


@pytest.mark.slow  # compiles a program of its own
def test_precomputed_maps_train_a_predictor(data, tmp_path):
    program.main(arguments(data, tmp_path, cache_targets=True))
    assert len([*(tmp_path / "targets" / "train").iterdir()]) == 6
    assert len([*(tmp_path / "targets" / "val").iterdir()]) == 3
    assert all(np.isfinite(value) for row in metrics_of(tmp_path) for value in row.values())
    assert predictor_of(tmp_path)


def test_bad_input_is_found_before_work(data, finished, tmp_path):
    uneven = write_data(tmp_path / "uneven", 2)
    shutil.rmtree(uneven / "F4" / "p1")
    missing = write_data(tmp_path / "missing", 2)
    (missing / "W+" / "p0" / "final" / "input.png").unlink()
    broken = write_data(tmp_path / "broken", 2)
    (broken / "F4" / "p0" / "final" / "reconstruction.png").write_bytes(b"not an image")
    mixed = write_data(tmp_path / "mixed", 2)
    Image.new("RGB", (64, 32)).save(mixed / "F4" / "p0" / "final" / "reconstruction.png")
    one_layer = write_data(tmp_path / "one_layer", 2)
    shutil.rmtree(one_layer / "F4")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "unfinished" / "W+" / "p0").mkdir(parents=True)
    for changes, message in (
        ({"dataset_folder_train": tmp_path / "none"}, "not a directory"),
        ({"dataset_folder_train": uneven}, r"1 of 2 images .* lack some of the layers .*p1"),
        ({"dataset_folder_train": missing}, "1 of 2 images .* unusable"),
        ({"dataset_folder_train": broken}, "1 of 2 images .* unusable"),
        ({"dataset_folder_train": mixed}, "the aspect ratios differ"),
        ({"dataset_folder_val": one_layer}, "lacks F4"),
        ({"dataset_folder_val": tmp_path / "nothing"}, "lacks W"),
        ({"dataset_folder_val": tmp_path / "unfinished", "latent_space_name": "W+"}, "no finished inversions"),
        ({"latent_space_name": "W+,F6"}, "lacks F6"),
        ({"batch_size": 3}, "does not divide evenly over the 2 devices"),
        ({"batch_size": 1}, "at least 2"),
        ({"target_H": 0}, "--target_H must be at least 16"),
        ({"num_steps": -5}, "--num_steps must be at least 1"),
        ({"momentum": 1.0}, "--momentum must be below 1"),
        ({"threshold": float("nan")}, "--threshold must be at least 0"),
        ({"seed": -1}, "--seed must lie between"),
        ({"init": finished / "predictor", "latent_space_name": "W+"}, r"has maps of W\+,F4, the data have W\+"),
    ):
        with pytest.raises(UserError, match=message):
            program.main(arguments(data, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_the_directory_of_another_run_is_not_changed(data, finished, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(UserError, match=r"other settings \(training\)"):
        program.main(arguments(data, finished, lr=1e-3))
    larger = dataclasses.replace(TINY, width=8)
    monkeypatch.setitem(recipes.PREDICTOR_PRESETS, "full", larger)
    with pytest.raises(UserError, match=r"other settings \(predictor\)"):
        program.main(arguments(data, finished, preset="full", lr=recipes.PREDICTOR_LEARNING_RATES["small"]))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_checkpoint_of_another_predictor_is_rejected(data, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "settings.json").unlink()
    other = dataclasses.replace(TINY, width=8)
    shapes = jax.eval_shape(lambda: deeplab.init(other, key=jax.random.key(0)))
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)  # nothing is compiled
    checkpoints.save_network(tmp_path / "other", other, variables, {})
    with pytest.raises(UserError, match=r"checkpoints/6 cannot be read .* another preset"):
        program.main(arguments(data, tmp_path / "run", init=tmp_path / "other"))


def test_a_full_disk_is_reported_and_nothing_is_lost(data, finished, tmp_path, monkeypatch):
    save = runs.Checkpoints.save

    def full(self, step, *rest):
        if step == 3:
            raise UserError(f"cannot write {step}: No space left on device")
        save(self, step, *rest)

    monkeypatch.setattr(runs.Checkpoints, "save", full)
    with pytest.raises(UserError, match="No space left"):
        program.main(arguments(data, tmp_path))
    monkeypatch.setattr(runs.Checkpoints, "save", save)
    program.main(arguments(data, tmp_path))
    assert metrics_of(tmp_path) == metrics_of(finished)


# --- real processes ---


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return lambda devices=1: environment(tmp_path_factory.getbasetemp(), devices)


@pytest.fixture(scope="module")
def alone(data, env, tmp_path_factory):
    """One device, uninterrupted."""
    output = tmp_path_factory.mktemp("alone")
    subprocess.run(training_command(data, output), check=True, capture_output=True, env=env())
    return output


def losses(directory: Path, name: str = "loss") -> np.ndarray:
    return np.array([row[name] for row in metrics_of(directory) if name in row])


@pytest.mark.slow
def test_eight_devices_agree_with_one(data, env, alone, tmp_path):
    subprocess.run(training_command(data, tmp_path), check=True, capture_output=True, env=env(8))
    assert len(losses(alone)) == 20
    assert losses(alone)[-1] < 0.99 * losses(alone)[0]  # so that a wrong gradient shows below
    # Float32 sums in another order, accumulated over twenty steps.
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_agree_with_one(data, env, alone, tmp_path):
    run_as_two(training_command, data, tmp_path, env())
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)
    np.testing.assert_allclose(losses(tmp_path, "val_loss"), losses(alone, "val_loss"), rtol=1e-4)


@pytest.mark.slow
def test_a_killed_and_restarted_run_equals_an_uninterrupted_one(data, env, alone, tmp_path):
    assert kill_training(data, tmp_path / "run", alone, 3, env()) > 0
