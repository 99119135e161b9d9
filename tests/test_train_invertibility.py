"""Training of a predictor from a folder: what it writes, how it goes on, and what it refuses.

The tests marked slow start real processes: killed ones, eight devices, two processes.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from killing import EXPERIMENTS, environment, figures, kill_training, run_as_two, training_command, write_data
from PIL import Image

from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.nets.deeplab import PredictorConfig

TINY = PredictorConfig(("W+", "F4"), blocks=(1, 1, 1, 1), width=4, decoder_width=8, low_level_width=4)


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import train_invertibility

        usual = train_invertibility.PRESETS["small"]
        train_invertibility.PRESETS["small"] = TINY
        yield train_invertibility
        train_invertibility.PRESETS["small"] = usual
    finally:
        sys.path.remove(str(EXPERIMENTS))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "train", 6)
    write_data(folder / "val", 3, seed=1)
    return folder


def arguments(script, data, output, **changes):
    values = {
        "dataset_folder_train": data / "train", "dataset_folder_val": data / "val", "output_folder": output,
        "preset": "small", "lpips_type": "alex", "target_H": 64, "target_W": 64, "batch_size": 4, "num_steps": 6,
        "val_frequency": 3, "save_frequency": 2, "log_frequency": 1,
    }  # fmt: skip
    return script.Arguments(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(script, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    script.main(arguments(script, data, output))
    return output


def predictor(folder: Path) -> dict[str, np.ndarray]:
    config, variables, _ = checkpoints.load_network(folder / "predictor", "invertibility")
    assert config == TINY
    return checkpoints.flatten(variables)


def test_a_run_leaves_a_predictor_figures_and_pictures(finished):
    rows = figures(finished)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert all(0 <= row["val_same_layer"] <= 1 for row in rows if "val_loss" in row)
    assert predictor(finished)
    for name in ("curve.png", "pictures/000003.png", "pictures/000006.png"):
        with Image.open(finished / name) as picture:
            assert min(picture.size) > 100
    assert list((finished / "tensorboard").iterdir())


def test_the_best_by_validation_is_what_comes_out(finished):
    rows = [row for row in figures(finished) if "val_loss" in row]
    best = min(rows, key=lambda row: row["val_loss"])["step"]
    _, _, manifest = checkpoints.load_network(finished / "predictor", "invertibility")
    assert manifest["source_format"].endswith(f"step {best}")
    assert {int(path.name) for path in (finished / "checkpoints").iterdir()} == {best, 6}


@pytest.mark.parametrize("stop", [4, 5])
def test_what_was_stopped_goes_on_as_if_nothing_had_happened(script, data, finished, tmp_path, monkeypatch, stop):
    calls, step = [], script.training.step

    def stopping(*args):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(script.training, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments(script, data, tmp_path))
    assert not (tmp_path / "predictor").exists()
    script.main(arguments(script, data, tmp_path))
    assert len(calls) < 6 + stop  # it did not begin anew
    assert figures(tmp_path) == figures(finished)
    expected, found = predictor(finished), predictor(tmp_path)
    assert all((expected[name] == found[name]).all() for name in expected)


def test_a_finished_run_is_not_run_again(script, data, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    script.main(arguments(script, data, tmp_path / "run"))
    assert "resuming after step 6 of 6" in capsys.readouterr().out
    assert figures(tmp_path / "run") == figures(finished)


def test_a_predictor_can_go_on_from_another(script, data, finished, tmp_path):
    script.main(arguments(script, data, tmp_path, init=finished / "predictor"))
    first, later = figures(finished)[0], figures(tmp_path)[0]
    assert later["loss"] != first["loss"]


@pytest.mark.slow  # compiles a program of its own
def test_maps_made_before_train_a_predictor(script, data, tmp_path):
    script.main(arguments(script, data, tmp_path, cache_targets=True))
    assert len([*(tmp_path / "targets" / "train").iterdir()]) == 6
    assert len([*(tmp_path / "targets" / "val").iterdir()]) == 3
    assert all(np.isfinite(value) for row in figures(tmp_path) for value in row.values())
    assert predictor(tmp_path)


def test_bad_input_is_found_before_work(script, data, finished, tmp_path):
    uneven = write_data(tmp_path / "uneven", 2)
    shutil.rmtree(uneven / "F4" / "p1")
    missing = write_data(tmp_path / "missing", 2)
    (missing / "W+" / "p0" / "final" / "input.png").unlink()
    broken = write_data(tmp_path / "broken", 2)
    (broken / "F4" / "p0" / "final" / "reconstruction.png").write_bytes(b"no picture")
    mixed = write_data(tmp_path / "mixed", 2)
    Image.new("RGB", (64, 32)).save(mixed / "F4" / "p0" / "final" / "reconstruction.png")
    one_layer = write_data(tmp_path / "one_layer", 2)
    shutil.rmtree(one_layer / "F4")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "unfinished" / "W+" / "p0").mkdir(parents=True)
    for changes, message in (
        ({"dataset_folder_train": tmp_path / "none"}, "no folder"),
        ({"dataset_folder_train": uneven}, r"1 of 2 images .* lack some of the layers .*p1"),
        ({"dataset_folder_train": missing}, "1 of 2 images .* unusable"),
        ({"dataset_folder_train": broken}, "1 of 2 images .* unusable"),
        ({"dataset_folder_train": mixed}, "not of one shape"),
        ({"dataset_folder_val": one_layer}, "lacks F4"),
        ({"dataset_folder_val": tmp_path / "nothing"}, "lacks W"),
        ({"dataset_folder_val": tmp_path / "unfinished", "latent_space_name": "W+"}, "no finished inversions"),
        ({"latent_space_name": "W+,F6"}, "lacks F6"),
        ({"batch_size": 3}, "does not divide by the 2 devices"),
        ({"batch_size": 1}, "at least 2"),
        ({"init": finished / "predictor", "latent_space_name": "W+"}, r"has maps of W\+,F4, the data have W\+"),
    ):
        with pytest.raises(UserError, match=message):
            script.main(arguments(script, data, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_another_runs_folder_is_left_alone(script, data, finished, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(UserError, match=r"other settings \(training\)"):
        script.main(arguments(script, data, finished, lr=1e-3))
    larger = dataclasses.replace(TINY, width=8)
    monkeypatch.setitem(script.PRESETS, "full", larger)
    with pytest.raises(UserError, match=r"other settings \(predictor\)"):
        script.main(arguments(script, data, finished, preset="full", lr=script.LEARNING_RATES["small"]))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_checkpoint_of_another_predictor_is_refused(script, data, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "settings.json").unlink()
    monkeypatch.setitem(script.PRESETS, "full", dataclasses.replace(TINY, width=8))
    with pytest.raises(UserError, match=r"checkpoints/6 cannot be read .* another preset"):
        script.main(arguments(script, data, tmp_path / "run", preset="full"))


def test_a_full_disk_is_told_and_nothing_is_lost(script, data, finished, tmp_path, monkeypatch):
    save = script.trainer.runs.Checkpoints.save

    def full(self, step, *rest):
        if step == 3:
            raise UserError(f"cannot write {step}: No space left on device")
        save(self, step, *rest)

    monkeypatch.setattr(script.trainer.runs.Checkpoints, "save", full)
    with pytest.raises(UserError, match="No space left"):
        script.main(arguments(script, data, tmp_path))
    monkeypatch.setattr(script.trainer.runs.Checkpoints, "save", save)
    script.main(arguments(script, data, tmp_path))
    assert figures(tmp_path) == figures(finished)


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


def losses(folder: Path, name: str = "loss") -> np.ndarray:
    return np.array([row[name] for row in figures(folder) if name in row])


@pytest.mark.slow
def test_eight_devices_agree_with_one(data, env, alone, tmp_path):
    subprocess.run(training_command(data, tmp_path), check=True, capture_output=True, env=env(8))
    assert len(losses(alone)) == 20
    assert losses(alone)[-1] < 0.99 * losses(alone)[0]  # a gradient wrong by a thousandth would show below
    # Float32 sums in another order, carried on over twenty steps.
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_agree_with_one(data, env, alone, tmp_path):
    run_as_two(training_command, data, tmp_path, env())
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)
    np.testing.assert_allclose(losses(tmp_path, "val_loss"), losses(alone, "val_loss"), rtol=1e-4)


@pytest.mark.slow
def test_killed_and_started_again_it_is_the_run_it_would_have_been(data, env, alone, tmp_path):
    assert kill_training(data, tmp_path / "run", alone, 3, env()) > 0
