"""Reading directions from files: samjax's own formats, those of other programs, and whole directories."""

import io

import numpy as np
import pytest
import safetensors.numpy
import torch

from ckpt_convert import directions as converter
from samjax.errors import UserError
from samjax.io import directions

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
@pytest.mark.parametrize("shape", [(1, 6, 8), (6, 8), (8,)])
def test_directions_of_every_format_and_shape(tmp_path, suffix, shape):
    array = np.random.default_rng(0).standard_normal(shape)
    save(tmp_path / f"direction{suffix}", array)
    found = directions.read(tmp_path / f"direction{suffix}", 6, 8)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.broadcast_to(array, (1, 6, 8))[0], rtol=1e-6)


def test_one_array_among_several_is_found_by_name(tmp_path):
    np.savez(tmp_path / "direction.npz", direction=np.ones(8), other=np.zeros(3))
    np.testing.assert_array_equal(directions.read(tmp_path / "direction.npz", 6, 8), np.ones((6, 8)))
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
        with pytest.raises(UserError, match=r"cannot be read|holds 0 arrays") as caught:
            directions.read(path, 6, 8)
        assert "\n" not in str(caught.value)
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
    with pytest.raises(UserError, match="cannot be read"):
        directions.read(tmp_path / "trap.npy", 6, 8)
    np.savez(tmp_path / "trap.npz", direction=np.array([Trap()], object))
    with pytest.raises(UserError, match="cannot be read"):
        directions.read(tmp_path / "trap.npz", 6, 8)


def test_other_formats_are_errors(tmp_path):
    (tmp_path / "direction.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"\.npy, \.npz or \.safetensors, not '\.pt'"):
        directions.read(tmp_path / "direction.pt", 6, 8)
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
    (tmp_path / "pose.pt").write_bytes(saved(torch.tensor(ALL), **options))
    (tmp_path / "ffhq_pca.pt").write_bytes(saved(PCA, **options))
    read = lambda name: converter.read(tmp_path / name, 8, 8)  # noqa: E731
    np.testing.assert_array_equal(read("age.pt")["age"], np.broadcast_to(ONE, (8, 8)))
    np.testing.assert_array_equal(read("pose.pt")["pose"], ALL[0])
    components = read("ffhq_pca.pt")
    assert list(components) == [f"ffhq_pca_{i:02d}" for i in range(8)]
    np.testing.assert_array_equal(components["ffhq_pca_02"], np.full((8, 8), 78.0))
    assert len(converter.read(tmp_path / "ffhq_pca.pt", 8, 8, max_components=80)) == 80


def test_numpy_files(tmp_path):
    np.save(tmp_path / "smile.npy", ONE[None])  # InterFaceGAN's boundaries
    np.save(tmp_path / "car.npy", ALL)  # SAM's
    np.savez(tmp_path / "ours.npz", direction=ALL[0])
    np.savez(
        tmp_path / "dump.npz", lat_comp=np.ones((3, 1, 8)), lat_stdev=np.array([3.0, 2.0, 1.0]), act_mean=np.ones(2)
    )
    read = lambda name: converter.read(tmp_path / name, 8, 8)  # noqa: E731
    np.testing.assert_array_equal(read("smile.npy")["smile"], np.broadcast_to(ONE, (8, 8)))
    np.testing.assert_array_equal(read("car.npy")["car"], ALL[0])
    np.testing.assert_array_equal(read("ours.npz")["ours"], ALL[0])
    np.testing.assert_array_equal(read("dump.npz")["dump_01"], np.full((8, 8), 2.0))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.pt", None, "no such file"),
        ("text.pt", b"hello", "not a file of torch.save"),
        ("list.pt", saved([1, 2]), "holds a list, not a tensor"),
        ("other.pt", saved({"weight": torch.ones(3)}), "holds weight, neither"),
        ("wide.pt", saved(torch.ones(1, 512)), "does not fit this generator"),
        ("pca.pt", saved({**PCA, "comp": torch.ones(80, 1, 512)}), "styles have 8 entries"),
        ("nan.pt", saved(torch.full((8,), float("nan"))), "not finite"),
        ("cut.pt", saved(torch.ones(8))[:200], "zip archive"),
        ("damaged.npz", b"PK\\3\\4", "cannot be read"),
    ],
)
def test_files_that_are_not_directions(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        converter.read(tmp_path / name, 8, 8)
    assert name in str(caught.value)


# --- directories ---


@pytest.mark.parametrize("read_folder", [directions.read_folder, converter.read_folder])
def test_directories(tmp_path, read_folder):
    with pytest.raises(UserError, match="is not a directory: give --edits_folder a directory of directions"):
        read_folder(tmp_path / "none", 8, 8)
    (tmp_path / "notes.txt").write_text("no direction")
    with pytest.raises(UserError, match=r"holds no directions \(\.npy, \.npz(,| or) \.safetensors( or \.pt)?\)"):
        read_folder(tmp_path, 8, 8)
    np.save(tmp_path / "b.npy", ALL)
    np.savez(tmp_path / "a.npz", direction=ONE)
    found = read_folder(tmp_path, 8, 8)
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["a"], np.broadcast_to(ONE, (8, 8)))
    np.testing.assert_array_equal(found["b"], ALL[0])
    (tmp_path / "b.npy").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"b\.npy: cannot be read"):
        read_folder(tmp_path, 8, 8)


def test_directories_with_files_of_other_programs(tmp_path):
    (tmp_path / "pca.pt").write_bytes(saved(PCA))
    np.save(tmp_path / "smile.npy", ONE)
    assert list(converter.read_folder(tmp_path, 8, 8)) == [*(f"pca_{i:02d}" for i in range(8)), "smile"]
    assert list(directions.read_folder(tmp_path, 8, 8)) == ["smile"]
