"""The comparison with the authors' code, as far as it goes without that code: figures, verdicts, wiring, errors."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import random_lpips, tiny_generator

from samjax import config as settings
from samjax import editing, inversion, latents, losses, maps
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.nets import stylegan2
from samjax.nets.stylegan2 import StyleGAN2Config

NETS = ("stylegan3", "encoder4editing", "pytorch-deeplab-xception", "semantic-segmentation-pytorch",
        "face-parsing.PyTorch")  # fmt: skip


@pytest.fixture(scope="module")
def compare():
    sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
    try:
        import compare_pytorch

        yield compare_pytorch
    finally:
        sys.path.pop(0)


@pytest.fixture
def reference(tmp_path):
    """A folder that looks like the authors' checkout."""
    for name in NETS:
        (tmp_path / "sam" / "src" / "nets" / name).mkdir(parents=True)
        (tmp_path / "sam" / "src" / "nets" / name / "README.md").touch()
    for name in ("sam_inv_optimization", "model_utils"):
        (tmp_path / "sam" / "src" / f"{name}.py").write_text(f"NAME = {name!r}\n")
    return tmp_path / "sam"


@pytest.fixture
def arguments(compare, reference, tmp_path):
    return compare.Arguments(
        reference=reference, image_path=tmp_path / "image.png", image_category="cars", weights=tmp_path
    )


@pytest.fixture
def installed(monkeypatch):
    """What seems to be installed: all that the authors' code needs, but for what a test takes out."""
    absent: set[str] = {"detectron2"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name in absent else object())
    return absent


# --- figures and verdicts ---


def test_differences(compare):
    theirs = np.array([[0.0, 4.0], [2.0, -4.0]])
    ours = theirs + np.array([[0.0, 0.5], [-1.0, 0.0]])
    assert compare.absolute(ours, theirs) == 1.0
    assert compare.of_spread(ours, theirs) == 1 / 8
    assert compare.each_of_spread(ours, theirs) == 1 / 6, "each along the leading axis has its own spread"
    assert compare.relative(ours, np.where(theirs == 0, 1, theirs)) == 1.0
    assert compare.of_pixels(ours, theirs) == 0.5


def test_differences_where_there_is_nothing_to_divide_by(compare):
    zeros = np.zeros(3)
    assert compare.of_spread(zeros, zeros) == 0
    assert compare.of_spread(zeros + 1, zeros) == math.inf
    assert compare.relative(zeros, zeros) == 0
    assert compare.relative([0, 1e-9, 0], zeros) == math.inf


def test_other_shapes_and_nan_never_pass(compare):
    for measure in (compare.absolute, compare.of_spread, compare.relative, compare.of_pixels):
        assert measure(np.ones((2, 1)), np.ones((2, 3))) == math.inf, "no broadcasting"
    tolerance = compare.Tolerance(1.0, "absolute")
    for measure in (compare.absolute, compare.of_spread, compare.relative):
        difference = measure([1.0, np.nan], [1.0, 2.0])
        assert not compare.Row("x", difference, tolerance, 0, 0, 0).passed


@pytest.mark.parametrize(("difference", "passed"), [(0.0, True), (1e-4, True), (1.001e-4, False), (math.nan, False)])
def test_verdict_at_the_tolerance(compare, difference, passed):
    row = compare.Row("encoder code", difference, compare.TOLERANCES["encoder code"], 1.0, 2.0, 3.0)
    assert row.passed is passed
    line = list(compare.table([row]))[2]
    assert ("**fail**" in line) is not passed


def test_table(compare):
    rows = [
        compare.Row("masks", 0.0, compare.TOLERANCES["masks"], 1.234, 0.5, 10.0),
        compare.Row("layer map", 0.02, compare.TOLERANCES["layer map"], math.nan, math.nan, math.nan),
    ]
    lines = list(compare.table(rows))
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| masks | 0.0e+00 absolute | 1e-06 | pass | 1.23 | 0.50 | 10.00 |"
    assert lines[3] == "| layer map | 2.0e-02 of the pixels | 1e-03 | **fail** |  |  |  |"


def test_balanced_threshold(compare):
    """Three segments of equal size that could take W+, F4 and the last layer: the thresholds that give all three."""
    segments = np.repeat([[7, 9, 20]], 4, axis=0)
    error_maps = np.array([[0.2, 0.4, 0.9], [0.1, 0.2, 0.8], [0.6, 0.6, 0.6]])[:, None].repeat(4, axis=1)
    tau = compare.reference_sam.balanced_threshold(error_maps, segments)
    assert maps.assign_layers(error_maps, segments, tau).layers.tolist() == [[0, 1, 2]]
    assert np.min(np.abs(error_maps - tau)) >= 0.05, "far from every mean, so that rounding decides nothing"
    assert compare.reference_sam.balanced_threshold(np.full((5, 2, 2), 0.3), np.zeros((2, 2))) == pytest.approx(0.3)


def test_their_terms_are_weighted_as_ours(compare):
    terms = np.arange(10.0).reshape(2, 5)
    weighted = compare.theirs_weighted(terms, settings.InversionConfig())
    assert list(weighted) == list(inversion.Terms._fields)
    np.testing.assert_allclose(weighted["delta"], 1e-3 * terms[:, 3])
    np.testing.assert_allclose(weighted["total"], terms @ [1, 1, 1e-8, 1e-3, 5])


def test_first_steps_are_those_of_a_whole_run(compare):
    def rates(config: settings.InversionConfig, steps: int) -> list[float]:
        names = ("num_opt_steps", "lr", "lr_rampdown_length", "lr_rampup_length")
        numbers = [jnp.asarray(getattr(config, name), jnp.float32) for name in names]
        return [float(losses.learning_rate(jnp.asarray(i), *numbers)) for i in range(steps)]

    whole = settings.InversionConfig()
    for count in (2, 5, 60, 750):
        np.testing.assert_allclose(rates(compare.first_steps(count), count), rates(whole, count), rtol=1e-5)
    assert compare.first_steps(1001) == dataclasses.replace(whole, noise="const")


# --- what their side keeps ---


class Value:
    """As much of a tensor as `Record` looks at."""

    def __init__(self, value: float) -> None:
        self.value = value

    def detach(self) -> float:
        return self.value


def test_record(compare):
    record = compare.reference_sam.Record()
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


def test_layout_leaves_the_checkout_alone(compare, reference, tmp_path):
    weights = {}
    for name in ("encoder_epoch_20.pth", "net.pkl"):
        (tmp_path / name).write_text(name)
        weights[name] = str(tmp_path / name)
    np.save(tmp_path / "csc_blue.npy", np.zeros(1))
    before = sorted(reference.rglob("*"))
    job = compare.reference_sam.Job(
        reference=str(reference), detectron2=None, category="cars", weights=weights, vgg="", image="", height=1,
        width=1, direction=str(tmp_path / "csc_blue.npy"), threshold=None, steps=2, lr_rampup_length=0.05,
        lr_rampdown_length=0.25, threads=1, seed=0, folder=str(tmp_path),
    )  # fmt: skip
    work = compare.reference_sam.lay_out(job)
    ade20k = work / "src/nets/semantic-segmentation-pytorch"
    assert (work / "ckpt/net.pkl").read_text() == "net.pkl"
    assert (ade20k / "ckpt/ade20k-resnet50dilated-ppm_deepsup/encoder_epoch_20.pth").is_file()
    assert (work / "edits/cars/csc_blue.npy").is_file()
    assert all((work / "src/nets" / name / "README.md").is_file() for name in NETS)
    assert (work / "src/model_utils.py").is_file()
    assert sorted(reference.rglob("*")) == before
    assert json.loads(json.dumps(dataclasses.asdict(job))) == dataclasses.asdict(job), "a job travels as JSON"


def job_at(compare, folder):
    return compare.reference_sam.Job("", None, "cars", {}, "", "", 1, 1, "", None, 2, 0, 0, 1, 0, str(folder))


def test_their_process_gives_arrays(compare, tmp_path, monkeypatch):
    script = tmp_path / "theirs.py"
    script.write_text(
        "import json, sys, pathlib, numpy as np\n"
        "job = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        "np.savez(pathlib.Path(job['folder']) / 'output.npz', mask_F4=np.full((2, 2, 1), job['steps']))\n"
        "(pathlib.Path(job['folder']) / 'seconds.json').write_text('{\"code\": 1.5}')\n"
    )
    monkeypatch.setattr(compare.reference_sam, "__file__", str(script))
    theirs = compare.run_theirs(job_at(compare, tmp_path))
    assert theirs.arrays["mask_F4"].tolist() == [[[2], [2]], [[2], [2]]]
    assert theirs.seconds == {"code": 1.5}


def test_their_failure_is_told_in_their_words(compare, tmp_path, monkeypatch):
    script = tmp_path / "theirs.py"
    script.write_text("print('loading')\nraise RuntimeError('size mismatch for b4')\n")
    monkeypatch.setattr(compare.reference_sam, "__file__", str(script))
    with pytest.raises(UserError, match="ended with code 1") as caught:
        compare.run_theirs(job_at(compare, tmp_path))
    assert "size mismatch for b4" in caught.value.details[-1]


# --- errors and exit codes ---


def test_what_is_missing_is_said_in_one_line(compare, arguments, installed, reference, tmp_path):
    def message(**changes) -> str:
        with pytest.raises(UserError) as caught:
            compare.check(dataclasses.replace(arguments, **changes))
        assert "\n" not in caught.value.shown
        return caught.value.shown

    assert compare.check(arguments) is None
    assert "no checkout of adobe-research/sam_inversion" in message(reference=tmp_path)
    assert "--steps" in message(steps=1)
    assert "--threshold" in message(threshold=math.nan)
    compare.check(dataclasses.replace(arguments, threshold="auto"))

    assert "--detectron2" in message(image_category="cats")
    (tmp_path / "detectron2" / "detectron2").mkdir(parents=True)
    (tmp_path / "detectron2" / "detectron2" / "__init__.py").touch()
    assert compare.check(dataclasses.replace(arguments, image_category="cats")) == tmp_path / "detectron2", "beside"
    installed.discard("detectron2")
    assert compare.check(dataclasses.replace(arguments, image_category="cats")) is None

    installed |= {"torch", "pycocotools"}
    assert "torch: pip install -e '.[compare]'" in message()
    assert "torch, pycocotools" in message(image_category="cats")
    installed.clear()

    (reference / "src/nets/stylegan3/README.md").unlink()
    assert "lacks the submodules stylegan3: run `git submodule update --init`" in message()


def test_missing_weights_and_edits(compare, arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMJAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="5 files of the category cars"):
        compare.files_of(arguments)
    for file in compare.registry.CATEGORY_FILES["cars"]:
        if file.role != "edits":
            (tmp_path / file.name).touch()
    with pytest.raises(UserError, match="a file of the category cars"):
        compare.files_of(arguments)
    (tmp_path / "edits/cars").mkdir(parents=True)
    for name in ("csc_blue", "csc_snow"):
        np.save(tmp_path / "edits/cars" / f"{name}.npy", np.zeros(1))
    paths, direction = compare.files_of(arguments)
    assert set(paths) == {
        "stylegan2-car-config-f.pkl", "e4e_cars_encode.pt", "invertibility_cars_sg2.pt", "encoder_epoch_20.pth",
        "decoder_epoch_20.pth",
    }  # fmt: skip
    assert direction.stem == "csc_blue"
    assert compare.files_of(dataclasses.replace(arguments, edit="csc_snow"))[1].stem == "csc_snow"
    with pytest.raises(UserError, match="no csc_red among csc_blue, csc_snow"):
        compare.files_of(dataclasses.replace(arguments, edit="csc_red"))


def run(compare, monkeypatch, *options) -> int:
    monkeypatch.setattr(sys, "argv", ["compare_pytorch.py", *map(str, options)])
    try:
        compare.cli.run(compare.Arguments, compare.main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(("difference", "code"), [(1e-5, 0), (1e-3, 1), (math.nan, 1)])
def test_exit_codes_of_stages(compare, reference, installed, monkeypatch, capsys, tmp_path, difference, code):
    arrays = {"layer_map": np.array([[0, 0, 0, 2]]), "segments": np.array([[1, 1, 1, 5]]), "threshold": np.array(0.25)}
    row = compare.Row("encoder code", difference, compare.TOLERANCES["encoder code"], 1, 1, 1)
    monkeypatch.setattr(compare, "compare", lambda *_: (compare.Theirs(arrays, {}), [row]))
    options = ("--reference", reference, "--image_path", "x.png", "--image_category", "cars")
    assert run(compare, monkeypatch, *options, "--output_path", tmp_path / "both") == code
    out = capsys.readouterr().out
    assert (tmp_path / "both" / "comparison.md").read_text() == out
    assert "cars: 2 segments, threshold 0.25, layers W+ 75%, F6 25%" in out
    assert "| encoder code |" in out


def test_exit_code_of_bad_input(compare, tmp_path, monkeypatch, capsys):
    options = ("--reference", tmp_path, "--image_path", "x.png", "--image_category", "faces")
    assert run(compare, monkeypatch, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


# --- our side, against arrays of our own in their place ---

SMALL = StyleGAN2Config(256, z_dim=8, w_dim=8, mapping_layers=2, channel_base=256, channel_max=8)
"""Small, but of a size that has all five latent layers."""


@pytest.fixture(scope="module")
def vgg():
    return random_lpips("vgg")


@pytest.fixture(scope="module")
def nets(compare):
    category = dataclasses.replace(settings.CATEGORIES["cars"], target_size=(48, 64))
    generator = checkpoints.LoadedGenerator(SMALL, tiny_generator(SMALL), {})
    segmenter = SimpleNamespace()
    return compare.networks.Networks("cars", category, generator, None, None, (None, segmenter, {}), None)


@pytest.fixture(scope="module")
def arrays(compare, vgg, nets):
    """What the authors' side would give for these networks, made by ours."""
    rng = np.random.default_rng(0)
    config, params, _ = nets.generator
    layers = latents.latent_layers(config)
    picture = rng.integers(0, 255, (48, 64, 3), np.uint8)
    error_maps = rng.random((5, 48, 64), np.float32)
    segments = np.repeat(np.repeat(np.arange(12).reshape(3, 4), 16, axis=0), 16, axis=1)
    layer_map = maps.assign_layers(error_maps, segments, 0.498).layer_maps[0]
    masks = {name: mask[None] for name, mask in maps.soft_masks(layer_map, layers).items()}
    z = rng.standard_normal((64, 8), np.float32)
    with jax.default_matmul_precision("highest"):
        ws = stylegan2.map_z(config, params, jnp.asarray(z))
    prior = losses.fit_prior(ws[:, 0])
    target = np.asarray(picture, np.float32) / 127.5 - 1
    start = latents.init_latents(layers, ws[:1])
    run = dataclasses.replace(compare.first_steps(2), loss_resolution=64)
    items = inversion.Items(target[None], masks, start, np.zeros(1, np.int64))
    result = inversion.run(config, inversion.Networks(params, vgg, prior), items, run)
    weights = np.array([1, 1, 1e-8, 1e-3, 5])
    direction = rng.standard_normal(ws.shape[1:]).astype(np.float32)
    root = np.asarray(prior.whitening, np.float64)
    return {
        "picture": picture, "direction": direction, "image": target, "code": np.asarray(ws[0]), "maps": error_maps,
        "segments": segments, "threshold": np.float64(0.498), "layer_map": layer_map, "z": z,
        "prior_mean_w": np.asarray(prior.mean_w), "prior_mean_v": np.asarray(prior.mean_v),
        "prior_inv_cov_v": root @ root.T,
        "first": inversion.render(config, params, start, masks)[0],
        "final": inversion.render(config, params, result.latents, masks)[0],
        "terms": np.stack([np.asarray(term, np.float64)[:, 0] for term in result.terms[:5]], axis=1) / weights,
        "edits": editing.edit(config, params, result.latents, masks, direction[None], (0, 1, 2, 3), batch_size=1)[0],
        **{f"mask_{name}": mask[0] for name, mask in masks.items()},
        **{f"latent_{name}": np.asarray(value[0]) for name, value in result.latents.items()},
    }  # fmt: skip


def rows_of(compare, nets, arrays, changes, monkeypatch, vgg):
    """The table for these arrays."""
    return ours_of(compare, nets, arrays, changes, monkeypatch, vgg)[1]


def ours_of(compare, nets, arrays, changes, monkeypatch, vgg):
    """Our side for these arrays, and its table; the recognition networks stand for ones that agree."""
    monkeypatch.setattr(compare.networks, "encode", lambda *_: arrays["code"])
    monkeypatch.setattr(compare.networks, "predicted_maps", lambda *_: arrays["maps"])
    monkeypatch.setattr(compare.segmentation, "ade20k", lambda *_: lambda _: arrays["segments"])
    monkeypatch.setattr(compare.weights, "load_lpips", lambda _: vgg)
    ours = compare.Ours(nets, compare.Theirs(arrays | changes, {"losses": 3.0}))
    rows = ours.rows(arrays["picture"], arrays["direction"], compare.first_steps(2))
    return ours, {row.stage: row for row in rows}


def test_every_stage_passes_where_both_sides_agree(compare, nets, arrays, monkeypatch, vgg):
    ours, rows = ours_of(compare, nets, arrays, {}, monkeypatch, vgg)
    assert {stage: row.difference for stage, row in rows.items() if not row.passed} == {}
    assert len(rows) == len(compare.TOLERANCES) - 1, "one of two kinds of segments"
    assert np.ptp(arrays["layer_map"]) > 1, "a picture that says something about layers"
    assert rows["losses of 2 steps"].theirs == 3.0
    check_pictures(compare.pictures(arrays, ours.made))


def check_pictures(pictures):
    """Two rows, theirs over ours, that agree."""
    assert list(pictures) == ["images", "maps", "layers", "edits"]
    for picture in pictures.values():
        content = picture[24:-24, 154:-24]  # without margins and the names of the sides
        assert len(content) == 2 * 192 + 10
        theirs, ours = content[:192].astype(int), content[-192:].astype(int)
        assert np.abs(theirs - ours).max() <= 3
        assert np.ptp(theirs) > 50


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
def test_an_error_shows_where_it_arises(compare, nets, arrays, monkeypatch, vgg, key, stage, followers):
    changed = arrays[key][::-1].copy() if key == "maps" else arrays[key] * 1.5 + 0.01
    rows = rows_of(compare, nets, arrays, {key: changed}, monkeypatch, vgg)
    failed = {name for name, row in rows.items() if not row.passed}
    assert stage in failed
    assert failed <= {stage, *followers}


def test_vgg16_in_torch_layout(compare, tmp_path, monkeypatch, vgg):
    monkeypatch.setattr(compare.weights, "load_lpips", lambda _: vgg)
    with np.load(compare.vgg16(tmp_path / "vgg.npz")) as file:
        assert file["conv1_2.weight"].shape == (64, 64, 3, 3)
        np.testing.assert_array_equal(
            file["conv1_1.weight"][5, 2],
            vgg["backbone"]["conv1_1"]["weight"][:, :, 2, 5],
            "output, input, rows",
        )
        names = sorted({key.partition(".")[0] for key in file.files})
    assert names[:3] == ["conv1_1", "conv1_2", "conv2_1"], "alphabetic is the network's order"
    assert len(names) == 13


def test_the_picture_reaches_both_sides_alike(compare, tmp_path):
    """What `compare` saves for their script is what ours looks at."""
    picture = np.arange(192 * 256 * 3, dtype=np.int64).reshape(192, 256, 3).astype(np.uint8)
    compare.images.save_png(tmp_path / "x.png", compare.images.to_float(picture))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), picture)
