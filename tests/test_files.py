"""Files appear completely or not at all, and damaged archives are refused in one line."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import resource
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest

from samjax.errors import UserError
from samjax.io import files


def listing(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_round_trips(tmp_path: Path):
    files.write_bytes(tmp_path / "a.bin", b"\0\1\2")
    assert (tmp_path / "a.bin").read_bytes() == b"\0\1\2"
    files.write_text(tmp_path / "a.txt", "grüße\n")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "grüße\n"
    arrays = {"W+": np.arange(6, dtype=np.float32).reshape(2, 3), "file": np.int32(4)}
    files.write_npz(tmp_path / "latents_T0.225.npz", arrays)
    with np.load(tmp_path / "latents_T0.225.npz", allow_pickle=False) as read:
        assert set(read.files) == {"W+", "file"}
        np.testing.assert_array_equal(read["W+"], arrays["W+"])
        assert read["W+"].dtype == np.float32
    assert listing(tmp_path) == ["a.bin", "a.txt", "latents_T0.225.npz"]


def test_json_of_arrays_dataclasses_and_paths(tmp_path: Path):
    @dataclasses.dataclass(frozen=True)
    class Row:
        label: int
        share: np.float32

    value = {
        "row": Row(3, np.float32(0.5)),
        "psnr": float("inf"),
        "nan": np.float64("nan"),
        "array": np.arange(3),
        "flag": np.bool_(True),
        "path": Path("a") / "b",
        0.225: (1, None, "ü"),
    }
    files.write_json(tmp_path / "m.json", value)
    text = (tmp_path / "m.json").read_text(encoding="utf-8")
    assert json.loads(text) == {
        "row": {"label": 3, "share": 0.5},
        "psnr": None,
        "nan": None,
        "array": [0, 1, 2],
        "flag": True,
        "path": os.path.join("a", "b"),
        "0.225": [1, None, "ü"],
    }
    assert text.endswith("}\n")
    assert "ü" in text
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "n.json", {"x": object()})
    assert listing(tmp_path) == ["m.json"]


def test_missing_directories_are_created_and_permissions_are_the_users(tmp_path: Path):
    path = tmp_path / "edits" / "blue car" / "x.txt"
    files.write_text(path, "x")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_name_of_the_greatest_length(tmp_path: Path):
    files.write_text(tmp_path / ("n" * 255), "x")
    with pytest.raises(UserError, match="too long"):
        files.write_text(tmp_path / ("n" * 256), "x")


def test_a_link_stays_a_link(tmp_path: Path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_the_old_file_is_kept_if_writing_fails(tmp_path: Path, raised: type[BaseException]):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(raised), files.whole_file(path) as file:  # noqa: PT012
        file.write(b"half")
        assert path.read_text() == "old"
        assert len(listing(tmp_path)) == 2
        raise raised
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "[Ii]nput/output error"),
    ],
)
@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_an_error_of_the_system_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str, where: str
):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def refuse(*_args, **_options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, where, refuse)
    with pytest.raises(UserError, match=says) as caught:
        files.write_text(path, "new")
    monkeypatch.undo()
    assert "a.txt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["a.txt"]


def test_a_disk_that_fills_up_while_writing(tmp_path: Path):
    """With a real refusal of the system: files of this process may not grow beyond 10 kB for a moment."""
    arrays = {"noise": np.random.default_rng(0).standard_normal(10_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UserError, match="larger than this disk") as caught:
            files.write_npz(tmp_path / "latents.npz", arrays)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "latents.npz" in str(caught.value)
    assert listing(tmp_path) == []


def test_a_failure_leaves_no_open_file(tmp_path: Path):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    before = descriptors()
    for _ in range(3):
        with pytest.raises(RuntimeError), files.whole_file(tmp_path / "a"):
            raise RuntimeError
    assert descriptors() == before


def test_paths_that_cannot_be_files(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="it is a directory"):
        files.write_text(tmp_path, "x")
    with pytest.raises(UserError, match="is a file, not a directory"):
        files.write_text(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(UserError, match="device"):
        files.write_text("/dev/null", "x")
    with pytest.raises(UserError, match="not a legal file name"):
        files.write_text(str(tmp_path / "a\0b"), "x")
    assert listing(tmp_path) == ["file"]


def test_objects_are_not_pickled(tmp_path: Path):
    with pytest.raises(ValueError, match="bad"):
        files.write_npz(tmp_path / "a.npz", {"bad": np.array([object()])})
    assert listing(tmp_path) == []


# --- reading archives ---


def npy(array: np.ndarray, **changes) -> bytes:
    """A .npy file whose header may lie."""
    stream = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array) | changes
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + array.tobytes()


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return path


def test_npz_files_are_read_as_numpy_reads_them(tmp_path: Path):
    arrays = {
        "W+": np.arange(6, dtype=np.float32).reshape(2, 3),
        "file": np.int32(4),
        "empty": np.zeros((0, 3)),
        "fortran": np.asfortranarray(np.arange(24).reshape(2, 3, 4)),
        "text": np.array(["a", "bcd"]),
        "flag": np.array([True, False]),
    }
    files.write_npz(tmp_path / "a.npz", arrays)
    np.savez(tmp_path / "b.npz", **{name: array for name, array in arrays.items() if name != "file"})
    for name in ("a.npz", "b.npz"):
        made = files.read_npz(tmp_path / name)
        with np.load(tmp_path / name) as expected:
            assert list(made) == expected.files
            for key, array in made.items():
                np.testing.assert_array_equal(array, expected[key])
                assert array.dtype == expected[key].dtype
                assert array.flags.writeable


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist: give the path"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.write_bytes(b""), "is damaged or not an .npz file"),
        (lambda path: path.write_text("hello"), "is damaged or not an .npz file"),
        (lambda path: archive(path, a=b"hello"), "is damaged or not an .npz file"),
        (lambda path: archive(path, a=npy(np.zeros(3))[:-1]), "is damaged or not an .npz file"),
        (lambda path: archive(path, a=npy(np.zeros(3), shape=(10**15,))), "is damaged or not an .npz file"),
        (lambda path: archive(path, a=npy(np.zeros(3), shape=(10**30,))), "is damaged or not an .npz file"),
        (lambda path: archive(path, a=npy(np.zeros(3), descr="|O")), "Python objects are not read"),
        (lambda path: np.savez(path, a=np.array([None])), "Python objects are not read"),
    ],
)
def test_archives_that_are_refused(tmp_path: Path, make, says: str):
    path = tmp_path / "a.npz"
    make(path)
    with pytest.raises(UserError, match=says) as caught:
        files.read_npz(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_archives_never_end_in_a_traceback(tmp_path: Path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.npz"
    files.write_npz(path, {"a": rng.normal(size=(20, 10)), "b": np.zeros((50, 50))})
    data = path.read_bytes()
    refused = 0
    for round_ in range(80):
        damaged = bytearray(data[: None if round_ % 2 else rng.integers(0, len(data))])
        for position in rng.integers(0, max(len(damaged), 1), 4 if damaged else 0):
            damaged[position] = rng.integers(0, 256)
        path.write_bytes(bytes(damaged))
        line = ""
        try:
            files.read_npz(path)
        except UserError as error:
            refused, line = refused + 1, str(error)
        assert "\n" not in line
    assert refused > 60


def test_archives_that_unpack_to_too_much(tmp_path: Path):
    path = tmp_path / "a.npz"
    files.write_npz(path, {"a": np.zeros(100_000), "b": np.zeros(100_000)})
    assert len(files.read_npz(path, max_bytes=1_601_000)) == 2
    with pytest.raises(UserError, match=r"a\.npz would unpack to 1,600,256 bytes, more than the limit of 1,000,000"):
        files.read_npz(path, max_bytes=1_000_000)
    # 30 MB of zeros, compressed to 30 kB.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("a.npy", "w", force_zip64=True) as entry:
        np.lib.format.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": (30_000_000,)})
        for _ in range(30):
            entry.write(bytes(1_000_000))
    with pytest.raises(UserError, match="would unpack to 30,000,128 bytes"):
        files.read_npz(path, max_bytes=29_000_000)
    smaller = path.read_bytes().replace((30_000_128).to_bytes(8, "little"), (128).to_bytes(8, "little"))
    path.write_bytes(smaller.replace((30_000_128).to_bytes(4, "little"), (128).to_bytes(4, "little")))
    with pytest.raises(UserError, match="is damaged"):  # an index that lies about the size
        files.read_npz(path)


def test_output_directory(tmp_path: Path):
    directory = files.output_directory(tmp_path / "a" / "b")
    assert directory.is_dir()
    (directory / "kept").write_text("x")
    assert files.output_directory(str(directory)) == directory
    with pytest.raises(UserError, match="give the path of the output directory, not 3"):
        files.output_directory(3)  # type: ignore[arg-type]
    assert listing(directory) == ["kept"]
    with pytest.raises(UserError, match="is a file"):
        files.output_directory(directory / "kept")
    with pytest.raises(UserError, match="is a file, not a directory"):
        files.output_directory(directory / "kept" / "deeper")
    with pytest.raises(UserError, match="not a legal directory name"):
        files.output_directory("a\0b")


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.EROFS, "read-only"), (errno.EACCES, "permission denied"), (errno.ENOSPC, "disk is full")],
)
def test_output_directory_that_cannot_be_written_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
):
    def refuse(*_args, **_options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(UserError, match=says) as caught:
        files.output_directory(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_directory_without_write_permission(tmp_path: Path):
    directory = tmp_path / "locked"
    directory.mkdir()
    directory.chmod(0o555)
    try:
        if os.geteuid() == 0:  # whom permissions do not bind
            files.write_text(directory / "a.txt", "x")
        else:
            with pytest.raises(UserError, match="permission denied"):
                files.write_text(directory / "a.txt", "x")
            with pytest.raises(UserError, match="permission denied"):
                files.output_directory(directory)
            assert listing(directory) == []
    finally:
        directory.chmod(0o755)
