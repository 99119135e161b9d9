"""Files of `torch.save` with more than plain tensors in them, and with lies."""

from __future__ import annotations

import argparse
import io
import math
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ckpt_files
import numpy as np
import pytest
import torch

from samjax.errors import UserError
from samjax.io import arrays, torch_files
from samjax.io.pickles import INERT


class Options:
    """A class of somebody's program."""


class Subclass(torch.Tensor):
    """A tensor of a class of somebody's program."""


def read(path: Path, **options: Any) -> Any:
    return torch_files.read(arrays.map_file(path), **options)


def values(stored: Any) -> np.ndarray:
    return np.asarray(stored.array())


BASE = torch.arange(12, dtype=torch.float32)


@pytest.mark.parametrize("legacy", [False, True])
def test_other_objects_are_inert(legacy, tmp_path):
    held = {
        "weights": BASE,
        "options": Options(),
        "namespace": argparse.Namespace(a=BASE),
        "simple": types.SimpleNamespace(a=1),
        "version": torch.__version__,
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "module": torch.nn.Linear(2, 2),
    }
    met: set[str] = set()
    found = read(ckpt_files.dump_torch(tmp_path / "t.pt", held, legacy=legacy), met=met)
    np.testing.assert_array_equal(values(found["weights"]), BASE)
    assert all(found[name] is INERT for name in held if name != "weights")
    assert met == {"test_torch_files.Options", "torch.nn.modules.linear.Linear"}


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_every_kind(legacy, tmp_path):
    attributed = BASE[:4].clone()
    attributed.note = "made by hand"  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(BASE.clone())
    parameter.note = [1, 2]  # type: ignore[attr-defined]
    held = {
        "attributed": attributed,
        "parameter": parameter,
        "subclass": BASE.as_subclass(Subclass),
        "expanded": BASE[:3].expand(5, 3),
        "expanded twice": BASE[0].expand(4, 2),
    }
    found = read(ckpt_files.dump_torch(tmp_path / "t.pt", held, legacy=legacy))
    for name, tensor in held.items():
        np.testing.assert_array_equal(values(found[name]), tensor.detach().as_subclass(torch.Tensor), err_msg=name)


def test_tensors_of_types_without_a_reader_are_inert(tmp_path):
    held = {
        "weights": BASE,
        "complex": torch.ones(2, dtype=torch.complex64),
        "unsigned": torch.ones(2, dtype=torch.uint16),
    }
    found = read(ckpt_files.dump_torch(tmp_path / "t.pt", held))
    assert found["complex"] is INERT
    assert found["unsigned"] is INERT
    np.testing.assert_array_equal(values(found["weights"]), BASE)


def test_tensors_may_be_made_of_numpy_arrays():
    rebuild = torch_files.names()["torch._utils", "_rebuild_device_tensor_from_numpy"]
    array = arrays.PickledArray()
    assert rebuild(array, INERT, "xla:0", False) is array


def test_further_names_have_stand_ins(tmp_path):
    path = ckpt_files.dump_torch(tmp_path / "t.pt", {"a": Options()})
    allowed = {("test_torch_files", "Options"): lambda *_: {"b": 1}}
    assert read(path, allowed=allowed) == {"a": {"b": 1}}


# --- lies ---


def storage(count: int) -> torch_files.Storage:
    return torch_files.Storage(np.dtype("<f4"), count, lambda: memoryview(bytes(4 * count)))


@pytest.mark.parametrize(
    ("count", "shape", "strides", "allowed"),
    [
        (1, (2**22,), (0,), True),  # 16 MB
        (1, (2**22 + 1,), (0,), False),
        (2**22 + 8, (2, 2**21), (0, 1), True),
        (2**22 + 8, (3, 2**21), (0, 1), False),
    ],
)
def test_repeated_values_are_limited(count, shape, strides, allowed):
    rebuild = torch_files.names()["torch._utils", "_rebuild_tensor_v2"]
    tensor = rebuild(storage(count), 0, shape, strides, False, {})
    assert tensor.nbytes == 4 * math.prod(shape)
    if allowed:
        assert tensor.array().shape == shape
    else:
        with pytest.raises(UserError, match="repeats the few values"):
            tensor.array()


def test_repeated_values_are_limited_in_all(tmp_path):
    one = torch.ones(1)
    held = [one.expand(1000, 1000 + i) for i in range(30)]  # 120 MB in a file of a few KB
    with pytest.raises(UserError, match="far more memory than the file has bytes"):
        read(ckpt_files.dump_torch(tmp_path / "t.pt", held))


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_members_that_overlap_are_refused(tmp_path):
    path = ckpt_files.dump_torch(tmp_path / "t.pt", {"a": torch.ones(1000), "b": torch.zeros(1000)})
    data = bytearray(path.read_bytes())
    first, second = (data.index(f"data/{key}".encode(), data.index(b"PK\x01\x02")) - 46 for key in (0, 1))
    start = data.rindex(b"PK\x01\x02", 0, second + 46 + 10)
    other = data.rindex(b"PK\x01\x02", 0, first + 46 + 10)
    data[start + 42 : start + 46] = data[other + 42 : other + 46]  # the place of the member
    data[start + 20 : start + 28] = 2 * (len(data) // 2).to_bytes(4, "little")  # and its size
    path.write_bytes(data)
    with pytest.raises(UserError, match="overlap"):
        read(path)


def test_an_index_without_end_is_refused(tmp_path):
    path = archive(tmp_path / "t.pt", {"a/data.pkl": b"\x80\x02N."})
    data = path.read_bytes()
    entry = data[data.index(b"PK\x01\x02") : data.index(b"PK\x05\x06")]
    end = bytearray(data[data.index(b"PK\x05\x06") :])
    count = 9 * 2**20 // len(entry)
    end[12:16] = (count * len(entry)).to_bytes(4, "little")
    path.write_bytes(data[: data.index(b"PK\x01\x02")] + entry * count + end)
    with pytest.raises(UserError, match="its index is too long"):
        read(path)


def test_storages_given_as_bytes_are_read_once_and_not_too_many(monkeypatch):
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about such storages
        torch.save(BASE.storage(), stream, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(torch_files, "_MAX_INNER", 2)
    reader, data = torch_files.storage_reader(), stream.getvalue()
    found = reader(data)
    assert found.count == 12
    assert reader(data) is found
    assert reader(bytes(bytearray(data))) is not found
    for bad in (bytes(bytearray(data)), b"abc", "text", INERT):
        with pytest.raises(UserError, match=r"not a torch file|not a file of torch"):
            reader(bad)
