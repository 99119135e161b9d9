"""Network pickles of NVIDIA's TensorFlow repositories (`stylegan2`, `stylegan2-ada`).

A pickle is a tuple (G, D, Gs) of the states of `dnnlib.tflib.network.Network`: the arguments that a network was built
with, its variables, its component networks, and the source code that builds it, which is not used here. `Gs` is the
moving average of the generator, and the one to convert.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckpt_convert.formats.checkpoint import MAX_NAME, Checkpoint, is_name
from ckpt_convert.formats.nvidia import require
from samjax.errors import UserError
from samjax.io import arrays
from samjax.io.arrays import Loaded, PickledArray, Stored

_MAX_NETWORKS = 100  # nested in each other; a generator has two
_FIELDS = {  # arguments of the program to fields of StyleGAN2Config
    "latent_size": "z_dim",
    "label_size": "c_dim",
    "dlatent_size": "w_dim",
    "resolution": "img_resolution",
    "num_channels": "img_channels",
    "fmap_max": "channel_max",
    "mapping_layers": "mapping_layers",
    "mapping_lrmul": "mapping_lr_multiplier",
    "conv_clamp": "conv_clamp",
}


class Network:
    """Stand-in for `dnnlib.tflib.network.Network`."""

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {}

    def __new__(cls, *_: Any) -> Network:
        network = super().__new__(cls)
        network.state = {}
        return network

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError("a network's state is a dictionary")
        self.state = state


def names() -> dict[tuple[str, str], Any]:
    """Stand-ins for the names in these pickles."""
    return {**arrays.python_names(), ("dnnlib.tflib.network", "Network"): Network}


def _variables(network: Network) -> dict[str, Any]:
    """The variables of a network and of its components, by name."""
    found: dict[str, Any] = {}
    waiting = [("", network)]
    for _ in range(_MAX_NETWORKS):
        if not waiting:
            return found
        prefix, network = waiting.pop()
        variables, components = network.state.get("variables", []), network.state.get("components", {})
        if not isinstance(variables, list) or not isinstance(components, dict):
            break
        for variable in variables:
            if not isinstance(variable, tuple | list) or len(variable) != 2 or not is_name(variable[0]):
                raise UserError("the network in the pickle has no readable variables: damaged?")
            found[f"{prefix}{variable[0]}"] = variable[1]
        for name, component in components.items():
            if not isinstance(component, Network) or not is_name(name):
                raise UserError("a component of the network in the pickle is not a network: damaged?")
            waiting.append((f"{prefix}{name}/"[:MAX_NAME], component))
    raise UserError("the network in the pickle has no readable variables: damaged?")


def is_generator(network: Network) -> bool:
    """Whether a network has component networks, as generators have since StyleGAN."""
    components = network.state.get("components")
    return isinstance(components, dict) and "synthesis" in components


def checkpoint(network: Network, place: str) -> Checkpoint:
    """The arrays and settings of a generator.

    Args:
      network: as `is_generator` checks.
      place: where it is in the file, such as "Gs"; "" for the file itself.

    Raises:
      UserError: if it is of a kind that samjax does not support.
    """
    version = network.state.get("version")
    variables = _variables(network)
    if not isinstance(version, int) or version < 4 or any("StyleMod" in name for name in variables):
        raise UserError(
            "the pickle holds a StyleGAN1 or older network; samjax inverts with StyleGAN2 (configurations e and f) only"
        )
    if "dlatent_avg" not in variables:
        raise UserError("the pickle's network is not a StyleGAN2 generator (it has no dlatent_avg)")
    kwargs = network.state.get("static_kwargs", {})
    if not isinstance(kwargs, dict):
        raise UserError("the network in the pickle has no readable arguments: damaged?")
    held: dict[str, Stored] = {}
    for name, value in variables.items():
        # Scalar variables are pickled as NumPy scalars.
        held[name] = Loaded(np.asarray(value, np.float32)) if isinstance(value, int | float) else value
        if not isinstance(held[name], PickledArray | Loaded):
            raise UserError(f"{name[:80]} in the pickle is not an array: damaged?")
    what = f"{place} of TensorFlow pickle" if place else "TensorFlow pickle of one network"
    return Checkpoint(what, "tensorflow", held, _settings(kwargs))


def _settings(kwargs: dict[Any, Any]) -> dict[str, Any]:
    """The arguments of a network as fields of `StyleGAN2Config`. Raises UserError for unsupported ones."""
    settings = {ours: kwargs[theirs] for theirs, ours in _FIELDS.items() if kwargs.get(theirs) is not None}
    if isinstance(kwargs.get("fmap_base"), int):
        settings["channel_base"] = 2 * kwargs["fmap_base"]  # NVIDIA's counts from the next lower resolution
    require("", "architecture", kwargs.get("architecture", "skip"), "skip")
    require("", "nonlinearity", kwargs.get("nonlinearity", "lrelu"), "lrelu")
    require("", "mapping_nonlinearity", kwargs.get("mapping_nonlinearity", "lrelu"), "lrelu")
    require("", "normalize_latents", kwargs.get("normalize_latents", True), True)
    kernel = kwargs.get("resample_kernel") or [1, 3, 3, 1]
    require("", "resample_kernel", list(kernel) if isinstance(kernel, tuple) else kernel, [1, 3, 3, 1])
    settings.setdefault("conv_clamp", None)
    if kwargs.get("use_noise") is False:
        settings["use_noise"] = False
    return settings
