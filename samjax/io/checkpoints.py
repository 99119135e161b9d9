"""Saving and loading networks: converted directories and safetensors files.

A converted network is a directory with an Orbax checkpoint (`params/`) and `manifest.json`, which records the source,
the config, the shape and type of every array, and the checksum of every file. The networks inside the package are
safetensors files with the same names and the config in the file's metadata.

Files may hold half precision; in memory every parameter is float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import secrets
import shutil
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from numpy.typing import DTypeLike

from samjax.errors import UserError, shown, with_article
from samjax.io import files, values
from samjax.nets import ade20k, bisenet, deeplab, e4e, mask_rcnn, offset_encoder, stylegan2
from samjax.nets.stylegan2 import StyleGAN2Config

# Orbax takes seconds to import, and the networks inside the package do not need it: only functions import it.

MANIFEST = "manifest.json"
"""The file that marks a converted directory."""

_PARAMS = "params"
_DTYPES = ("float32", "float16", "bfloat16")
_MAX_LISTED = 1000  # names in one message, more than any generator has
_MAX_SIZE = 2**24  # of any entry of a config
_MAX_ENTRIES = 64  # of a list in a config, or characters of a string


class Kind(NamedTuple):
    """A kind of network.

    Attributes:
      what: its name in messages.
      config: the type of its config, which no other kind has.
      init: `init(config, key=key)` returns its parameters.
    """

    what: str
    config: type
    init: Callable[..., Any]

    @property
    def one(self) -> str:
        """Its name with the article: "a generator", "an e4e encoder"."""
        return with_article(self.what)


NETWORKS: Mapping[str, Kind] = {
    "generator": Kind("generator", StyleGAN2Config, stylegan2.init),
    "e4e": Kind("e4e encoder", e4e.E4EConfig, e4e.init),
    "invertibility": Kind("invertibility predictor", deeplab.PredictorConfig, deeplab.init),
    "offsets": Kind("offset encoder", offset_encoder.OffsetEncoderConfig, offset_encoder.init),
    "ade20k": Kind("ADE20K segmenter", ade20k.ADE20KConfig, ade20k.init),
    "bisenet": Kind("face parser", bisenet.BiSeNetConfig, bisenet.init),
    "mask_rcnn": Kind("Mask R-CNN", mask_rcnn.MaskRCNNConfig, mask_rcnn.init),
}
"""All kinds of networks by name."""

DISTRIBUTED = (".pkl", ".pt", ".pth", ".ckpt")
"""Suffixes, in lower case, of files as authors distribute them, which `ckpt_convert` converts."""


class LoadedNetwork(NamedTuple):
    """A network in memory.

    Attributes:
      config: its sizes, a dataclass whose type tells the kind of network; see `NETWORKS`.
      params: nested dictionary of float32 arrays, as the network's functions in `samjax.nets` take it.
      manifest: source, format and license, as far as they are known; may be empty.
    """

    config: Any
    params: dict[str, Any]
    manifest: dict[str, Any]


# --- names ---


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens a nested dictionary: `{"synthesis/b4/const": array, ...}`, the names that files use."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def kind_of(config: Any) -> tuple[str, Kind]:
    """The entry of `NETWORKS` that `config` belongs to. Raises ValueError if there is none."""
    for name, kind in NETWORKS.items():
        if type(config) is kind.config:
            return name, kind
    raise ValueError(f"{type(config).__name__} is not the config of a network")


@functools.lru_cache(maxsize=8)
def _parameter_shapes(config: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    _, kind = kind_of(config)
    tree = jax.eval_shape(lambda: kind.init(config, key=jax.random.key(0)))
    return tuple((path, tuple(leaf.shape)) for path, leaf in flatten(tree).items())


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of the network with this config, found by tracing `init` abstractly."""
    return dict(_parameter_shapes(config))


def compact(names: Iterable[str]) -> str:
    """Joins names in one line and groups those that differ only in the last part: `a/b/{weight, bias}`."""
    groups: dict[str, list[str]] = {}
    listed = list(names)
    more = f", and {len(listed) - _MAX_LISTED} more" if len(listed) > _MAX_LISTED else ""
    for name in listed[:_MAX_LISTED]:
        cut = max(name.rfind("/"), name.rfind(".")) + 1
        groups.setdefault(name[:cut], []).append(name[cut:])
    return (
        ", ".join(head + (ends[0] if len(ends) == 1 else "{" + ", ".join(ends) + "}") for head, ends in groups.items())
        + more
    )


def differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Describes in one line how the arrays of a file differ from the expected ones.

    Args:
      found: name to shape in the file.
      expected: name to shape that the network needs.

    Returns:
      All missing and unexpected names and all wrong shapes; "" if there are none.
    """
    parts = []
    if missing := [name for name in expected if name not in found]:
        parts.append(f"{len(missing)} missing: {compact(missing)}")
    if unexpected := [name for name in found if name not in expected]:
        parts.append(f"{len(unexpected)} unexpected: {compact(unexpected)}")
    both = [name for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    if both:
        shapes = ", ".join(f"{name} {list(found[name])} instead of {list(expected[name])}" for name in both)
        parts.append(f"{len(both)} of another shape: {shapes}")
    return "; ".join(parts)


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config as a dictionary for JSON; see `config_from_dict`."""
    return dataclasses.asdict(config)


def config_from_dict(values: Any, where: str, network: str = "generator") -> Any:
    """Builds a config from a dictionary.

    Args:
      values: as returned by `config_to_dict`, possibly read from JSON; missing fields take their defaults.
      where: the origin of `values`, for messages.
      network: a key of `NETWORKS`.

    Returns:
      The config, of the type that `NETWORKS` lists.

    Raises:
      UserError: if a field is unknown, or its value is not possible for this kind of network.
    """
    what, kind, _ = NETWORKS[network]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(values, Mapping) or not set(values) <= set(fields):
        raise UserError(f"{where} has no config of {NETWORKS[network].one}: damaged, or of another program?")
    taken = {}
    for name, value in values.items():
        # Only fields whose default is 0 may be 0.
        default = fields[name].default
        low = 0 if isinstance(default, int) and default == 0 else 1
        try:
            taken[name] = _setting(typing.get_type_hints(kind)[name], value, low)
        except TypeError:
            raise UserError(f"{where}: {name} is {shown(value)}, which no {what} can have") from None
    try:
        return kind(**taken)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _setting(hint: Any, value: Any, low: int) -> Any:
    """Checks `value` against the type `hint`; TypeError if it does not fit. Integers are at least `low`."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list | tuple) and 0 < len(value) <= _MAX_ENTRIES:
            return tuple(_setting(arguments[0], entry, low) for entry in value)
    elif type(None) in arguments:
        return None if value is None else _setting(arguments[0], value, low)
    elif hint is int and type(value) is int and low <= value <= _MAX_SIZE:
        return value
    elif hint is float and type(value) in (int, float) and 0 < value < math.inf:
        return float(value)
    elif (hint is str and isinstance(value, str) and 0 < len(value) <= _MAX_ENTRIES) or (
        hint is bool and isinstance(value, bool)
    ):
        return value
    raise TypeError


# --- directories ---


def _contiguous(array: Any) -> np.ndarray:
    # `np.ascontiguousarray` alone makes a scalar an array of one.
    array = np.asarray(array)
    return np.ascontiguousarray(array).reshape(array.shape)


def _checksums(directory: Path) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of every file below `directory`, by relative path."""
    found = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        crc = 0
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                crc = zlib.crc32(chunk, crc)
        found[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "crc32": crc}
    return found


def _check_shapes(config: Any, flat: Mapping[str, Any], where: str) -> None:
    found = {name: tuple(np.shape(array)) for name, array in flat.items()}
    if wrong := differences(found, parameter_shapes(config)):
        raise UserError(f"{where} does not hold the {kind_of(config)[1].what} that its config describes: {wrong}")


def _format(network: str) -> str:
    return f"samjax {network} 1"


_FORMATS = {_format(name): name for name in NETWORKS}


def network_at(path: str | Path) -> str | None:
    """The kind of the converted network at `path`, a key of `NETWORKS`; None if there is none.

    Args:
      path: path of a directory written by `save_network`, or of a file written by `save_safetensors`. Only the
        manifest or the metadata is read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            found = json.loads((path / MANIFEST).read_text("utf-8")).get("format")
        else:
            found = _safetensors_metadata(path).get("format", "")
        return _FORMATS.get(found)
    except (UserError, OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None


def check_writable(path: str | Path, manifest: Mapping[str, Any]) -> None:
    """Checks in advance that `save_network` may write to `path`.

    Args:
      path: path of the directory.
      manifest: manifest of the network to be written; only its `source` counts.

    Raises:
      UserError: if `path` is a file, a directory of something else, or holds the network of another source.
    """
    directory = Path(path)
    try:
        if directory.is_dir():
            if not any(directory.iterdir()):
                return
            if (network := network_at(directory)) is None:
                raise UserError(f"{directory} is not empty and not a converted network: choose another directory")
            old = json.loads((directory / MANIFEST).read_text("utf-8")).get("source")
            if _origin(old) & _origin(manifest.get("source")) or old == manifest.get("source"):
                return
            name = old.get("file") if isinstance(old, Mapping) else old
            what = NETWORKS[network].what
            raise UserError(f"{directory} holds the {what} of {name}: choose another directory, or delete that one")
        if directory.exists() or directory.is_symlink():
            raise UserError(f"{directory} is a file: choose the name of a directory")
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"cannot write {str(directory)!r}: not a legal directory name") from error


def _origin(source: Any) -> set[tuple[str, str]]:
    """File name and hash of a source; two sources are the same if they share either."""
    if not isinstance(source, Mapping):
        return set()
    return {(key, source[key]) for key in ("file", "sha256") if isinstance(source.get(key), str)}


@contextlib.contextmanager
def _atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes `path` if the block succeeds, and is deleted otherwise."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{secrets.token_hex(8)}.part"
    old = path.parent / f".{secrets.token_hex(8)}.old"
    try:
        beside.mkdir()
        yield beside
        if path.exists():
            path.rename(old)
        beside.rename(path)
    finally:
        # Interrupted between the two renames: the old directory goes back.
        if old.exists() and not path.exists():
            old.rename(path)
        for directory in (beside, old):
            shutil.rmtree(directory, ignore_errors=True)


def save_network(path: str | Path, config: Any, params: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Writes a network as an Orbax directory with its manifest, atomically.

    A directory that holds the network of the same source is replaced; anything else at `path` is left alone.

    Args:
      path: path of the directory.
      config: sizes of the network; its type tells the kind of network.
      params: nested dictionary of arrays: float32, or float16 or bfloat16, which halve the size on disk.
      manifest: the network's origin, for JSON; `source` decides what may be replaced.

    Raises:
      UserError: if there is something else at `path`, or it cannot be written.
      ValueError: if `params` do not fit `config`.
    """
    import orbax.checkpoint as ocp

    directory, flat = Path(path), flatten(params)
    network, _ = kind_of(config)
    found = {name: tuple(np.shape(array)) for name, array in flat.items()}
    if wrong := differences(found, parameter_shapes(config)):
        raise ValueError(f"the parameters are not those of the config: {wrong}")
    check_writable(directory, manifest)
    flat = {name: np.asarray(array) for name, array in flat.items()}
    described = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in flat.items()}
    if odd := [name for name, array in described.items() if array["dtype"] not in _DTYPES]:
        raise ValueError(f"parameters must be float32, float16 or bfloat16; these are not: {compact(odd)}")
    whole = {"format": _format(network), **manifest, "config": config_to_dict(config), "arrays": described}
    try:
        with _atomic_directory(directory) as beside:
            # Weights hardly compress, and compressing them doubles the memory that writing takes.
            # Where several processes train together, only the one that writes gets here, so Orbax must not wait
            # for the others.
            me = jax.process_index()
            options = ocp.options.MultiprocessingOptions(me, {me}, f"network{me}")
            handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=options)
            with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
                checkpointer.save((beside / _PARAMS).absolute(), args=ocp.args.PyTreeSave(unflatten(flat)))
            whole["files"] = _checksums(beside / _PARAMS)
            files.write_text(beside / MANIFEST, _readable(whole))
    except UserError:
        raise
    except Exception as error:  # Orbax reports a full disk in many ways
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0][:200]
        raise UserError(f"cannot write {directory}: {reason}") from error


def _readable(manifest: Mapping[str, Any]) -> str:
    """A manifest as JSON with one line for each array and file."""
    text = json.dumps({**manifest, "arrays": {}, "files": {}}, indent=2, ensure_ascii=False)
    for key in ("arrays", "files"):
        rows = (f"\n    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in manifest[key].items())
        text = text.replace(f'\n  "{key}": {{}}', f'\n  "{key}": {{{",".join(rows)}\n  }}')
    return text + "\n"


def _restore(directory: Path, dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    args = {name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=jnp.dtype(dtype)) for name, dtype in dtypes.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restore = ocp.args.PyTreeRestore(restore_args=unflatten(args))
        return flatten(checkpointer.restore((directory / _PARAMS).absolute(), args=restore))


def _read_manifest(directory: Path, network: str) -> tuple[Any, dict[str, Any]]:
    """Config and manifest of a converted directory."""
    what, one = NETWORKS[network].what, NETWORKS[network].one
    try:
        text = (directory / MANIFEST).read_text("utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{directory} is not a converted {what} (it has no {MANIFEST}): make one with python -m ckpt_convert"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {directory / MANIFEST}: {error}") from error
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{directory / MANIFEST} is damaged: convert the {what} again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _format(network):
        if other := network_at(directory):
            raise UserError(f"{directory} holds another network ({NETWORKS[other].what}), where {one} is expected")
        raise UserError(f"{directory} is not {one} converted by this version: convert it again")
    return config_from_dict(manifest.get("config"), str(directory / MANIFEST), network), manifest


def _load_directory(directory: Path, network: str) -> LoadedNetwork:
    config, manifest = _read_manifest(directory, network)
    what = NETWORKS[network].what
    arrays = manifest.get("arrays")
    if not isinstance(arrays, dict) or not all(
        isinstance(array, dict) and isinstance(array.get("shape"), list) and array.get("dtype") in _DTYPES
        for array in arrays.values()
    ):
        raise UserError(f"{directory / MANIFEST} is damaged: convert the {what} again")
    if wrong := differences({name: tuple(array["shape"]) for name, array in arrays.items()}, parameter_shapes(config)):
        raise UserError(f"{directory} does not hold the {what} that its config describes: {wrong}")
    # Checked before Orbax reads the files: on damaged ones it is slow and prints.
    listed = manifest.get("files")
    try:
        found = _checksums(directory / _PARAMS)
    except OSError as error:
        raise UserError(f"cannot read {directory / _PARAMS}: {error.strerror or error}") from error
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{directory / MANIFEST} is damaged: convert the {what} again")
    if damaged := [name for name in listed if found.get(name) != listed[name]]:
        raise UserError(f"{directory / _PARAMS} is damaged ({compact(damaged)}): convert the {what} again")
    try:
        flat = _restore(directory, {name: array["dtype"] for name, array in arrays.items()})
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}" if str(error) else type(error).__name__
        raise UserError(f"{directory / _PARAMS} cannot be read ({reason}): convert the {what} again") from error
    _check_shapes(config, flat, str(directory))
    return LoadedNetwork(config, to_device(flat), manifest)


def to_device(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Nested float32 arrays on the default device, from arrays by flat names."""
    # Converted by NumPy, since JAX would compile a program for every shape of a float16 file.
    return jax.device_put(unflatten({name: np.asarray(array, np.float32) for name, array in flat.items()}))


# --- safetensors ---


@contextlib.contextmanager
def _open_safetensors(path: str | Path) -> Iterator[Any]:
    """`values.open_safetensors`, with all errors as UserErrors that name the file."""
    from safetensors import SafetensorError

    try:
        with values.open_safetensors(path) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a converted generator or a .safetensors file") from None
    except (UserError, SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        if Path(path).suffix.lower() != ".safetensors":
            raise UserError(
                f"{path} is not a converted network: give a directory or a .safetensors file of samjax, or the .pkl,"
                " .pt, .pth or .ckpt file of another program"
            ) from error
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a readable safetensors file ({reason}): damaged, or not whole?") from error


def _safetensors_metadata(path: str | Path) -> dict[str, str]:
    with _open_safetensors(path) as file:
        return dict(file.metadata() or {})


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the arrays and the metadata of a safetensors file.

    Args:
      path: path of the file.

    Returns:
      Arrays by name, and the metadata.

    Raises:
      UserError: if the file is missing, damaged, or of another format.
    """
    with _open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def write_safetensors(path: str | Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically. Raises UserError if it cannot be written."""
    from safetensors.numpy import save

    # The library writes the memory of an array without regard to its strides.
    data = save({name: _contiguous(array) for name, array in arrays.items()}, dict(metadata))
    files.write_bytes(path, data)


def parse_metadata(text: str | None, where: str) -> Any:
    """Parses JSON in a metadata field; None for an empty one. Raises UserError if it is not JSON."""
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        raise UserError(f"{where} has damaged metadata") from None


def save_safetensors(
    path: str | Path,
    config: Any,
    params: Mapping[str, Any],
    dtype: DTypeLike = np.float32,
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """Writes a network as one safetensors file with samjax's names and the config in the metadata.

    Args:
      path: path of the file, which is replaced if it exists.
      config: sizes of the network; its type tells the kind of network.
      params: nested dictionary of arrays.
      dtype: float32, or float16 for half the size.
      manifest: the network's origin, for JSON.

    Raises:
      UserError: if the file cannot be written.
      ValueError: if `params` do not fit `config`, or some values leave the range of `dtype`.
    """
    network, _ = kind_of(config)
    with np.errstate(over="ignore"):  # reported below
        flat = {name: np.asarray(array).astype(dtype) for name, array in flatten(params).items()}
    found = {name: array.shape for name, array in flat.items()}
    if wrong := differences(found, parameter_shapes(config)):
        raise ValueError(f"the parameters are not those of the config: {wrong}")
    if infinite := [name for name, array in flat.items() if not np.isfinite(array).all()]:
        raise ValueError(f"not finite as {np.dtype(dtype)}: {compact(infinite)}")
    settings, origin = json.dumps(config_to_dict(config)), json.dumps(manifest or {})
    write_safetensors(path, flat, {"format": _format(network), "config": settings, "manifest": origin})


def _parse_metadata(path: Path, metadata: Mapping[str, str], network: str) -> tuple[Any, dict[str, Any]]:
    """Config and manifest in the metadata of a file."""
    if metadata.get("format") != _format(network):
        one, other = NETWORKS[network].one, _FORMATS.get(metadata.get("format", ""))
        if other:
            raise UserError(f"{path} holds another network ({NETWORKS[other].what}), where {one} is expected")
        raise UserError(
            f"{path} is not {one} written by samjax: convert it first, python -m ckpt_convert {path} OUT_DIR"
        )
    config = config_from_dict(parse_metadata(metadata.get("config"), str(path)), str(path), network)
    manifest = parse_metadata(metadata.get("manifest"), str(path))
    return config, manifest if isinstance(manifest, dict) else {}


def _load_safetensors(path: Path, network: str, *, trusted: bool = False) -> LoadedNetwork:
    flat, metadata = read_safetensors(path)
    config, manifest = _parse_metadata(path, metadata, network)
    if not trusted:
        _check_shapes(config, flat, str(path))
    if odd := [name for name, array in flat.items() if str(array.dtype) not in _DTYPES]:
        raise UserError(f"{path} holds arrays that are not of floating-point numbers: {compact(odd)}")
    return LoadedNetwork(config, to_device(flat), manifest)


# --- either ---


def load_network(path: str | Path, network: str, *, trusted: bool = False) -> LoadedNetwork:
    """Loads a network.

    Args:
      path: a directory written by `save_network` (or `python -m ckpt_convert`), or a file by `save_safetensors`.
      network: the expected kind, a key of `NETWORKS`.
      trusted: for files inside the package: the shapes of the arrays are not compared with the config, for which the
        network would have to be traced.

    Returns:
      Config, float32 arrays on the default device, and the manifest.

    Raises:
      UserError: if it is missing, damaged, incomplete, or holds something else.
    """
    path = _converted(path)
    return _load_directory(path, network) if path.is_dir() else _load_safetensors(path, network, trusted=trusted)


def load_config(path: str | Path, network: str) -> Any:
    """Loads only the config of a network; arguments and errors are those of `load_network`."""
    path = _converted(path)
    if path.is_dir():
        return _read_manifest(path, network)[0]
    return _parse_metadata(path, _safetensors_metadata(path), network)[0]


def _converted(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix.lower() in DISTRIBUTED and not path.is_dir():
        raise UserError(f"{path} is not converted yet: python -m ckpt_convert {path} OUT_DIR, then give OUT_DIR")
    return path


def load_generator(path: str | Path) -> LoadedNetwork:
    """Loads a generator; see `load_network`."""
    return load_network(path, "generator")
