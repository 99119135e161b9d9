"""What the page lets one person do with an image, on a tiny generator and without the page."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from samjax import api
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.nets import stylegan2

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@pytest.fixture(scope="module")
def studio():
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import studio

        yield studio
    finally:
        sys.path.remove(str(EXPERIMENTS))


@pytest.fixture(scope="module")
def invert(studio):
    return studio.invert


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A generator of 64 px (W+, F4, F6), two pictures, a label image and two directions."""
    folder = tmp_path_factory.mktemp("inputs")
    config = stylegan2.StyleGAN2Config(64, z_dim=8, w_dim=8, mapping_layers=2, channel_base=256, channel_max=8)
    checkpoints.save_safetensors(folder / "own.safetensors", config, stylegan2.init(config, key=jax.random.key(0)))
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{name}.png")
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 40:] = 7
    Image.fromarray(labels).save(folder / "labels.png")
    (folder / "edits").mkdir()
    for name in ("left", "right"):
        np.save(folder / "edits" / f"{name}.npy", rng.standard_normal((1, 10, 8)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def shared(studio, invert, folder):
    settings = invert.Settings(
        gan_weights=folder / "own.safetensors",
        edits_folder=folder / "edits",
        num_opt_steps=4,
        lpips_type="alex",
        edit_strengths=(0.0, 1.0),
        threshold=0.5,
    )
    return studio.load(settings)


@pytest.fixture
def session(studio, shared, folder):
    session = studio.open_image(shared, folder / "one.png", folder / "labels.png")
    yield session
    session.close()


@pytest.fixture(scope="module")
def inverted(studio, shared, folder):
    """A session after its inversion, what it told on the way, and the folder of its files."""
    session = studio.open_image(shared, folder / "one.png", folder / "labels.png")
    told = [list(studio.stream(session.look)), list(studio.stream(session.invert))]
    yield session, told
    session.close()


def quiet(told: object) -> None:
    """Tells nobody."""


def test_the_maps_are_measured_before_anything_is_chosen(inverted, shared):
    session, (looked, _) = inverted
    assert session.looked.maps.shape == (3, 64, 64)
    assert [item.image.shape for item in session.looked.singles] == [(64, 64, 3)] * 3
    assert looked[-1].what == "Measuring the error maps"
    assert "layer 3 of 3, step 4 of 4, loss" in looked[-1].words
    assert looked[-1].share == 1
    shares = [report.share for report in looked]
    assert shares == sorted(shares)


def test_a_picture_that_improves(inverted):
    session, (_, told) = inverted
    pictures = [report.picture for report in told if report.picture is not None]
    assert pictures
    assert pictures[0].shape == (64, 64, 3)
    assert session.done.item.loss[-1] < session.done.item.loss[0]
    assert "LPIPS 0." in session.summary()


def test_threshold_and_force_choose_layers(session, studio):
    for _ in studio.stream(session.look):
        pass
    means = session.assignment().means
    session.threshold = float(means.max()) + 0.1
    assert session.assignment().layers.tolist() == [[0, 0]]
    session.force(7, "F6")
    chosen = session.assignment()
    assert chosen.layers.tolist() == [[0, 2]]
    assert set(np.unique(chosen.layer_maps[0, :, 40:])) == {2}
    assert [row.layer for row in session.preview().segment_rows] == ["W+", "F6"]
    session.force(7, None)
    assert session.assignment().layers.tolist() == [[0, 0]]
    session.threshold = -1.0
    assert session.assignment().layers.tolist() == [[2, 2]]
    assert (session.segment_at(0.0, 0.0), session.segment_at(1.0, 1.0), session.segment_at(0.61, 0.2)) == (0, 7, 0)
    assert session.segment_at(0.64, 0.2) == 7


def test_several_directions_at_once(inverted, shared):
    session, _ = inverted
    item = session.done.item
    np.testing.assert_array_equal(session.edit({"left": 0.0, "right": 0.0}), np.clip(item.image, -1, 1))
    way = shared.directions["left"] * 1.5 - shared.directions["right"]
    expected = api.edit_latents(shared.models, item.latents, item.masks, way, (1.0,))[0]
    made = session.edit({"left": 1.5, "right": -1.0})
    np.testing.assert_allclose(made, np.clip(expected, -1, 1), atol=1e-5)  # another batch size: other sums
    assert np.abs(made - session.edit({})).max() > 0.01


def test_downloads(inverted, shared, tmp_path):
    session, _ = inverted
    paths = session.save(tmp_path, {"left": 1.0, "right": 0.0})
    assert [path.name for path in paths] == [
        "one_latents.npz", "one_reconstruction.png", "one_edited.png", "one_report.html"
    ]  # fmt: skip
    with np.load(paths[0]) as saved:
        np.testing.assert_array_equal(saved["layer_map"], session.done.assignment.layer_maps[0])
        np.testing.assert_array_equal(saved["latent_W+"], session.done.item.latents["W+"])
        assert saved["latent_F6"].shape == (1, 32, 32, 8)
    edited = np.asarray(Image.open(paths[2]), np.float32) / 127.5 - 1
    assert np.abs(edited - session.edit({"left": 1.0, "right": 0.0})).max() < 0.005
    text = paths[3].read_text()
    assert "<title>one" in text
    assert all(name in text for name in ("left", "right", "W+", "F6"))


def test_the_report_is_of_the_inversion_not_of_the_choice_since(inverted):
    session, _ = inverted
    before = session.threshold
    try:
        session.threshold = 0.001
        assert session.result().threshold == before
        assert session.preview().threshold == 0.001
    finally:
        session.threshold = before


def test_stopped_and_begun_again(session, studio):
    steps = studio.stream(session.look)
    next(steps)
    session.stop()
    with pytest.raises(studio.StoppedError):
        list(steps)
    assert session.looked is None
    list(studio.stream(session.look))
    assert session.looked is not None


def test_two_people_at_once_do_not_mix(studio, shared, folder, inverted):
    """Each gets to the bit what each would get alone."""
    sessions = [studio.open_image(shared, folder / f"{name}.png", folder / "labels.png") for name in ("one", "two")]
    sessions[1].force(7, "F4")

    def work(session):
        session.look(quiet)
        session.invert(quiet)

    threads = [threading.Thread(target=work, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone, _ = inverted
    np.testing.assert_array_equal(sessions[0].done.item.image, alone.done.item.image)
    assert sessions[1].assignment().layers[0, 1] == 1
    assert sessions[0].forced == {}
    assert np.abs(sessions[1].done.item.image - alone.done.item.image).max() > 0.1
    assert sessions[0].folder != sessions[1].folder
    for session in sessions:
        session.close()
        assert not session.folder.exists()


def test_bad_files_get_the_words_of_the_command_line(studio, invert, shared, folder, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError) as by_page:
        studio.open_image(shared, tmp_path / "text.png")
    with pytest.raises(UserError) as by_command:
        invert.settle(invert.Arguments(image_path=tmp_path / "text.png", gan_weights=folder / "own.safetensors"))
    assert by_page.value.shown == by_command.value.shown
    with pytest.raises(UserError, match="--threshold must be a number"):
        studio.load(invert.Settings(threshold=float("nan")))


def test_a_stream_gives_reports_results_and_errors(studio):
    def work(tell):
        for i in range(5):
            tell(studio.Report("x", i / 4, str(i), np.zeros(1)))
        return "end"

    outcome = []

    def follow():
        outcome.append((yield from studio.stream(work)))

    assert [report.words for report in follow()] == list("01234")
    assert outcome == ["end"]

    def fails(tell):
        tell(studio.Report("x", 0, ""))
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        list(studio.stream(fails))


def test_time_left(studio):
    assert (studio.time_left(9.4), studio.time_left(600)) == ("9 s left", "10 min left")
