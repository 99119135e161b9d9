"""The main job as a user runs it, on a tiny generator of their own; the full demo is `slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import invert
import numpy as np
import pytest
from PIL import Image

from samjax.errors import UserError
from samjax.io import checkpoints, images
from samjax.pipeline import Pipeline
from samjax.testing import TINY_64, tiny_encoder, tiny_generator, tiny_predictor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A generator of 64 px (W+, F4, F6), an image, a label image and a direction."""
    folder = tmp_path_factory.mktemp("inputs")
    checkpoints.save_safetensors(folder / "own.safetensors", TINY_64, tiny_generator(TINY_64))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (80, 100, 3), np.uint8)).save(folder / "photo.png")
    labels = np.zeros((80, 100), np.uint8)
    labels[:, 50:] = 7
    Image.fromarray(labels).save(folder / "labels.png")
    (folder / "edits").mkdir()
    np.save(folder / "edits" / "up.npy", rng.standard_normal((1, 10, 8)).astype(np.float32))
    return folder


def _arguments(inputs, output, **changes):
    values = {
        "image_path": inputs / "photo.png",
        "gan_weights": inputs / "own.safetensors",
        "segments": inputs / "labels.png",
        "edits_folder": inputs / "edits",
        "output_path": output,
        "num_opt_steps": 3,
        "lpips_type": "alex",
        "edit_strengths": (0.0, 1.0),
    }
    return invert.Arguments(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    invert.main(_arguments(inputs, output))
    return output / "photo"


def test_everything_promised_is_there(finished):
    tag = "T0.225"
    for name in (
        "input.png", "start.png", "segments.png", "invertibility.png", f"layers_{tag}.png", f"reconstruction_{tag}.png",
        f"latents_{tag}.npz", f"edits/up/{tag}.png", f"edits/up/{tag}_mul1.png", "comparison.png", "metrics.json",
        "report.html",
    ):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    assert not list(finished.rglob("*.part"))
    summary = json.loads((finished / "metrics.json").read_text())
    assert set(summary["thresholds"]["0.225"]["metrics"]) == {"W+", "F6", "SAM"}
    assert [row["label"] for row in summary["thresholds"]["0.225"]["segments"]] == [0, 7]
    assert summary["layers"] == ["W+", "F4", "F6"]
    assert images.image_size(finished / f"reconstruction_{tag}.png") == (64, 64)


def test_latents_on_disk_give_the_reconstruction(finished):
    with np.load(finished / "latents_T0.225.npz", allow_pickle=False) as saved:
        assert saved["latent_W+"].shape == (1, 10, 8)
        assert saved["latent_F6"].shape == (1, 32, 32, 8)
        assert saved["layer_map"].shape == (64, 64)


def test_the_same_command_resumes_and_another_threshold_adds(inputs, finished, capsys):
    measured = (finished / "measured.npz").stat().st_mtime_ns
    invert.main(_arguments(inputs, finished.parent))
    out = capsys.readouterr().out
    assert "resuming: the single-layer inversions are done" in out
    assert "resuming: threshold 0.225 is done" in out
    invert.main(_arguments(inputs, finished.parent, threshold=0.9))
    assert (finished / "latents_T0.900.npz").exists()
    assert (finished / "measured.npz").stat().st_mtime_ns == measured


def test_a_sweep_runs_equal_layer_maps_once(inputs, finished, capsys):
    invert.main(_arguments(inputs, finished.parent, sweep_thresholds=True, generate_edits=False))
    assert "different layer maps" in capsys.readouterr().out
    assert len(list(finished.glob("reconstruction_T*.png"))) >= 14


def test_other_settings_in_the_same_folder_are_refused(inputs, finished):
    with pytest.raises(UserError, match=r"other settings \(num_opt_steps\)"):
        invert.main(_arguments(inputs, finished.parent, num_opt_steps=4, invertibility_steps=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_path": Path("missing.png")}, "missing.png"),
        ({"gan_weights": Path("missing")}, "missing"),
        ({"latent_names": "W+,F5"}, "unknown latent layer 'F5'"),
        ({"latent_names": "W+,F10"}, "F10"),
        ({"image_category": "cars"}, "512 px"),
        ({"edits_folder": Path("nowhere")}, "nowhere"),
        ({"num_opt_steps": -1}, "num_opt_steps"),
        ({"gan_weights": None, "image_category": "faces"}, "3 files of the category faces cannot be found"),
        ({"start": "encoder"}, "--e4e_path"),
        ({"invertibility": "predicted"}, "--inv_model_path"),
        ({"segments": None, "segmenter": "mask_rcnn"}, "a file of the category cats cannot be found"),
        ({"e4e_path": Path("missing.pt")}, "missing.pt"),
        ({"edits_folder": None, "generate_edits": True}, "--edits_folder"),
        ({"threshold": float("nan")}, "threshold"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(inputs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        invert.main(_arguments(inputs, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_segments_of_another_size_are_found_before_work(inputs, tmp_path):
    Image.new("L", (7, 5)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"small\.png has 7 x 5 pixels"):
        invert.main(_arguments(inputs, tmp_path / "out", segments=tmp_path / "small.png"))
    assert not (tmp_path / "out").exists()


def test_directions_of_another_generator_are_found_before_work_starts(inputs, tmp_path):
    (tmp_path / "edits").mkdir()
    np.save(tmp_path / "edits" / "foreign.npy", np.zeros((1, 18, 512), np.float32))
    with pytest.raises(UserError, match=r"foreign\.npy"):
        invert.main(_arguments(inputs, tmp_path / "out", edits_folder=tmp_path / "edits"))
    assert not (tmp_path / "out").exists()


def test_the_command_line_gives_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "experiments/invert.py", "--image-path", "missing.png", "--output_path", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """An encoder and a predictor for that generator."""
    folder = tmp_path_factory.mktemp("learned")
    for name, network in (("e4e", tiny_encoder(TINY_64)), ("predictor", tiny_predictor(("W+", "F4", "F6", "F8")))):
        checkpoints.save_network(folder / name, network.config, network.params, {})
    return folder


def test_with_encoder_and_predictor_nothing_is_inverted_twice(inputs, learned, tmp_path, capsys):
    changes = {"e4e_path": learned / "e4e", "inv_model_path": learned / "predictor", "paste_back": True}
    invert.main(_arguments(inputs, tmp_path, **changes))
    assert "single layers" not in capsys.readouterr().err
    folder = tmp_path / "photo"
    summary = json.loads((folder / "metrics.json").read_text())
    assert set(summary["thresholds"]["0.225"]["metrics"]) == {"SAM"}
    assert not (folder / "measured.npz").exists()
    assert images.image_size(folder / "pasted" / "reconstruction_T0.225.png") == (80, 100)
    assert images.image_size(folder / "pasted" / "up" / "T0.225_mul1.png") == (80, 100)
    with pytest.raises(UserError, match="encoder, invertibility, measure_steps, predictor, start"):
        invert.main(_arguments(inputs, tmp_path))


def test_networks_that_do_not_belong_together_are_an_error(inputs, learned, tmp_path):
    for changes, message in (
        ({"inv_model_path": learned / "e4e"}, r"holds another network \(e4e encoder\)"),
        ({"e4e_path": learned / "predictor"}, r"holds another network \(invertibility predictor\)"),
        ({"inv_model_path": inputs / "own.safetensors"}, r"holds another network \(generator\)"),
    ):
        with pytest.raises(UserError, match=message):
            invert.main(_arguments(inputs, tmp_path / "out", **changes))
    eight = tiny_encoder()
    checkpoints.save_network(tmp_path / "eight", eight.config, eight.params, {})
    with pytest.raises(UserError, match="gives 8 styles of 8, the generator takes 10 of 8"):
        invert.main(_arguments(inputs, tmp_path / "out", e4e_path=tmp_path / "eight"))
    few = tiny_predictor(("W+", "F6"))
    checkpoints.save_network(tmp_path / "few", few.config, few.params, {})
    with pytest.raises(UserError, match="no maps of F4"):
        invert.main(_arguments(inputs, tmp_path / "out", inv_model_path=tmp_path / "few"))
    assert not (tmp_path / "out").exists()


def test_the_script_is_the_pipeline_to_the_bit(inputs, finished):
    sam = Pipeline.from_pretrained(
        inputs / "own.safetensors", edits_folder=inputs / "edits", num_opt_steps=3, lpips_type="alex"
    )
    result = sam.invert(inputs / "photo.png", segments=inputs / "labels.png")
    with np.load(finished / "latents_T0.225.npz", allow_pickle=False) as saved:
        for name, latent in result.latents.items():
            np.testing.assert_array_equal(saved[f"latent_{name}"], latent)
        np.testing.assert_array_equal(saved["terms"], np.stack(result.terms))
    by_script = np.asarray(Image.open(finished / "reconstruction_T0.225.png"))
    np.testing.assert_array_equal(np.asarray(result.reconstruction), by_script)
    summary = json.loads((finished / "metrics.json").read_text())["thresholds"]["0.225"]
    assert summary["metrics"]["SAM"] == dict(result.metrics)
    assert {row["label"]: row["layer"] for row in summary["segments"]} == result.layers


def test_images_in_progress(inputs, tmp_path):
    invert.main(_arguments(inputs, tmp_path, save_intermediate=True, save_frequency=2, generate_edits=False))
    assert [path.name for path in (tmp_path / "photo" / "intermediate").iterdir()] == ["step_00_0002.png"]


@pytest.mark.slow
def test_the_demo_shows_the_point_of_the_method(tmp_path):
    # The threshold belongs to maps of these settings, which the predictor learned.
    invert.main(invert.Arguments(output_path=tmp_path, invertibility="measured", start="encoder"))
    (summary,) = json.loads((tmp_path / "scene0" / "metrics.json").read_text())["thresholds"].values()
    lpips = {name: row["LPIPS"] for name, row in summary["metrics"].items()}
    assert lpips["SAM"] <= 0.75 * lpips["W+"]
    assert lpips["SAM"] <= lpips["F10"] + 0.06
    assert len({row["layer"] for row in summary["segments"]}) > 1


@pytest.mark.slow
def test_the_demos_own_networks_do_nearly_as_well_as_measuring(tmp_path):
    lpips = {}
    for how in ("measured", "predicted"):
        invert.main(invert.Arguments(output_path=tmp_path / how, invertibility=how, generate_edits=False))
        (summary,) = json.loads((tmp_path / how / "scene0" / "metrics.json").read_text())["thresholds"].values()
        lpips[how] = summary["metrics"]["SAM"]["LPIPS"]
    assert lpips["predicted"] <= 1.1 * lpips["measured"]
