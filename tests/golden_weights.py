"""Weights and inputs of the reference cases: filled by rule under NVIDIA's names, in the layout that samjax uses."""

from __future__ import annotations

import importlib.util
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samjax import latents
from samjax.nets.stylegan2 import StyleGAN2Config

GOLDEN = Path(__file__).parent / "golden"


def load_fill() -> Any:
    """The module with the filling rules."""
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_nvidia(state: dict[str, np.ndarray]) -> dict[str, Any]:
    """Lays a state dict with NVIDIA's names ("synthesis.b4.conv1.weight") on the tree of `samjax.nets.stylegan2`."""
    tree: dict[str, Any] = {}
    for name, array in state.items():
        *path, leaf = name.split(".")
        if leaf == "resample_filter":
            continue
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        if leaf == "weight" and array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)  # OIHW to HWIO
        elif leaf == "weight":
            array = array.T
        elif leaf == "const":
            array = array.transpose(1, 2, 0)
        node[leaf] = np.array(array, np.float32, order="C")
    return tree


def golden_generator(case: Any) -> tuple[StyleGAN2Config, dict[str, Any]]:
    """The generator of a case that stores `config`, `weights` (a list of [name, shape]) and `salt`."""
    settings = json.loads(str(case["config"]))
    config = StyleGAN2Config(
        img_resolution=settings["img_resolution"],
        z_dim=settings["z_dim"],
        c_dim=settings["c_dim"],
        w_dim=settings["w_dim"],
        img_channels=settings["img_channels"],
        mapping_layers=settings["mapping_kwargs"]["num_layers"],
        channel_base=settings["channel_base"],
        channel_max=settings["channel_max"],
        conv_clamp=settings["conv_clamp"],
    )
    fill, salt = load_fill().fill, str(case["salt"])
    return config, from_nvidia({name: fill(name, shape, salt) for name, shape in json.loads(str(case["weights"]))})


def seeded(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The reference's inputs: NCHW arrays by rule, as NHWC."""
    array = np.random.default_rng(zlib.crc32(f"A/input/{name}".encode())).standard_normal(shape).astype(np.float32)
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def seeded_latents(config: StyleGAN2Config, wp: np.ndarray) -> dict[str, jax.Array]:
    """W+ as given, and offsets of 0.3 times the seeded arrays F4 to F10."""
    found = {"W+": jnp.asarray(wp)}
    for layer in latents.latent_layers(config)[1:]:
        r, _, channels = layer.shape
        found[layer.name] = jnp.asarray(np.float32(0.3) * seeded(layer.name, (1, channels, r, r)))
    return found
