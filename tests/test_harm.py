"""Files that mean harm end in one line, soon, and without taking much memory; their names and contents are escaped."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_convert import __main__ as program
from ckpt_convert.formats import safetensors
from samjax.errors import UserError, brief, escaped, shown
from samjax.io import arrays, directions, files

CASES = Path(__file__).parent / "cases" / "hostile"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def module(state: bytes) -> bytes:
    """A network of NVIDIA's programs."""
    meta = b"}(" + text("class_name") + text("Generator") + text("state") + state + b"u"
    return b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n" + meta + b"\x85R"


# Files that are too large to be kept, but not to be made.
MADE = {
    "deep_hash.pkl": text("x") + b"N" + b"\x85" * 200_000 + b"\x93",
    "copies.pkl": b"](" + b"N" * 400_000 + b"eq\0cbuiltins\nlist\nq\1(" + b"h\1h\0\x85R" * 3000 + b"l",
    "modules.pkl": b"}q\0" + module(b"}(" + text("_modules") + b"h\0u") + b"q\x010h\0("
    + b"".join(text(f"m{i}") + b"h\1" for i in range(20_000))
    + text("synthesis") + b"h\1" + text("mapping") + b"h\1u0h\1",
    "doubled_modules.pkl": module(b"}") + b"q\0"
    + b"".join(
        module(b"}(" + text("_modules") + b"}(" + text("a") + b"h%c" % i + text("b") + b"h%cuu" % i) + b"q%c" % (i + 1)
        for i in range(20)
    ),
    "many_lists.pkl": b"(" + b"]" * 600_000 + b"l",
    "many_sets.pkl": b"(" + b"\x8f" * 400_000 + b"l",
    "steps.pkl": b"N0" * 1_600_000,
}  # fmt: skip

_READ = """
import contextlib, json, shutil, sys, tempfile
from pathlib import Path
import fuzzing
folder, work = map(Path, sys.argv[1:])
readers = fuzzing.readers()
watch, found = fuzzing.Watch(work), {}
for path in sorted(folder.iterdir()):
    for name in ("convert", "directions", "latents")[: None if path.stat().st_size < 10_000 else 1]:
        refused = watch.refused
        problem = watch.read(readers[name], path, work / "out")
        found[f"{name} {path.name}"] = problem or ("" if watch.refused > refused else "not refused")
print(json.dumps([found, [entry.name for entry in work.iterdir()]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_hostile_files_are_refused_in_little_time_and_memory(tmp_path):
    folder, work = tmp_path / "files", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    for case in CASES.iterdir():
        (folder / case.name).write_bytes(case.read_bytes())
    for name, body in MADE.items():
        (folder / name).write_bytes(b"\x80\x04" + body + b".")
    inflating(folder / "inflating.npz", 300 * 2**20)
    root = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", _READ, folder, work],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": f"{root}:{root.parent}"},
    )  # fmt: skip
    found, left = json.loads(done.stdout)
    assert {name.partition(" ")[2] for name in found} == {path.name for path in folder.iterdir()}
    assert not {name: problem for name, problem in found.items() if problem}
    assert not left


@pytest.mark.parametrize("name", ["esc_global.pkl", "st_nul.safetensors", "laughs_list_tensor_shape.pt"])
def test_the_program_prints_one_plain_line(name, tmp_path, capsys):
    assert program.main([str(CASES / name), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("\n")
    assert printed.err[:-1].isprintable()
    assert name in printed.err
    assert not list(tmp_path.iterdir())


# --- messages ---


def test_messages_are_one_printable_line():
    error = UserError("a\nb\x1b[31m\u202e\udcff\u3000é🎨 c", details=("x\ty",))
    assert str(error) == "a\\nb\\x1b[31m\\u202e\\udcff\u3000é🎨 c"
    assert error.shown == f"{error}\n  x\\ty"
    assert len(str(UserError("x" * 10**6))) < 5000
    assert escaped("x" * 100, 20) == f"{'x' * 10} … {'x' * 10}"


def test_file_names_are_escaped(tmp_path):
    path = tmp_path / "a\x1b[31m\nb.npz"
    path.write_bytes(b"nothing")
    with pytest.raises(UserError) as caught:
        files.read_npz(path)
    assert "a\\x1b[31m\\nb.npz" in str(caught.value)


def doubled() -> Any:
    value: Any = []
    for _ in range(60):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("text", "'text'"),
        ("\x1b", "'\\x1b'"),
        ("x" * 1000, f"'{'x' * 60}'…"),
        (2.5, "2.5"),
        (None, "None"),
        (True, "True"),
        (2**300, "an integer of 301 bits"),
        ((1, "a"), "(1, 'a')"),
        ([1, 2], "[1, 2]"),
        ([0] * 9, "a list"),
        ({"a": 1}, "a dict"),
        ((["a"],), "a tuple"),
    ],
)
def test_values_are_shown_briefly(value, expected):
    assert shown(value) == expected
    assert shown(doubled()) == "a list"


def test_reasons_are_brief():
    assert brief(KeyError("x" * 10**6)) == "KeyError"
    assert brief(ValueError()) == "ValueError"
    assert len(brief(ValueError("x" * 10**6))) < 130


# --- NumPy's formats ---


def npy(header: str, data: bytes = bytes(64), version: int = 1) -> bytes:
    width = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(width, len(header)) + header.encode() + data


def plain(descr: str = "'<f4'", order: str = "False", shape: str = "(4, 4)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def inflating(path: Path, size: int, claimed: int | None = None) -> None:
    """An archive with an array of `size` zeros, of which its index claims another size."""
    head = npy(plain("'|u1'", shape=f"({size},)"), b"")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = bytes(2**20)
    packed = packer.compress(head) + b"".join(packer.compress(zeros) for _ in range(size >> 20)) + packer.flush()
    stated = len(head) + size if claimed is None else claimed
    fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(packed), stated, 5, 0)
    local = b"PK\x03\x04" + fields + b"w.npy" + packed
    index = b"PK\x01\x02" + struct.pack("<H", 20) + fields + bytes(14) + b"w.npy"
    path.write_bytes(local + index + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(index), len(local), 0))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
        np.float64(3),
        np.zeros((0, 4), np.float16),
        np.array(["a", "bcd"]),
        np.array([True, False]),
        np.arange(3, dtype=">i4"),
        np.array(["2020-01-02"], "M8[D]"),
        np.ones(2, np.complex64),
    ],
)
def test_arrays_are_read_as_numpy_reads_them(array, tmp_path):
    np.save(tmp_path / "a.npy", array)
    found = files.read_npy(tmp_path / "a.npy")
    np.testing.assert_array_equal(found, array)
    assert found.dtype == np.asarray(array).dtype
    assert found.flags.writeable
    (tmp_path / "b.npy").write_bytes((tmp_path / "a.npy").read_bytes() + b"more")
    np.testing.assert_array_equal(files.read_npy(tmp_path / "b.npy"), array)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"hello", npy(plain())[:20], npy(plain(), bytes(63)), npy(plain("'|O'")), npy(plain("[('a', '<f4')]")),
        npy(plain(shape="(4, -4)")), npy(plain(shape=f"({2**62},)")), npy(plain(shape=f"({10**30}, 0)")),
        npy(plain(shape=f"({'9' * 5000},)")), npy(plain("'<U0'", shape=f"({2**40},)")), npy(plain("'<U99999999'")),
        npy(plain("'<Q7'")), npy(plain(shape="(" + "1, " * 100 + ")")), npy(plain(order="3")), npy("(" * 60_000),
        npy("-" * 60_000 + "1"), npy("__import__('os').system('true')"), npy(plain() + " " * 70_000, version=2),
        npy(plain(), version=4), b"\x93NUMPY\x02\0" + b"\xff" * 4 + plain().encode(),
        npy(plain("'<U1'", shape="(1,)"), b"\xff" * 4),
    ],
)  # fmt: skip
def test_files_that_are_no_arrays_are_refused(data, tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.npy is damaged or not a \.npy file"):
        files.read_npy(path)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", data)
    with pytest.raises(UserError, match=r"a\.npz is damaged or not an \.npz file"):
        files.read_npz(tmp_path / "a.npz")


def test_missing_arrays(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        files.read_npy(tmp_path / "a.npy")
    with pytest.raises(UserError, match="is a directory"):
        files.read_npy(tmp_path)


def test_archives_that_inflate_or_lie_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    inflating(path, 300 * 2**20)
    assert path.stat().st_size < 2**20
    with pytest.raises(UserError, match="would unpack to 314,"):
        files.read_npz(path)
    inflating(path, 2**26, claimed=200)
    with pytest.raises(UserError, match="is damaged"):
        files.read_npz(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.npy", npy(plain()))
    with pytest.raises(UserError, match="packed in a way that NumPy does not use"):
        files.read_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(40_000):
            archive.writestr(f"{i}.npy", b"")
    with pytest.raises(UserError, match="its index is too long"):
        files.read_npz(path)


# --- other files ---


def test_pipes_are_not_waited_for(tmp_path):
    import os

    path = tmp_path / "a.npz"
    os.mkfifo(path)
    for read in (files.read_npz, files.read_npy, arrays.map_file):
        with pytest.raises(UserError, match="is a device or a pipe"):
            read(path)
    with pytest.raises(UserError):
        directions.read(path, 4, 4)


def test_headers_without_end_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    header = b"{" + b" " * 9_000_000 + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="its header has 9,000,002 bytes"):
        safetensors.read(path)
