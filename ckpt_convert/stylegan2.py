"""StyleGAN2 in other programs: a table of names for each, and the config inferred from shapes.

TensorFlow stores dense weights [in, out] and convolutions [k, k, I, O] like samjax, but flips up-convolutions, and
stores the bias of styles without its 1, the only value that conversion changes. rosinality scales the weights of
convolutions by 1 / sqrt(fan_in) at run time: demodulation cancels the scale, and ToRGB scales in samjax too, so the
stored values are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ckpt_convert import tables
from ckpt_convert.tables import CONV, DENSE, SAME, Layout, Row
from samjax.errors import UserError
from samjax.io import checkpoints
from samjax.io.arrays import Loaded, Stored
from samjax.nets.stylegan2 import StyleGAN2Config

FIRST_CONV = Layout(lambda a: CONV.ours(a[0]), lambda a: CONV.theirs(a)[None])  # with a leading batch axis
FLIPPED_CONV = Layout(lambda a: a[::-1, ::-1], lambda a: a[::-1, ::-1])
CONST = Layout(lambda a: a.transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1))
FIRST_CONST = Layout(lambda a: CONST.ours(a[0]), lambda a: CONST.theirs(a)[None])
MAP = Layout(lambda a: a.reshape(a.shape[2:]), lambda a: a[None, None])
CHANNELS = Layout(lambda a: a[0, :, 0, 0], lambda a: a[None, :, None, None])
SCALAR = Layout(lambda a: a.reshape(()), lambda a: a.reshape(1))
PLUS_ONE = Layout(lambda a: a.astype(np.float32) + np.float32(1), lambda a: a.astype(np.float32) - np.float32(1))


@dataclasses.dataclass(frozen=True)
class Naming:
    """The table of a program.

    Attributes:
      rows: see `Row`; the first that matches counts.
      filters: name to sum of the resampling filters [4, 4] that a file for a config holds. They are constants of the
        architecture, so they are checked and not converted.
      ignored: pattern of names that inference does not use.
      marker: a name that every generator of the program has, and nothing else; "" if its files are found otherwise.
      format: what a state dict with these names is called.
      note: what such a state dict leaves open, for users of the converted generator.
    """

    rows: tuple[Row, ...]
    filters: Callable[[StyleGAN2Config], dict[str, float]] = lambda _: {}
    ignored: str = ""
    marker: str = ""
    format: str = ""
    note: str = ""

    def find(self, path: str) -> tuple[str, Layout]:
        """Name and layout in the other program of samjax's parameter `path`; see `tables.find`."""
        return tables.find(self.rows, path)


def _same_name(path: str) -> str:
    return path.replace("/", ".")


def layer_index(resolution: str, layer: str) -> int:
    """Number of a convolution, counted from 0 at 4 px; that of its block for ToRGB."""
    level = int(resolution).bit_length() - 3  # 0 at 4 px
    return level if layer == "torgb" else 2 * level - 1 + int(layer[-1])


def _nvidia_filters(config: StyleGAN2Config) -> dict[str, float]:
    names = []
    for r in config.block_resolutions:
        names += [f"synthesis.b{r}.resample_filter", f"synthesis.b{r}.conv1.resample_filter"]
        names += [f"synthesis.b{r}.conv0.resample_filter"] if r > 4 else []
    return dict.fromkeys(names, 1.0)


NVIDIA = Naming(
    rows=(
        Row(r"(mapping/.*/weight)", _same_name, DENSE),
        Row(r"(.*/affine/weight)", _same_name, DENSE),
        Row(r"(synthesis/b4/const)", _same_name, CONST),
        Row(r"(synthesis/b\d+/\w+/weight)", _same_name, CONV),
        Row(r"((?!mapping/label_matrix).*)", _same_name, SAME),
    ),
    filters=_nvidia_filters,
    marker="synthesis.b4.const",
    format="a state dict with NVIDIA's names",
)


def _tensorflow_layer(r: str, layer: str) -> str:
    names = {"conv0": "Conv0_up", "conv1": "Conv1" if r != "4" else "Conv", "torgb": "ToRGB"}
    return f"synthesis/{r}x{r}/{names[layer]}"


TENSORFLOW = Naming(
    rows=(
        Row(r"mapping/w_avg", lambda: "dlatent_avg", SAME),
        Row(r"mapping/embed/(\w+)", lambda part: f"mapping/LabelEmbed/{part}", SAME),
        Row(r"mapping/label_matrix", lambda: "mapping/LabelConcat/weight", SAME),
        Row(r"mapping/fc(\d+)/(\w+)", lambda i, part: f"mapping/Dense{i}/{part}", SAME),
        Row(r"synthesis/b4/const", lambda: "synthesis/4x4/Const/const", FIRST_CONST),
        Row(r"synthesis/b(\d+)/(\w+)/noise_const", lambda r, k: f"synthesis/noise{layer_index(r, k)}", MAP),
        Row(r"synthesis/b(\d+)/(conv0)/weight", lambda r, k: f"{_tensorflow_layer(r, k)}/weight", FLIPPED_CONV),
        Row(r"synthesis/b(\d+)/(\w+)/affine/weight", lambda r, k: f"{_tensorflow_layer(r, k)}/mod_weight", SAME),
        Row(r"synthesis/b(\d+)/(\w+)/affine/bias", lambda r, k: f"{_tensorflow_layer(r, k)}/mod_bias", PLUS_ONE),
        Row(r"synthesis/b(\d+)/(\w+)/(\w+)", lambda r, k, part: f"{_tensorflow_layer(r, k)}/{part}", SAME),
    ),
    ignored="lod",  # the progress of progressive growing, which StyleGAN2 does not use
)


def blur_filters(config: StyleGAN2Config) -> dict[str, float]:
    """The filters in rosinality's files, and in those of programs that descend from its."""
    levels = range(len(config.block_resolutions) - 1)
    return {f"convs.{2 * i}.conv.blur.kernel": 4.0 for i in levels} | {
        f"to_rgbs.{i}.upsample.kernel": 4.0 for i in levels
    }


def rows_in_lists(
    *,
    w_avg: str,
    dense: str,
    const: str,
    noise: str,
    strength: str,
    modulation: str,
    conv: str,
    dense_weight: str = "weight",
    conv_weight: str = "weight",
    prefix: str = "",
) -> tuple[Row, ...]:
    """Rows for networks in which the layers at 4 px stand alone and the others are in lists, as in rosinality's.

    Args:
      w_avg: name of the mean style.
      dense: name of a mapping layer, with its number, from 1, for {}.
      const: name of the constant.
      noise: name of stored noise, with the number of its convolution for {}.
      strength: name of a noise strength within its layer.
      modulation: name of the layer that maps styles, within its convolution.
      conv: name of a convolution within its layer.
      dense_weight: name of the weights of dense layers.
      conv_weight: name of the weights of convolutions.
      prefix: prefix of the names of the convolutions' layers.
    """

    def layer(resolution: str, name: str) -> str:
        index = layer_index(resolution, name)
        if name == "torgb":
            return f"to_rgbs.{index - 1}" if index else "to_rgb1"
        return f"{prefix}convs.{index - 1}" if index else f"{prefix}conv1"

    def within(part: str) -> Callable[[str, str], str]:
        return lambda resolution, name: f"{layer(resolution, name)}.{part}"

    block = r"synthesis/b(\d+)/(\w+)"
    return (
        Row(r"mapping/w_avg", lambda: w_avg, SAME),
        Row(r"mapping/fc(\d+)/weight", lambda i: f"{dense.format(int(i) + 1)}.{dense_weight}", DENSE),
        Row(r"mapping/fc(\d+)/bias", lambda i: f"{dense.format(int(i) + 1)}.bias", SAME),
        Row(r"synthesis/b4/const", lambda: const, FIRST_CONST),
        Row(rf"{block}/noise_const", lambda r, k: noise.format(layer_index(r, k)), MAP),
        Row(rf"{block}/noise_strength", within(strength), SCALAR),
        Row(rf"{block}/affine/weight", within(f"{conv}.{modulation}.{dense_weight}"), DENSE),
        Row(rf"{block}/affine/bias", within(f"{conv}.{modulation}.bias"), SAME),
        Row(rf"{block}/weight", within(f"{conv}.{conv_weight}"), FIRST_CONV),
        Row(r"synthesis/b(\d+)/(torgb)/bias", within("bias"), CHANNELS),
        Row(rf"{block}/bias", within("activate.bias"), SAME),
    )


ROSINALITY = Naming(
    rows=rows_in_lists(
        w_avg="latent_avg", dense="style.{}", const="input.input", noise="noises.noise_{}", strength="noise.weight",
        conv="conv", modulation="modulation",
    ),
    filters=blur_filters,
    marker="to_rgb1.conv.modulation.weight",
    format="rosinality checkpoint",
)  # fmt: skip

OWN = Naming(
    rows=(Row(r"(.*)", lambda path: path, SAME),), marker="synthesis/b4/const", format="a file with samjax's names"
)

NAMINGS: Mapping[str, Naming] = {
    "nvidia": NVIDIA,
    "tensorflow": TENSORFLOW,
    "rosinality": ROSINALITY,
    "samjax": OWN,
}


def resample_filter(total: float) -> np.ndarray:
    """The outer product of [1, 3, 3, 1] with itself, scaled to the sum `total`: [4, 4] float32."""
    taps = np.array([1, 3, 3, 1], np.float32)
    return np.outer(taps, taps) * np.float32(total / 64)


# --- config ---


def _our_shape(naming: Naming, stored: Mapping[str, Stored], path: str) -> tuple[int, ...] | None:
    """Shape in samjax's layout of the parameter `path` in a file; None if the file lacks it."""
    try:
        name, layout = naming.find(path)
    except KeyError:
        return None
    if name not in stored:
        return None
    # A broadcast scalar stands for the array, since layouts only rearrange axes.
    try:
        return layout.ours(np.broadcast_to(np.int8(0), stored[name].shape)).shape
    except (ValueError, IndexError):
        raise UserError(f"{name} has the shape {list(stored[name].shape)}, which no StyleGAN2 has") from None


def infer_config(naming: Naming, stored: Mapping[str, Stored], settings: Mapping[str, Any]) -> StyleGAN2Config:
    """Infers the config of a generator from the shapes of its arrays.

    Args:
      naming: the table of the program that wrote the file.
      stored: the file's arrays, by its own names.
      settings: fields that the file states; they take precedence.

    Returns:
      The config.

    Raises:
      UserError: if no StyleGAN2 generator of any size has such arrays.
    """

    def shape(path: str, axes: int) -> tuple[int, ...]:
        found = _our_shape(naming, stored, path)
        if found is None or len(found) != axes or 0 in found:
            first = ", ".join(list(stored)[:4])[:200]
            raise UserError(f"no StyleGAN2 generator in the file ({path} is missing; it has {first or 'nothing'} …)")
        return found

    height, width, _ = shape("synthesis/b4/const", 3)
    if (height, width) != (4, 4):
        raise UserError(
            f"the generator makes images that are not square: it starts from {height} x {width} values;"
            " samjax's start from 4 x 4"
        )
    channels: dict[int, int] = {}
    for level in range(2, 13):
        if _our_shape(naming, stored, f"synthesis/b{2**level}/conv1/weight") is None:
            break
        channels[2**level] = shape(f"synthesis/b{2**level}/conv1/weight", 4)[-1]
    layers = 0
    while _our_shape(naming, stored, f"mapping/fc{layers}/weight") is not None:
        layers += 1
    w_dim = shape("synthesis/b4/conv1/affine/weight", 2)[0]
    inputs, hidden = shape("mapping/fc0/weight", 2)
    labels = ("mapping/embed/weight", "mapping/label_matrix")
    label = next((path for path in labels if _our_shape(naming, stored, path) is not None), None)
    c_dim, embed_dim = shape(label, 2) if label else (0, 0)
    values: dict[str, Any] = {
        "img_resolution": max(channels, default=0),
        "z_dim": inputs - embed_dim,
        "c_dim": c_dim,
        "w_dim": w_dim,
        "img_channels": shape("synthesis/b4/torgb/weight", 4)[-1],
        "mapping_layers": layers,
        "mapping_dim": hidden if layers > 1 and hidden != w_dim else None,
        "embed_dim": embed_dim if embed_dim not in (0, w_dim) else None,
        "label_concat": label == "mapping/label_matrix",
        "use_noise": _our_shape(naming, stored, "synthesis/b4/conv1/noise_strength") is not None,
        **settings,
    }
    values |= _channel_rule(channels, settings)
    return checkpoints.config_from_dict(values, "the file")


def _channel_rule(channels: Mapping[int, int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`channel_base` and `channel_max`: as stated if they fit the file's channels, otherwise computed from these.

    With `block_channels`, if no such rule fits.
    """

    def fits(rule: Mapping[str, Any]) -> bool:
        return all(isinstance(value, int) for value in rule.values()) and all(
            min(rule["channel_base"] // r, rule["channel_max"]) == count for r, count in channels.items()
        )

    widest = max(channels.values(), default=1)
    limited = {r: count for r, count in channels.items() if count < widest} or channels
    found = {"channel_base": max((r * count for r, count in limited.items()), default=1), "channel_max": widest}
    stated = {**found, **{name: settings[name] for name in found if name in settings}}
    if fits(stated):
        return stated
    return found if fits(found) else {**found, "block_channels": tuple(channels.values())}


# --- what files leave out ---

NOISE_SEED = 0
"""Seed of the stored noise for files that have none."""

MEAN_SAMPLES = 16_384
"""Number of mapped z from which the mean style is estimated for files that have none."""


def lacks(naming: Naming, stored: Mapping[str, Stored], path: str) -> bool:
    """Whether a file lacks samjax's parameter `path`."""
    return naming.find(path)[0] not in stored


def complete(
    naming: Naming, stored: Mapping[str, Stored], config: StyleGAN2Config
) -> tuple[dict[str, Stored], list[str]]:
    """Adds what a generator's file may lack.

    Args:
      naming: the table of the program that wrote the file.
      stored: the file's arrays, by its own names.
      config: sizes of the generator.

    Returns:
      The arrays with stored noise drawn from `NOISE_SEED`, and zeros for the mean style, which the caller estimates;
      and notes that say so.
    """
    held, notes, rng = dict(stored), [], np.random.default_rng(NOISE_SEED)
    shapes = checkpoints.parameter_shapes(config)
    noise = [path for path in shapes if path.endswith("/noise_const")]
    if noise and all(lacks(naming, stored, path) for path in noise):  # if only some are missing, it is damaged
        for path in noise:
            name, layout = naming.find(path)
            held[name] = Loaded(layout.theirs(rng.standard_normal(shapes[path], np.float32)))
        notes.append(
            f"the file has no stored noise: it was drawn with the seed {NOISE_SEED}; other programs draw their own"
        )
    if lacks(naming, stored, "mapping/w_avg"):
        name, layout = naming.find("mapping/w_avg")
        held[name] = Loaded(layout.theirs(np.zeros(shapes["mapping/w_avg"], np.float32)))
        notes.append(f"the file has no {name}: w_avg is the mean of {MEAN_SAMPLES:,} mapped samples")
    if not config.use_noise:
        notes.append("the generator was trained without noise")
        # Some programs store noise nevertheless.
        with_noise = checkpoints.parameter_shapes(dataclasses.replace(config, use_noise=True))
        for path in with_noise:
            if path.endswith(("/noise_const", "/noise_strength")):
                held.pop(naming.find(path)[0], None)
    if naming.filters(config) and not naming.filters(config).keys() & stored.keys():
        notes.append("the file has no resampling filters: StyleGAN2's own, [1, 3, 3, 1], are used")
    return held, notes


def unstated(naming: str, params: Mapping[str, np.ndarray]) -> list[str]:
    """Notes on settings that a state dict does not state, and that change the images.

    Args:
      naming: the program whose names the file has, a key of `NAMINGS`.
      params: the converted arrays, by samjax's flat names.
    """
    notes = []
    if naming == "nvidia":
        notes.append(
            "a state dict does not state conv_clamp: none is used; NVIDIA's training since 2020 sets 256, which"
            " matters for values beyond it only"
        )
    spread = float(np.std(params["mapping/fc0/weight"].astype(np.float32)))
    # Weights are drawn with the standard deviation 1 / lr_multiplier, from which training moves them little.
    if not 100 / 3 < spread < 300:
        notes.append(
            "a state dict does not state the learning rate multiplier of the mapping network: 0.01 is used, though"
            f" weights with a standard deviation of {spread:.3g} suggest another; it changes the images of seeds, not"
            " those of styles"
        )
    return notes


# --- conversion ---


def to_ours(naming: Naming, stored: Mapping[str, Stored], config: StyleGAN2Config) -> dict[str, np.ndarray]:
    """Converts the arrays of a file to samjax's parameters; see `tables.to_ours`.

    Args:
      naming: the table of the program that wrote the file.
      stored: the file's arrays, by its own names.
      config: sizes of the generator.

    Returns:
      Arrays by samjax's flat names, views of the file where possible.

    Raises:
      UserError: if arrays are missing, unexpected or of another shape (all are listed), or hold invalid values.
    """
    filters = naming.filters(config)
    if not filters.keys() & stored.keys():
        filters = {}
    params = tables.to_ours(
        naming.rows,
        stored,
        checkpoints.parameter_shapes(config),
        f"StyleGAN2 generator ({config.img_resolution} px, {config.channel_base}/{config.channel_max} channels)",
        constants=dict.fromkeys(filters, (4, 4)),
        ignored=naming.ignored,
    )
    for name, total in filters.items():
        if not np.allclose(stored[name].array().astype(np.float32), resample_filter(total), rtol=0, atol=1e-4):
            raise UserError(f"{name} is not the filter [1, 3, 3, 1], the only one that samjax's StyleGAN2 has")
    return params


def to_theirs(naming: Naming, params: Mapping[str, Any], config: StyleGAN2Config) -> dict[str, np.ndarray]:
    """Converts samjax's parameters to the arrays of another program; the inverse of `to_ours`.

    Args:
      naming: the table of the other program.
      params: arrays by samjax's flat names.
      config: sizes of the generator.

    Returns:
      Float32 arrays by the program's names, including its filters.

    Raises:
      UserError: if the other program has no such parameter.
    """
    arrays = {}
    for path, value in params.items():
        try:
            name, layout = naming.find(path)
        except KeyError:
            raise UserError(f"the other program has no parameter for {path}, which labels of this kind need") from None
        arrays[name] = layout.theirs(np.asarray(value, np.float32))
    return arrays | {name: resample_filter(total) for name, total in naming.filters(config).items()}
