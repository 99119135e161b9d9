"""From a file of any known format to a folder of ours, and from a folder to a file that PyTorch reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_convert import ade20k, bisenet, deeplab, e4e, mask_rcnn, tables
from ckpt_convert import stylegan2 as stylegan2_tables
from ckpt_convert.formats import arrays, nvidia, rosinality, safetensors, tensorflow, torch_file
from ckpt_convert.formats.arrays import Checkpoint, Loaded, Stored, View
from samjax.errors import UserError
from samjax.io import checkpoints, pickles
from samjax.nets import stylegan2
from samjax.nets.deeplab import PredictorConfig
from samjax.nets.stylegan2 import StyleGAN2Config

Names = Literal["nvidia", "rosinality", "sam"]
Sources = str | Path | Sequence[str | Path]

RECOGNITION = (e4e.NETWORK, deeplab.NETWORK, ade20k.NETWORK, bisenet.NETWORK, mask_rcnn.NETWORK)
"""Networks that look at images, beside the generator that makes them."""

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
    """What `read` found: the config, whose type says which network, arrays by our flat names, and what to say of it."""

    config: Any
    params: dict[str, np.ndarray]
    manifest: dict[str, Any]


class Unpacked(NamedTuple):
    """What a file holds, as plain Python; its arrays are views of the file."""

    kind: Literal["torch", "safetensors", "pickle"]
    held: Any


# --- reading ---


def unpack(data: memoryview) -> Unpacked:
    """What a file holds, whose format its first bytes tell.

    Raises:
      UserError: it is no file of a known format, is damaged, or names what is not on the allow list.
    """
    if data[:2] == b"PK" or data[: len(torch_file.LEGACY_START)] == torch_file.LEGACY_START:
        return Unpacked("torch", torch_file.read(data))
    if safetensors.looks_like(data):
        return Unpacked("safetensors", safetensors.read(data))
    for start, what in _OTHERS.items():
        if data[: len(start)] == start:
            raise UserError(f"it is {what}, not a checkpoint")
    # Protocol 2 and above; none of the programs used an older one.
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        allowed = {**nvidia.names(), **tensorflow.names()}
        return Unpacked("pickle", pickles.load(View(data), allowed, encoding="latin1"))
    raise UserError(
        "its format is unknown: samjax reads NVIDIA's .pkl (PyTorch and TensorFlow), .pt and .pth of torch.save,"
        " Detectron2's .pkl, and .safetensors that samjax exported"
    )


def generator(file: Unpacked) -> Checkpoint:
    """The generator in a file.

    Raises:
      UserError: it holds no generator that samjax has.
    """
    if file.kind == "torch":
        return rosinality.checkpoint(file.held)
    if file.kind == "safetensors":
        return _safetensors(*file.held)
    if isinstance(file.held, dict) and "G_ema" not in file.held and "G" not in file.held:
        keys = ", ".join(str(key)[:40] for key in list(file.held)[:5])
        raise UserError(f"the pickle holds no G_ema (it has {keys or 'nothing'}): not a checkpoint of a generator")
    if isinstance(file.held, dict | nvidia.Module):
        return nvidia.checkpoint(file.held)
    return tensorflow.checkpoint(file.held)


def _safetensors(held: Mapping[str, Stored], metadata: Mapping[str, str]) -> Checkpoint:
    # Files that are not ours of any kind may still have names that are known.
    known = (key for key, table in stylegan2_tables.NAMINGS.items() if table.find("synthesis/b4/const")[0] in held)
    naming = metadata.get("names") or next(known, "")
    if naming not in stylegan2_tables.NAMINGS:
        first = ", ".join(list(held)[:4])[:200]
        raise UserError(f"no StyleGAN2 generator in the file (it has {first or 'nothing'} …)")
    settings = checkpoints.parse_metadata(metadata.get("config"), "the file") or {}
    if settings:
        settings = checkpoints.config_to_dict(checkpoints.config_from_dict(settings, "the file"))
    stored: dict[str, Stored] = {**held}
    return Checkpoint(f"safetensors with the names of {naming}", naming, stored, settings)


def read(sources: Sources, network: str | None = None) -> Converted:
    """The network in a file of any known format.

    Args:
      sources: path of an NVIDIA pickle (PyTorch or TensorFlow), of a torch file in rosinality's layout, of a
        safetensors file of ours, or of the weights of a recognition network (`RECOGNITION`); a
        list of paths for one that its authors distribute in parts.
      network: which one is wanted, a key of `samjax.io.checkpoints.NETWORKS`; None for what the file holds. An
        encoder's checkpoint holds its generator too, and gives that unless "e4e" is asked for.

    Raises:
      UserError: a file is missing, damaged or of something else; or it names what is not on the allow list.
    """
    paths = [Path(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    mapped = [arrays.map_file(path) for path in paths]
    try:
        files = [unpack(data) for data in mapped]
        found = _recognition(files, [path.name for path in paths], network)
        config, params, notes, what, licence = found or _generator(files)
        for name, values in params.items():
            # One array at a time out of the file, whose pages are given back: at no time are there two whole copies.
            params[name] = np.array(values, order="C")
            for data in mapped:
                arrays.release(data)
    except UserError as error:
        raise UserError(f"{_names(paths, str)}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Values of kinds and sizes that no program writes, and for which nothing above has words of its own.
        raise UserError(
            f"{_names(paths, str)}: damaged ({type(error).__name__}: {error}): fetch or copy it again"
        ) from error
    if isinstance(config, StyleGAN2Config) and "mapping/w_avg" not in params:
        params["mapping/w_avg"] = np.zeros(config.w_dim, np.float32)
        params["mapping/w_avg"] = _mean_style(config, params)
    manifest = {
        "source": {
            "file": _names(paths, lambda path: path.name),
            "sha256": _names(paths, _sha256),
            "bytes": sum(len(data) for data in mapped),
        },
        "source_format": what,
        "licence": licence,
        "notes": notes,
    }
    return Converted(config, params, manifest)


def _names(paths: Sequence[Path], of: Callable[[Path], str]) -> str:
    return " + ".join(of(path) for path in paths)


def _recognition(files: Sequence[Unpacked], names: Sequence[str], network: str | None) -> _Found | None:
    """The recognition network in `files`, if it is what is wanted."""
    held = [file.held for file in files]
    if (whole := deeplab.of_epoch(dict(zip(names, held, strict=True)))) is not None:
        held = [whole]
    for table in RECOGNITION:
        if (network is None and table is e4e.NETWORK) or network not in (None, table.name):
            continue
        stored = table.find(held)
        if stored is not None:
            config, what = table.config(stored), checkpoints.NETWORKS[table.name].what
            shapes = checkpoints.parameter_shapes(config)
            params = tables.to_ours(table.rows, stored, shapes, what, ignored=table.ignored)
            return _Found(config, params, [], table.format, table.licence)
    if network in (None, "generator"):
        return None
    raise UserError(f"no {checkpoints.NETWORKS[network].what} in the file")


class _Found(NamedTuple):
    config: Any
    params: dict[str, np.ndarray]
    notes: list[str]
    format: str
    licence: str


def _generator(files: Sequence[Unpacked]) -> _Found:
    if len(files) > 1:
        raise UserError("files that do not belong together: a generator lies in one")
    found = generator(files[0])
    naming, held, notes = stylegan2_tables.NAMINGS[found.naming], dict(found.arrays), list(found.notes)
    if found.format.startswith("decoder"):
        notes.append("the file holds an encoder too: --network e4e converts it, where it is e4e's")
    estimate = found.naming == "rosinality" and "latent_avg" not in held
    if estimate and "style.1.bias" in held:
        # Checkpoints of rosinality's own training have none, and its programs estimate it as is done here.
        held["latent_avg"] = Loaded(np.zeros(held["style.1.bias"].shape, np.float32))
        notes.append("the file has no latent_avg: w_avg is the mean of 16,384 mapped samples")
    config = stylegan2_tables.infer_config(naming, held, found.settings)
    params = stylegan2_tables.to_ours(naming, held, config)
    if estimate:
        del params["mapping/w_avg"]
    return _Found(config, params, notes, found.format, _LICENCES[found.naming])


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


def convert(sources: Sources, out_dir: str | Path, network: str | None = None) -> Converted:
    """Reads the network in the files `sources` and writes it to the folder `out_dir`.

    Returns:
      What was written.

    Raises:
      UserError: as `read`, and as `samjax.io.checkpoints.save_network`.
    """
    if not (Path(out_dir) / checkpoints.MANIFEST).is_file():
        checkpoints.check_writable(out_dir, {})  # before the work; whose an older network is shows only after it
    found = read(sources, network)
    checkpoints.save_network(out_dir, found.config, checkpoints.unflatten(found.params), found.manifest)
    return found


# --- writing ---


def export(folder: str | Path, path: str | Path, names: Names) -> list[str]:
    """Writes a converted network with the names and layouts of another program.

    `read` reads such a file back to the same bits. A generator becomes a safetensors file of its state dict, with the
    config in the metadata; an invertibility predictor ("sam") a file of `torch.save` like the authors' published ones.

    Args:
      folder: of the network; see `samjax.io.checkpoints.load_network`.
      path: of the file; one that exists is replaced.
      names: whose names.

    Returns:
      What a user of the file should know.

    Raises:
      UserError: there is no such network at `folder`, the other program's cannot hold it, or `path` cannot be written.
    """
    return _export_predictor(folder, path) if names == "sam" else _export_generator(folder, path, names)


def _export_predictor(folder: str | Path, path: str | Path) -> list[str]:
    config, variables, _ = checkpoints.load_network(folder, "invertibility")
    torch_file.write(path, deeplab.to_theirs(checkpoints.flatten(variables)))
    if config != dataclasses.replace(PredictorConfig(), latent_names=config.latent_names):
        return ["the authors' program has predictors of its own size only (a ResNet-101), and this one is another"]
    return []


def _export_generator(folder: str | Path, path: str | Path, names: Names) -> list[str]:
    config, params, manifest = checkpoints.load_generator(folder)
    held = stylegan2_tables.to_theirs(stylegan2_tables.NAMINGS[names], checkpoints.flatten(params), config)
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
