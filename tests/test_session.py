"""A session, from analysis to edits and downloads, with a tiny generator."""

from __future__ import annotations

import copy
import dataclasses
import threading

import invert
import numpy as np
import pytest
from PIL import Image

from samjax import editing, session
from samjax.config import Options
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.pipeline import Pipeline
from samjax.session import ProgressUpdate, Session, StoppedError, stream
from samjax.testing import TINY_64, tiny_generator


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A directory with a generator of 64 px (W+, F4, F6), two images, a label image and two directions."""
    directory = tmp_path_factory.mktemp("inputs")
    checkpoints.save_safetensors(directory / "own.safetensors", TINY_64, tiny_generator(TINY_64))
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(directory / f"{name}.png")
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 40:] = 7
    Image.fromarray(labels).save(directory / "labels.png")
    (directory / "edits").mkdir()
    for name in ("left", "right"):
        np.save(directory / "edits" / f"{name}.npy", rng.standard_normal((1, 10, 8)).astype(np.float32))
    return directory


@pytest.fixture(scope="module")
def pipeline(inputs):
    options = Options(
        gan_weights=inputs / "own.safetensors",
        edits_folder=inputs / "edits",
        num_opt_steps=4,
        lpips_type="alex",
        edit_strengths=(0.0, 1.0),
        threshold=0.5,
    )
    return Pipeline.from_options(options)


@pytest.fixture(scope="module")
def analysis(inverted):
    """The analysis of image one, which takes most of the time of an inversion."""
    return inverted[0].analysis


@pytest.fixture
def opened(pipeline, inputs):
    """A session of image one, before its analysis."""
    opened = Session(pipeline, inputs / "one.png", inputs / "labels.png")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def inverted(pipeline, inputs):
    """A session after its inversion, with the progress of its analysis and of its inversion."""
    inverted = Session(pipeline, inputs / "one.png", inputs / "labels.png")
    updates = [list(stream(inverted.analyze)), list(stream(inverted.invert))]
    yield inverted, updates
    inverted.close()


def test_maps_are_measured_by_the_analysis(inverted, pipeline):
    done, (updates, _) = inverted
    analysis = done.analysis
    assert analysis.maps.shape == (3, 64, 64)
    assert analysis.singles["latent_W+"].shape == (3, 10, 8)
    assert analysis.singles["latent_F6"].shape == (3, 32, 32, 8)
    assert {name: item.image.shape for name, item in done.inversion.baselines.items()} == {
        "W+": (64, 64, 3), "F6": (64, 64, 3)
    }  # fmt: skip
    assert updates[-1].task == "Measuring the error maps"
    assert "layer 3 of 3, step 4 of 4, loss" in updates[-1].message
    assert updates[-1].fraction == 1
    fractions = [update.fraction for update in updates]
    assert fractions == sorted(fractions)


def test_the_image_improves(inverted):
    done, (_, updates) = inverted
    images = [update.image for update in updates if update.image is not None]
    assert images
    assert images[0].shape == (64, 64, 3)
    total = done.inversion.terms.total
    assert total[-1] < total[0]
    assert "LPIPS 0." in done.summary()


def test_threshold_and_force_choose_layers(opened, analysis):
    opened.analysis = analysis
    means = opened.assignment().means
    opened.threshold = float(means.max()) + 0.1
    assert opened.assignment().layers.tolist() == [[0, 0]]
    opened.force(7, "F6")
    chosen = opened.assignment()
    assert chosen.layers.tolist() == [[0, 2]]
    assert set(np.unique(chosen.layer_maps[0, :, 40:])) == {2}
    assert [row.layer for row in opened.preview().rows] == ["W+", "F6"]
    assert [row.forced for row in opened.preview().rows] == [False, True]
    opened.force(7, None)
    assert opened.assignment().layers.tolist() == [[0, 0]]
    opened.threshold = -1.0
    assert opened.assignment().layers.tolist() == [[2, 2]]
    assert (opened.segment_at(0.0, 0.0), opened.segment_at(1.0, 1.0), opened.segment_at(0.61, 0.2)) == (0, 7, 0)
    assert opened.segment_at(0.64, 0.2) == 7


def test_several_directions_at_once(inverted, pipeline):
    done, _ = inverted
    item, generator = done.inversion, pipeline.generator
    np.testing.assert_array_equal(done.edit({"left": 0.0, "right": 0.0}), np.clip(item.image, -1, 1))
    total = pipeline.directions["left"] * 1.5 - pipeline.directions["right"]
    expected = editing.edit(
        generator.config, generator.params, item.latents, item.masks, total[None], (1.0,), batch_size=4
    )[0, 0]
    made = done.edit({"left": 1.5, "right": -1.0})
    np.testing.assert_allclose(made, np.clip(expected, -1, 1), atol=1e-5)  # another batch size: other sums
    assert np.abs(made - done.edit({})).max() > 0.01
    with pytest.raises(UserError, match="no direction 'up': choose from left, right"):
        done.edit({"up": 1.0})


def test_the_first_edit_compiles_nothing(inverted):
    done, _ = inverted
    before = editing.apply._cache_size()
    done.edit({"right": 2.0})
    assert editing.apply._cache_size() == before > 0


def test_downloads(inverted, tmp_path):
    done, _ = inverted
    paths = done.save(tmp_path, {"left": 1.0, "right": 0.0})
    assert [path.name for path in paths] == [
        "one_latents.npz", "one_reconstruction.png", "one_edited.png", "one_report.html"
    ]  # fmt: skip
    with np.load(paths[0]) as saved:
        np.testing.assert_array_equal(saved["layer_map"], done.inversion.assignment.layer_maps[0])
        np.testing.assert_array_equal(saved["latent_W+"], done.inversion.latents["W+"])
        np.testing.assert_array_equal(saved["loss"], done.inversion.terms.total)
        assert saved["latent_F6"].shape == (1, 32, 32, 8)
    edited = np.asarray(Image.open(paths[2]), np.float32) / 127.5 - 1
    assert np.abs(edited - done.edit({"left": 1.0, "right": 0.0})).max() < 0.005
    text = paths[3].read_text()
    assert "<title>one" in text
    assert all(name in text for name in ("left", "right", "W+", "F6"))


def test_the_report_shows_the_inversion_not_later_choices(inverted):
    done, _ = inverted
    before = done.threshold
    try:
        done.threshold = 0.001
        assert done.describe().threshold == before
        assert done.preview().threshold == 0.001
    finally:
        done.threshold = before


def test_stopped_and_started_again(opened):
    updates = stream(opened.analyze)
    next(updates)
    opened.stop()
    with pytest.raises(StoppedError):
        list(updates)
    assert opened.analysis is None
    list(stream(opened.analyze))
    assert opened.analysis is not None


def test_two_users_at_once_do_not_mix(pipeline, inputs, inverted):
    """Each gets to the bit what each gets alone."""
    sessions = [Session(pipeline, inputs / f"{name}.png", inputs / "labels.png") for name in ("one", "two")]
    sessions[1].force(7, "F4")

    def work(one):
        one.analyze()
        one.invert()

    threads = [threading.Thread(target=work, args=(one,)) for one in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone, _ = inverted
    np.testing.assert_array_equal(sessions[0].inversion.image, alone.inversion.image)
    assert sessions[1].assignment().layers[0, 1] == 1
    assert sessions[0].forced == {}
    assert np.abs(sessions[1].inversion.image - alone.inversion.image).max() > 0.1
    assert sessions[0].directory != sessions[1].directory
    for one in sessions:
        one.close()
        assert not one.directory.exists()


def test_bad_files_give_the_messages_of_the_command_line(pipeline, inputs, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError) as by_session:
        Session(pipeline, tmp_path / "text.png")
    with pytest.raises(UserError) as by_command:
        invert.main(invert.Arguments(image_path=tmp_path / "text.png", gan_weights=inputs / "own.safetensors"))
    assert by_session.value.shown == by_command.value.shown
    with pytest.raises(UserError, match=r"text\.png"):
        Session(pipeline, inputs / "one.png", tmp_path / "text.png")
    with pytest.raises(UserError, match="--threshold must be a finite number"):
        Pipeline.from_options(Options(threshold=float("nan")))


def test_each_step_needs_the_one_before(opened):
    for early in (opened.preview, opened.assignment, opened.invert, lambda: opened.segment_at(0.5, 0.5)):
        with pytest.raises(UserError, match="call analyze"):
            early()
    for early in (opened.describe, opened.summary, lambda: opened.edit({})):
        with pytest.raises(UserError, match="call invert"):
            early()


def test_images_have_the_generators_size_without_its_letterbox(pipeline, inputs):
    letterboxed = copy.copy(pipeline)
    letterboxed.category = dataclasses.replace(pipeline.category, target_size=(24, 32))
    opened = Session(letterboxed, inputs / "one.png")
    assert opened.target.shape == (24, 32, 3)
    rows = np.broadcast_to(np.arange(64)[:, None, None], (64, 64, 3))
    np.testing.assert_array_equal(opened.full_size(rows), rows[8:56])
    opened.close()


def test_a_stream_yields_updates_results_and_errors():
    def work(on_progress):
        for i in range(5):
            on_progress(ProgressUpdate("x", i / 4, str(i), np.zeros(1)))
        return "end"

    outcome = []

    def follow():
        outcome.append((yield from stream(work)))

    assert [update.message for update in follow()] == list("01234")
    assert outcome == ["end"]

    def fails(on_progress):
        on_progress(ProgressUpdate("x", 0, ""))
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        list(stream(fails))


def test_time_left():
    assert (session.time_left(9.4), session.time_left(600)) == ("9 s left", "10 min left")
