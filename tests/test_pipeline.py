"""The pipeline on a tiny generator: the calls of the README, what is kept on disk, and wrong input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import samjax
from samjax import report
from samjax.config import Options
from samjax.driver import Progress
from samjax.errors import UserError
from samjax.io import checkpoints, files
from samjax.io.checkpoints import LoadedNetwork
from samjax.nets.stylegan2 import StyleGAN2Config
from samjax.pipeline import Pipeline
from samjax.testing import TINY_64, tiny_encoder, tiny_generator, tiny_predictor

LAYERS = ("W+", "F4", "F6")
QUICK = Options(num_opt_steps=3, lpips_type="alex", edit_strengths=(0.0, 1.0))


@pytest.fixture(scope="module")
def network():
    return LoadedNetwork(TINY_64, tiny_generator(TINY_64), {})


@pytest.fixture(scope="module")
def directions():
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal((TINY_64.num_ws, TINY_64.w_dim)).astype(np.float32) for name in ("left", "right")}


@pytest.fixture(scope="module")
def sam(network, directions):
    return Pipeline(network, directions=directions, options=QUICK)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)


@pytest.fixture(scope="module")
def labels():
    made = np.zeros((64, 64), np.int32)
    made[:, 32:] = 7
    return made


@pytest.fixture(scope="module")
def maps(labels):
    """At 0.6, segment 0 takes W+ and segment 7 takes F4."""
    return np.stack([np.where(labels == 7, 0.9, 0.1), np.full(labels.shape, 0.5), np.full(labels.shape, 0.4)])


@pytest.fixture(scope="module")
def analysis(sam, image, labels, maps):
    return sam.analyze(image, segments=labels, maps=maps, segment_names={7: "car"}, name="photo")


@pytest.fixture(scope="module")
def result(sam, analysis):
    return sam.invert(analysis, threshold=0.6)


# --- inversion ---


def test_each_segment_takes_its_layer(result, sam):
    assert result.layers == {0: "W+", 7: "F4"}
    assert result.masks["F4"][0, :, 12:].min() > 0.9
    assert result.masks["F4"][0, :, :4].max() < 0.1
    assert result.image.shape == (64, 64, 3)
    assert result.reconstruction.size == (64, 64)
    assert set(result.metrics) == {"MSE", "PSNR", "SSIM", "LPIPS"}
    assert result.terms.total.shape == (3,)
    assert np.isfinite(result.terms.total).all()
    assert (result.threshold, result.generator, result.analysis.name) == (0.6, "custom", "photo")
    assert sam.category.threshold == 0.225


def test_layers_by_hand(sam, analysis, result):
    chosen = sam.invert(analysis, threshold=0.6, layers={7: "F6"})
    assert chosen.layers == {0: "W+", 7: "F6"}
    assert chosen.forced == {7: "F6"}
    assert not np.array_equal(chosen.latents["F6"], result.latents["F6"])


def test_one_image_one_threshold_one_sweep_are_the_same(sam, analysis, result):
    swept = sam.sweep(analysis, [0.2, 0.6, 0.65])
    np.testing.assert_array_equal(swept[1].image, result.image)
    np.testing.assert_array_equal(swept[2].image, result.image)  # equal layers: optimized once
    assert [one.layers[7] for one in swept] == ["F6", "F4", "F4"]
    assert len(sam.sweep(analysis)) == len(sam.category.sweep())


def test_a_batch_is_each_image_alone(sam, analysis, result, image, labels, maps):
    other = sam.analyze(image[::-1], segments=labels, maps=maps)
    together = sam.invert_batch([other, analysis], threshold=0.6)
    assert [one.analysis.name for one in together] == ["image", "photo"]
    np.testing.assert_array_equal(together[1].image, result.image)  # one at a time on a CPU
    assert not np.array_equal(together[0].image, result.image)
    assert sam.invert_batch([]) == []


def test_progress_is_reported_and_nothing_is_drawn_without_a_terminal(sam, analysis, capsys):
    seen: list[Progress] = []
    sam.invert(analysis, threshold=0.6, on_progress=seen.append)
    assert [one.step for one in seen] == [1, 2, 3]
    assert seen[-1].masks["F4"].shape == (1, 16, 16, 1)
    sam.invert(analysis, threshold=0.6)
    assert capsys.readouterr() == ("", "")


def test_maps_are_measured_without_a_predictor(sam, image, labels):
    seen: list[Progress] = []
    known = sam.analyze(image, segments=labels, on_progress=seen.append)
    assert {one.groups for one in seen} == {3}
    assert known.maps.shape == (3, 64, 64)
    assert known.singles["latent_F6"].shape == (3, 32, 32, 8)
    result = sam.invert(known, threshold=float(known.maps.max()) + 1)
    assert set(result.layers.values()) == {"W+"}
    assert set(result.baselines) == {"W+", "F6"}
    assert result.baselines["F6"].layers == {0: "F6", 7: "F6"}
    assert result.baselines["W+"].metrics["LPIPS"] > 0
    edits = sam.edit_sweep(result)
    assert {name: set(strengths) for name, strengths in edits.items()} == {"left": {0.0, 1.0}, "right": {0.0, 1.0}}
    assert set(edits["left"][1.0]) == {"W+", "F6", "SAM"}


def test_with_encoder_and_predictor(network, image, labels):
    sam = Pipeline(network, encoder=tiny_encoder(TINY_64), predictor=tiny_predictor((*LAYERS, "F8")), options=QUICK)
    assert (sam.category.start, sam.category.invertibility) == ("encoder", "predicted")
    known = sam.analyze(image, segments=labels)
    assert known.maps.shape == (3, 64, 64)
    assert known.singles == {}
    assert np.ptp(known.ws, axis=0).max() > 0  # a style for each layer
    assert sam.start_image(known).shape == (64, 64, 3)


def test_a_letterboxed_generator_gives_images_of_its_own_size(image):
    """512 px like the cars': the target has 192 x 256, reconstruction and edits 384 x 512."""
    config = StyleGAN2Config(512, z_dim=8, w_dim=8, mapping_layers=2, channel_base=1024, channel_max=8)
    network = LoadedNetwork(config, tiny_generator(config), {})
    direction = np.ones((config.num_ws, config.w_dim), np.float32)
    options = dataclasses.replace(
        QUICK, image_category="cars", start="mean", invertibility="measured", segmenter="felzenszwalb",
        num_opt_steps=0,
    )  # fmt: skip
    sam = Pipeline(network, directions={"up": direction}, options=options)
    maps = np.full((5, 192, 256), 0.1)
    segments = np.zeros((192, 256), np.int32)
    result = sam.invert(sam.analyze(image, segments=segments, maps=maps))
    assert result.analysis.target.shape == (192, 256, 3)
    assert result.image.shape == (512, 512, 3)
    assert result.reconstruction.size == (512, 384)
    assert sam.edit(result, {"up": 1}).size == (512, 384)
    np.testing.assert_array_equal(result.full_size(result.image), result.image[64:-64])


# --- edits ---


def test_edits_by_name_by_file_and_by_array(sam, result, directions, tmp_path):
    edited = sam.edit(result, {"left": 1.5, "right": -1})
    assert edited.size == (64, 64)
    total = 1.5 * directions["left"] - directions["right"]
    np.testing.assert_array_equal(np.asarray(edited), np.asarray(sam.edit(result, total)))
    np.save(tmp_path / "half.npy", 0.5 * total[None])
    np.testing.assert_array_equal(np.asarray(edited), np.asarray(sam.edit(result, {tmp_path / "half.npy": 2})))
    np.testing.assert_array_equal(np.asarray(edited), np.asarray(sam.edit(result, str(tmp_path / "half.npy"), 2)))
    assert np.abs(sam.edit_array(result, "left") - sam.edit_array(result, {})).max() > 0.01


def test_all_directions_at_once_are_each_alone(sam, result):
    edits = sam.edit_sweep(result, strengths=(-1.0, 2.0))
    for name, strengths in edits.items():
        for strength, methods in strengths.items():
            alone = sam.edit_array(result, name, strength)
            # Another batch, another order of sums.
            np.testing.assert_allclose(methods["SAM"], alone, rtol=0, atol=1e-5 * np.ptp(alone))
    assert sam.edit_sweep(result, names=()) == {}


def test_strength_zero_is_the_reconstruction_of_hard_masks(sam, result):
    # Where a mask is soft, the reference's edited pass mixes the offset in twice, by m squared.
    hard = dataclasses.replace(result, masks={name: np.round(mask) for name, mask in result.masks.items()})
    plain = sam.render(hard.latents, hard.masks)[0]
    np.testing.assert_allclose(sam.edit_array(hard, "left", 0), plain, rtol=0, atol=1e-5 * np.ptp(plain))


# --- files ---


def test_saved_and_loaded_it_goes_on(sam, result, tmp_path):
    result.save(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["inversion.json", "inversion.npz"]
    loaded = sam.load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.image, result.image)
    np.testing.assert_array_equal(np.asarray(sam.edit(loaded, "left")), np.asarray(sam.edit(result, "left")))
    assert (loaded.layers, loaded.metrics, loaded.config) == (result.layers, result.metrics, result.config)
    assert (loaded.category, loaded.threshold, loaded.forced) == (result.category, result.threshold, result.forced)
    assert loaded.analysis.segment_names == {7: "car"}
    assert report.describe(loaded).settings["error maps"] == loaded.analysis.maps_from == "given"
    # Another threshold: from its analysis. More steps: from its latents.
    assert sam.invert(loaded, threshold=0.2).layers[7] == "F6"
    more = sam.invert(loaded, num_opt_steps=2)
    assert more.terms.total.shape == (2,)
    assert more.config.num_opt_steps == 2
    assert more.terms.total[0] < result.terms.total[0]
    report.save(loaded, tmp_path / "report.html", edits=sam.edit_sweep(loaded))
    assert "<title>photo" in (tmp_path / "report.html").read_text()


def test_measured_maps_are_saved_too(sam, image, labels, tmp_path):
    result = sam.invert(sam.analyze(image, segments=labels))
    result.save(tmp_path)
    loaded = sam.load(tmp_path)
    assert set(loaded.baselines) == {"W+", "F6"}
    np.testing.assert_array_equal(loaded.baselines["F6"].image, result.baselines["F6"].image)


@pytest.fixture
def saved(result, tmp_path):
    result.save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "0" * 16}, "by another generator"),
        ({"format": "samjax inversion 0"}, "not an inversion saved by this version"),
        ({"layers": ["W+", "F4"]}, "in the layers W\\+, F4"),
        ({"threshold": "low"}, "is damaged"),
        ({"forced": {"7": "F9"}}, "unknown latent layer 'F9'"),
        ({"config": {"num_opt_steps": "many"}}, "is damaged"),
        ({"config": {"chunk": 1}}, "is damaged"),
        ({"category": 3}, "is damaged"),
        ({"metrics": {}}, "is damaged"),
        ({"measure_steps": -3}, "is damaged"),
        ({"threshold": 10**400}, "is damaged"),
        ({"name": 3}, "is damaged"),
    ],
)
def test_saved_notes_of_something_else_are_an_error(sam, saved, change, message):
    path = saved / "inversion.json"
    files.write_json(path, {**json.loads(path.read_text()), **change})
    with pytest.raises(UserError, match=message):
        sam.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_F4": np.zeros((1, 16, 16, 4))}, "does not fit this generator: latent_F4"),
        ({"latent_W+": None}, "does not fit this generator: latent_W\\+"),
        ({"maps": np.full((3, 64, 64), np.nan)}, "does not fit this generator: maps"),
        ({"segments": np.zeros((64, 64))}, "does not fit this generator: segments"),
        ({"terms": np.zeros(3)}, "terms"),
        ({"source": np.zeros((8, 8, 3))}, "source"),
        ({"source": np.zeros((0, 64, 3), np.uint8)}, "source"),
        ({"source": np.zeros((8, 8, 1), np.uint8)}, "source"),
        ({"target": np.full((64, 64, 3), 2.0)}, "target"),
        ({"ws": np.zeros((10, 8), int)}, "ws"),
        ({"segments": np.full((64, 64), 2**40)}, "segments"),
        ({"terms": np.zeros((6, 0))}, "terms"),
        ({"terms": np.zeros((3, 3))}, "terms"),
        ({"single_latent_F4": np.zeros((3, 16, 16, 8))}, "single_terms"),
        ({"latent_F8": np.zeros(3)}, "latent_F8"),
    ],
)
def test_saved_arrays_of_something_else_are_an_error(sam, saved, change, message):
    arrays = {**files.read_npz(saved / "inversion.npz"), **change}
    files.write_npz(saved / "inversion.npz", {name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=message):
        sam.load(saved)


def test_nothing_saved(sam, tmp_path):
    with pytest.raises(UserError, match="holds no saved inversion"):
        sam.load(tmp_path)


def test_a_directory_keeps_what_is_done(network, image, labels, tmp_path):
    notes: list[str] = []
    sam = Pipeline(network, options=QUICK, notify=notes.append)
    known = sam.analyze(image, segments=labels, directory=tmp_path)
    first = sam.invert(known, threshold=0.5, directory=tmp_path)
    assert notes == []
    again = sam.invert(sam.analyze(image, segments=labels, directory=tmp_path), threshold=0.5, directory=tmp_path)
    assert [note.partition(" (")[0] for note in notes] == [
        "resuming: the single-layer inversions are done", "resuming: threshold 0.500 is done"
    ]  # fmt: skip
    np.testing.assert_array_equal(again.image, first.image)
    # Kept latents of other layers are not taken for those of this threshold.
    chosen = sam.invert(known, threshold=0.5, layers={0: "F6", 7: "W+"}, directory=tmp_path)
    assert not np.array_equal(chosen.latents["W+"], first.latents["W+"])
    other = Pipeline(network, options=dataclasses.replace(QUICK, num_opt_steps=4, invertibility_steps=3))
    with pytest.raises(UserError, match=r"other settings \(num_opt_steps\)"):
        other.analyze(image, segments=labels, directory=tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("latents_T0.600.npz", {"terms": None}),
        ("latents_T0.600.npz", {"seconds": None}),
        ("latents_T0.600.npz", {"terms": np.zeros((3, 3))}),
        ("latents_T0.600.npz", {"latent_F4": np.full((1, 16, 16, 8), np.nan)}),
        ("measured.npz", {"maps": None}),
        ("measured.npz", {"maps": np.zeros((2, 3))}),
        ("measured.npz", {"terms": np.zeros((3, 3, 3))}),
        ("measured.npz", {"seconds": np.zeros(3)}),
    ],
)
def test_damaged_files_in_a_directory_are_named(sam, image, labels, maps, tmp_path, name, change):
    measured = name.startswith("measured")
    given = {"segments": labels, "directory": tmp_path, **({} if measured else {"maps": maps})}
    sam.invert(sam.analyze(image, **given), threshold=0.6, directory=tmp_path)
    arrays = {**files.read_npz(tmp_path / name), **change}
    files.write_npz(tmp_path / name, {key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=rf"{name} is damaged \({next(iter(change))}\): remove it"):
        sam.invert(sam.analyze(image, **given), threshold=0.6, directory=tmp_path)


# --- wrong input ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((80, 100), np.uint8)}, "height, width, 3"),
        ({"image": np.full((80, 100, 3), 200.0)}, r"\[-1, 1\]"),
        ({"image": np.full((80, 100, 3), np.nan)}, "finite|NaN"),
        ({"image": np.zeros((80, 100, 3), np.int64)}, "uint8"),
        ({"image": Path("missing.png")}, "missing.png"),
        ({"segments": np.zeros((30, 30), np.int32)}, "segments of 30 x 30 pixels do not fit the image"),
        ({"segments": np.zeros((64, 64))}, "segments must be integers"),
        ({"maps": np.zeros((4, 64, 64))}, r"maps must be numbers \[3, 64, 64\], not float64 \[4, 64, 64\]"),
        ({"maps": np.full((3, 64, 64), np.inf)}, "maps hold values that are not finite"),
        ({"maps": np.full((3, 64, 64), -0.5)}, "maps are errors of at least 0; the smallest is -0.5"),
        ({"start": np.zeros((1, 9, 8))}, r"start: has shape \(1, 9, 8\); this generator takes"),
        ({"start": {"W+": np.full((10, 8), np.nan)}}, "start: holds values that are not finite"),
    ],
)
def test_wrong_images_segments_and_arrays_are_refused(sam, image, labels, maps, change, message):
    given = {"image": image, "segments": labels, "maps": maps, **change}
    with pytest.raises(UserError, match=message) as caught:
        sam.analyze(given.pop("image"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": float("nan")}, "the threshold must be a finite number"),
        ({"layers": {0: "F8"}}, "unknown latent layer 'F8': choose from W\\+, F4, F6"),
        ({"layers": {3: "F4"}}, "the image has no segment 3: its segments are 0, "),
        ({"layers": {"0": "F4"}}, "the image has no segment '0'"),
        ({"layers": ["F4"]}, "layers maps segments to layers"),
        ({"layers": {0: ["F4"]}}, "unknown latent layer \\['F4'\\]"),
        ({"threshold": "0.2"}, "the threshold must be a finite number, 0 or more, not '0.2'"),
        ({"threshold": -1}, "the threshold must be a finite number, 0 or more, not -1"),
        ({"num_opt_steps": "3"}, "num_opt_steps must be an integer"),
        ({"directory": 3}, "directory must be a path, not 3"),
        ({"num_opt_steps": -1}, "num_opt_steps must be at least 0"),
        ({"segments": np.zeros((64, 64), int)}, "segments can be given with an image only"),
    ],
)
def test_wrong_choices_are_refused(sam, analysis, arguments, message):
    with pytest.raises(UserError, match=message):
        sam.invert(analysis, **arguments)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ({"lft": 1}, "there is no direction 'lft': choose from left, right"),
        ({"left": float("inf")}, "a strength must be a finite number"),
        ({"missing.npy": 1}, "missing.npy: no such file"),
        (np.zeros((3, 8)), "does not fit this generator"),
        (np.full((10, 8), np.nan), "not finite"),
        ({"left": 1e300}, "a strength must be a finite number"),
        ({"left": "1"}, "a strength must be a finite number"),
        (["left", "right"], "several directions are given with their strengths"),
    ],
)
def test_wrong_directions_are_refused(sam, result, direction, message):
    with pytest.raises(UserError, match=message):
        sam.edit(result, direction)


def test_wrong_uses_are_refused_in_one_line(network, sam, analysis, result, image, tmp_path):
    other = dataclasses.replace(result, fingerprint="of another generator")
    (tmp_path / "photo.png").write_bytes(b"precious")
    for use, message in (
        (lambda: sam.edit(result, {"left": 1}, 2.0), "leave strength out"),
        (lambda: sam.edit(analysis, "left"), "give an inversion, as returned by invert"),
        (lambda: sam.edit(other, "left"), "is by another generator"),
        (lambda: sam.invert(other), "is by another generator"),
        (lambda: sam.edit_sweep(result, strengths=[float("nan")]), "a strength must be a finite number"),
        (lambda: sam.edit_sweep(result, strengths=2), "strengths must be a list of numbers, not 2"),
        (lambda: sam.edit_sweep(result, names="left"), "names must be a list of directions, not 'left'"),
        (lambda: sam.edit(result, {"left": 3e38, "right": 3e38}), "not finite: give smaller strengths"),
        (lambda: sam.invert("not read yet.png", threshold="x"), "the threshold must be a finite number"),
        (lambda: sam.sweep(analysis, 0.3), "thresholds must be a list of numbers, not 0.3"),
        (lambda: sam.sweep(analysis, layers=["F4"]), "layers maps segments to layers"),
        (lambda: sam.start_image(dataclasses.replace(analysis, fingerprint="other")), "is by another generator"),
        (lambda: sam.invert(dataclasses.replace(analysis, fingerprint="other")), "is by another generator"),
        (lambda: sam.single_layers(result), "give an analysis, as returned by analyze"),
        (lambda: report.save(analysis, tmp_path / "report.html"), "give an inversion, as returned by Pipeline.invert"),
        (lambda: report.save(result, tmp_path / "report.html", sweep=result), "sweep must be a list of inversions"),
        (lambda: Pipeline(network, directions=["x"]), "directions must be a mapping of names to directions"),
        (lambda: Pipeline(network, encoder="x"), "encoder must be a loaded encoder, not 'x'"),
        (lambda: Pipeline(network, predictor=network), "predictor must be a loaded predictor"),
        (lambda: Pipeline(network, segmenter="slic"), "segmenter must be a function"),
        (lambda: Pipeline.from_pretrained("demo", steps=5), "steps cannot be given here"),
        (lambda: sam.analyze(image, segment_names=[1]), "segment_names maps labels"),
        (lambda: sam.invert_batch(image), "takes a list of images"),
        (lambda: sam.invert_batch("photo.png"), "takes a list of images"),
        (lambda: sam.analyze(image, segments=np.full((64, 64), 2**40)), "integers of 32 bits"),
        (lambda: sam.analyze(image, segments=np.full((80, 100), np.uint64(2**40))), "integers of 32 bits"),
        (lambda: sam.analyze(image, segments=np.zeros((0, 0), int)), "do not fit the image"),
        (lambda: sam.analyze(image, segments=np.arange(4096).reshape(64, 64)), "at most 256"),
        (lambda: sam.analyze(image, segments=[[1], [1, 2]]), "segments must be an array"),
        (lambda: sam.analyze(image, segment_names={"a": "b"}), "segment_names maps labels"),
        (lambda: sam.invert(analysis, directory=tmp_path / "photo.png"), "is a file: give a directory"),
        (lambda: sam.load(tmp_path / "photo.png"), "is a file: give a directory"),
        (lambda: Pipeline.from_pretrained("Cars"), "choose from cars, faces, cats, demo"),
        (lambda: Pipeline.from_pretrained(["demo"]), "give the name of a category"),
        (lambda: Pipeline.from_options({"threshold": 3}), "samjax.config.Options"),
    ):
        with pytest.raises(UserError, match=message):
            use()
    assert (tmp_path / "photo.png").read_bytes() == b"precious"
    assert len(repr(result)) < 200 > len(repr(analysis))


def test_segments_of_the_images_own_size_are_brought_to_the_targets(sam, image, maps):
    own = np.zeros((80, 100), np.uint8)
    own[:, 50:] = 3
    known = sam.analyze(image, segments=own, maps=maps)
    assert np.unique(known.segments[:, :31]).tolist() == [0]
    assert np.unique(known.segments[:, 33:]).tolist() == [3]
    assert known.segments_from == "given"
    assert sam.analyze(image, maps=maps).segments_from == "felzenszwalb"


def test_an_analysis_of_another_pipeline_is_an_error(sam, network, image, labels):
    fewer = Pipeline(network, options=dataclasses.replace(QUICK, latent_names="W+,F4"))
    known = fewer.analyze(image, segments=labels, maps=np.zeros((2, 64, 64)))
    with pytest.raises(UserError, match="the analysis is of the layers W\\+, F4"):
        sam.invert(known)


def test_networks_that_do_not_belong_together_are_an_error(network):
    eight = StyleGAN2Config(32, z_dim=8, w_dim=8, mapping_layers=2, channel_base=256, channel_max=8)
    with pytest.raises(UserError, match="gives 8 styles of 8, the generator takes 10 of 8"):
        Pipeline(network, encoder=tiny_encoder(eight))
    with pytest.raises(UserError, match="no maps of F4"):
        Pipeline(network, predictor=tiny_predictor(("W+", "F6")))


# --- finding networks ---


def test_from_pretrained(network, tmp_path):
    path = tmp_path / "own.safetensors"
    checkpoints.save_safetensors(path, *network[:2])
    own = Pipeline.from_pretrained(path, num_opt_steps=5)
    assert (own.name, own.category.name, own.config.num_opt_steps) == ("own.safetensors", "custom", 5)
    assert own.directions == {}
    demo = Pipeline.from_pretrained("demo", generate_edits=False)
    assert (demo.name, demo.category.name, demo.config.num_opt_steps) == ("demo", "demo", 30)
    assert demo.directions == {}
    with pytest.raises(UserError, match="python -m ckpt_convert get cars"):
        Pipeline.from_pretrained("cars")
    with pytest.raises(UserError, match="nowhere"):
        Pipeline.from_pretrained("nowhere")


def test_the_packages_top(capsys):
    assert samjax.__version__.count(".") == 2
    assert set(samjax.__all__) == {"Inversion", "InversionConfig", "Pipeline", "UserError", "__version__", "report"}
    assert samjax.Pipeline is Pipeline
