"""Reading directions from files: samjax's own formats, those of other programs, and whole directories."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from samjax.errors import UserError
from samjax.io import directions
from samjax.io.directions import Component, parse_components

CASES = Path(__file__).parent / "cases"

# --- formats of samjax ---


def save(path, array):
    match path.suffix:
        case ".npy":
            np.save(path, array)
        case ".npz":
            np.savez(path, name=array)
        case _:
            safetensors.numpy.save_file({"name": array}, path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("shape", [(1, 6, 8), (6, 8), (1, 1, 8), (8,)])
def test_directions_of_every_format_and_shape(tmp_path, suffix, shape):
    array = np.random.default_rng(0).standard_normal(shape)
    save(tmp_path / f"direction{suffix}", array)
    found = directions.read_one(tmp_path / f"direction{suffix}", 6, 8)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.broadcast_to(array, (1, 6, 8))[0], rtol=1e-6)


def test_one_array_among_several_is_found_by_name(tmp_path):
    np.savez(tmp_path / "direction.npz", direction=np.ones(8), other=np.zeros(3))
    np.testing.assert_array_equal(directions.read_one(tmp_path / "direction.npz", 6, 8), np.ones((6, 8)))
    np.savez(tmp_path / "two.npz", a=np.ones(8), b=np.zeros(3))
    with pytest.raises(UserError, match=r"2 arrays \(a, b\)"):
        directions.read(tmp_path / "two.npz", 6, 8)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_damaged_and_other_files_give_errors_of_one_line(tmp_path, suffix):
    path = tmp_path / f"direction{suffix}"
    with pytest.raises(UserError, match="no such file"):
        directions.read(path, 6, 8)
    save(path, np.ones((6, 8), np.float32))
    whole = path.read_bytes()
    for damaged in (b"", b"\x80\x04not an array", whole[:20], whole[:-9]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|is empty") as caught:
            directions.read(path, 6, 8)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)
    save(path, np.ones((6, 7), np.float32))
    with pytest.raises(UserError, match=r"\(6, 7\) does not fit .* \(1, 6, 8\), \(6, 8\), \(1, 8\) or \(8,\)"):
        directions.read(path, 6, 8)
    save(path, np.array([1, 2, np.nan, 4, 5, 6, 7, 8], np.float32))
    with pytest.raises(UserError, match="not finite"):
        directions.read(path, 6, 8)


def test_pickled_objects_are_refused_unread(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.exit, ("the pickle was run",))

    np.save(tmp_path / "trap.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(UserError, match="Python objects"):
        directions.read(tmp_path / "trap.npy", 6, 8)
    np.savez(tmp_path / "trap.npz", direction=np.array([Trap()], object))
    with pytest.raises(UserError, match="Python objects"):
        directions.read(tmp_path / "trap.npz", 6, 8)


def test_other_formats_are_errors(tmp_path):
    (tmp_path / "direction.txt").write_bytes(b"0 1 2")
    with pytest.raises(UserError, match=r"not read from \.txt; give \.npy, .* or \.pkl"):
        directions.read(tmp_path / "direction.txt", 6, 8)
    np.save(tmp_path / "words.npy", np.array(["a"] * 8))
    with pytest.raises(UserError, match="not numbers"):
        directions.read(tmp_path / "words.npy", 6, 8)


# --- formats of other programs ---


def saved(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


ONE, ALL = np.arange(8, dtype=np.float32), np.arange(64, dtype=np.float32).reshape(1, 8, 8)
PCA = {"mean": torch.zeros(1, 8), "comp": torch.ones(80, 1, 8), "std": torch.arange(80.0, 0, -1)}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_torch_files(tmp_path, options):
    (tmp_path / "age.pt").write_bytes(saved(torch.tensor(ONE)[None], **options))
    (tmp_path / "pose.PTH").write_bytes(saved(torch.tensor(ALL).bfloat16(), **options))
    (tmp_path / "ffhq_pca.pt").write_bytes(saved(PCA, **options))
    read = lambda name: directions.read(tmp_path / name, 8, 8)  # noqa: E731
    np.testing.assert_array_equal(read("age.pt")["age"], np.broadcast_to(ONE, (8, 8)))
    np.testing.assert_array_equal(read("pose.PTH")["pose"], ALL[0])
    components = read("ffhq_pca.pt")
    assert list(components) == [f"ffhq_pca_{i:02d}" for i in range(8)]
    np.testing.assert_array_equal(components["ffhq_pca_02"], np.full((8, 8), 78.0))


def test_numpy_files(tmp_path):
    np.save(tmp_path / "smile.npy", ONE[None])  # InterFaceGAN's boundaries
    np.save(tmp_path / "car.npy", ALL)  # SAM's
    np.savez(tmp_path / "ours.npz", direction=ALL[0])
    np.savez(
        tmp_path / "dump.npz", lat_comp=np.ones((3, 1, 8)), lat_stdev=np.array([3.0, 2.0, 1.0]), act_mean=np.ones(2)
    )
    read = lambda name: directions.read(tmp_path / name, 8, 8)  # noqa: E731
    np.testing.assert_array_equal(read("smile.npy")["smile"], np.broadcast_to(ONE, (8, 8)))
    np.testing.assert_array_equal(read("car.npy")["car"], ALL[0])
    np.testing.assert_array_equal(read("ours.npz")["ours"], ALL[0])
    np.testing.assert_array_equal(read("dump.npz")["dump_01"], np.full((8, 8), 2.0))


def loaded(name: str):
    """What a case holds, by the libraries that wrote it."""
    path = CASES / "directions" / name
    return torch.load(path, weights_only=False) if path.suffix == ".pt" else np.load(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w_column.npy", lambda held: {"w_column": held[:, 0]}),
        ("numpy_in_pt.pt", lambda held: {"numpy_in_pt": held}),
        ("dict_one.pt", lambda held: {"dict_one": held["direction"]}),
        ("stack.npy", lambda held: {f"stack_{i:02d}": row for i, row in enumerate(held)}),
        ("boundaries_anycost.pt", lambda held: {f"boundaries_anycost_{k}": v for k, v in held.items()}),
        ("factor.pt", lambda held: {f"factor_{i:02d}": held["eigvec"][:, i] for i in range(8)}),
        ("cars_pca.pt", lambda held: {f"cars_pca_{i:02d}": held["comp"][i] * held["std"][i] for i in range(8)}),
    ],
)
def test_what_people_have(name, expected):
    found = directions.read(CASES / "directions" / name, 10, 32)
    wanted = {key: np.broadcast_to(np.asarray(value), (10, 32)) for key, value in expected(loaded(name)).items()}
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, err_msg=key)  # scaled in float64, not in float32


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.pt", None, "no such file"),
        ("text.pt", b"hello", "not a file of torch.save"),
        ("list.pt", saved([1, 2]), "holds no arrays"),
        ("other.pt", saved({"weight": torch.ones(3)}), r"\(3,\) does not fit"),
        (
            "network.pt",
            saved({"bias": torch.ones(8), "weight": torch.ones(3, 3)}),
            r"2 arrays \(bias, weight\), not all",
        ),
        ("wide.pt", saved(torch.ones(1, 512)), "does not fit this generator"),
        ("other_size.pt", saved(torch.ones(18, 8)), r"styles of a 1024 px generator, not of 32 px, or 18 codes in W"),
        ("pca.pt", saved({**PCA, "comp": torch.ones(80, 1, 512)}), "styles have 8 entries"),
        ("factor.pt", saved({"eigvec": torch.ones(512, 512)}), "styles have 8 entries"),
        ("nan.pt", saved(torch.full((8,), float("nan"))), "not finite"),
        ("many.pt", saved(torch.ones(1001, 8)), "more than the 1,000"),
        ("cut.pt", saved(torch.ones(8))[:200], "zip archive"),
        ("damaged.npz", b"PK\3\4", "damaged"),
    ],
)
def test_files_that_are_not_directions(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        directions.read(tmp_path / name, 8, 8)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name", ["dir_strings.npz", "h_noext.npz", "h_zerodims_FloatStorage.pt", "d1019_del_b.npz", "d1070_move_b.npz"]
)
def test_files_that_mean_harm(name):
    with pytest.raises(UserError) as caught:
        directions.read(CASES / "hostile" / name, 8, 8)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_are_safe_and_differ(tmp_path):
    (tmp_path / "a.pt").write_bytes(saved({"../../x": torch.tensor(ONE), 1: torch.tensor(ONE), "1": torch.tensor(ONE)}))
    names = list(directions.read(tmp_path / "a.pt", 8, 8))
    assert names[1:] == ["a_1", "a_1_2"]
    assert "/" not in names[0]


def test_one_direction_is_wanted(tmp_path):
    with pytest.raises(UserError, match=r"holds 5 directions: use one by its name in --edits_folder \(stack_00"):
        directions.read_one(CASES / "directions" / "stack.npy", 10, 32)
    with pytest.raises(UserError, match=r"an array: shape \(2, 8\) does not fit .* that of 2 directions"):
        directions.check(np.ones((2, 8)), 6, 8, "an array")


# --- components ---


def test_components_act_on_a_range_of_styles(tmp_path):
    (tmp_path / "cars_pca.pt").write_bytes(saved(PCA))
    chosen = parse_components(["0:0-5", "16:3-6", "22:7-11", "2", "3:4"])
    found = directions.read(tmp_path / "cars_pca.pt", 8, 8, components=chosen)
    assert list(found) == ["cars_pca_00_0-5", "cars_pca_16_3-6", "cars_pca_22_7-11", "cars_pca_02", "cars_pca_03_4"]
    for (number, first, end), direction in zip(chosen, found.values(), strict=True):
        inside = range(0 if first is None else first, 8 if end is None else min(end, 8))
        for style in range(8):
            np.testing.assert_array_equal(direction[style], 80.0 - number if style in inside else 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("80", "no component 80: its components are 0 to 79"), ("0:8-9", "has the styles 0 to 7")],
)
def test_components_that_a_file_or_a_generator_lacks(tmp_path, text, message):
    (tmp_path / "pca.pt").write_bytes(saved(PCA))
    with pytest.raises(UserError, match=message):
        directions.read(tmp_path / "pca.pt", 8, 8, components=parse_components([text]))


@pytest.mark.parametrize("text", ["", "a", "1:", "1:5-3", "1:5-5", "1:-2", "1:0-19", "-1", "1:2:3", "1,2"])
def test_components_that_cannot_be_read(text):
    with pytest.raises(UserError, match=r"--components"):
        parse_components([text])
    assert parse_components(["7", "7:3", "7:3-5"]) == (Component(7), Component(7, 3, 4), Component(7, 3, 5))


# --- directories ---


def test_directories(tmp_path):
    with pytest.raises(UserError, match="is not a directory: give --edits_folder a directory of directions"):
        directions.read_folder(tmp_path / "none", 8, 8)
    (tmp_path / "notes.txt").write_text("no direction")
    with pytest.raises(UserError, match=r"holds no directions \(\.npy, .* or \.pkl\)"):
        directions.read_folder(tmp_path, 8, 8)
    np.save(tmp_path / "b.npy", ALL)
    np.savez(tmp_path / "a.npz", direction=ONE)
    (tmp_path / "pca.PT").write_bytes(saved(PCA))
    with (tmp_path / "C.NPY").open("wb") as file:
        np.save(file, ONE)
    for name in (".hidden.npy", "._b.npy", "movie.mp4", "more.TXT"):
        (tmp_path / name).write_bytes(b"no direction")
    notes = []
    found = directions.read_folder(tmp_path, 8, 8, notify=notes.append)
    assert notes == [f"{tmp_path}: passed over 3 files: 2 .txt, 1 .mp4"]
    assert list(found) == ["C", "a", "b", *(f"pca_{i:02d}" for i in range(8))]
    np.testing.assert_array_equal(found["a"], np.broadcast_to(ONE, (8, 8)))
    np.testing.assert_array_equal(found["b"], ALL[0])
    (tmp_path / "b.npy").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"b\.npy is damaged"):
        directions.read_folder(tmp_path, 8, 8)


def test_a_directory_with_files_of_every_kind(tmp_path):
    shutil.copytree(CASES / "directions", tmp_path / "edits")
    components = parse_components(["16:3-6"])
    found = directions.read_folder(tmp_path / "edits", 10, 32, components=components)
    assert {"dict_one", "cars_pca_16_3-6", "factor_16_3-6", "stack_04", "w_column"} < set(found)
    assert len(found) == 40 + 5 + 5
    (tmp_path / "edits" / "cars_pca.pt").unlink()
    (tmp_path / "edits" / "factor.pt").unlink()
    with pytest.raises(UserError, match="holds no file of GANSpace or SeFa: leave --components out"):
        directions.read_folder(tmp_path / "edits", 10, 32, components=components)


def test_directions_of_one_name_in_several_files(tmp_path):
    np.save(tmp_path / "smile.npy", ONE)
    (tmp_path / "smile.pt").write_bytes(saved(torch.tensor(ALL)))
    assert list(directions.read_folder(tmp_path, 8, 8)) == ["smile", "smile_2"]


def test_safetensors_with_a_header_that_would_fill_the_memory_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes((9 * 2**20).to_bytes(8, "little") + b"{" + bytes(9 * 2**20))
    with pytest.raises(UserError, match=r"a\.safetensors: its header has 9,437,184 bytes"):
        directions.read(tmp_path / "a.safetensors", 10, 8)
