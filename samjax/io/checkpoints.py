"""Networks on disk: the only module that knows Orbax and safetensors.

A converted network is a folder of an Orbax checkpoint (`params/`) and `manifest.json`, which says in plain words
what it is: where it came from, its config, every array with its shape and type, every file with its checksum. The
networks inside the package are safetensors files with the same names and the config in the file's metadata.

Half precision on disk stays so; in memory every parameter is float32.
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
from numpy.typing import DTypeLike

from samjax.errors import UserError
from samjax.io import files
from samjax.nets import ade20k, bisenet, deeplab, e4e, mask_rcnn, stylegan2
from samjax.nets.stylegan2 import Params, StyleGAN2Config

# Orbax takes seconds to import, and the generator in the package does not need it: see the functions that do.

MANIFEST = "manifest.json"
_PARAMS = "params"
_DTYPES = ("float32", "float16", "bfloat16")
_MAX_LISTED = 1000  # names in one message; no generator has as many
_MAX_SIZE = 2**24  # of any entry of a config
_MAX_ENTRIES = 64  # of a list in a config, or letters of a word


class Kind(NamedTuple):
    """A kind of network.

    Attributes:
      what: for messages. config: type of its config, which no other kind has. init: `init(config, key=key)` gives its
      variables.
    """

    what: str
    config: type
    init: Callable[..., Any]


NETWORKS: Mapping[str, Kind] = {
    "generator": Kind("generator", StyleGAN2Config, stylegan2.init),
    "e4e": Kind("e4e encoder", e4e.E4EConfig, e4e.init),
    "invertibility": Kind("invertibility predictor", deeplab.PredictorConfig, deeplab.init),
    "ade20k": Kind("ADE20K segmenter", ade20k.ADE20KConfig, ade20k.init),
    "bisenet": Kind("face parser", bisenet.BiSeNetConfig, bisenet.init),
    "mask_rcnn": Kind("Mask R-CNN", mask_rcnn.MaskRCNNConfig, mask_rcnn.init),
}


class LoadedNetwork(NamedTuple):
    """A network as its functions take it: config, nested dictionary of float32 arrays, and what its origin is."""

    config: Any
    variables: Mapping[str, Any]
    manifest: dict[str, Any]


class LoadedGenerator(NamedTuple):
    """A generator as the networks take it.

    Attributes:
      config: its sizes.
      params: nested dictionary of float32 arrays; see `samjax.nets.stylegan2`.
      manifest: what is known of its origin; empty for a safetensors file that says nothing.
    """

    config: StyleGAN2Config
    params: Params
    manifest: dict[str, Any]


# --- names ---


def flatten(params: Params) -> dict[str, Any]:
    """Nested dictionary to one level: `{"synthesis/b4/const": array, …}`."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{rest}": array for rest, array in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `flatten`."""
    params: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        inner = params
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = value
    return params


def kind_of(config: Any) -> tuple[str, Kind]:
    """The entry of `NETWORKS` that `config` belongs to. Raises ValueError if it is the config of no network."""
    for name, kind in NETWORKS.items():
        if type(config) is kind.config:
            return name, kind
    raise ValueError(f"{type(config).__name__} is the config of no network")


@functools.lru_cache(maxsize=8)
def _parameter_shapes(config: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    _, kind = kind_of(config)
    tree = jax.eval_shape(lambda: kind.init(config, key=jax.random.key(0)))
    return tuple((path, tuple(leaf.shape)) for path, leaf in flatten(tree).items())


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of a network, traced from the network itself; nothing is computed."""
    return dict(_parameter_shapes(config))


def compact(names: Iterable[str]) -> str:
    """Names in one line, those that differ only in their last part together: `a/b/{weight, bias}`."""
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


def differences(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = ()
) -> str:
    """What separates the arrays that a file has from those that it should have, all in one line; "" if nothing."""
    parts = []
    if missing := [name for name in expected if name not in found]:
        parts.append(f"{len(missing)} missing: {compact(missing)}")
    allowed = set(ignored)
    if unexpected := [name for name in found if name not in expected and name not in allowed]:
        parts.append(f"{len(unexpected)} unexpected: {compact(unexpected)}")
    both = [name for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    if both:
        shapes = ", ".join(f"{name} {list(found[name])} instead of {list(expected[name])}" for name in both)
        parts.append(f"{len(both)} of another shape: {shapes}")
    return "; ".join(parts)


def config_to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def config_from_dict(values: Any, where: str, network: str = "generator") -> Any:
    """The config that `values` describe; `where` names them in messages.

    Args:
      values: as `config_to_dict` gives them, perhaps by way of JSON; what is left out takes its default.
      where: for messages.
      network: a key of `NETWORKS`.

    Raises:
      UserError: a field is unknown, or is not what such a network can have.
    """
    what, kind, _ = NETWORKS[network]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(values, Mapping) or not set(values) <= set(fields):
        raise UserError(f"{where} has no config of a {what}: damaged, or of another program?")
    taken = {}
    for name, value in values.items():
        # A setting that is 0 or empty by default may be so; any other has to be something.
        default = fields[name].default
        low = 0 if isinstance(default, int) and default == 0 else 1
        try:
            taken[name] = _setting(typing.get_type_hints(kind)[name], value, low)
        except TypeError:
            raise UserError(f"{where}: {name} is {str(value)[:40]!r}, which no {what} can have") from None
    try:
        return kind(**taken)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _setting(hint: Any, value: Any, low: int) -> Any:
    """`value` as a field of the type `hint`; TypeError if it is none. Whole numbers are at least `low`."""
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


# --- folders ---


def _contiguous(array: Any) -> np.ndarray:
    # `np.ascontiguousarray` alone makes a scalar an array of one.
    array = np.asarray(array)
    return np.ascontiguousarray(array).reshape(array.shape)


def _checksums(folder: Path) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of every file below `folder`, by its path from there."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        crc = 0
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                crc = zlib.crc32(chunk, crc)
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": crc}
    return found


def _check_shapes(config: Any, flat: Mapping[str, Any], where: str) -> None:
    found = {name: tuple(np.shape(array)) for name, array in flat.items()}
    if wrong := differences(found, parameter_shapes(config)):
        raise UserError(f"{where} does not hold the {kind_of(config)[1].what} that its config describes: {wrong}")


def _format(network: str) -> str:
    return f"samjax {network} 1"


_FORMATS = {_format(name): kind.what for name, kind in NETWORKS.items()}


def kind_at(folder: str | Path) -> str | None:
    """What the converted network in `folder` is, as `Kind.what` has it; None if there is none."""
    try:
        return _FORMATS.get(json.loads((Path(folder) / MANIFEST).read_text("utf-8")).get("format"))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None


def check_writable(path: str | Path, manifest: Mapping[str, Any]) -> None:
    """Says early whether `save_network` may write to `path`.

    Raises:
      UserError: there is a file, a folder of something else, or the network of another source.
    """
    folder = Path(path)
    try:
        if folder.is_dir():
            if not any(folder.iterdir()):
                return
            if (what := kind_at(folder)) is None:
                raise UserError(f"{folder} is not empty and not a converted network: choose another folder")
            old = json.loads((folder / MANIFEST).read_text("utf-8")).get("source")
            if _origin(old) & _origin(manifest.get("source")) or old == manifest.get("source"):
                return
            name = old.get("file") if isinstance(old, Mapping) else old
            raise UserError(f"{folder} holds the {what} of {name}: choose another folder, or delete that one")
        if folder.exists() or folder.is_symlink():
            raise UserError(f"{folder} is a file: choose the name of a folder")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    except ValueError as error:  # a zero byte in the name
        raise UserError(f"cannot write {str(folder)!r}: not a legal folder name") from error


def _origin(source: Any) -> set[tuple[str, str]]:
    """What makes two sources the same: the file's name, or its contents."""
    if not isinstance(source, Mapping):
        return set()
    return {(key, source[key]) for key in ("file", "sha256") if isinstance(source.get(key), str)}


@contextlib.contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write in that becomes `path` when the block ends well, and disappears when it does not."""
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
        # Whenever it ended, what was there before is there again, or its successor is.
        if old.exists() and not path.exists():
            old.rename(path)
        for folder in (beside, old):
            shutil.rmtree(folder, ignore_errors=True)


def save_network(path: str | Path, config: Any, variables: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Writes a network as an Orbax folder with its manifest; it appears whole, or not at all.

    A folder that holds the network of the same source is replaced; anything else at `path` is left alone.

    Args:
      path: of the folder.
      config: the network's; its type says which network it is.
      variables: nested dictionary of arrays (a generator's parameters, the variables of others): float32, or float16
        or bfloat16, which halve the size on disk.
      manifest: what to say of the network's origin, for JSON; `source` decides what may be replaced.

    Raises:
      UserError: there is something else at `path`, or it cannot be written.
      ValueError: `variables` are not those of `config`.
    """
    import orbax.checkpoint as ocp

    folder, flat = Path(path), flatten(variables)
    network, _ = kind_of(config)
    found = {name: tuple(np.shape(array)) for name, array in flat.items()}
    if wrong := differences(found, parameter_shapes(config)):
        raise ValueError(f"the parameters are not those of the config: {wrong}")
    check_writable(folder, manifest)
    flat = {name: np.asarray(array) for name, array in flat.items()}
    described = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in flat.items()}
    if odd := [name for name, array in described.items() if array["dtype"] not in _DTYPES]:
        raise ValueError(f"parameters must be float32, float16 or bfloat16; these are not: {compact(odd)}")
    whole = {"format": _format(network), **manifest, "config": config_to_dict(config), "arrays": described}
    try:
        with _whole_folder(folder) as beside:
            # Weights hardly compress, and compressing them doubles the memory that writing takes.
            # Of several processes that train together only the one that writes is here to be waited for.
            me = jax.process_index()
            options = ocp.options.MultiprocessingOptions(me, {me}, f"network{me}")
            handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=options)
            with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
                checkpointer.save((beside / _PARAMS).absolute(), args=ocp.args.PyTreeSave(unflatten(flat)))
            whole["files"] = _checksums(beside / _PARAMS)
            files.write_text(beside / MANIFEST, _readable(whole))
    except UserError:
        raise
    except Exception as error:  # what a full disk makes of the libraries below
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0][:200]
        raise UserError(f"cannot write {folder}: {reason}") from error


def _readable(manifest: Mapping[str, Any]) -> str:
    """A manifest as JSON with one line for each array and file."""
    text = json.dumps({**manifest, "arrays": {}, "files": {}}, indent=2, ensure_ascii=False)
    for key in ("arrays", "files"):
        rows = (f"\n    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in manifest[key].items())
        text = text.replace(f'\n  "{key}": {{}}', f'\n  "{key}": {{{",".join(rows)}\n  }}')
    return text + "\n"


def _restore(folder: Path, dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    args = {name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=jnp.dtype(dtype)) for name, dtype in dtypes.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restore = ocp.args.PyTreeRestore(restore_args=unflatten(args))
        return flatten(checkpointer.restore((folder / _PARAMS).absolute(), args=restore))


def _load_folder(folder: Path, network: str) -> LoadedNetwork:
    what = NETWORKS[network].what
    try:
        text = (folder / MANIFEST).read_text("utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a converted {what} (it has no {MANIFEST}): make one with python -m ckpt_convert"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {folder / MANIFEST}: {error}") from error
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{folder / MANIFEST} is damaged: convert the {what} again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _format(network):
        if other := kind_at(folder):
            raise UserError(f"{folder} holds another network ({other}), where a {what} is expected")
        raise UserError(f"{folder} is not a {what} converted by this version: convert it again")
    config = config_from_dict(manifest.get("config"), str(folder / MANIFEST), network)
    arrays = manifest.get("arrays")
    if not isinstance(arrays, dict) or not all(
        isinstance(array, dict) and isinstance(array.get("shape"), list) and array.get("dtype") in _DTYPES
        for array in arrays.values()
    ):
        raise UserError(f"{folder / MANIFEST} is damaged: convert the {what} again")
    if wrong := differences({name: tuple(array["shape"]) for name, array in arrays.items()}, parameter_shapes(config)):
        raise UserError(f"{folder} does not hold the {what} that its config describes: {wrong}")
    # Before the libraries below see the files: what they make of damaged ones is neither quiet nor quick.
    listed = manifest.get("files")
    try:
        found = _checksums(folder / _PARAMS)
    except OSError as error:
        raise UserError(f"cannot read {folder / _PARAMS}: {error.strerror or error}") from error
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{folder / MANIFEST} is damaged: convert the {what} again")
    if damaged := [name for name in listed if found.get(name) != listed[name]]:
        raise UserError(f"{folder / _PARAMS} is damaged ({compact(damaged)}): convert the {what} again")
    try:
        flat = _restore(folder, {name: array["dtype"] for name, array in arrays.items()})
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}" if str(error) else type(error).__name__
        raise UserError(f"{folder / _PARAMS} cannot be read ({reason}): convert the {what} again") from error
    _check_shapes(config, flat, str(folder))
    return LoadedNetwork(config, _on_device(flat), manifest)


def _on_device(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    # Converted by NumPy, and put there at once: JAX would compile a program for every shape of a float16 file.
    return jax.device_put(unflatten({name: np.asarray(array, np.float32) for name, array in flat.items()}))


# --- safetensors ---


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a safetensors file.

    Raises:
      UserError: it is missing, damaged, or not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a converted generator or a .safetensors file") from None
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a readable safetensors file ({reason}): damaged, or not whole?") from error


def write_safetensors(path: str | Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, whole. Raises UserError if it cannot be written."""
    from safetensors.numpy import save

    # The library writes an array's memory as it lies, so it has to lie in order.
    data = save({name: _contiguous(array) for name, array in arrays.items()}, dict(metadata))
    files.write_bytes(path, data)


def parse_metadata(text: str | None, where: str) -> Any:
    """JSON out of a metadata field. Raises UserError if it is not."""
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        raise UserError(f"{where} has damaged metadata") from None


def save_safetensors(
    path: str | Path,
    config: Any,
    variables: Mapping[str, Any],
    dtype: DTypeLike = np.float32,
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """Writes a network as one safetensors file under our own names, its config in the metadata.

    Args:
      path: of the file, which is replaced if it exists.
      config: the network's; its type says which network it is.
      variables: nested dictionary of arrays.
      dtype: float32, or float16 for half the size.
      manifest: what to say of the network's origin, for JSON.

    Raises:
      UserError: the file cannot be written.
      ValueError: `variables` are not those of `config`, or some leave the range of `dtype`.
    """
    network, _ = kind_of(config)
    with np.errstate(over="ignore"):  # what leaves the range is named below
        flat = {name: np.asarray(array).astype(dtype) for name, array in flatten(variables).items()}
    found = {name: array.shape for name, array in flat.items()}
    if wrong := differences(found, parameter_shapes(config)):
        raise ValueError(f"the parameters are not those of the config: {wrong}")
    if infinite := [name for name, array in flat.items() if not np.isfinite(array).all()]:
        raise ValueError(f"not finite as {np.dtype(dtype)}: {compact(infinite)}")
    settings, origin = json.dumps(config_to_dict(config)), json.dumps(manifest or {})
    write_safetensors(path, flat, {"format": _format(network), "config": settings, "manifest": origin})


def _load_safetensors(path: Path, network: str) -> LoadedNetwork:
    flat, metadata = read_safetensors(path)
    if metadata.get("format") != _format(network):
        what, other = NETWORKS[network].what, _FORMATS.get(metadata.get("format", ""))
        if other:
            raise UserError(f"{path} holds another network ({other}), where a {what} is expected")
        raise UserError(f"{path} is not a {what} of ours: convert it first, python -m ckpt_convert {path} OUT_DIR")
    config = config_from_dict(parse_metadata(metadata.get("config"), str(path)), str(path), network)
    _check_shapes(config, flat, str(path))
    if odd := [name for name, array in flat.items() if str(array.dtype) not in _DTYPES]:
        raise UserError(f"{path} holds arrays that are not of floating-point numbers: {compact(odd)}")
    manifest = parse_metadata(metadata.get("manifest"), str(path))
    return LoadedNetwork(config, _on_device(flat), manifest if isinstance(manifest, dict) else {})


# --- both ---


def load_network(path: str | Path, network: str) -> LoadedNetwork:
    """Reads a network.

    Args:
      path: a folder written by `save_network` (which `python -m ckpt_convert` uses), or a file by `save_safetensors`.
      network: which one is expected, a key of `NETWORKS`.

    Returns:
      Config, float32 arrays on the default device, and the manifest.

    Raises:
      UserError: it is missing, damaged, not whole, or something else.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, network)
    if path.suffix in (".pkl", ".pt", ".pth", ".ckpt"):
        raise UserError(f"{path} is not converted yet: python -m ckpt_convert {path} OUT_DIR, then give OUT_DIR")
    return _load_safetensors(path, network)


def load_generator(path: str | Path) -> LoadedGenerator:
    """`load_network`, for a generator."""
    return LoadedGenerator(*load_network(path, "generator"))
