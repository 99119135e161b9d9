"""Networks of NVIDIA's PyTorch repositories (`stylegan2-ada-pytorch`, `stylegan3`) and of programs that build on them.

A pickle is a dictionary of networks (`G`, `D`, `G_ema` and settings of the training), or a single generator; PTI saves
its tuned generators with `torch.save`. Networks are "persistent objects": besides their state they carry the source
code of their classes, which NVIDIA's programs run on loading. Here only the state is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_convert.formats.checkpoint import MAX_NAME, Checkpoint, is_name
from samjax.errors import UserError, shown
from samjax.io import torch_files
from samjax.io.arrays import Stored

_MAX_MODULES = 10_000  # a generator has about a hundred


class Module:
    """Stand-in for a persistent object: the name of its class, and its state."""

    def __init__(self, meta: Any) -> None:
        if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
            raise ValueError("a persistent object without a state")
        kind = meta.get("class_name")
        self.kind: str = kind if is_name(kind) else ""
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
        ("torch.storage", "_load_from_bytes"): torch_files.storage_reader(),
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
            if isinstance(part, Module) and is_name(key):
                waiting.append((f"{name}{key}."[:MAX_NAME], part))
            elif part is not None:
                raise UserError(f"a part of {name or 'the network'} is not a network of NVIDIA's repositories")
    raise UserError("the networks in the pickle are nested without end: damaged?")


def is_generator(network: Module) -> bool:
    """Whether a network has the two parts of a generator."""
    parts = network.part("_modules")
    return all(isinstance(parts.get(name), Module) for name in ("mapping", "synthesis"))


def checkpoint(network: Module, place: str) -> Checkpoint:
    """The arrays and settings of a generator.

    Args:
      network: with the two parts that `is_generator` checks.
      place: where it is in the file, such as "G_ema"; "" for the file itself.

    Raises:
      UserError: if it is of a kind that samjax does not support.
    """
    parts = network.part("_modules")
    synthesis, mapping = parts["synthesis"], parts["mapping"]
    if "input" in synthesis.part("_modules"):
        raise UserError("the file holds a StyleGAN3 generator; samjax inverts with StyleGAN2 only")
    arrays: dict[str, Stored] = {}
    for name, module in _walk(network):
        for values in (module.part("_parameters"), module.part("_buffers")):
            for key, value in values.items():
                if value is None:
                    continue
                if not isinstance(value, torch_files.Tensor) or not is_name(key):
                    raise UserError(f"an array of {name or 'the network'} is not a tensor: damaged?")
                arrays[f"{name}{key}"] = value
    what = f"{place} of NVIDIA PyTorch pickle" if place else "NVIDIA PyTorch network"
    return Checkpoint(what, "nvidia", arrays, _settings(network, synthesis, mapping))


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
    clamps, multipliers, noises = set(), set(), set()
    for name, module in _walk(generator):
        if module.kind == "SynthesisBlock":
            require(name, "architecture", module.setting("architecture", "skip"), "skip")
        elif module.kind == "SynthesisLayer":
            require(name, "activation", module.setting("activation", "lrelu"), "lrelu")
            _require_gain(name, "act_gain", module.setting("act_gain"), math.sqrt(2))
            noises.add(module.setting("use_noise", True) is not False)
        if module.kind in ("SynthesisLayer", "ToRGBLayer"):
            clamp = module.setting("conv_clamp", made_with.get("conv_clamp"))
            clamps.add(float(clamp) if isinstance(clamp, int | float) else None)
        elif module.kind == "FullyConnectedLayer":
            is_mapping = name.startswith("mapping.fc")
            activation = "lrelu" if is_mapping else "linear"
            require(name, "activation", module.setting("activation", activation), activation)
            multiplier = _multiplier(name, module)
            if multiplier is not None and is_mapping:
                multipliers.add(multiplier)
            elif multiplier is not None:
                _require_gain(name, "lr_multiplier", multiplier, 1.0)
    if len(clamps) > 1:
        raise UserError("the generator's layers have different conv_clamp; samjax's have one for all")
    if len(multipliers) > 1:
        raise UserError("the mapping network's layers have different lr_multiplier; samjax's have one for all")
    if len(noises) > 1:
        raise UserError("some of the generator's layers add noise and some do not; samjax's all do, or none does")
    if False in noises:
        settings["use_noise"] = False
    settings["conv_clamp"] = next(iter(clamps), None)
    stated = mapping.setting("lr_multiplier")
    if multipliers or isinstance(stated, float):
        settings["mapping_lr_multiplier"] = next(iter(multipliers), stated)
    return settings


def _multiplier(name: str, layer: Module) -> float | None:
    """The learning rate multiplier of a dense layer, from the factors that it stores; None if it stores none."""
    weight, gain = layer.part("_parameters").get("weight"), layer.setting("weight_gain")
    if not isinstance(weight, torch_files.Tensor) or len(weight.shape) != 2 or not isinstance(gain, float):
        return None
    multiplier = float(f"{gain * math.sqrt(weight.shape[1]):.6g}")  # without the rounding errors of the product
    _require_gain(name, "bias_gain", layer.setting("bias_gain"), multiplier)
    return multiplier


def _require_gain(where: str, name: str, value: Any, supported: float) -> None:
    """`require` for factors, of which older versions do not store all, and which are rounded."""
    if isinstance(value, int | float) and not math.isclose(value, supported, rel_tol=1e-4):
        require(where, name, value, supported)


def require(where: str, name: str, value: Any, supported: Any) -> None:
    """Raises a UserError unless `value` is the only one that samjax's generator supports."""
    if type(value) is not type(supported) or value != supported:  # the comparison of other types may take long
        where = f"{where.removesuffix('.')}: " if where else ""
        raise UserError(f"{where}{name} is {shown(value)}; samjax's StyleGAN2 has {supported!r} only")
