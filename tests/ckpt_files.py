"""Writers of checkpoints of generators as other programs write them, with torch, and with stand-ins for the classes of
NVIDIA's repositories, so that the pickles have the same names as real ones."""

from __future__ import annotations

import collections
import contextlib
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckpt_convert import stylegan2 as tables
from samjax.io import checkpoints
from samjax.nets.stylegan2 import StyleGAN2Config

TRAP = "raise SystemExit('a converter ran code that a checkpoint carried')\n"
TINY = StyleGAN2Config(img_resolution=16, z_dim=8, w_dim=12, mapping_layers=2, channel_base=128, channel_max=16)


def random_params(config: StyleGAN2Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters by samjax's flat names."""
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(rng.standard_normal(shape, np.float32))
        for name, shape in checkpoints.parameter_shapes(config).items()
    }


def their_arrays(
    naming: str, config: StyleGAN2Config, params: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """The same parameters with the names and layouts of another program."""
    return tables.to_theirs(tables.NAMINGS[naming], params or random_params(config), config)


def tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}


@contextlib.contextmanager
def _modules(**modules: dict[str, Any]) -> Iterator[None]:
    """Makes modules with these members importable for pickling; `__` in a name stands for a dot."""
    added = {}
    for name, members in modules.items():
        dotted = name.replace("__", ".")
        module = types.ModuleType(dotted)
        for key, member in members.items():
            member.__module__, member.__qualname__, member.__name__ = dotted, key, key
            setattr(module, key, member)
        added[dotted] = module
    before = {name: sys.modules.get(name) for name in added}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


# NVIDIA's PyTorch repositories.


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("only named, never called")


class _Persistent:
    def __init__(self, kind: str, state: dict[str, Any]) -> None:
        self.meta = {"type": "class", "version": 6, "module_src": TRAP, "class_name": kind, "state": state}

    def __reduce__(self) -> Any:
        return _reconstruct_persistent_obj, (self.meta,)


_KINDS = {"synthesis": "SynthesisNetwork", "mapping": "MappingNetwork", "torgb": "ToRGBLayer"}
_BUFFERS = ("resample_filter", "noise_const", "w_avg")


def _kind(name: str) -> str:
    last = name.rsplit(".", 1)[-1]
    if last.startswith("conv"):
        return "SynthesisLayer"
    if last[:1] == "b" and last[1:].isdigit():
        return "SynthesisBlock"
    return _KINDS.get(last, "FullyConnectedLayer" if name else "Generator")


def nvidia_network(
    config: StyleGAN2Config,
    arrays: Mapping[str, np.ndarray],
    adjust: Callable[[str, str, dict[str, Any]], None] = lambda *_: None,
) -> _Persistent:
    """A generator as an object that is pickled like NVIDIA's.

    `adjust` may change a module's state before it is stored; it gets dotted name, class and state.
    """
    children: dict[str, set[str]] = {}
    for name in arrays:
        parts = name.split(".")
        for i in range(1, len(parts)):
            children.setdefault(".".join(parts[: i - 1]), set()).add(parts[i - 1])

    def build(name: str) -> _Persistent:
        parameters, buffers = {}, {}
        for key, array in arrays.items():
            owner, _, last = key.rpartition(".")
            if owner == name and last in _BUFFERS:
                buffers[last] = torch.from_numpy(np.array(array))
            elif owner == name:
                parameters[last] = torch.nn.Parameter(torch.from_numpy(np.array(array)), requires_grad=False)
        inner = {child: build(f"{name}.{child}".lstrip(".")) for child in sorted(children.get(name, ()))}
        state: dict[str, Any] = {"training": False, "_parameters": parameters, "_buffers": buffers, "_modules": inner}
        if _kind(name) in ("SynthesisLayer", "ToRGBLayer"):
            state["conv_clamp"] = config.conv_clamp
        if _kind(name) == "SynthesisLayer":
            state |= {"activation": "lrelu", "use_noise": True}
        if _kind(name) == "SynthesisBlock":
            state["architecture"] = "skip"
        if _kind(name) == "Generator":
            fields = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")
            state |= {field: getattr(config, field) for field in fields}
            sizes = {"channel_base": config.channel_base, "channel_max": config.channel_max}
            state["_init_kwargs"] = {"synthesis_kwargs": sizes}
        adjust(name, _kind(name), state)
        return _Persistent(_kind(name), state)

    return build("")


def dump_nvidia(path: Path, found: Any) -> Path:
    """Pickles `found`, which may hold networks of `nvidia_network`."""
    with _modules(
        torch_utils={}, torch_utils__persistence={"_reconstruct_persistent_obj": _reconstruct_persistent_obj}
    ):
        path.write_bytes(pickle.dumps(found, 4))
    return path


# NVIDIA's TensorFlow repositories.


class Network:
    """A TensorFlow network's state."""

    def __init__(self, name: str, kwargs: dict[str, Any], variables: list[Any], parts: dict[str, Any]) -> None:
        self.state = {
            "version": 4, "name": name, "static_kwargs": kwargs, "components": parts, "build_module_src": TRAP,
            "build_func_name": name, "variables": variables,
        }  # fmt: skip

    def __getstate__(self) -> Any:
        return self.state


def tensorflow_network(config: StyleGAN2Config, arrays: Mapping[str, np.ndarray], **kwargs: Any) -> Network:
    """A generator as a TensorFlow network, with scalars as TensorFlow stores them."""
    stated = {
        "latent_size": config.z_dim, "label_size": config.c_dim, "dlatent_size": config.w_dim,
        "resolution": config.img_resolution, "num_channels": config.img_channels,
        "fmap_base": config.channel_base // 2, "fmap_max": config.channel_max,
        "mapping_layers": config.mapping_layers, "architecture": "skip", "conv_clamp": config.conv_clamp, **kwargs,
    }  # fmt: skip
    groups: dict[str, list[Any]] = {"": [("lod", np.float32(0))], "mapping": [], "synthesis": []}
    for name, array in arrays.items():
        group, _, rest = name.partition("/") if "/" in name else ("", "", name)
        groups[group].append((rest, array[()] if array.ndim == 0 else array))
    parts = {name: Network(name, {}, groups[name], {}) for name in ("mapping", "synthesis")}
    return Network("Gs", stated, groups[""], parts)


def dump_tensorflow(path: Path, found: Any) -> Path:
    """Pickles `found`, which may hold networks of `tensorflow_network`."""
    with _modules(dnnlib={}, dnnlib__tflib={}, dnnlib__tflib__network={"Network": Network}):
        path.write_bytes(pickle.dumps(found, 3))
    return path


# rosinality.


def dump_torch(path: Path, found: Any, *, legacy: bool = False) -> Path:
    torch.save(found, path, _use_new_zipfile_serialization=not legacy)
    return path


def rosinality_checkpoint(config: StyleGAN2Config, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """`g_ema` and `latent_avg` of a generator."""
    held = collections.OrderedDict(
        (name, tensor.to(dtype)) for name, tensor in tensors(their_arrays("rosinality", config)).items()
    )
    held._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as torch does
    average = held.pop("latent_avg")
    return {"g_ema": held, "latent_avg": average}
