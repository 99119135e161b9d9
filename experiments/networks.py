"""The networks of a run, from its flags: the generator, and what looks at the image before the inversion.

For the demo and a generator of one's own nothing else is needed; the official categories have an encoder, an
invertibility predictor and a segmenter each, which are found in --weights DIR or where `python -m ckpt_convert get`
put them. Files as their authors distribute them are converted on the way, once.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ckpt_convert import get
from samjax import api, demo, encoding, invertibility, segmentation
from samjax.config import CATEGORIES, Category, Invertibility, Segmenter, Start
from samjax.errors import UserError
from samjax.io import checkpoints, registry
from samjax.io.checkpoints import LoadedGenerator, LoadedNetwork

_CATEGORY_OF = {
    file.network: name for name, files in registry.CATEGORY_FILES.items() for file in files if file.role == "segmenter"
}


@dataclasses.dataclass(frozen=True)
class Flags:
    """What the scripts share."""

    image_category: Literal["demo", "cars", "faces", "cats", "custom"] | None = None
    """Sizes, letterboxing and the defaults that say "by category"; none: demo, or custom with gan_weights."""
    weights: Path | None = None
    """A folder with the category's files under their authors' names; none: those of `python -m ckpt_convert get`."""
    gan_weights: Path | None = None
    """A generator, converted or as distributed; none: the category's."""
    e4e_path: Path | None = None
    """An e4e encoder, converted or as distributed; none: the category's."""
    inv_model_path: Path | None = None
    """An invertibility predictor, converted or as distributed; none: the category's."""

    segmenter: Segmenter | None = None
    """What finds segments: felzenszwalb and slic by colour; ade20k (150 kinds of things), bisenet (parts of faces)
    and mask_rcnn (the 80 kinds of COCO) by a network; none: by category."""
    swap_channels: bool = False
    """Gives mask_rcnn red for blue, as the authors' script does; for comparing with it."""
    invertibility: Invertibility | None = None
    """Where the error maps come from: "measured" by a short inversion in each layer, or "predicted"; none: by
    category, or predicted with inv_model_path."""
    start: Start | None = None
    """Where W+ starts: the mean style, the best of 256 samples by LPIPS, or the encoder's code; none: by category, or
    encoder with e4e_path."""


class Networks(NamedTuple):
    """What `load` gives.

    Attributes:
      name: of the category; "custom" for a generator of one's own.
      category: with the flags laid over it.
      generator: with its config.
      encoder, predictor, segmenter: None where they are not needed; the segmenter also where it is a classical one.
      edits: the category's folder of directions, where there is one.
    """

    name: str
    category: Category
    generator: LoadedGenerator
    encoder: LoadedNetwork | None
    predictor: LoadedNetwork | None
    segmenter: LoadedNetwork | None
    edits: Path | None


def load(flags: Flags, *, segments_given: bool = False) -> Networks:
    """Finds and loads the networks that the flags ask for.

    Args:
      flags: the command line's.
      segments_given: whether segments come from a file, so that no segmenter is needed.

    Raises:
      UserError: files are missing (all are listed), hold something else, or do not belong together.
    """
    name = flags.image_category or ("demo" if flags.gan_weights is None else "custom")
    if name == "custom" and flags.gan_weights is None:
        raise UserError("--image_category custom needs --gan_weights, the generator")
    official = name in registry.CATEGORY_FILES
    preset = CATEGORIES.get(name)
    # Another generator in the demo's category is a stranger to the demo's networks.
    learned = preset if official or flags.gan_weights is None else None
    start = flags.start or ("encoder" if flags.e4e_path else learned.start if learned else "mean")
    maps = flags.invertibility or (
        "predicted" if flags.inv_model_path else learned.invertibility if learned else "measured"
    )
    segmenter = flags.segmenter or (preset.segmenter if preset else "felzenszwalb")
    for wanted, given, flag in (
        (start == "encoder", flags.e4e_path, "--start encoder needs --e4e_path"),
        (maps == "predicted", flags.inv_model_path, "--invertibility predicted needs --inv_model_path"),
    ):
        if wanted and given is None and not learned:
            raise UserError(f"{flag}: the category {name} has none of its own")
    # One's own generator first: whether it fits is known without the other networks.
    generator = None
    if flags.gan_weights is not None:
        generator = _generator(get.ready(flags.gan_weights, "generator", notify=print), name)
    by_network = segmenter not in get_args(segmentation.Method) and not segments_given

    roles = [
        role
        for role, wanted in (
            ("generator", official and flags.gan_weights is None),
            ("encoder", official and start == "encoder" and flags.e4e_path is None),
            ("invertibility", official and maps == "predicted" and flags.inv_model_path is None),
            ("segmenter", by_network and official and preset is not None and segmenter == preset.segmenter),
        )
        if wanted
    ]
    found: dict[str, Path] = {} if official else {"encoder": demo.ENCODER, "invertibility": demo.PREDICTOR}
    if roles:
        found |= get.get(name, flags.weights, roles=roles, fetch=False, notify=print)
    if by_network and "segmenter" not in found:
        found |= get.get(_CATEGORY_OF[segmenter], flags.weights, roles=("segmenter",), fetch=False, notify=print)
    for role, path, network in (
        ("encoder", flags.e4e_path, "e4e"),
        ("invertibility", flags.inv_model_path, "invertibility"),
    ):
        if path is not None:
            found[role] = get.ready(path, network, notify=print)

    generator = generator or _generator(found.get("generator", "demo"), name)
    category = preset or Category.for_resolution(generator.config.img_resolution)
    networks = Networks(
        name,
        dataclasses.replace(category, segmenter=segmenter, invertibility=maps, start=start),
        generator,
        checkpoints.load_network(found["encoder"], "e4e") if start == "encoder" else None,
        checkpoints.load_network(found["invertibility"], "invertibility") if maps == "predicted" else None,
        checkpoints.load_network(found["segmenter"], segmenter) if by_network else None,
        get.edits_folder(name, flags.weights) if official else None,
    )
    _check(networks)
    return networks


def _generator(source: str | Path, name: str) -> LoadedGenerator:
    """The generator, which must make images of the category's size."""
    generator = api.load_generator(source)
    made, preset = generator.config.img_resolution, CATEGORIES.get(name)
    if preset is not None and made != preset.resolution:
        raise UserError(
            f"the generator makes {made} px images, the category {name} has {preset.resolution} px: leave"
            " --image_category out, or give another generator"
        )
    return generator


def _check(networks: Networks) -> None:
    """Makes sure that the networks belong together."""
    config = networks.generator.config
    if networks.encoder is not None:
        given = networks.encoder.config
        if (given.num_styles, given.style_dim) != (config.num_ws, config.w_dim):
            raise UserError(
                f"the encoder gives {given.num_styles} styles of {given.style_dim}, the generator takes "
                f"{config.num_ws} of {config.w_dim}: they do not belong together"
            )


def check_layers(networks: Networks, latent_names: tuple[str, ...]) -> None:
    """Makes sure that the predictor, if there is one, knows these layers.

    Raises:
      UserError: it does not know some.
    """
    known = latent_names if networks.predictor is None else networks.predictor.config.latent_names
    if unknown := [name for name in latent_names if name not in known]:
        raise UserError(
            f"the invertibility predictor has no maps of {', '.join(unknown)}: choose --latent_names among "
            f"{','.join(known)}, or --invertibility measured"
        )


def segments(networks: Networks, target: np.ndarray, swap_channels: bool = False) -> np.ndarray:
    """Labels [h, w] of a target [h, w, 3], by the segmenter that was asked for."""
    return _segmenter(networks.category.segmenter, networks.segmenter, swap_channels)(target)


def segmenter(flags: Flags) -> segmentation.Segmenter:
    """The segmenter that the flags ask for, alone.

    Raises:
      UserError: its files are missing or hold something else.
    """
    preset = CATEGORIES.get(flags.image_category or "")
    name = flags.segmenter or (preset.segmenter if preset else "felzenszwalb")
    loaded = None
    if name not in get_args(segmentation.Method):
        found = get.get(_CATEGORY_OF[name], flags.weights, roles=("segmenter",), fetch=False, notify=print)
        loaded = checkpoints.load_network(found["segmenter"], name)
    return _segmenter(name, loaded, flags.swap_channels)


def _segmenter(name: Any, loaded: LoadedNetwork | None, swap_channels: bool) -> segmentation.Segmenter:
    if loaded is None:
        return functools.partial(segmentation.segment, method=name)
    config, variables, _ = loaded
    if name == "ade20k":
        return segmentation.ade20k(variables, config)
    if name == "bisenet":
        return segmentation.face_parsing(variables, config)
    return segmentation.instances(variables, config, swap_channels=swap_channels)


def predicted_maps(networks: Networks, target: np.ndarray, latent_names: tuple[str, ...]) -> np.ndarray:
    """The predictor's error maps [L, h, w] of a target [h, w, 3], for layers that `check_layers` has seen."""
    assert networks.predictor is not None
    config, variables, _ = networks.predictor
    maps = invertibility.predicted(variables, config)(target[None])[0]
    return maps[[config.latent_names.index(name) for name in latent_names]]


def encode(networks: Networks, target: np.ndarray) -> np.ndarray:
    """The encoder's code [num_ws, w_dim] of a target [h, w, 3]."""
    assert networks.encoder is not None
    config, variables, _ = networks.encoder
    return encoding.e4e(variables, config)(target[None])[0]


def origin(network: LoadedNetwork | LoadedGenerator | None) -> str | None:
    """What tells one network from another, for the notes of a run: the hash of the file that it came from."""
    return None if network is None else str(network.manifest.get("source", {}).get("sha256"))[:16]
