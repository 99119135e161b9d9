"""From a file of any known format to a folder of ours, and from a folder to a file that PyTorch reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_convert import stylegan2 as tables
from ckpt_convert.formats import arrays, nvidia, rosinality, safetensors, tensorflow, torch_file
from ckpt_convert.formats.arrays import Checkpoint, Loaded, Stored, View
from samjax.errors import UserError
from samjax.io import checkpoints, pickles
from samjax.nets import stylegan2
from samjax.nets.stylegan2 import StyleGAN2Config

Names = Literal["nvidia", "rosinality"]

_NVIDIA_LICENCE = (
    "networks that NVIDIA published are under its source code licence, for non-commercial use; a network of your own"
    " training is under the terms you set"
)
_LICENCES = {
    "nvidia": _NVIDIA_LICENCE,
    "tensorflow": _NVIDIA_LICENCE,
    "rosinality": (
        "the file states none: networks converted from NVIDIA's are under its source code licence, for non-commercial"
        " use; others are under the terms of whoever trained them"
    ),
    "samjax": "that of the generator it was made from",
}
_OTHERS = {  # how other files begin, and what they are
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"<!DO": "a web page: the download failed",
    b"<htm": "a web page: the download failed",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with git lfs pull",
}


class Converted(NamedTuple):
    """What `read` found: the config, parameters by our flat names, and what to say of them."""

    config: StyleGAN2Config
    params: dict[str, np.ndarray]
    manifest: dict[str, Any]


# --- reading ---


def detect(data: memoryview) -> Checkpoint:
    """The generator in a file, whose format its first bytes tell.

    Raises:
      UserError: it is no file of a known format, or holds no generator that samjax has.
    """
    if data[:2] == b"PK" or data[: len(torch_file.LEGACY_START)] == torch_file.LEGACY_START:
        return rosinality.checkpoint(torch_file.read(data))
    if safetensors.looks_like(data):
        return _safetensors(data)
    for start, what in _OTHERS.items():
        if data[: len(start)] == start:
            raise UserError(f"it is {what}, not a checkpoint")
    # Protocol 2 and above; NVIDIA's never used an older one.
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        found = pickles.load(View(data), {**nvidia.names(), **tensorflow.names()}, encoding="latin1")
        if isinstance(found, dict) and "G_ema" not in found and "G" not in found:
            keys = ", ".join(str(key)[:40] for key in list(found)[:5])
            raise UserError(f"the pickle holds no G_ema (it has {keys or 'nothing'}): not a checkpoint of a generator")
        if isinstance(found, dict | nvidia.Module):
            return nvidia.checkpoint(found)
        return tensorflow.checkpoint(found)
    raise UserError(
        "its format is unknown: samjax reads NVIDIA's .pkl (PyTorch and TensorFlow), rosinality's .pt,"
        " and .safetensors that samjax exported"
    )


def _safetensors(data: memoryview) -> Checkpoint:
    held, metadata = safetensors.read(data)
    # Files that are not ours of any kind may still have names that are known.
    known = (key for key, table in tables.NAMINGS.items() if table.find("synthesis/b4/const")[0] in held)
    naming = metadata.get("names") or next(known, "")
    if naming not in tables.NAMINGS:
        first = ", ".join(list(held)[:4])[:200]
        raise UserError(f"no StyleGAN2 generator in the file (it has {first or 'nothing'} …)")
    settings = checkpoints.parse_metadata(metadata.get("config"), "the file") or {}
    if settings:
        settings = checkpoints.config_to_dict(checkpoints.config_from_dict(settings, "the file"))
    stored: dict[str, Stored] = {**held}
    return Checkpoint(f"safetensors with the names of {naming}", naming, stored, settings)


def read(source: str | Path) -> Converted:
    """The generator in a file of any known format.

    Args:
      source: path of an NVIDIA pickle (PyTorch or TensorFlow), of a torch file in rosinality's layout, or of a
        safetensors file of ours.

    Raises:
      UserError: the file is missing, damaged or of something else; or it names what is not on the allow list.
    """
    path = Path(source)
    data = arrays.map_file(path)
    try:
        found = detect(data)
        naming, held, notes = tables.NAMINGS[found.naming], dict(found.arrays), list(found.notes)
        estimate = found.naming == "rosinality" and "latent_avg" not in held
        if estimate and "style.1.bias" in held:
            # Checkpoints of rosinality's own training have none, and its programs estimate it as is done here.
            held["latent_avg"] = Loaded(np.zeros(held["style.1.bias"].shape, np.float32))
            notes.append("the file has no latent_avg: w_avg is the mean of 16,384 mapped samples")
        config = tables.infer_config(naming, held, found.settings)
        params = tables.to_ours(naming, held, config)
        for name, values in params.items():
            # One array at a time out of the file, whose pages are given back: at no time are there two whole copies.
            params[name] = np.array(values, order="C")
            arrays.release(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Values of kinds and sizes that no program writes, and for which nothing above has words of its own.
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}): fetch or copy it again") from error
    if estimate:
        params["mapping/w_avg"] = _mean_style(config, params)
    manifest = {
        "source": {"file": path.name, "sha256": _sha256(path), "bytes": len(data)},
        "source_format": found.format,
        "licence": _LICENCES[found.naming],
        "notes": notes,
    }
    return Converted(config, params, manifest)


def _mean_style(config: StyleGAN2Config, params: Mapping[str, np.ndarray]) -> np.ndarray:
    mapping = {name: jnp.asarray(a, jnp.float32) for name, a in params.items() if name.startswith("mapping/")}

    @jax.jit
    def mean(mapping: stylegan2.Params) -> jax.Array:
        z = jax.random.normal(jax.random.key(0), (16384, config.z_dim))
        return stylegan2.map_z(config, mapping, z)[:, 0].mean(0)

    with jax.default_matmul_precision("highest"):
        return np.asarray(mean(checkpoints.unflatten(mapping)))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def convert(source: str | Path, out_dir: str | Path) -> Converted:
    """Reads the generator in the file `source` and writes it to the folder `out_dir`.

    Returns:
      What was written.

    Raises:
      UserError: as `read`, and as `samjax.io.checkpoints.save_network`.
    """
    if not (Path(out_dir) / checkpoints.MANIFEST).is_file():
        checkpoints.check_writable(out_dir, {})  # before the work; whose an older generator is shows only after it
    found = read(source)
    checkpoints.save_network(out_dir, found.config, checkpoints.unflatten(found.params), found.manifest)
    return found


# --- writing ---


def export(folder: str | Path, path: str | Path, names: Names) -> list[str]:
    """Writes a converted generator as a safetensors file with the names and layouts of another program.

    `read` reads such a file back to the same bits; the config is in the file's metadata.

    Args:
      folder: of a generator, or a safetensors file of ours; see `samjax.io.checkpoints.load_generator`.
      path: of the file; one that exists is replaced.
      names: whose names.

    Returns:
      What a user of the file should know.

    Raises:
      UserError: there is no whole generator at `folder`, their network cannot hold it, or `path` cannot be written.
    """
    config, params, manifest = checkpoints.load_generator(folder)
    held = tables.to_theirs(tables.NAMINGS[names], checkpoints.flatten(params), config)
    metadata = {
        "names": names,
        "config": json.dumps(checkpoints.config_to_dict(config)),
        "source": json.dumps(manifest.get("source")),
        "licence": str(manifest.get("licence", "")),
    }
    checkpoints.write_safetensors(path, held, metadata)
    notes = []
    if names == "rosinality":
        if config.conv_clamp is not None:
            notes.append(
                f"rosinality's network has no conv_clamp; where values pass {config.conv_clamp:g}, images differ"
            )
        if config.z_dim != config.w_dim or any(config.channels(r) != 512 for r in config.block_resolutions if r <= 32):
            notes.append(
                "this generator's widths are not rosinality's: give its Generator the same channels and style_dim"
            )
    return notes
