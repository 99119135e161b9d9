"""Evaluations over a directory of images, on tiny networks."""

from __future__ import annotations

import dataclasses
import json
import math

import evaluate
import evaluate_learned
import numpy as np
import pytest
from PIL import Image

from samjax import demo, evaluation
from samjax.config import Options
from samjax.demo import scenes
from samjax.errors import UserError
from samjax.evaluation import LearnedRow, Row
from samjax.io import checkpoints
from samjax.testing import TINY_64, tiny_encoder, tiny_generator, tiny_predictor


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A generator of 64 px, a direction, and two images."""
    directory = tmp_path_factory.mktemp("inputs")
    checkpoints.save_safetensors(directory / "own.safetensors", TINY_64, tiny_generator(TINY_64))
    (directory / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(directory / "images" / f"{name}.png")
    np.save(directory / "up.npy", rng.standard_normal(8).astype(np.float32))
    return directory


def test_a_directory_gives_a_table_and_is_resumed(inputs, tmp_path, capsys):
    args = evaluate.Arguments(
        images=inputs / "images",
        gan_weights=inputs / "own.safetensors",
        output_path=tmp_path / "out",
        thresholds=(0.3, 2.0),
        steps=(0,),
        num_opt_steps=2,
        lpips_type="alex",
        edit=str(inputs / "up.npy"),
    )
    evaluate.main(args)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(table["mean"]) == ["W+", "F4", "F6", "SAM 0.3", "SAM 2", "SAM, 0 steps"]
    # At threshold 2 every segment takes W+: the same inversion as W+'s own.
    for figure in ("psnr", "ssim", "lpips", "edit"):
        assert table["mean"]["SAM 2"][figure] == pytest.approx(table["mean"]["W+"][figure], rel=1e-4)
    assert all(row["seconds"] > 0 for row in table["mean"].values())
    assert table["mean"]["SAM, 0 steps"]["psnr"] < table["mean"]["SAM 0.3"]["psnr"]
    printed = capsys.readouterr().out
    assert "| SAM 2 |" in printed
    assert "2 images of images; 2 steps at 0.05 with LPIPS-alex, threshold 0.3, 2; " in printed
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("[ab]_*.json")}
    assert len(before) == 2
    evaluate.main(args)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert capsys.readouterr().out == printed


def test_single_layers_are_compared_where_maps_are_predicted(inputs, tmp_path):
    predictor = tiny_predictor(("W+", "F4", "F6"))
    checkpoints.save_safetensors(tmp_path / "predictor.safetensors", predictor.config, predictor.params)
    args = evaluate.Arguments(
        images=inputs / "images", gan_weights=inputs / "own.safetensors", output_path=tmp_path, single_layers=True,
        inv_model_path=tmp_path / "predictor.safetensors", threshold=1e9, num_opt_steps=2, lpips_type="alex",
        edit=str(inputs / "up.npy"),
    )  # fmt: skip
    evaluate.main(args)
    rows = json.loads((tmp_path / "table.json").read_text())["images"]
    for row in rows.values():
        assert list(row) == ["W+", "F4", "F6", "SAM"]
        assert {**row["SAM"], "seconds": 0} == {**row["W+"], "seconds": 0}  # every segment takes W+
        assert row["F6"]["lpips"] != row["F4"]["lpips"] != row["W+"]["lpips"]


def test_other_generators_need_images(inputs, tmp_path):
    for program in (evaluate, evaluate_learned):
        with pytest.raises(UserError, match="--images"):
            program.main(program.Arguments(gan_weights=inputs / "own.safetensors", output_path=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_bad_numbers_and_names_are_found_before_work(inputs, tmp_path):
    given = {"images": inputs / "images", "gan_weights": inputs / "own.safetensors", "output_path": tmp_path / "out"}
    for program, changes, message in (
        (evaluate, {"thresholds": (0.3, float("nan"))}, "--thresholds takes finite numbers"),
        (evaluate, {"edit_strength": float("nan")}, "--edit_strength takes finite numbers"),
        (evaluate, {"scene_seed": 99999999999999999999}, "--scene_seed must lie between"),
        (evaluate, {"edit": "nope"}, "--edit 'nope' is neither a file nor the name of a direction: there are none"),
        (evaluate_learned, {"scene_seed": -1}, "--scene_seed must lie between"),
        (evaluate_learned, {}, "give --e4e_path and --inv_model_path"),
        (evaluate_learned, {"e4e_path": inputs / "own.safetensors"}, "give --inv_model_path"),
    ):
        with pytest.raises(UserError, match=message):
            program.main(program.Arguments(**given | changes))
    assert not (tmp_path / "out").exists()


def test_label_images_belong_to_their_images(tmp_path):
    for name in ("a.png", "a_segments.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    a, b = evaluation.load_examples(Options(), tmp_path, 0, 0)
    assert (a.name, a.image, a.segments) == ("a", tmp_path / "a.png", tmp_path / "a_segments.png")
    assert (b.name, b.segments, b.region) == ("b", None, None)


def test_hard_scenes_mark_the_car(monkeypatch):
    labels = np.zeros((2, 8, 8), np.int32)
    labels[1, 4:] = scenes.CAR
    drawn = scenes.Scene(np.full((2, 8, 8, 3), 0.5, np.float32), labels)
    monkeypatch.setattr(demo, "hard_scenes", lambda count, key: drawn)
    first, second = evaluation.load_examples(Options(), None, 2, 7)
    assert (first.name, second.name) == ("scene7_000", "scene7_001")
    assert second.image.dtype == np.uint8
    assert not first.region.any()
    assert second.region[4:].all()
    assert not second.region[:4].any()
    np.testing.assert_array_equal(second.segments, labels[1])
    with pytest.raises(UserError, match="--scenes"):
        evaluation.load_examples(Options(), None, 0, 7)


def test_what_remains_of_an_edit_is_a_ratio_of_means():
    rows = {
        "a": {"W+": Row(20.0, 0.5, 0.3, 0.2, 1.0), "SAM": Row(24.0, 0.7, 0.1, 0.1, 2.0)},
        "b": {"W+": Row(22.0, 0.7, 0.5, 0.4, 3.0), "SAM": Row(26.0, 0.9, 0.3, 0.2, 4.0)},
    }
    assert dataclasses.astuple(evaluation.means(rows)["SAM"]) == pytest.approx((25.0, 0.8, 0.2, 0.15, 3.0))
    assert evaluation.table(rows, "two").splitlines()[2:] == [
        "| W+ | 21.00 | 0.600 | 0.400 | 0.300 | 100% | 2.0 |",
        "| SAM | 25.00 | 0.800 | 0.200 | 0.150 | 50% | 3.0 |",
        "",
        "two",
    ]
    alone = {"a": {"SAM": dataclasses.replace(rows["a"]["SAM"], edit=math.nan)}}
    assert "| 0.100 | – | – | 2.0 |" in evaluation.table(alone, "no edit")


def test_learned_networks_in_tables():
    row = LearnedRow(0.9, 0.02, [1.0, 0.0], 0.2, 0.21, mean_w=0.3, half_w=0.2, mean_sam=0.1, half_sam=0.15)
    text = evaluation.learned_table({"a": row}, "one", 100)
    assert "| predicted | 90.0% | 0.020 | 0.210 (+5.0%) |" in text
    assert "from the encoder's code, 50 steps" in text
    assert "| W+ | 0.3000 | 0.2000 | 100% of images |" in text
    assert "| SAM | 0.1000 | 0.1500 | 0% of images |" in text


def test_finished_images_are_read_again(tmp_path):
    examples, calls = [evaluation.Example(name, np.zeros((2, 2, 3), np.uint8)) for name in "ab"], []

    def count(example):
        calls.append(example.name)
        return {"SAM": Row(20.0, 0.5, 0.3, math.nan, 1.0)}

    first = evaluation.run(examples, count, tmp_path, "0f", evaluation.read_rows)
    assert math.isnan(first["a"]["SAM"].edit)
    evaluation.run(examples, count, tmp_path, "0f", evaluation.read_rows)
    assert calls == ["a", "b"]
    evaluation.run(examples, count, tmp_path, "1f", evaluation.read_rows)
    assert calls == ["a", "b", "a", "b"]
    for content in ("{", "[]", '{"SAM": {"psnr": 1}}'):
        (tmp_path / "a_0f.json").write_text(content)
        with pytest.raises(UserError, match="damaged"):
            evaluation.run(examples, count, tmp_path, "0f", evaluation.read_rows)


@pytest.mark.slow
def test_learned_networks_are_compared_with_measured_maps(inputs, tmp_path, capsys):
    encoder, predictor = tiny_encoder(TINY_64), tiny_predictor(("W+", "F4", "F6"))
    for name, network in (("encoder", encoder), ("predictor", predictor)):
        checkpoints.save_safetensors(tmp_path / f"{name}.safetensors", network.config, network.params)
    args = evaluate_learned.Arguments(
        images=inputs / "images", gan_weights=inputs / "own.safetensors", output_path=tmp_path, num_opt_steps=2,
        lpips_type="alex", threshold=1e9, e4e_path=tmp_path / "encoder.safetensors",
        inv_model_path=tmp_path / "predictor.safetensors",
    )  # fmt: skip
    evaluate_learned.main(args)
    printed = capsys.readouterr().out
    # At this threshold every segment takes W+, whatever the maps.
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
    evaluate_learned.main(args)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("[ab]_*.json")}
    assert capsys.readouterr().out == printed
