"""Saving and loading generators, and damaged files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ckpt_files import TINY, random_params
from safetensors.numpy import save_file

from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.nets.stylegan2 import StyleGAN2Config

SOURCE = {"source": {"file": "g.pkl", "sha256": "0" * 64}}
PARAMS = checkpoints.unflatten(random_params(TINY))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "generator"
    checkpoints.save_network(folder, TINY, PARAMS, SOURCE)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "generator"))


def assert_same(found: Any, expected: Any) -> None:
    found, expected = checkpoints.flatten(found), checkpoints.flatten(expected)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert isinstance(array, jax.Array), name
        assert array.dtype == jnp.float32, name
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[name], np.float32), err_msg=name)


def test_unflatten_inverts_flatten():
    flat = checkpoints.flatten(PARAMS)
    assert "synthesis/b8/conv0/affine/weight" in flat
    assert checkpoints.flatten(checkpoints.unflatten(flat)).keys() == flat.keys()


def test_a_directory_loads_as_it_was_saved(saved):
    config, params, manifest = checkpoints.load_generator(saved)
    assert config == TINY
    assert_same(params, PARAMS)
    assert manifest["source"] == SOURCE["source"]
    assert (saved / "manifest.json").read_text().count("\n") < 50 + len(checkpoints.flatten(PARAMS))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_on_disk_is_float32_in_memory(dtype, tmp_path):
    half = jax.tree.map(lambda array: array.astype(dtype), PARAMS)
    checkpoints.save_network(tmp_path / "g", TINY, half, {})
    config, params, manifest = checkpoints.load_generator(tmp_path / "g")
    assert config == TINY
    assert manifest["arrays"]["mapping/w_avg"]["dtype"] == np.dtype(dtype).name
    assert_same(params, half)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_safetensors_file_loads_as_it_was_saved(dtype, tmp_path):
    config = StyleGAN2Config(16, 8, 0, 12, 3, 2, 128, 16, conv_clamp=256.0)
    # Arrays in Fortran order, whose memory the library would write as it is.
    turned = jax.tree.map(lambda array: np.array(array.T, order="C").T, PARAMS)
    checkpoints.save_safetensors(tmp_path / "g.safetensors", config, turned, dtype, SOURCE)
    found = checkpoints.load_generator(tmp_path / "g.safetensors")
    assert found.config == config
    assert found.manifest == SOURCE
    assert_same(found.params, jax.tree.map(lambda array: array.astype(dtype), PARAMS))


def test_jax_arrays_can_be_saved(tmp_path):
    checkpoints.save_network(tmp_path / "g", TINY, jax.tree.map(jnp.asarray, PARAMS), {})
    assert_same(checkpoints.load_generator(str(tmp_path / "g")).params, PARAMS)


def test_wrong_parameters_are_not_saved(tmp_path):
    flat = random_params(TINY)
    flat["mapping/fc9/weight"] = flat.pop("mapping/fc0/weight")
    for save in (checkpoints.save_safetensors, lambda *given: checkpoints.save_network(*given, {})):
        with pytest.raises(ValueError, match=r"1 missing: mapping/fc0/weight; 1 unexpected: mapping/fc9/weight"):
            save(tmp_path / "g", TINY, checkpoints.unflatten(flat))
    big = checkpoints.unflatten(random_params(TINY) | {"mapping/w_avg": np.full(TINY.w_dim, 1e6, np.float32)})
    with pytest.raises(ValueError, match="not finite as float16: mapping/w_avg"):
        checkpoints.save_safetensors(tmp_path / "g", TINY, big, np.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", [{}, SOURCE, {"source": {"file": "other.pkl", "sha256": "0" * 64}}])
def test_what_may_be_replaced(source, saved, copied):
    if source == {}:
        with pytest.raises(UserError, match=r"holds the generator of g\.pkl"):
            checkpoints.save_network(copied, TINY, PARAMS, source)
        return
    other = jax.tree.map(lambda array: array + np.float32(1), PARAMS)
    checkpoints.save_network(copied, TINY, other, source)
    assert_same(checkpoints.load_generator(copied).params, other)
    assert [path.name for path in copied.parent.iterdir()] == ["generator"]


def test_a_link_to_a_directory_stays_a_link(copied):
    link = copied.parent / "link"
    link.symlink_to(copied)
    checkpoints.save_network(link, TINY, PARAMS, SOURCE)
    assert link.is_symlink()
    assert_same(checkpoints.load_generator(link).params, PARAMS)


# --- damage ---


def is_found(folder: Path) -> bool:
    """Whether loading raises an error; if not, the damage must not have changed any parameter."""
    try:
        loaded = checkpoints.load_generator(folder)
    except UserError:
        return True
    assert_same(loaded.params, PARAMS)
    return False


@pytest.mark.parametrize("how", ["cut", "emptied", "removed", "flipped"])
def test_damaged_directories_never_load_as_something_else(how, copied):
    parts = sorted(path for path in copied.rglob("*") if path.is_file() and path.stat().st_size > 400)
    found = set()
    for part in parts:
        content = part.read_bytes()
        if how == "removed":
            part.unlink()
        elif how == "flipped":
            damaged = bytearray(content)
            damaged[-len(content) // 3] ^= 16
            part.write_bytes(damaged)
        else:
            part.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
        if is_found(copied):
            found.add(part.name)
        part.write_bytes(content)
    assert found >= {part.name for part in parts} - {"manifest.json" if how == "flipped" else ""}


def test_weights_that_are_not_those_of_the_manifest_are_found(copied, tmp_path):
    other = jax.tree.map(lambda array: array + np.float32(1), PARAMS)
    checkpoints.save_network(tmp_path / "other", TINY, other, {})
    shutil.rmtree(copied / "params")
    shutil.copytree(tmp_path / "other" / "params", copied / "params")
    with pytest.raises(UserError, match=r"is damaged .*convert the generator again"):
        checkpoints.load_generator(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"format": "another"}, "not a generator converted by this version"),
        (lambda m: [], "not a generator converted by this version"),
        (lambda m: m | {"config": None}, "no config"),
        (lambda m: m | {"config": m["config"] | {"depth": 3}}, "no config"),
        (lambda m: m | {"config": m["config"] | {"w_dim": 0}}, "w_dim is 0"),
        (lambda m: m | {"config": m["config"] | {"w_dim": True}}, "w_dim is True"),
        (lambda m: m | {"config": m["config"] | {"conv_clamp": "x"}}, "conv_clamp is 'x'"),
        (lambda m: m | {"config": m["config"] | {"img_resolution": 48}}, "power of two"),
        (lambda m: m | {"config": m["config"] | {"mapping_layers": 3}}, "2 missing: mapping/fc2/{bias, weight}"),
        (lambda m: m | {"arrays": {}}, "missing"),
        (lambda m: m | {"arrays": {"mapping/w_avg": 3}}, "damaged"),
        (lambda m: m | {"files": {}}, "damaged"),
        (lambda m: m | {"files": {"../../secret": {"bytes": 1, "crc32": 1}}}, "damaged"),
    ],
)
def test_damaged_manifests_are_found(change, message, copied):
    path = copied / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError) as caught:
        checkpoints.load_generator(copied)
    assert message in str(caught.value)


def test_other_things_are_not_generators(tmp_path, copied):
    (copied / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        checkpoints.load_generator(copied)
    with pytest.raises(UserError, match="does not exist"):
        checkpoints.load_generator(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        checkpoints.load_generator(tmp_path)
    with pytest.raises(UserError, match="python -m ckpt_convert"):
        checkpoints.load_generator(tmp_path / "g.pkl")
    for content in (b"", b"\x89PNG", (2**63).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}"):
        path = tmp_path / "g.safetensors"
        path.write_bytes(content)
        with pytest.raises(UserError):
            checkpoints.load_generator(path)


def test_other_files_are_no_converted_networks(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"\x89PNG" + bytes(64))
    with pytest.raises(UserError, match=r"photo\.png is not a converted network: give"):
        checkpoints.load_generator(tmp_path / "photo.png")


def test_names_of_networks_have_an_article():
    assert [kind.one for kind in checkpoints.NETWORKS.values()] == [
        "a generator", "an e4e encoder", "an invertibility predictor", "an offset encoder", "an ADE20K segmenter",
        "a face parser", "a Mask R-CNN",
    ]  # fmt: skip


def test_damaged_safetensors_files_are_found(tmp_path):
    path, cut = tmp_path / "g.safetensors", tmp_path / "cut.safetensors"
    checkpoints.save_safetensors(path, TINY, PARAMS)
    content = path.read_bytes()
    for size in (3, 100, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:size])
        with pytest.raises(UserError, match="not a readable safetensors file"):
            checkpoints.load_generator(cut)
    flat = random_params(TINY)
    del flat["mapping/w_avg"]
    metadata = {"format": "samjax generator 1", "config": json.dumps(checkpoints.config_to_dict(TINY))}
    save_file(flat, path, metadata)
    with pytest.raises(UserError, match="1 missing: mapping/w_avg"):
        checkpoints.load_generator(path)
    save_file(flat, path, metadata | {"config": "{"})
    with pytest.raises(UserError, match="damaged metadata"):
        checkpoints.load_generator(path)
    save_file(flat, path, {})
    with pytest.raises(UserError, match="convert it first"):
        checkpoints.load_generator(path)


def test_reading_safetensors_needs_no_orbax(tmp_path):
    checkpoints.save_safetensors(tmp_path / "g.safetensors", TINY, PARAMS)
    code = (
        "import sys; from samjax.io import checkpoints; checkpoints.load_generator(sys.argv[1]);"
        " assert not any(name.startswith('orbax') for name in sys.modules)"
    )
    command = [sys.executable, "-c", code, tmp_path / "g.safetensors"]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
