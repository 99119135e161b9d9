"""Network pickles of NVIDIA's PyTorch repositories (`stylegan2-ada-pytorch`, `stylegan3`).

A pickle is a dictionary of networks (`G`, `D`, `G_ema` and settings of the training), or a single generator. Networks
are "persistent objects": besides their state they carry the source code of their classes, which NVIDIA's programs run
on loading. Here only the state is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_convert.formats.checkpoint import Checkpoint
from samjax.errors import UserError
from samjax.io import torch_files
from samjax.io.arrays import Stored

_MAX_MODULES = 10_000  # a generator has about a hundred


class Module:
    """Stand-in for a persistent object: the name of its class, and its state."""

    def __init__(self, meta: Any) -> None:
        if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
            raise ValueError("a persistent object without a state")
        self.kind = str(meta.get("class_name", ""))
        self.state: dict[Any, Any] = meta["state"]

    def part(self, name: str) -> Mapping[Any, Any]:
        """`_parameters`, `_buffers` or `_modules`."""
        part = self.state.get(name, {})
        if not isinstance(part, dict):
            raise UserError(f"a network in the pickle has no readable {name}: damaged?")
        return part

    def setting(self, name: str, default: Any = None) -> Any:
        """An attribute, or else an argument of the constructor."""
        made_with = self.state.get("_init_kwargs")
        return self.state.get(name, made_with.get(name, default) if isinstance(made_with, dict) else default)


def names() -> dict[tuple[str, str], Any]:
    """Stand-ins for the names in these pickles."""
    return {
        **torch_files.names(),
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): Module,
        ("torch.storage", "_load_from_bytes"): torch_files.storage_from_bytes,
    }


def _walk(module: Module) -> Iterator[tuple[str, Module]]:
    """`module` and all modules in it, with their dotted names, which end with a dot."""
    waiting = [("", module)]
    for _ in range(_MAX_MODULES):
        if not waiting:
            return
        name, module = waiting.pop()
        yield name, module
        for key, part in module.part("_modules").items():
            if isinstance(part, Module):
                waiting.append((f"{name}{key}."[:200], part))
            elif part is not None:
                raise UserError(f"{name}{key} in the pickle is not a network of NVIDIA's repositories")
    raise UserError("the networks in the pickle are nested without end: damaged?")


def checkpoint(found: Any) -> Checkpoint:
    """Finds the generator in an unpickled file: `G_ema` of a dictionary, or the object itself.

    Raises:
      UserError: if there is none, or it is of a kind that samjax does not support.
    """
    if isinstance(found, dict):
        which = "G_ema" if found.get("G_ema") is not None else "G"
        found = found.get(which)
        if found is None:
            raise UserError("the pickle holds no G_ema: not a generator of NVIDIA's repositories")
        what = f"{which} of NVIDIA PyTorch pickle"
    else:
        what = "NVIDIA PyTorch pickle of one network"
    if not isinstance(found, Module):
        raise UserError("the pickle's G_ema is not a network as NVIDIA's repositories save it")
    parts = found.part("_modules")
    synthesis, mapping = parts.get("synthesis"), parts.get("mapping")
    if found.kind != "Generator" or not isinstance(synthesis, Module) or not isinstance(mapping, Module):
        raise UserError(f"the pickle holds a network of the class {found.kind[:60]!r}, not a generator with a mapping")
    if "input" in synthesis.part("_modules"):
        raise UserError("the pickle holds a StyleGAN3 generator; samjax inverts with StyleGAN2 only")
    arrays: dict[str, Stored] = {}
    for name, module in _walk(found):
        for values in (module.part("_parameters"), module.part("_buffers")):
            for key, value in values.items():
                if value is None:
                    continue
                if not isinstance(value, torch_files.Tensor):
                    raise UserError(f"{name}{key} in the pickle is not a tensor: damaged?")
                arrays[f"{name}{key}"] = value
    return Checkpoint(what, "nvidia", arrays, _settings(found, synthesis, mapping))


def _settings(generator: Module, synthesis: Module, mapping: Module) -> dict[str, Any]:
    """Fields of `StyleGAN2Config` that the objects state. Raises UserError for unsupported settings."""
    settings = {
        name: generator.setting(name)
        for name in ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")
        if generator.setting(name) is not None
    }
    # Older versions pass the arguments in a dictionary for each part, newer ones in one.
    nested = generator.setting("synthesis_kwargs")
    made_with = {**(generator.setting("_init_kwargs") or {}), **(nested if isinstance(nested, dict) else {})}
    for name in ("channel_base", "channel_max"):
        value = synthesis.setting(name, made_with.get(name))
        if value is not None:
            settings[name] = value
    num_layers = mapping.setting("num_layers")
    if num_layers is not None:
        settings["mapping_layers"] = num_layers
    clamps = set()
    for name, module in _walk(generator):
        if module.kind == "SynthesisBlock":
            require(name, "architecture", module.setting("architecture", "skip"), "skip")
        elif module.kind == "SynthesisLayer":
            require(name, "activation", module.setting("activation", "lrelu"), "lrelu")
            require(name, "use_noise", module.setting("use_noise", True), True)
        if module.kind in ("SynthesisLayer", "ToRGBLayer"):
            clamp = module.setting("conv_clamp", made_with.get("conv_clamp"))
            clamps.add(float(clamp) if isinstance(clamp, int | float) else None)
        elif module.kind == "FullyConnectedLayer" and name.startswith("mapping.fc"):
            require(name, "activation", module.setting("activation", "lrelu"), "lrelu")
            gain, inputs = module.setting("weight_gain"), module.setting("in_features")
            if isinstance(gain, float) and isinstance(inputs, int) and inputs > 0:
                require(name, "lr_multiplier", round(gain * math.sqrt(inputs), 6), 0.01)
    if len(clamps) > 1:
        raise UserError("the generator's layers have different conv_clamp; samjax's have one for all")
    settings["conv_clamp"] = next(iter(clamps), None)
    return settings


def require(where: str, name: str, value: Any, supported: Any) -> None:
    """Raises a UserError unless `value` is the only one that samjax's generator supports."""
    if value != supported:
        where = f"{where.removesuffix('.')}: " if where else ""
        raise UserError(f"{where}{name} is {str(value)[:40]!r}; samjax's StyleGAN2 has {supported!r} only")
