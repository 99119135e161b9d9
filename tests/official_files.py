"""Writers of the official categories' files, at full size, as their authors distribute them, with weights by rule.

    python tests/official_files.py cars DIR                       # the names that `--weights DIR` looks for
    python tests/official_files.py cats DIR --stylegan3 CHECKOUT

The pickles of NVIDIA's PyTorch repositories contain source code. Here it is a trap for readers that execute it; with a
checkout of stylegan3 the pickles are written by NVIDIA's own program.
"""

from __future__ import annotations

import argparse
import functools
import json
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ckpt_files
import numpy as np
import torch
from golden_weights import GOLDEN, load_fill

from ckpt_convert import e4e, stylegan2, tables
from samjax.config import LATENT_NAMES
from samjax.io import checkpoints, registry
from samjax.nets.e4e import E4EConfig
from samjax.nets.stylegan2 import StyleGAN2Config

Fill = Callable[[str, Any, str], Any]

CONFIGS = {
    "cars": StyleGAN2Config(512),
    "faces": StyleGAN2Config(1024),
    "cats": StyleGAN2Config(256, conv_clamp=256.0),
}
SALT = "A"


def by_rule(state: Mapping[str, Any], fill: Fill, salt: str) -> OrderedDict[str, torch.Tensor]:
    """A state dict of these names and shapes; names for which the rule returns None are left out."""
    filled = {name: fill(name, tuple(shape), salt) for name, shape in state.items()}
    held = OrderedDict((name, torch.as_tensor(array)) for name, array in filled.items() if array is not None)
    held._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as torch does
    return held


def names_in(case: str, key: str) -> dict[str, Any]:
    """Names and shapes of all arrays in a real file, from a reference case."""
    with np.load(GOLDEN / f"{case}.npz") as file:
        return dict(json.loads(str(file[key])))


def generator(config: StyleGAN2Config) -> dict[str, np.ndarray]:
    """A generator's parameters by samjax's flat names, filled by rule under NVIDIA's names."""
    fill = load_fill().fill
    rows = stylegan2.NVIDIA.rows
    params = {}
    for path, shape in checkpoints.parameter_shapes(config).items():
        name, layout = tables.find(rows, path)
        theirs = layout.theirs(np.broadcast_to(np.float32(0), shape)).shape
        params[path] = np.array(layout.ours(fill(name, theirs, SALT)), np.float32, order="C")
    return params


# --- one writer for each kind of file ---


def write_tensorflow(path: Path, config: StyleGAN2Config) -> None:
    """(G, D, Gs); D, which inversion does not use, is one of 8 px."""
    arrays = ckpt_files.their_arrays("tensorflow", config, generator(config))
    network = ckpt_files.tensorflow_network(config, arrays)
    network.state["static_kwargs"].pop("conv_clamp")  # the program that wrote these files has none
    shapes = {
        "8x8/FromRGB/weight": (1, 1, 3, 32), "8x8/FromRGB/bias": (32,),
        "8x8/Conv0/weight": (3, 3, 32, 32), "8x8/Conv0/bias": (32,),
        "8x8/Conv1_down/weight": (3, 3, 32, 32), "8x8/Conv1_down/bias": (32,), "8x8/Skip/weight": (1, 1, 32, 32),
        "4x4/Conv/weight": (3, 3, 33, 32), "4x4/Conv/bias": (32,),
        "4x4/Dense0/weight": (512, 32), "4x4/Dense0/bias": (32,), "Output/weight": (32, 1), "Output/bias": (1,),
    }  # fmt: skip
    kwargs = {"resolution": 8, "fmap_max": 32, "num_channels": 3, "label_size": 0, "architecture": "resnet"}
    variables = [(name, np.zeros(shape, np.float32)) for name, shape in shapes.items()]
    ckpt_files.dump_tensorflow(path, (network, ckpt_files.Network("D", kwargs, variables, {}), network))


def write_nvidia(path: Path, config: StyleGAN2Config, stylegan3: Path | None) -> None:
    arrays = ckpt_files.their_arrays("nvidia", config, generator(config))
    if stylegan3 is None:
        network = ckpt_files.nvidia_network(config, arrays)
        ckpt_files.dump_nvidia(path, {"G": None, "D": None, "G_ema": network, "training_set_kwargs": {}})
        return
    sys.path.insert(0, str(stylegan3))
    from training import networks_stylegan2 as networks  # type: ignore[import-not-found]

    made = networks.Generator(
        z_dim=config.z_dim, c_dim=config.c_dim, w_dim=config.w_dim, img_resolution=config.img_resolution,
        img_channels=config.img_channels, mapping_kwargs={"num_layers": config.mapping_layers},
        channel_base=config.channel_base, channel_max=config.channel_max, conv_clamp=config.conv_clamp,
    ).eval().requires_grad_(False)  # fmt: skip
    made.load_state_dict(ckpt_files.tensors(arrays), strict=True)
    other = networks.Discriminator(c_dim=0, img_resolution=8, img_channels=3, channel_max=32)
    path.write_bytes(pickle.dumps({"G": made, "D": other, "G_ema": made, "training_set_kwargs": {}}, 4))


def write_e4e(path: Path, config: StyleGAN2Config) -> None:
    rule = load_fill().e4e
    encoder_config = E4EConfig(num_styles=config.num_ws)
    names: dict[str, Any] = {}
    for ours, shape in checkpoints.parameter_shapes(encoder_config).items():
        name, layout = tables.find(e4e.ROWS, ours)
        names[name] = layout.theirs(np.broadcast_to(np.float32(0), shape)).shape
        if name.endswith("running_var"):
            names[name.replace("running_var", "num_batches_tracked")] = ()
    average = names.pop("latent_avg")
    decoder = ckpt_files.tensors(ckpt_files.their_arrays("rosinality", config, generator(config)))
    del decoder["latent_avg"]
    state = OrderedDict((f"encoder.{name}", value) for name, value in by_rule(names, rule, SALT).items())
    state.update((f"decoder.{name}", value) for name, value in decoder.items())
    opts = {
        "encoder_type": "Encoder4Editing", "start_from_latent_avg": True, "stylegan_size": config.img_resolution,
        "checkpoint_path": None, "device": "cuda:0", "learn_in_w": False,
    }  # fmt: skip
    latent_avg = torch.as_tensor(rule("latent_avg", average, SALT))
    torch.save({"state_dict": state, "latent_avg": latent_avg, "opts": opts}, path)


def write_invertibility(path: Path) -> None:
    fill = load_fill().fan_scaled
    state: dict[str, Any] = {"sd_base": by_rule(names_in("invertibility_A", "weights"), fill, SALT)}
    heads = names_in("invertibility_A", "head_weights")
    torch.save(state | {name: by_rule(heads, fill, f"{SALT}/{name}") for name in LATENT_NAMES}, path)


def write_ade20k(path: Path, part: str) -> None:
    state = by_rule(names_in("ade20k_A", f"{part}_weights"), load_fill().fan_scaled, f"{SALT}/{part}")
    torch.save(state, path, _use_new_zipfile_serialization=False)  # in the format that torch had then


def write_bisenet(path: Path) -> None:
    state = by_rule(names_in("faceparsing_A", "weights"), load_fill().fan_scaled, SALT)
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_detectron2(path: Path) -> None:
    state = by_rule(names_in("maskrcnn_A", "weights"), load_fill().maskrcnn, SALT)
    model = {name: value.numpy() for name, value in state.items()}
    # Random deltas move boxes out of the image, where they are empty; those of a trained network stay near.
    for name in ("proposal_generator.rpn_head.anchor_deltas.weight", "roi_heads.box_predictor.bbox_pred.weight"):
        model[name] = model[name] * np.float32(0.1)
    path.write_bytes(pickle.dumps({"model": model, "__author__": "Detectron2 Model Zoo"}, 4))


def write(category: str, folder: Path, stylegan3: Path | None = None, config: StyleGAN2Config | None = None) -> None:
    """Writes every file of a category.

    Args:
      category: "cars", "faces" or "cats".
      folder: output directory; it is created if missing.
      stylegan3: a checkout of that repository; see above.
      config: of the generator; default: the category's, which some tests do not need.
    """
    config = config or CONFIGS[category]
    writers: dict[str, Callable[[Path], None]] = {
        "stylegan2-car-config-f.pkl": functools.partial(write_tensorflow, config=config),
        "stylegan2-ffhq-config-f.pkl": functools.partial(write_tensorflow, config=config),
        "stylegan2-cat-config-f_sg2adapyt.pkl": functools.partial(write_nvidia, config=config, stylegan3=stylegan3),
        "encoder_epoch_20.pth": functools.partial(write_ade20k, part="encoder"),
        "decoder_epoch_20.pth": functools.partial(write_ade20k, part="decoder"),
        "79999_iter.pth": write_bisenet,
        "model_final_cafdb1.pkl": write_detectron2,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "edits" / category).mkdir(parents=True, exist_ok=True)
    for file in registry.CATEGORY_FILES[category]:
        if file.role == "edits":
            direction = np.random.default_rng(len(file.name)).standard_normal((1, config.num_ws, config.w_dim))
            np.save(folder / "edits" / category / file.name, direction.astype(np.float32))
        elif file.role == "encoder":
            write_e4e(folder / file.name, config)
        elif file.role == "invertibility":
            write_invertibility(folder / file.name)
        else:
            writers[file.name](folder / file.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("category", choices=tuple(CONFIGS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stylegan3", type=Path)
    given = parser.parse_args()
    write(given.category, given.folder, given.stylegan3)
