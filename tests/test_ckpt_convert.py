"""Conversion of generators: every format gives the same network, and bad files give errors only."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ckpt_files
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from ckpt_files import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import ckpt_convert
from ckpt_convert import __main__ as program
from ckpt_convert import convert
from samjax import demo
from samjax.errors import UserError
from samjax.io import arrays, checkpoints, pickles, torch_files
from samjax.nets import stylegan2
from samjax.nets.stylegan2 import StyleGAN2Config

GOLDEN = Path(__file__).parent / "golden"
FILES = ("nvidia_A.pkl", "tensorflow_A.pkl", "rosinality_A.pt")
NAMES = ("nvidia", "rosinality")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each golden file, converted."""
    root = tmp_path_factory.mktemp("converted")
    for name in FILES:
        convert.convert(GOLDEN / name, root / name)
    return {name: root / name for name in FILES}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two generators' parameters have the same names, types, shapes and bits."""
    one, other = checkpoints.flatten(one), checkpoints.flatten(other)
    return one.keys() == other.keys() and all(
        (a := np.asarray(one[name])).dtype == (b := np.asarray(other[name])).dtype
        and a.shape == b.shape
        and a.tobytes() == b.tobytes()
        for name in one
    )


def error(found: Any, expected: np.ndarray) -> float:
    """Largest difference, relative to the spread of what is expected."""
    return float(np.abs(np.asarray(found) - expected).max() / (expected.max() - expected.min()))


# --- the reference generator ---

# Float32 sums over a few hundred channels in another order: 1e-4 of the spread, as for the network itself.
TOLERANCE = 1e-4


@functools.partial(jax.jit, static_argnums=0)
def outputs(config: StyleGAN2Config, params: Any, z: jax.Array, ws: jax.Array) -> dict[str, jax.Array]:
    """The outputs that the reference case holds, NHWC."""
    map_z = functools.partial(stylegan2.map_z, config, params, z)
    image, features = stylegan2.synthesize(config, params, ws, noise="none")
    return {
        "ws": map_z(),
        "ws_psi07": map_z(truncation_psi=0.7),
        "ws_psi05_cut4": map_z(truncation_psi=0.5, truncation_cutoff=4),
        "img_const": stylegan2.synthesize(config, params, ws, noise="const").image,
        "img_none": image,
        **{f"feat_{r}": features[r] for r in (4, 8, 16, 32)},
    }


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_reference_generator(name, folders, golden):
    reference = golden("stylegan2_A")
    config, params, _ = checkpoints.load_generator(folders[name])
    assert config == StyleGAN2Config(64, 32, 0, 48, 3, 4, 1024, 48)
    for key, found in outputs(config, params, reference["z"], reference["ws_in"]).items():
        expected = reference[key] if key.startswith("ws") else reference[key].transpose(0, 2, 3, 1)
        assert error(found, expected) < TOLERANCE, key


def test_manifest_names_the_source(folders):
    manifest = json.loads((folders["nvidia_A.pkl"] / "manifest.json").read_text())
    assert manifest["source"]["file"] == "nvidia_A.pkl"
    assert manifest["source"]["bytes"] == (GOLDEN / "nvidia_A.pkl").stat().st_size
    assert manifest["source"]["sha256"] == "e0c4d210cbdb16af73d5812c2d6cbce2effec9890b2f0f99a780ed2a445366cd"
    assert manifest["source_format"] == "G_ema of NVIDIA PyTorch pickle"
    assert "non-commercial" in manifest["licence"]
    assert manifest["config"]["channel_base"] == 1024
    assert manifest["arrays"]["synthesis/b32/conv0/weight"]["shape"] == [3, 3, 48, 32]
    assert {name: tuple(array["shape"]) for name, array in manifest["arrays"].items()} == checkpoints.parameter_shapes(
        StyleGAN2Config(**manifest["config"])
    )


# --- load ---


@pytest.mark.parametrize("name", FILES)
def test_loading_a_file_equals_converting_it_first(name, folders):
    found, expected = ckpt_convert.load(GOLDEN / name), checkpoints.load_generator(folders[name])
    assert type(found) is type(expected)
    assert found.config == expected.config
    assert same(found.params, expected.params)
    assert all(isinstance(array, jax.Array) for array in checkpoints.flatten(found.params).values())
    assert found.manifest["source"] == expected.manifest["source"]


def test_converted_networks_can_be_loaded(folders):
    folder = folders["nvidia_A.pkl"]
    assert same(ckpt_convert.load(str(folder)).params, checkpoints.load_generator(folder).params)
    expected = checkpoints.load_network(demo.ENCODER, "e4e")
    assert same(ckpt_convert.load(demo.ENCODER).params, expected.params)
    with pytest.raises(UserError, match=r"holds another network \(e4e encoder\), where a generator is expected"):
        ckpt_convert.load(demo.ENCODER, "generator")


def test_exported_files_can_be_loaded(folders, tmp_path):
    convert.export(folders["nvidia_A.pkl"], tmp_path / "g.safetensors", "rosinality")
    found = ckpt_convert.load(tmp_path / "g.safetensors")
    assert same(found.params, checkpoints.load_generator(folders["nvidia_A.pkl"]).params)


def test_errors_of_load(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        ckpt_convert.load(tmp_path / "none.pkl")
    with pytest.raises(UserError, match="is a directory: give the checkpoint file itself"):
        ckpt_convert.load(tmp_path)
    with pytest.raises(UserError, match=r"nvidia_A\.pkl: no e4e encoder in the file"):
        ckpt_convert.load(GOLDEN / "nvidia_A.pkl", "e4e")


def test_importing_the_package_imports_no_readers():
    code = "import sys, ckpt_convert; assert not any(name.startswith('ckpt_convert.') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=Path(__file__).parent.parent)


# --- export ---


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_safetensors_of_every_precision(dtype, tmp_path):
    params = {name: array.astype(dtype) for name, array in ckpt_files.random_params(TINY).items()}
    checkpoints.write_safetensors(tmp_path / "g.safetensors", params, {"names": "samjax"})
    found = convert.read(tmp_path / "g.safetensors")
    assert found.config == TINY
    assert same(found.params, params)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("name", FILES)
def test_converting_an_exported_file_restores_the_same_bits(name, names, folders, tmp_path):
    before = checkpoints.load_generator(folders[name])
    convert.export(folders[name], tmp_path / "exported.safetensors", names)
    convert.convert(tmp_path / "exported.safetensors", tmp_path / "back")
    after = checkpoints.load_generator(tmp_path / "back")
    assert after.config == before.config
    assert same(after.params, before.params)


def test_export_for_nvidia_is_their_state_dict(folders, golden, tmp_path):
    # The golden file's weights were filled by a rule from exactly these names and shapes.
    from ckpt_convert.formats import nvidia

    view = arrays.View(arrays.map_file(GOLDEN / "nvidia_A.pkl"))
    expected = nvidia.checkpoint(pickles.load(view, nvidia.names())["G_ema"], "G_ema").arrays
    convert.export(folders["nvidia_A.pkl"], tmp_path / "out.safetensors", "nvidia")
    found = load_file(tmp_path / "out.safetensors")
    shapes = {name: tuple(shape) for name, shape in json.loads(str(golden("stylegan2_A")["weights"]))}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    for name, tensor in found.items():
        assert torch.equal(tensor, torch.from_numpy(expected[name].array().copy())), name


def test_export_for_rosinality_is_their_state_dict(folders, tmp_path):
    expected = torch.load(GOLDEN / "rosinality_A.pt", weights_only=True)
    convert.export(folders["rosinality_A.pt"], tmp_path / "out.safetensors", "rosinality")
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found.pop("latent_avg"), expected["latent_avg"])
    assert found.keys() == expected["g_ema"].keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected["g_ema"][name]), name


def test_conditional_generators_can_be_exported_and_read(tmp_path):
    config = StyleGAN2Config(16, 8, 5, 12, 3, 2, 128, 16, conv_clamp=256.0)
    params = ckpt_files.random_params(config)
    checkpoints.save_safetensors(tmp_path / "own.safetensors", config, checkpoints.unflatten(params))
    convert.export(tmp_path / "own.safetensors", tmp_path / "exported.safetensors", "nvidia")
    found = convert.read(tmp_path / "exported.safetensors")
    assert found.config == config
    assert same(found.params, params)
    with pytest.raises(UserError, match="labels"):
        convert.export(tmp_path / "own.safetensors", tmp_path / "no.safetensors", "rosinality")
    assert not (tmp_path / "no.safetensors").exists()


def test_export_for_rosinality_notes_differences(tmp_path):
    config = StyleGAN2Config(16, 8, 0, 12, 3, 2, 128, 16, conv_clamp=256.0)
    params = checkpoints.unflatten(ckpt_files.random_params(config))
    checkpoints.save_safetensors(tmp_path / "own.safetensors", config, params)
    notes = convert.export(tmp_path / "own.safetensors", tmp_path / "exported.safetensors", "rosinality")
    assert any("conv_clamp" in note for note in notes)
    assert any("widths" in note for note in notes)


def test_safetensors_of_samjax_can_be_converted(tmp_path):
    params = ckpt_files.random_params(TINY)
    checkpoints.save_safetensors(tmp_path / "own.safetensors", TINY, checkpoints.unflatten(params), np.float16)
    convert.convert(tmp_path / "own.safetensors", tmp_path / "out")
    expected = {name: array.astype(np.float16).astype(np.float32) for name, array in params.items()}
    assert same(checkpoints.load_generator(tmp_path / "out").params, expected)


# --- variants of each format ---


def nvidia_file(path: Path, config: StyleGAN2Config, *, bare: bool = False, adjust: Any = lambda *_: None) -> Path:
    network = ckpt_files.nvidia_network(config, ckpt_files.their_arrays("nvidia", config), adjust)
    return ckpt_files.dump_nvidia(path, network if bare else {"G": None, "D": None, "G_ema": network})


def tensorflow_file(path: Path, config: StyleGAN2Config, *, bare: bool = False, **kwargs: Any) -> Path:
    network = ckpt_files.tensorflow_network(config, ckpt_files.their_arrays("tensorflow", config), **kwargs)
    other = ckpt_files.Network("D", {}, [], {})
    return ckpt_files.dump_tensorflow(path, network if bare else (other, other, network))


CONFIGS = {
    "tiny": TINY,
    "labels, clamp": StyleGAN2Config(16, 8, 5, 12, 3, 2, 128, 16, conv_clamp=256.0),
    "channels cut by the base everywhere": StyleGAN2Config(32, 8, 0, 12, 3, 2, 100, 512),
    "channels cut by the maximum everywhere": StyleGAN2Config(16, 8, 0, 12, 1, 1, 4096, 6),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("bare", [False, True])
def test_nvidia_pickle(config, bare, tmp_path):
    found = convert.read(nvidia_file(tmp_path / "g.pkl", config, bare=bare))
    assert found.config == config
    assert same(found.params, ckpt_files.random_params(config))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_tensorflow_pickle(config, tmp_path):
    found = convert.read(tensorflow_file(tmp_path / "g.pkl", config))
    assert found.config == config
    for name, expected in ckpt_files.random_params(config).items():
        # The bias of styles is stored minus one, which rounds.
        np.testing.assert_allclose(
            found.params[name], expected, atol=1e-6 if "affine/bias" in name else 0, err_msg=name
        )


def test_tensorflow_pickle_of_one_network(tmp_path):
    assert convert.read(tensorflow_file(tmp_path / "g.pkl", TINY, bare=True)).config == TINY


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rosinality_checkpoint(legacy, dtype, tmp_path):
    held = ckpt_files.rosinality_checkpoint(TINY, dtype)
    held |= {"g": {"unused": torch.ones(3)}, "d": {}, "args": argparse.Namespace(size=16), "ada_aug_p": 0.1}
    found = convert.read(ckpt_files.dump_torch(tmp_path / "g.pt", held, legacy=legacy))
    assert found.config == TINY  # inferred from shapes
    for name, expected in ckpt_files.random_params(TINY).items():
        rounded = torch.from_numpy(np.array(expected)).to(dtype).float().numpy()
        np.testing.assert_array_equal(found.params[name].astype(np.float32), rounded, err_msg=name)


@pytest.mark.parametrize("legacy", [False, True])
def test_decoder_inside_an_encoder_checkpoint(legacy, tmp_path):
    held = ckpt_files.rosinality_checkpoint(TINY)
    state = {f"decoder.{name}": tensor for name, tensor in held["g_ema"].items()}
    state |= {"encoder.input_layer.0.weight": torch.ones(4, 3, 3, 3)}
    average = held["latent_avg"].repeat(TINY.num_ws, 1)
    whole = {"state_dict": state, "latent_avg": average, "opts": {"device": "cuda:0", "lr": 1e-4, "stages": [1, 2]}}
    found = convert.read(ckpt_files.dump_torch(tmp_path / "e4e.pt", whole, legacy=legacy))
    assert same(found.params, ckpt_files.random_params(TINY))
    average[1] += 1
    with pytest.raises(UserError, match="different mean style for each layer"):
        convert.read(ckpt_files.dump_torch(tmp_path / "psp.pt", whole, legacy=legacy))


def test_missing_average_is_estimated_and_noted(tmp_path):
    held = ckpt_files.rosinality_checkpoint(TINY)
    del held["latent_avg"]
    found = convert.read(ckpt_files.dump_torch(tmp_path / "g.pt", held))
    assert "w_avg is the mean" in found.manifest["notes"][0]
    z = jax.random.normal(jax.random.key(7), (4096, TINY.z_dim))
    map_z = jax.jit(functools.partial(stylegan2.map_z, TINY))
    ws = np.asarray(map_z(checkpoints.unflatten(found.params), z)[:, 0])
    # Two estimates of one mean: five standard errors of the smaller sample apart at most.
    assert (np.abs(ws.mean(0) - found.params["mapping/w_avg"]) < 5 * ws.std(0) / 4096**0.5).all()


# --- torch files ---


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_read_as_torch_wrote_them(legacy, tmp_path):
    base = torch.arange(120, dtype=torch.float32)
    held = {
        "shared": base,
        "offset": base[7:19],
        "strided": base[:60].view(3, 4, 5).permute(2, 0, 1)[:, ::2, 1:],
        "channels_last": base.view(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base[:6].view(2, 3)),
        "cut": torch.arange(1000)[990:],
        **{
            str(dtype): torch.arange(6).to(dtype)
            for dtype in (
                torch.float16,
                torch.bfloat16,
                torch.float64,
                torch.int8,
                torch.uint8,
                torch.int32,
                torch.bool,
            )
        },
    }
    path = ckpt_files.dump_torch(tmp_path / "t.pt", {"inner": [held, (1, "a", None, 2.5, b"b")]}, legacy=legacy)
    found, plain = torch_files.read(arrays.map_file(path))["inner"]
    assert plain == (1, "a", None, 2.5, b"b")
    for name, tensor in held.items():
        array = found[name].array()
        np.testing.assert_array_equal(array.astype(np.float64), tensor.detach().double().numpy(), err_msg=name)
        if tensor.dtype != torch.bfloat16:
            assert array.dtype == tensor.detach().numpy().dtype


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((4, 4), (4, 1), 1),
        ((4,), (6,), 0),
        ((10**8,), (0,), 0),
        ((-1,), (1,), 0),
        ((4,), (-1,), 8),
        ((2**62,), (1,), 0),
    ],
)
def test_tensors_beyond_their_storage_are_refused(shape, strides, offset):
    storage = torch_files.Storage(np.dtype("<f4"), 16, lambda: memoryview(bytes(64)))
    rebuild = torch_files.names()["torch._utils", "_rebuild_tensor_v2"]
    with pytest.raises(UserError, match=r"beyond its storage|damaged"):
        rebuild(storage, offset, shape, strides, False, {}).array()


# --- bad input ---


class Runs:
    """Creates a directory when Python unpickles it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.system, (f"mkdir {self.folder}",)


def _rezip(data: bytes, change: Callable[[str, bytes], bytes | None], pack: int = zipfile.ZIP_STORED) -> bytes:
    """The archive `data` with its members changed; None leaves one out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", pack) as new:
        for member in old.infolist():
            if (content := change(member.filename, old.read(member))) is not None:
                new.writestr(member.filename, content)
    return out.getvalue()


def bad_sources(root: Path) -> dict[str, tuple[Path, str]]:
    """Files that cannot be converted, and a part of the error message."""
    nvidia, tensorflow, rosinality = ((GOLDEN / name).read_bytes() for name in FILES)
    root.mkdir()
    found: dict[str, tuple[Path, str]] = {
        "missing": (root / "nowhere.pkl", "does not exist"),
        "a directory": (root, "is a directory"),
    }

    def add(name: str, content: bytes, message: str) -> None:
        path = root / f"{len(found)}.bin"
        path.write_bytes(content)
        found[name] = path, message

    add("empty", b"", "is empty")
    add("text", b"hello, this is no checkpoint\n" * 9, "format is unknown")
    add("a web page", b"<!DOCTYPE html><html></html>", "web page")
    add("a picture", b"\x89PNG\r\n\x1a\n" + bytes(99), "PNG image")
    add("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull")
    add("one byte", b"\x80", "format is unknown")
    for name, content in {"nvidia": nvidia, "tensorflow": tensorflow, "rosinality": rosinality}.items():
        for share in (0.02, 0.5, 0.999):
            add(f"{name} cut at {share}", content[: int(share * len(content))], "damaged, or not whole")
    trap = Runs(root / "ran")
    add("a pickle that runs", pickle.dumps({"G_ema": trap}, 4), "which no checkpoint needs")
    add("an old pickle that runs", pickle.dumps({"G_ema": trap}, 2), "which no checkpoint needs")
    stream = io.BytesIO()
    torch.save({"g_ema": trap}, stream)
    add("a zip that runs", stream.getvalue(), "which no checkpoint needs")
    stream = io.BytesIO()
    torch.save({"g_ema": trap}, stream, _use_new_zipfile_serialization=False)
    add("a legacy torch file that runs", stream.getvalue(), "which no checkpoint needs")
    for legacy in (False, True):
        stream = io.BytesIO()
        torch.save(torch.nn.Linear(3, 4).state_dict(), stream, _use_new_zipfile_serialization=not legacy)
        add(
            f"another network, legacy {legacy}",
            stream.getvalue(),
            "no StyleGAN2 generator in the file (its arrays are weight, bias)",
        )
        stream = io.BytesIO()
        torch.save({"g_ema": torch.nn.Linear(3, 4).state_dict()}, stream, _use_new_zipfile_serialization=not legacy)
        add(f"another g_ema, legacy {legacy}", stream.getvalue(), "no StyleGAN2 generator in the file")
    add("a pickle of something else", pickle.dumps({"a": 1}), "no StyleGAN2 generator in the file (it has a)")
    add("a pickle of a number", pickle.dumps(1), "no StyleGAN2 generator in the file (it holds an int)")
    add(
        "a zip of something else",
        _rezip(rosinality, lambda name, data: data if "pkl" not in name else None),
        "data.pkl",
    )
    add("a packed zip", _rezip(rosinality, lambda _, data: data, zipfile.ZIP_DEFLATED), "packed")
    add("a zip without a storage", _rezip(rosinality, lambda n, d: None if n.endswith("/data/5") else d), "lacks")
    add("a zip with a short storage", _rezip(rosinality, lambda n, d: d[:-4] if n.endswith("/5") else d), "shorter")
    add("a big-endian zip", _rezip(rosinality, lambda n, d: b"big" if n.endswith("order") else d), "big-endian")
    middle = rosinality.index(b"rosinality_A/data/50") + 2000  # inside the numbers of a storage
    flipped = bytes([rosinality[middle] ^ 1])
    add("a flipped bit", rosinality[:middle] + flipped + rosinality[middle + 1 :], "checksum")
    add("safetensors, cut", (9000).to_bytes(8, "little") + b'{"a":', "not a readable safetensors file")

    def with_header(entry: Mapping[str, Any], size: int = 8) -> bytes:
        header = json.dumps(entry).encode()
        return len(header).to_bytes(8, "little") + header + bytes(size)

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for name, change, size in (
        ("cut in an array", {}, 7),
        ("negative", {"shape": [-2]}, 8),
        ("huge", {"shape": [2**62, 4]}, 8),
        ("overlapping", {"data_offsets": [4, 12]}, 12),
        ("of no known type", {"dtype": "F1"}, 8),
    ):
        add(f"safetensors, {name}", with_header({"a": entry | change}, size), "not a readable safetensors file")
    add("safetensors, bad metadata", with_header({"a": entry, "__metadata__": {"names": 3}}), "not a readable")
    add("safetensors, another network", with_header({"a": entry}), "no StyleGAN2 generator in the file")
    return found


BAD = (
    "missing", "a directory", "empty", "text", "a web page", "a picture", "a Git LFS pointer", "one byte",
    *(f"{name} cut at {share}" for name in ("nvidia", "tensorflow", "rosinality") for share in (0.02, 0.5, 0.999)),
    "a pickle that runs", "an old pickle that runs", "a zip that runs", "a legacy torch file that runs",
    "another network, legacy False", "another g_ema, legacy False", "another network, legacy True",
    "another g_ema, legacy True", "a pickle of something else", "a pickle of a number", "a zip of something else",
    "a packed zip", "a zip without a storage", "a zip with a short storage", "a big-endian zip", "a flipped bit",
    "safetensors, cut",
    *(f"safetensors, {how}" for how in (
        "cut in an array", "negative", "huge", "overlapping", "of no known type", "bad metadata", "another network",
    )),
)  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    return bad_sources(tmp_path_factory.mktemp("bad") / "files")


@pytest.mark.parametrize("name", BAD)
def test_bad_files_end_with_one_line_and_write_nothing(name, bad, tmp_path, capsys):
    path, message = bad[name]
    assert program.main([str(path), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert str(path) in printed.err
    assert not list(tmp_path.iterdir())
    assert not (bad["a directory"][0] / "ran").exists()


def test_every_bad_file_is_tried(bad):
    assert set(BAD) == set(bad)


def change(name: str, value: Any, kind: str) -> Any:
    """Sets an attribute in all modules of one class."""

    def adjust(_: str, found: str, state: dict[str, Any]) -> None:
        if found == kind:
            state[name] = value

    return adjust


def stylegan3(_: str, kind: str, state: dict[str, Any]) -> None:
    if kind == "SynthesisNetwork":
        state["_modules"]["input"] = next(iter(state["_modules"].values()))


def filter_of(taps: list[float]) -> Any:
    def adjust(_: str, kind: str, state: dict[str, Any]) -> None:
        if kind == "SynthesisLayer":
            state["_buffers"]["resample_filter"] = torch.tensor(np.outer(taps, taps), dtype=torch.float32)

    return adjust


@pytest.mark.parametrize(
    ("adjust", "message"),
    [
        (change("architecture", "resnet", "SynthesisBlock"), "architecture is 'resnet'"),
        (change("activation", "relu", "SynthesisLayer"), "activation is 'relu'"),
        (change("activation", "relu", "FullyConnectedLayer"), "activation is 'relu'"),
        (change("act_gain", 1.0, "SynthesisLayer"), "act_gain is 1.0"),
        (change("conv_clamp", 128, "ToRGBLayer"), "different conv_clamp"),
        (filter_of([0.25, 0.25, 0.25, 0.25]), r"not the filter \[1, 3, 3, 1\]"),
        (change("img_resolution", 20, "Generator"), "power of two"),
        (change("z_dim", -1, "Generator"), "z_dim"),
        (change("class_name", 5, "Generator"), "expected"),
        (stylegan3, "StyleGAN3"),
    ],
)
def test_generators_of_other_kinds_are_refused(adjust, message, tmp_path):
    path = nvidia_file(tmp_path / "g.pkl", TINY, adjust=adjust)
    if message == "expected":  # an attribute that conversion does not use
        assert convert.read(path).config == TINY
        return
    with pytest.raises(UserError, match=message):
        convert.read(path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"architecture": "orig"}, "architecture is 'orig'"),
        ({"nonlinearity": "relu"}, "nonlinearity"),
        ({"resample_kernel": [1, 2, 1]}, "resample_kernel"),
        ({"mapping_lrmul": -1.0}, "mapping_lr_multiplier"),
        ({"resolution": 32}, "missing: .*32x32"),
    ],
)
def test_tensorflow_generators_of_other_kinds_are_refused(kwargs, message, tmp_path):
    with pytest.raises(UserError, match=message):
        convert.read(tensorflow_file(tmp_path / "g.pkl", TINY, **kwargs))


def test_stylegan1_is_refused(tmp_path):
    network = ckpt_files.tensorflow_network(TINY, ckpt_files.their_arrays("tensorflow", TINY))
    network.state["version"] = 3
    with pytest.raises(UserError, match="StyleGAN1"):
        convert.read(ckpt_files.dump_tensorflow(tmp_path / "g.pkl", (network, network, network)))


def test_wrong_keys_and_shapes_are_all_listed_at_once(tmp_path):
    held = ckpt_files.rosinality_checkpoint(TINY)
    state = held["g_ema"]
    # Stored noise and filters may be missing altogether, not in part.
    del state["convs.1.noise.weight"], state["to_rgbs.0.upsample.kernel"], state["noises.noise_3"]
    state |= {"extra.weight": torch.ones(2), "extra.bias": torch.ones(2)}
    state["convs.0.activate.bias"] = torch.ones(7)
    with pytest.raises(UserError) as caught:
        convert.read(ckpt_files.dump_torch(tmp_path / "g.pt", held))
    message = str(caught.value)
    assert "3 missing: " in message
    assert "2 unexpected: extra.{weight, bias}" in message
    assert "1 of another shape: convs.0.activate.bias [7] instead of [16]" in message
    for name in ("convs.1.noise.weight", "to_rgbs.0.upsample.kernel", "noises.noise_3"):
        assert name in message


@pytest.mark.parametrize("value", [torch.full((12,), torch.nan), torch.ones(12, dtype=torch.int32)])
def test_arrays_that_cannot_be_weights_are_refused(value, tmp_path):
    held = ckpt_files.rosinality_checkpoint(TINY) | {"latent_avg": value}
    with pytest.raises(UserError, match="latent_avg in the file"):
        convert.read(ckpt_files.dump_torch(tmp_path / "g.pt", held))


def test_safetensors_of_types_that_numpy_lacks(tmp_path):
    arrays = ckpt_files.their_arrays("nvidia", TINY)
    checkpoints.write_safetensors(tmp_path / "g.safetensors", arrays, {})
    content = (tmp_path / "g.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    first, end = header["mapping.w_avg"]["data_offsets"]
    assert end == first + 4 * TINY.w_dim
    # FP8 takes a quarter of the bytes; another array takes the rest, since a file may have no gaps.
    header["mapping.w_avg"] = {"dtype": "F8_E4M3", "shape": [TINY.w_dim], "data_offsets": [first, first + TINY.w_dim]}
    header["rest"] = {"dtype": "U8", "shape": [3 * TINY.w_dim], "data_offsets": [first + TINY.w_dim, end]}
    text = json.dumps(header).encode()
    (tmp_path / "g.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(UserError, match=r"unexpected: rest"):
        convert.read(tmp_path / "g.safetensors")
    from ckpt_convert.formats import safetensors

    held, _ = safetensors.read(tmp_path / "g.safetensors")
    assert held["mapping.w_avg"].shape == (TINY.w_dim,)
    with pytest.raises(UserError, match=r"mapping\.w_avg in the file is of a type that NumPy does not have"):
        held["mapping.w_avg"].array()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", FILES)
def test_damage_of_any_kind_is_survived(name, data, tmp_path):
    content = bytearray((GOLDEN / name).read_bytes())
    # Structure is at the front of pickles, and at both ends of zip archives.
    place = st.one_of(
        st.integers(0, len(content) - 1), st.integers(0, 8000), st.integers(len(content) - 10_000, len(content) - 1)
    )
    if data.draw(st.booleans(), "cut"):
        del content[data.draw(place) :]
    else:
        for index in data.draw(st.lists(place, min_size=1, max_size=6)):
            content[index] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "damaged.bin"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        convert.read(path)  # a flipped bit in the numbers of a pickle cannot be detected


# Opcodes of pickles, with arguments that fit some of them, in any order.
_PIECES = st.one_of(
    st.binary(min_size=1, max_size=3),
    st.sampled_from(
        [b"(", b"t", b"}", b"]", b"u", b"e", b"s", b"b", b"R", b"\x81", b"\x94", b"h\x00", b"2", b"0", b"."]
    ),
    st.sampled_from([b"ccollections\nOrderedDict\n", b"cnumpy\nndarray\n", b"ctorch._utils\n_rebuild_tensor_v2\n"]),
    st.sampled_from([b"cdnnlib.tflib.network\nNetwork\n", b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"]),
    st.sampled_from([b"ctorch.storage\n_load_from_bytes\n", b"K\x05", b"\x8c\x05state", b"J\xff\xff\xff\xff", b"\x8f"]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_PIECES, max_size=40))
def test_pickles_of_any_opcodes_give_a_value_or_an_error(pieces):
    from ckpt_convert.formats import nvidia, tensorflow

    view = arrays.View(memoryview(b"\x80\x04" + b"".join(pieces) + b"."))
    with contextlib.suppress(UserError):
        pickles.load(view, {**nvidia.names(), **tensorflow.names()}, encoding="latin1")


# --- the pickle reader ---


def plain_objects() -> st.SearchStrategy[Any]:
    keys = st.one_of(
        st.text(max_size=5), st.integers(-(2**64) + 1, 2**64 - 1), st.booleans(), st.none(), st.binary(max_size=5)
    )
    leaves = st.one_of(keys, st.floats(allow_nan=False), st.frozensets(keys, max_size=4), st.sets(keys, max_size=4))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.tuples(inner, inner), st.dictionaries(keys, inner, max_size=4)
        ),
        max_leaves=12,
    )


@settings(max_examples=100, deadline=None)
@given(value=plain_objects(), protocol=st.integers(0, 5))
def test_plain_objects_read_as_python_wrote_them(value, protocol):
    allowed = arrays.python_names() | {("builtins", "frozenset"): frozenset, ("__builtin__", "frozenset"): frozenset}
    text = pickle.dumps(value, protocol)
    stream = io.BytesIO(text + b"behind")
    assert pickles.load(stream, allowed) == value
    assert stream.read() == b"behind"


@pytest.mark.parametrize(
    "text",
    [
        b"\x80\x04" + b"(" * 10 + b"K\x01" * 10,  # no end
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"abc.",  # bytes without end
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85R.",
        b"\x80\x02cbuiltins\neval\n(X\x03\x00\x00\x001+1tR.",
        b"\x80\x02ccopyreg\n__reduce_ex__\n.",
        b"\x80\x04\x82\x01.",  # the extension registry
        b"\x80\x05\x97.",  # buffers outside of the pickle
        b"\x80\x04cnumpy\nndarray\n}\x8c\x08__code__K\x01sb.",  # an attribute of a stand-in
        b"\x80\x04K\x01)R.",  # a call of a number
    ],
)
def test_hostile_pickles_are_refused(text):
    with pytest.raises(UserError):
        pickles.load(io.BytesIO(text), arrays.python_names())


def test_endless_pickles_end(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    with pytest.raises(UserError, match="more than 1,000 steps"):
        pickles.load(io.BytesIO(b"\x80\x04" + b"N0" * 600 + b"N."), {})


# --- the command line ---


def test_command_line_converts_exports_and_converts_back(tmp_path, capsys):
    source = nvidia_file(tmp_path / "g.pkl", TINY)
    out, there, back = (str(tmp_path / name) for name in ("out", "exported.safetensors", "back"))
    assert program.main([str(source), out]) == 0
    assert program.main(["export", out, there, "--names", "rosinality"]) == 0
    assert program.main([there, back]) == 0
    assert "16 px, 6 styles" in capsys.readouterr().out
    assert same(checkpoints.load_generator(back).params, ckpt_files.random_params(TINY))
    assert {path.name for path in tmp_path.iterdir()} == {"g.pkl", "out", "exported.safetensors", "back"}


def test_command_line_replaces_only_its_own(tmp_path, capsys):
    source, other = nvidia_file(tmp_path / "g.pkl", TINY), tensorflow_file(tmp_path / "h.pkl", TINY)
    out = tmp_path / "out"
    assert program.main([str(source), str(out)]) == 0
    assert program.main([str(source), str(out)]) == 0  # the same once more
    before = (out / "manifest.json").read_bytes()
    assert program.main([str(other), str(out)]) == 2
    assert "holds the generator of g.pkl" in capsys.readouterr().err
    assert (out / "manifest.json").read_bytes() == before
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "holiday.png").write_bytes(b"1")
    assert program.main([str(source), str(foreign)]) == 2
    assert program.main([str(source), str(source)]) == 2
    assert program.main([str(source), str(source / "below")]) == 2
    assert program.main([str(source), "no\0name"]) == 2
    assert program.main(["export", str(foreign), str(tmp_path / "x.safetensors"), "--names", "nvidia"]) == 2
    assert program.main(["export", str(out), str(foreign), "--names", "nvidia"]) == 2
    assert program.main(["export", str(out), str(tmp_path / "x.pt"), "--names", "nvidia"]) == 2
    assert capsys.readouterr().err.count("\n") == 7
    assert [path.name for path in foreign.iterdir()] == ["holiday.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"g.pkl", "h.pkl", "out", "photos"}


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_writing_keeps_the_old_directory(stop, tmp_path, monkeypatch, capsys):
    source, out = nvidia_file(tmp_path / "g.pkl", TINY), tmp_path / "out"
    assert program.main([str(source), str(out)]) == 0
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fail(*_: Any) -> None:
        raise stop

    monkeypatch.setattr(checkpoints.files, "write_text", fail)
    assert program.main([str(source), str(out)]) == (2 if isinstance(stop, OSError) else 130)
    assert program.main([str(source), str(tmp_path / "new")]) != 0
    assert capsys.readouterr().err.count("No space left") == (2 if isinstance(stop, OSError) else 0)
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"g.pkl", "out"}


@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (["SOURCE", "OUT_DIR", "rosinality"] if len(arguments) == 1 else ["--names"]))


# getrusage would include the memory of the parent process, from before exec.
_MEASURE = """
import pathlib, sys
from ckpt_convert import convert
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
small, large, out = sys.argv[1:]
convert.convert(small, out + "/from_small")
before = peak()
convert.convert(large, out + "/from_large")
assert not {"torch", "tensorflow"} & set(sys.modules), "a converter imported what wrote the file"
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory of a process is read from /proc")
@pytest.mark.parametrize("form", ["zip", "legacy", "half", "nvidia", "tensorflow", "safetensors"])
def test_peak_memory_is_below_three_times_the_file(form, tmp_path):
    paths = {}
    for name, config in {"small": TINY, "large": StyleGAN2Config(256, channel_base=65536, channel_max=640)}.items():
        path = tmp_path / name
        if form == "nvidia":
            nvidia_file(path, config)
        elif form == "tensorflow":
            tensorflow_file(path, config, bare=True)
        elif form == "safetensors":
            checkpoints.write_safetensors(path, ckpt_files.their_arrays("nvidia", config), {})
        else:
            dtype = torch.float16 if form == "half" else torch.float32
            ckpt_files.dump_torch(path, ckpt_files.rosinality_checkpoint(config, dtype), legacy=form == "legacy")
        paths[name] = path
    command = [sys.executable, "-c", _MEASURE, paths["small"], paths["large"], tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    # Measured: 2.0 to 2.1 times in all formats; less than once would be an error of measurement.
    assert 1 < int(done.stdout) / paths["large"].stat().st_size < 3


def test_conversion_imports_neither_torch_nor_tensorflow(tmp_path):
    source = nvidia_file(tmp_path / "g.pkl", TINY)
    code = (
        "import sys; from ckpt_convert import convert; convert.convert(*sys.argv[1:]);"
        " assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, source, tmp_path / "out"]
    subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parent.parent)


def test_every_parameter_has_a_name_in_every_program():
    from ckpt_convert import stylegan2 as tables

    paths = checkpoints.parameter_shapes(StyleGAN2Config(64))
    for naming in ("nvidia", "tensorflow", "rosinality"):
        assert len({tables.NAMINGS[naming].find(path)[0] for path in paths}) == len(paths)
