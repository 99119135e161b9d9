"""Reading codes in W and W+ as programs save them, and starting an inversion at one."""

import io
import itertools
import os
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from samjax.config import Options, resolve_category
from samjax.errors import UserError
from samjax.io import files, styles
from samjax.pipeline import Pipeline
from samjax.testing import TINY_64, tiny_generator

CASES = Path(__file__).parent / "cases" / "latents"
PLUS = np.random.default_rng(0).standard_normal((3, 6, 8)).astype(np.float32)
W = PLUS[:, 0]


def saved(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def loaded(name: str):
    path = CASES / name
    return torch.load(path, weights_only=False) if path.suffix == ".pt" else np.load(path)


# --- files ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("projected_w.npz", lambda held: {"projected_w": held["w"][0]}),
        ("latents.pt", lambda held: {f"latents_{i:02d}": code for i, code in enumerate(held)}),  # e4e
        ("0.pt", lambda held: {"0": held[0]}),  # PTI
        ("project.pt", lambda held: {"/data/face.png": held["/data/face.png"]["latent"]}),  # rosinality
        ("latents_dict.pt", lambda held: {"face.png": held["face.png"]}),
        ("w_512.npy", lambda held: {"w_512": held}),
        ("w_1x512.npy", lambda held: {"w_1x512": held}),
        ("w_Nx1x512.npy", lambda held: {f"w_Nx1x512_{i:02d}": code for i, code in enumerate(held)}),
    ],
)
def test_what_people_have(name, expected):
    found = styles.read(CASES / name, 10, 32)
    wanted = expected(loaded(name))
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == np.float32
        np.testing.assert_array_equal(found[key], np.broadcast_to(np.asarray(value), (10, 32)))


def test_codes_of_another_size_are_not_cut():
    with pytest.raises(
        UserError, match=r"wp_18.npy: has shape \(1, 18, 32\), the styles of a 1024 px generator, not of 64"
    ):
        styles.read(CASES / "wp_18.npy", 10, 32)
    assert styles.read(CASES / "wp_18.npy", 18, 32)["wp_18"].shape == (18, 32)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (W[0], W[:1]),
        (W[:1], W[:1]),
        (W, W),
        (W[:, None], W),
        (W[:1, None, None], W[:1]),
        (PLUS[0], PLUS[:1]),  # as many rows as styles: one code in W+
        (PLUS[:1], PLUS[:1]),
        (PLUS, PLUS),
        (PLUS[None], PLUS),
        (PLUS[:, None], PLUS),
    ],
)
def test_shapes(array, expected):
    found = np.stack(list(styles.collect(array, 6, 8, "array").values()))
    expected = np.broadcast_to(expected[:, None] if expected.ndim == 2 else expected, (len(expected), 6, 8))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        *itertools.product([".npy", ".NPZ", ".safetensors", ".pt", ".PTH", ".pkl"], ["float16", "float32", "float64"]),
        *itertools.product([".safetensors", ".pt", ".PTH"], ["bfloat16"]),  # which NumPy's formats do not have
    ],
)
def test_formats_and_precisions(tmp_path, suffix, dtype):
    path = tmp_path / f"codes{suffix}"
    array = PLUS.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    match suffix.lower():
        case ".npy":
            with path.open("wb") as file:
                np.save(file, array)
        case ".npz":
            files.write_npz(path, {"w": array})
        case ".safetensors":
            safetensors.numpy.save_file({"latent_W+": array}, path)
        case ".pkl":
            path.write_bytes(pickle.dumps({"w": array}))
        case _:
            path.write_bytes(saved([torch.tensor(PLUS).to(getattr(torch, dtype))]))
    found = np.stack(list(styles.read(path, 6, 8).values()))
    np.testing.assert_array_equal(found, array.astype(np.float32))


def test_our_own_latents_hold_the_result_and_not_the_start(tmp_path):
    files.write_npz(tmp_path / "a.npz", {"ws": PLUS[0], "latent_W+": PLUS[1:2], "latent_F4": np.ones((1, 16, 16, 8))})
    files.write_npz(tmp_path / "b.npz", {"W+": PLUS[1], "F4": np.ones((16, 16, 8))})
    for name in "ab":
        np.testing.assert_array_equal(styles.read(tmp_path / f"{name}.npz", 6, 8)[name], PLUS[1])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones((2, 6, 8), np.int64), "holds int64, but styles are floats"),
        (np.ones((2, 7)), r"\(2, 7\); this generator takes \(N, 6, 8\)"),
        (np.ones((0, 8)), r"\(0, 8\)"),
        (np.ones((1, 5, 8)), r"\(1, 5, 8\)"),
        (np.ones((16, 8)), "a 512 px generator, not of 16 px, or 16 codes in W, to be saved as .16, 1, 8"),
        (np.ones((10_001, 8)), "more than 10,000 codes"),
        (np.full((6, 8), 1e300), "not finite"),
        ({"a": PLUS[0], "b": np.ones((3, 3))}, r"b has shape \(3, 3\)"),
        ({"a": "text"}, "holds no arrays"),
        ([], "holds no arrays"),
        (np.array(["a"]), "holds <U1"),
    ],
)
def test_what_holds_no_codes(value, message):
    with pytest.raises(UserError, match=message) as caught:
        styles.collect(value, 6, 8, "the value")
    assert str(caught.value).startswith("the value: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.npy", None, "no such file"),
        ("text.pt", b"hello", "not a file of torch.save"),
        ("photo.png", b"\x89PNG", "not read from .png"),
        ("bare", b"hello", "not read from files without a suffix"),
        ("cut.pt", saved(torch.ones(6, 8))[:300], "zip archive"),
        ("runs.pkl", pickle.dumps({"w": os.system}), "which no checkpoint needs"),
        (
            "object.npy",
            b"\x93NUMPY\1\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(200),
            "Python objects",
        ),
    ],
)
def test_files_that_hold_no_codes(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        styles.read(tmp_path / name, 6, 8)
    assert name in str(caught.value)


# --- the code of an image ---


@pytest.mark.parametrize(
    ("image", "chosen"),
    [("face.png", 0), ("photos/face.jpg", 0), ("b/car.png", 2), ("a/car.png", 1), (r"C:\x\cat.png", 3)],
)
def test_the_code_that_has_the_name_of_the_image(image, chosen):
    names = ("/data/face.png", "a/car.png", "b/car.png", r"D:\cat.jpg")
    codes = {name: np.full((6, 8), i, np.float32) for i, name in enumerate(names)}
    assert styles.choose(codes, image, "codes.pt")[0, 0] == chosen


def test_a_code_that_nothing_chooses():
    codes = {"a/car.png": W, "b/car.png": W}
    for image in ("car.png", "face.png"):
        with pytest.raises(
            UserError, match=r"codes.pt: holds 2 codes \(a/car.png, b/car.png\), of which not exactly one"
        ):
            styles.choose(codes, Path("photos") / image, "codes.pt")
    assert styles.choose({"other": W}, "face.png", "codes.pt") is W


# --- inversions that start at a code ---


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    from samjax.io import checkpoints

    folder = tmp_path_factory.mktemp("start")
    checkpoints.save_safetensors(folder / "own.safetensors", TINY_64, tiny_generator(TINY_64))
    codes = {"photo.png": torch.ones(10, 8), "other.png": torch.zeros(8)}
    (folder / "codes.pt").write_bytes(saved(codes))

    def make(**options) -> Pipeline:
        known = {"num_opt_steps": 2, "lpips_type": "alex", "preset": None, **options}
        return Pipeline(folder / "own.safetensors", options=Options(gan_weights=folder / "own.safetensors", **known))

    make.codes = folder / "codes.pt"
    return make


LABELS, MAPS = np.zeros((64, 64), np.int32), np.zeros((3, 64, 64))


def test_where_an_inversion_starts(pipeline, image, tmp_path):
    sam = pipeline()
    analyze = lambda start, name="photo": sam.analyze(image, segments=LABELS, maps=MAPS, start=start, name=name)  # noqa: E731
    for start in (pipeline.codes, np.ones((1, 10, 8)), np.ones(8), {"W+": np.ones((10, 8))}, [torch.ones(8)]):
        known = analyze(start)
        np.testing.assert_array_equal(known.ws, np.ones((10, 8)))
        assert known.ws_from == "given"
    np.testing.assert_array_equal(analyze(pipeline.codes, "other").ws, np.zeros((10, 8)))
    with pytest.raises(UserError, match=r"codes.pt: holds 2 codes \(photo.png, other.png\)"):
        analyze(pipeline.codes, "third")
    assert analyze(None).ws_from == "mean"
    with pytest.raises(UserError, match="a start can be given with an image only"):
        sam.invert(analyze(None), start=np.ones(8))


def test_the_option_and_what_is_resumed(pipeline, image, tmp_path):
    sam = pipeline(start_latent=pipeline.codes)
    given = {"segments": LABELS, "maps": MAPS, "directory": tmp_path}
    known = sam.analyze(image, name="photo", **given)
    np.testing.assert_array_equal(known.ws, np.ones((10, 8)))
    assert sam.category.start == "given"
    sam.analyze(image, name="photo", **given)
    (tmp_path / "result.png").touch()
    with pytest.raises(UserError, match=r"results of other settings \(ws\)"):
        sam.analyze(image, name="other", **given)
    with pytest.raises(UserError, match=r"results of other settings \(start, start_latent, ws\)"):
        pipeline().analyze(image, name="photo", **given)


def test_options_that_exclude_each_other():
    for other in ({"start": "mean"}, {"e4e_path": Path("e4e")}):
        with pytest.raises(UserError, match="--start_latent replaces --start, --e4e_path and --offsets_path"):
            resolve_category(Options(start_latent=Path("codes.pt"), **other))
    assert resolve_category(Options("cars", start_latent=Path("codes.pt"))).start == "given"
