"""The comparison with the authors' code, as far as it goes without that code: differences, verdicts, stages, errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys

import compare_pytorch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_sam
import stages
from PIL import Image
from reference_job import NETS, Job
from stages import TOLERANCES, Row, Theirs, Tolerance

from samjax import Pipeline, UserError, cli, driver, editing, inversion, latents, layer_selection, losses
from samjax import config as settings
from samjax.io import images, registry, weights
from samjax.io.checkpoints import LoadedNetwork
from samjax.nets import stylegan2
from samjax.nets.stylegan2 import StyleGAN2Config
from samjax.testing import random_lpips, tiny_encoder_config, tiny_generator, tiny_predictor_config


@pytest.fixture
def reference(tmp_path):
    """A directory that looks like the authors' checkout."""
    for name in NETS:
        (tmp_path / "sam" / "src" / "nets" / name).mkdir(parents=True)
        (tmp_path / "sam" / "src" / "nets" / name / "README.md").touch()
    for name in ("sam_inv_optimization", "model_utils"):
        (tmp_path / "sam" / "src" / f"{name}.py").write_text(f"NAME = {name!r}\n")
    return tmp_path / "sam"


@pytest.fixture
def arguments(reference, tmp_path):
    return compare_pytorch.Arguments(
        reference=reference, image_path=tmp_path / "image.png", image_category="cars", weights=tmp_path
    )


@pytest.fixture
def installed(monkeypatch):
    """Makes every package seem installed except those in the set."""
    absent: set[str] = {"detectron2"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name in absent else object())
    return absent


# --- figures and verdicts ---


def test_differences():
    theirs = np.array([[0.0, 4.0], [2.0, -4.0]])
    ours = theirs + np.array([[0.0, 0.5], [-1.0, 0.0]])
    assert stages.absolute(ours, theirs) == 1.0
    assert stages.of_spread(ours, theirs) == 1 / 8
    assert stages.each_of_spread(ours, theirs) == 1 / 6, "each along the leading axis has its own spread"
    assert stages.relative(ours, np.where(theirs == 0, 1, theirs)) == 1.0
    assert stages.of_pixels(ours, theirs) == 0.5


def test_differences_do_not_divide_by_zero():
    zeros = np.zeros(3)
    assert stages.of_spread(zeros, zeros) == 0
    assert stages.of_spread(zeros + 1, zeros) == math.inf
    assert stages.relative(zeros, zeros) == 0
    assert stages.relative([0, 1e-9, 0], zeros) == math.inf


def test_other_shapes_and_nan_never_pass():
    for measure in (stages.absolute, stages.of_spread, stages.relative, stages.of_pixels):
        assert measure(np.ones((2, 1)), np.ones((2, 3))) == math.inf, "no broadcasting"
    tolerance = Tolerance(1.0, "absolute")
    for measure in (stages.absolute, stages.of_spread, stages.relative):
        difference = measure([1.0, np.nan], [1.0, 2.0])
        assert not Row("x", difference, tolerance, 0, 0, 0).passed


@pytest.mark.parametrize(("difference", "passed"), [(0.0, True), (1e-4, True), (1.001e-4, False), (math.nan, False)])
def test_verdict_at_the_tolerance(difference, passed):
    row = Row("encoder code", difference, TOLERANCES["encoder code"], 1.0, 2.0, 3.0)
    assert row.passed is passed
    line = list(stages.table([row]))[2]
    assert ("**fail**" in line) is not passed


def test_table():
    rows = [
        Row("masks", 0.0, TOLERANCES["masks"], 1.234, 0.5, 10.0),
        Row("layer map", 0.02, TOLERANCES["layer map"], math.nan, math.nan, math.nan),
    ]
    lines = list(stages.table(rows))
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| masks | 0.0e+00 absolute | 1e-06 | pass | 1.23 | 0.50 | 10.00 |"
    assert lines[3] == "| layer map | 2.0e-02 of the pixels | 1e-03 | **fail** |  |  |  |"


def test_balanced_threshold():
    """Three segments of equal size that could take W+, F4 and the last layer: the thresholds that give all three."""
    segments = np.repeat([[7, 9, 20]], 4, axis=0)
    error_maps = np.array([[0.2, 0.4, 0.9], [0.1, 0.2, 0.8], [0.6, 0.6, 0.6]])[:, None].repeat(4, axis=1)
    tau = reference_sam.balanced_threshold(error_maps, segments)
    assert layer_selection.assign_layers(error_maps, segments, tau).layers.tolist() == [[0, 1, 2]]
    assert np.min(np.abs(error_maps - tau)) >= 0.05, "far from every mean, so that rounding decides nothing"
    assert reference_sam.balanced_threshold(np.full((5, 2, 2), 0.3), np.zeros((2, 2))) == pytest.approx(0.3)


def test_their_terms_are_weighted_as_ours():
    terms = np.arange(10.0).reshape(2, 5)
    weighted = Theirs({"terms": terms}, {}).weighted_terms(settings.InversionConfig())
    assert list(weighted) == list(inversion.Terms._fields)
    np.testing.assert_allclose(weighted["delta"], 1e-3 * terms[:, 3])
    np.testing.assert_allclose(weighted["total"], terms @ [1, 1, 1e-8, 1e-3, 5])


def test_first_steps_are_those_of_a_whole_run():
    def rates(config: settings.InversionConfig, steps: int) -> list[float]:
        names = ("num_opt_steps", "lr", "lr_rampdown_length", "lr_rampup_length")
        numbers = [jnp.asarray(getattr(config, name), jnp.float32) for name in names]
        return [float(losses.learning_rate(jnp.asarray(i), *numbers)) for i in range(steps)]

    whole = settings.InversionConfig()
    for count in (2, 5, 60, 750):
        np.testing.assert_allclose(rates(compare_pytorch.first_steps(count), count), rates(whole, count), rtol=1e-5)
    assert compare_pytorch.first_steps(1001) == dataclasses.replace(whole, noise="const")


# --- their side ---


class Value:
    """The part of a tensor that `Record` uses."""

    def __init__(self, value: float) -> None:
        self.value = value

    def detach(self) -> float:
        return self.value


def test_record():
    record = reference_sam.Record()
    record.term("mse", Value(100))  # before the first step: none of its terms
    for step in (1, 2):
        record.steps.append({})
        for name, value in (("mse", 1), ("lpips", 2), ("mvg", 3), ("delta", 4), *(4 * [("mse", 5)])):
            record.term(name, Value(step * value))
    np.testing.assert_array_equal(record.terms(), [[1, 2, 3, 4, 20], [2, 4, 6, 8, 40]])

    calls, kept = [], []
    watched = record.timed("stage", lambda x, y: calls.append(x) or x + y, lambda *args, **names: kept.append(
        (args, names)), times=2)  # fmt: skip
    assert watched(1, y=2) == 3
    assert calls == [1, 1], "twice, so that the second can be timed"
    assert kept == [((3, 1), {"y": 2})]
    assert record.seconds["stage"] >= 0


def test_layout_leaves_the_checkout_alone(reference, tmp_path):
    weights = {}
    for name in ("encoder_epoch_20.pth", "net.pkl"):
        (tmp_path / name).write_text(name)
        weights[name] = str(tmp_path / name)
    np.save(tmp_path / "csc_blue.npy", np.zeros(1))
    before = sorted(reference.rglob("*"))
    job = Job(
        reference=str(reference), detectron2=None, category="cars", weights=weights, vgg="", image="", height=1,
        width=1, direction=str(tmp_path / "csc_blue.npy"), threshold=None, steps=2, lr_rampup_length=0.05,
        lr_rampdown_length=0.25, threads=1, seed=0, folder=str(tmp_path),
    )  # fmt: skip
    work = reference_sam.lay_out(job)
    ade20k = work / "src/nets/semantic-segmentation-pytorch"
    assert (work / "ckpt/net.pkl").read_text() == "net.pkl"
    assert (ade20k / "ckpt/ade20k-resnet50dilated-ppm_deepsup/encoder_epoch_20.pth").is_file()
    assert (work / "edits/cars/csc_blue.npy").is_file()
    assert all((work / "src/nets" / name / "README.md").is_file() for name in NETS)
    assert (work / "src/model_utils.py").is_file()
    assert sorted(reference.rglob("*")) == before
    assert json.loads(json.dumps(dataclasses.asdict(job))) == dataclasses.asdict(job), "a job travels as JSON"


def job_at(folder):
    return Job("", None, "cars", {}, "", "", 1, 1, "", None, 2, 0, 0, 1, 0, str(folder))


def test_their_process_gives_arrays(tmp_path, monkeypatch):
    script = tmp_path / "theirs.py"
    script.write_text(
        "import json, sys, pathlib, numpy as np\n"
        "job = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        "np.savez(pathlib.Path(job['folder']) / 'output.npz', mask_F4=np.full((2, 2, 1), job['steps']))\n"
        "(pathlib.Path(job['folder']) / 'seconds.json').write_text('{\"code\": 1.5}')\n"
    )
    monkeypatch.setattr(compare_pytorch, "REFERENCE_SAM", script)
    theirs = compare_pytorch.run_theirs(job_at(tmp_path))
    assert theirs.arrays["mask_F4"].tolist() == [[[2], [2]], [[2], [2]]]
    assert theirs.seconds == {"code": 1.5}


def test_their_failure_shows_their_last_lines(tmp_path, monkeypatch):
    script = tmp_path / "theirs.py"
    script.write_text("print('loading')\nraise RuntimeError('size mismatch for b4')\n")
    monkeypatch.setattr(compare_pytorch, "REFERENCE_SAM", script)
    with pytest.raises(UserError, match="ended with code 1") as caught:
        compare_pytorch.run_theirs(job_at(tmp_path))
    assert "size mismatch for b4" in caught.value.details[-1]


# --- errors and exit codes ---


def test_what_is_missing_takes_one_line(arguments, installed, reference, tmp_path):
    def message(**changes) -> str:
        with pytest.raises(UserError) as caught:
            compare_pytorch.check(dataclasses.replace(arguments, **changes))
        assert "\n" not in caught.value.shown
        return caught.value.shown

    assert compare_pytorch.check(arguments) is None
    assert "not a checkout of adobe-research/sam_inversion" in message(reference=tmp_path)
    assert "--steps" in message(steps=1)
    assert "--threshold" in message(threshold=math.nan)
    compare_pytorch.check(dataclasses.replace(arguments, threshold="auto"))

    assert "--detectron2" in message(image_category="cats")
    (tmp_path / "detectron2" / "detectron2").mkdir(parents=True)
    (tmp_path / "detectron2" / "detectron2" / "__init__.py").touch()
    cats = dataclasses.replace(arguments, image_category="cats")
    assert compare_pytorch.check(cats) == tmp_path / "detectron2", "beside"
    installed.discard("detectron2")
    assert compare_pytorch.check(cats) is None

    installed |= {"torch", "pycocotools"}
    assert "torch: pip install -e '.[compare]'" in message()
    assert "torch, pycocotools" in message(image_category="cats")
    installed.clear()

    (reference / "src/nets/stylegan3/README.md").unlink()
    assert "lacks the submodules stylegan3: run `git submodule update --init`" in message()


def test_missing_weights_and_edits(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMJAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="5 files of the category cars"):
        compare_pytorch.find_files(arguments)
    for file in registry.CATEGORY_FILES["cars"]:
        if file.role != "edits":
            (tmp_path / file.name).touch()
    with pytest.raises(UserError, match="a file of the category cars"):
        compare_pytorch.find_files(arguments)
    (tmp_path / "edits/cars").mkdir(parents=True)
    for name in ("csc_blue", "csc_snow"):
        np.save(tmp_path / "edits/cars" / f"{name}.npy", np.zeros(1))
    paths, direction = compare_pytorch.find_files(arguments)
    assert set(paths) == {
        "stylegan2-car-config-f.pkl", "e4e_cars_encode.pt", "invertibility_cars_sg2.pt", "encoder_epoch_20.pth",
        "decoder_epoch_20.pth",
    }  # fmt: skip
    assert direction.stem == "csc_blue"
    assert compare_pytorch.find_files(dataclasses.replace(arguments, edit="csc_snow"))[1].stem == "csc_snow"
    with pytest.raises(UserError, match="no csc_red among csc_blue, csc_snow"):
        compare_pytorch.find_files(dataclasses.replace(arguments, edit="csc_red"))


def run(monkeypatch, *options) -> int:
    monkeypatch.setattr(sys, "argv", ["compare_pytorch.py", *map(str, options)])
    try:
        cli.run(compare_pytorch.Arguments, compare_pytorch.main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(("difference", "code"), [(1e-5, 0), (1e-3, 1), (math.nan, 1)])
def test_exit_codes_of_stages(reference, installed, monkeypatch, capsys, tmp_path, difference, code):
    arrays = {"layer_map": np.array([[0, 0, 0, 2]]), "segments": np.array([[1, 1, 1, 5]]), "threshold": np.array(0.25)}
    row = Row("encoder code", difference, TOLERANCES["encoder code"], 1, 1, 1)
    monkeypatch.setattr(compare_pytorch, "compare", lambda *_: (Theirs(arrays, {}), [row]))
    options = ("--reference", reference, "--image_path", "x.png", "--image_category", "cars")
    assert run(monkeypatch, *options, "--output_path", tmp_path / "both") == code
    out = capsys.readouterr().out
    assert (tmp_path / "both" / "comparison.md").read_text() == out
    assert "cars: 2 segments, threshold 0.25, layers W+ 75%, F6 25%" in out
    assert "| encoder code |" in out


def test_exit_code_of_bad_input(tmp_path, monkeypatch, capsys):
    options = ("--reference", tmp_path, "--image_path", "x.png", "--image_category", "faces")
    assert run(monkeypatch, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


# --- our stages, with arrays of samjax in place of theirs ---

SMALL = StyleGAN2Config(256, z_dim=8, w_dim=8, mapping_layers=2, channel_base=256, channel_max=8)
"""Small, but of a size that has all five latent layers."""


@pytest.fixture(scope="module")
def vgg():
    return random_lpips("vgg")


@pytest.fixture(scope="module")
def sam(vgg):
    """A pipeline whose encoder, predictor and segmenter are never run."""
    category = dataclasses.replace(settings.CATEGORIES["cars"], resolution=256, target_size=(48, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "load_lpips", lambda _: vgg)
        return Pipeline(
            LoadedNetwork(SMALL, tiny_generator(SMALL), {}),
            encoder=LoadedNetwork(tiny_encoder_config(SMALL), {}, {}),
            predictor=LoadedNetwork(tiny_predictor_config(latents.LATENT_NAMES), {}, {}),
            segmenter=lambda _: np.zeros(0, np.int32),
            category=category,
        )


@pytest.fixture(scope="module")
def arrays(vgg, sam):
    """What the authors' code would compute for this pipeline, computed by samjax."""
    rng = np.random.default_rng(0)
    config, params, _ = sam.generator
    layers = latents.latent_layers(config)
    image = rng.integers(0, 255, (48, 64, 3), np.uint8)
    error_maps = rng.random((5, 48, 64), np.float32)
    segments = np.repeat(np.repeat(np.arange(12).reshape(3, 4), 16, axis=0), 16, axis=1)
    layer_map = layer_selection.assign_layers(error_maps, segments, 0.498).layer_maps[0]
    masks = {name: mask[None] for name, mask in layer_selection.soft_masks(layer_map, layers).items()}
    z = rng.standard_normal((64, 8), np.float32)
    with jax.default_matmul_precision("highest"):
        ws = stylegan2.map_z(config, params, jnp.asarray(z))
    prior = losses.fit_prior(ws[:, 0])
    target = np.asarray(image, np.float32) / 127.5 - 1
    start = latents.init_latents(layers, ws[:1])
    run = dataclasses.replace(compare_pytorch.first_steps(2), loss_resolution=64)
    items = inversion.Items(target[None], masks, start, np.zeros(1, np.int64))
    found, terms = driver.run(config, inversion.Networks(params, vgg, prior), items, run)
    scales = np.array([1, 1, 1e-8, 1e-3, 5])
    direction = rng.standard_normal(ws.shape[1:]).astype(np.float32)
    root = np.asarray(prior.whitening, np.float64)
    return {
        "pixels": image, "direction": direction, "image": target, "code": np.asarray(ws[0]), "maps": error_maps,
        "segments": segments, "threshold": np.float64(0.498), "layer_map": layer_map, "z": z,
        "prior_mean_w": np.asarray(prior.mean_w), "prior_mean_v": np.asarray(prior.mean_v),
        "prior_inv_cov_v": root @ root.T,
        "first": driver.render(config, params, start, masks)[0],
        "final": driver.render(config, params, found, masks)[0],
        "terms": np.stack([np.asarray(term, np.float64)[:, 0] for term in terms[:5]], axis=1) / scales,
        "edits": editing.edit(config, params, found, masks, direction[None], (0, 1, 2, 3), batch_size=1)[0],
        **{f"mask_{name}": mask[0] for name, mask in masks.items()},
        **{f"latent_{name}": np.asarray(value[0]) for name, value in found.items()},
    }  # fmt: skip


def ours_of(sam, arrays, changes, monkeypatch):
    """Our stages for these arrays, and their rows by name; encoder, predictor and segmenter return the arrays."""
    monkeypatch.setattr(stages.analysis, "encode", lambda *_: arrays["code"][None])
    monkeypatch.setattr(stages.analysis, "predict_maps", lambda *_: arrays["maps"][None])
    monkeypatch.setattr(sam, "segmenter", lambda _: arrays["segments"])
    ours = stages.Ours(sam, Theirs(arrays | changes, {"losses": 3.0}))
    rows = ours.rows(arrays["pixels"], arrays["direction"], compare_pytorch.first_steps(2))
    return ours, {row.stage: row for row in rows}


@pytest.mark.slow  # runs every stage, with the gradient of LPIPS-VGG
def test_every_stage_passes_where_both_sides_agree(sam, arrays, monkeypatch):
    ours, rows = ours_of(sam, arrays, {}, monkeypatch)
    assert {stage: row.difference for stage, row in rows.items() if not row.passed} == {}
    assert len(rows) == len(TOLERANCES) - 1, "one of two kinds of segments"
    assert np.ptp(arrays["layer_map"]) > 1, "several layers are chosen"
    assert rows["losses of 2 steps"].theirs == 3.0
    check_figures(stages.figures(arrays, ours.made))


def check_figures(figures):
    """Each figure has two rows, theirs above ours, that agree."""
    assert list(figures) == ["images", "maps", "layers", "edits"]
    for figure in figures.values():
        content = figure[24:-24, 154:-24]  # without the margins and titles
        assert len(content) == 2 * 192 + 10
        theirs, ours = content[:192].astype(int), content[-192:].astype(int)
        assert np.abs(theirs - ours).max() <= 3
        assert np.ptp(theirs) > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "stage", "followers"),
    [
        ("code", "encoder code", {"first image", "losses of 2 steps", "image after 2 steps"}),
        ("maps", "error maps", {"layer map"}),
        ("mask_F6", "masks", {"image after 2 steps", "losses of 2 steps", "edit at 4 strengths"}),
        ("prior_mean_v", "prior: mean", {"losses of 2 steps"}),
        ("terms", "losses of 2 steps", set()),
        ("edits", "edit at 4 strengths", set()),
    ],
)
def test_an_error_shows_where_it_arises(sam, arrays, monkeypatch, key, stage, followers):
    changed = arrays[key][::-1].copy() if key == "maps" else arrays[key] * 1.5 + 0.01
    _, rows = ours_of(sam, arrays, {key: changed}, monkeypatch)
    failed = {name for name, row in rows.items() if not row.passed}
    assert stage in failed
    assert failed <= {stage, *followers}


def test_vgg16_in_torch_layout(tmp_path, monkeypatch, vgg):
    monkeypatch.setattr(weights, "load_lpips", lambda _: vgg)
    with np.load(compare_pytorch.vgg16(tmp_path / "vgg.npz")) as file:
        assert file["conv1_2.weight"].shape == (64, 64, 3, 3)
        np.testing.assert_array_equal(
            file["conv1_1.weight"][5, 2],
            vgg["backbone"]["conv1_1"]["weight"][:, :, 2, 5],
            "output, input, rows",
        )
        names = sorted({key.partition(".")[0] for key in file.files})
    assert names[:3] == ["conv1_1", "conv1_2", "conv2_1"], "alphabetic is the network's order"
    assert len(names) == 13


def test_both_sides_get_the_same_image(tmp_path):
    """The file that `compare` saves for the authors' script has the pixels that our stages get."""
    image = np.arange(192 * 256 * 3, dtype=np.int64).reshape(192, 256, 3).astype(np.uint8)
    images.save_png(tmp_path / "x.png", images.to_float(image))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), image)
