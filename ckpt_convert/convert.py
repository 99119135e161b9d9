"""Converting a file of any known format to a directory of samjax, and a network of samjax to a file for PyTorch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckpt_convert import ade20k, bisenet, deeplab, e4e, mask_rcnn, tables
from ckpt_convert import stylegan2 as stylegan2_tables
from ckpt_convert.formats import nvidia, safetensors, search, tensorflow
from ckpt_convert.formats.checkpoint import Checkpoint
from samjax.errors import UserError
from samjax.io import arrays, checkpoints, pickles, torch_files
from samjax.io.arrays import Stored, View
from samjax.io.checkpoints import LoadedNetwork
from samjax.nets import stylegan2
from samjax.nets.deeplab import PredictorConfig
from samjax.nets.stylegan2 import StyleGAN2Config

Names = Literal["nvidia", "rosinality", "sam"]
Sources = str | Path | Sequence[str | Path]

RECOGNITION = (e4e.NETWORK, deeplab.NETWORK, ade20k.NETWORK, bisenet.NETWORK, mask_rcnn.NETWORK)
"""The tables of all networks other than the generator."""

_NVIDIA_LICENCE = (
    "networks that NVIDIA published are under its source code license, for non-commercial use; a network of your own"
    " training is under the terms you set"
)
_LICENCES = {
    "nvidia": _NVIDIA_LICENCE,
    "tensorflow": _NVIDIA_LICENCE,
    "rosinality": (
        "the file states none: networks converted from NVIDIA's are under its source code license, for non-commercial"
        " use; others are under the terms set by those who trained them"
    ),
    "samjax": "that of the original generator",
}
_MAX_REPEATED = 16 * 2**20  # bytes by which a network may exceed its file
_OTHERS = {  # the first bytes of other formats
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
    """A network read from a file.

    Attributes:
      config: its sizes; the type tells the kind of network.
      params: arrays by samjax's flat names; see `samjax.io.checkpoints.flatten`.
      manifest: source, format, license and notes.
    """

    config: Any
    params: dict[str, np.ndarray]
    manifest: dict[str, Any]


class Unpacked(NamedTuple):
    """The contents of a file as plain Python objects; arrays are read on demand.

    Attributes:
      kind: kind of the file.
      held: its contents.
      unknown: names of classes in it that are not read.
    """

    kind: Literal["torch", "safetensors", "pickle"]
    held: Any
    unknown: Sequence[str] = ()


# --- reading ---


def unpack(path: Path, data: memoryview) -> Unpacked:
    """Reads a file in the format that its first bytes identify.

    Args:
      path: path of the file.
      data: its contents, memory-mapped.

    Raises:
      UserError: if the format is unknown, the file is damaged, or it names something that runs.
    """
    unknown: set[str] = set()
    if data[:2] == b"PK" or data[: len(torch_files.LEGACY_START)] == torch_files.LEGACY_START:
        held = torch_files.read(data, nvidia.names(), met=unknown)
        return Unpacked("torch", held, sorted(unknown))
    if safetensors.looks_like(data):
        return Unpacked("safetensors", safetensors.read(path))
    for start, what in _OTHERS.items():
        if data[: len(start)] == start:
            raise UserError(f"it is {what}, not a checkpoint")
    if pickles.looks_like(data):
        allowed = {**nvidia.names(), **tensorflow.names()}
        held = pickles.load(View(data), allowed, encoding="latin1", size=len(data), unknown="inert", met=unknown)
        return Unpacked("pickle", held, sorted(unknown))
    raise UserError(
        "its format is unknown: samjax reads NVIDIA's .pkl (PyTorch and TensorFlow), .pt and .pth of torch.save,"
        " Detectron2's .pkl, and .safetensors that samjax exported"
    )


def generator(file: Unpacked) -> Checkpoint:
    """Finds the generator in a file.

    Raises:
      UserError: if there is none, or it is of a kind that samjax does not support.
    """
    if file.kind == "safetensors":
        return _safetensors(*file.held)
    return search.find(file.held, file.unknown)


def _safetensors(held: Mapping[str, Stored], metadata: Mapping[str, str]) -> Checkpoint:
    naming = metadata.get("names", "")
    if naming not in stylegan2_tables.NAMINGS:  # another program's
        return search.find(held)
    settings = checkpoints.parse_metadata(metadata.get("config"), "the file") or {}
    if settings:
        settings = checkpoints.config_to_dict(checkpoints.config_from_dict(settings, "the file"))
    return Checkpoint(f"safetensors with the names of {naming}", naming, dict(held), settings)


def read(sources: Sources, network: str | None = None) -> Converted:
    """Reads the network in a file of any known format.

    Args:
      sources: path of an NVIDIA pickle (PyTorch or TensorFlow), of a torch file in rosinality's layout, of a
        safetensors file written by samjax, or of the weights of a recognition network (`RECOGNITION`); a list of paths
        for a network distributed in parts.
      network: the expected kind, a key of `samjax.io.checkpoints.NETWORKS`. Default: the kind that the file holds. The
        checkpoint of an encoder holds its generator too, which is the default; "e4e" selects the encoder.

    Returns:
      Config, arrays by flat names, and the manifest.

    Raises:
      UserError: if a file is missing, damaged, of something else, or names something outside of the allow list.
    """
    paths = [Path(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    mapped = [arrays.map_file(path) for path in paths]
    try:
        files = [unpack(path, data) for path, data in zip(paths, mapped, strict=True)]
        size = sum(len(data) for data in mapped)
        found = _recognition(files, [path.name for path in paths], network, size)
        config, params, notes, what, licence = found or _generator(files, size)
        for name, values in params.items():
            # One array at a time, releasing the mapped pages, so that there are never two copies of all arrays.
            params[name] = np.array(values, order="C")
            for data in mapped:
                arrays.release(data)
    except UserError as error:
        raise UserError(f"{_names(paths, str)}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Values of types and sizes that no program writes.
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


def _recognition(files: Sequence[Unpacked], names: Sequence[str], network: str | None, size: int) -> _Found | None:
    """Finds the recognition network in `files`; None if the generator is wanted instead."""
    held = [file.held for file in files]
    if (whole := deeplab.of_epoch(dict(zip(names, held, strict=True)))) is not None:
        held = [whole]
    for table in RECOGNITION:
        if (network is None and table is e4e.NETWORK) or network not in (None, table.name):
            continue
        stored = table.find(held)
        if stored is not None:
            config, what = table.config(stored), checkpoints.NETWORKS[table.name].what
            shapes = _shapes(config, size)
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


def _shapes(config: Any, size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's parameters, if a file of `size` bytes can hold them.

    Arrays may repeat their elements, as the mean style does, so that a small file could describe an enormous network.
    """
    shapes = checkpoints.parameter_shapes(config)
    count = sum(map(math.prod, shapes.values()))
    if 2 * count > size + _MAX_REPEATED:
        raise UserError(f"the file describes a network of {count:,} parameters, far more than its {size:,} bytes hold")
    return shapes


def _generator(files: Sequence[Unpacked], size: int) -> _Found:
    if len(files) > 1:
        raise UserError("files that do not belong together: a generator is one file")
    found = generator(files[0])
    naming, notes = search.NAMINGS[found.naming], list(found.notes)
    if "decoder of" in found.format:
        notes.append("the file holds an encoder too: --network e4e converts it, where it is e4e's")
    config = stylegan2_tables.infer_config(naming, found.arrays, found.settings)
    _shapes(config, size)
    held, assumed = stylegan2_tables.complete(naming, found.arrays, config)
    params = stylegan2_tables.to_ours(naming, held, config)
    if stylegan2_tables.lacks(naming, found.arrays, "mapping/w_avg"):
        del params["mapping/w_avg"]  # estimated from the other parameters
    if not found.settings:
        assumed += stylegan2_tables.unstated(found.naming, params)
    return _Found(config, params, [*notes, *assumed], found.format, _LICENCES.get(found.naming, _LICENCES["samjax"]))


def _mean_style(config: StyleGAN2Config, params: Mapping[str, np.ndarray]) -> np.ndarray:
    samples = stylegan2_tables.MEAN_SAMPLES
    mapping = {name: jnp.asarray(a, jnp.float32) for name, a in params.items() if name.startswith("mapping/")}
    nested = checkpoints.unflatten(mapping)
    width = max(config.z_dim, config.w_dim, config.mapping_dim or 0, config.embed_dim or 0, config.c_dim)
    batch_size = max(1, min(samples, 2**24 // width))

    @jax.jit
    def total(nested: stylegan2.Params, z: jax.Array, labels: jax.Array | None) -> jax.Array:
        return stylegan2.map_z(config, nested, z, labels)[:, 0].sum(0)

    z = np.asarray(jax.random.normal(jax.random.key(0), (samples, config.z_dim)))
    parts = []
    with jax.default_matmul_precision("highest"):
        for first in range(0, samples, batch_size):
            index = np.arange(first, min(first + batch_size, samples))
            labels = jax.nn.one_hot(index % config.c_dim, config.c_dim) if config.c_dim else None  # all classes alike
            parts.append(np.asarray(total(nested, z[index], labels)))
    return (np.sum(parts, axis=0) / samples).astype(np.float32)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def load(source: Sources, network: str | None = None) -> LoadedNetwork:
    """Loads a network from a file of any known format, converted or not; see `ckpt_convert.load`."""
    if isinstance(source, str | Path) and (found := checkpoints.network_at(source)):
        return checkpoints.load_network(source, network or found)
    config, params, manifest = read(source, network)
    return LoadedNetwork(config, checkpoints.to_device(params), manifest)


def convert(sources: Sources, out_dir: str | Path, network: str | None = None) -> Converted:
    """Converts the network in a file to a directory.

    Args:
      sources: path of the file, or paths of its parts; see `read`.
      out_dir: the directory to write; it is replaced if it holds a network of the same source.
      network: the expected kind; see `read`.

    Returns:
      The network that was written.

    Raises:
      UserError: as `read` and `samjax.io.checkpoints.save_network` do.
    """
    if not (Path(out_dir) / checkpoints.MANIFEST).is_file():
        checkpoints.check_writable(out_dir, {})  # early; an older network's source is compared on saving
    found = read(sources, network)
    checkpoints.save_network(out_dir, found.config, checkpoints.unflatten(found.params), found.manifest)
    return found


# --- writing ---


def export(folder: str | Path, path: str | Path, names: Names) -> list[str]:
    """Writes a network with the names and layouts of another program.

    A generator becomes a safetensors file of its state dict with the config in the metadata; an invertibility predictor
    ("sam") becomes a file of `torch.save` like those that SAM's authors publish. `read` restores the same bits.

    Args:
      folder: directory of the converted network; see `samjax.io.checkpoints.load_network`.
      path: path of the file; one that exists is replaced.
      names: the program whose names to use.

    Returns:
      Notes for users of the file, such as differences between the programs.

    Raises:
      UserError: if there is no such network, the other program cannot hold it, or `path` cannot be written.
    """
    return _export_predictor(folder, path) if names == "sam" else _export_generator(folder, path, names)


def _export_predictor(folder: str | Path, path: str | Path) -> list[str]:
    config, params, _ = checkpoints.load_network(folder, "invertibility")
    torch_files.write(path, deeplab.to_theirs(checkpoints.flatten(params)))
    if config != dataclasses.replace(PredictorConfig(), latent_names=config.latent_names):
        return ["the authors' program loads predictors of its own size only (a ResNet-101); this one has another"]
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
    if names == "rosinality" and config.conv_clamp is not None:
        notes.append(
            f"rosinality's network has no conv_clamp; where values exceed {config.conv_clamp:g}, images differ"
        )
    usual = config.z_dim == config.w_dim and config.mapping_dim is None
    if names == "rosinality" and (not usual or any(config.channels(r) != 512 for r in config.block_resolutions[:4])):
        notes.append("this generator's widths are not rosinality's: give its Generator the same channels and style_dim")
    if config.mapping_lr_multiplier != 0.01:
        argument = "lr_mlp" if names == "rosinality" else "mapping_kwargs.lr_multiplier"
        notes.append(f"give the other program's Generator {argument} = {config.mapping_lr_multiplier:g}")
    if not config.use_noise:
        notes.append("the generator has no noise: construct the other program's without, or with strengths of zero")
    return notes
