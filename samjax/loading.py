"""Finding and loading the networks and directions that options select, in the formats of samjax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from samjax import demo, segmentation
from samjax.config import CLASSICAL_SEGMENTERS, Category, Options, required_roles, resolve, segmenter_category
from samjax.errors import UserError
from samjax.io import checkpoints, directions, registry
from samjax.io.checkpoints import LoadedNetwork


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """The result of `load`.

    Attributes:
      generator: the generator.
      encoder: the encoder; None if W+ starts without one.
      offsets: the offset encoder; None if F layers start at zero.
      predictor: the predictor; None if error maps are measured.
      segmenter: the segmenter; None if segments are given with every image.
      directions: name to direction [num_ws, w_dim].
    """

    generator: LoadedNetwork
    encoder: LoadedNetwork | None
    offsets: LoadedNetwork | None
    predictor: LoadedNetwork | None
    segmenter: segmentation.Segmenter | None
    directions: Mapping[str, np.ndarray]


def load(
    options: Options, category: Category, *, segments_given: bool, notify: Callable[[str], None] | None = None
) -> Parts:
    """Loads everything that options select.

    Args:
      options: the user's options.
      category: as returned by `resolve_category`.
      segments_given: whether segments are given with every image.
      notify: called with one line for each message, such as files that are passed over.

    Raises:
      UserError: something is missing, damaged, or does not fit.
    """
    own = options.gan_weights is not None
    components = directions.parse_components(options.components)
    generator = None
    if options.gan_weights is not None:  # first, so that a wrong one is reported early
        generator = checkpoints.load_generator(options.gan_weights)
        resolve(options, generator.config, category=category)
    roles = required_roles(options, segmenter=not segments_given)
    found = {role: registry.find_converted(category.name, role) for role in roles}
    if generator is None:
        generator = checkpoints.load_generator(found["generator"]) if "generator" in found else demo.load_generator()
    encoder = offsets = predictor = None
    if category.start in ("encoder", "learned"):
        encoder = _learned("e4e", options.e4e_path or found.get("encoder"))
    # The demo's own is always at hand, for single images that ask for the learned start.
    demos = category.name == "demo" and not own and options.e4e_path is None and encoder is not None
    if category.start == "learned" or demos:
        offsets = _learned("offsets", options.offsets_path)
    if category.invertibility == "predicted":
        predictor = _learned("invertibility", options.inv_model_path or found.get("invertibility"))
    segmenter = None if segments_given else _segmenter(category.segmenter, options, found.get("segmenter"))
    directory = options.edits_folder
    if directory is None and category.name == "demo" and not own:
        directory = demo.EDITS
    elif directory is None and category.official:
        directory = registry.find_edits(category.name, options.weights)
    edits: Mapping[str, np.ndarray] = {}
    for flag, wanted in (("--generate_edits", options.generate_edits), ("--components", components)):
        if wanted and directory is None:
            raise UserError(f"{flag} needs --edits_folder, a directory of directions")
    if options.generate_edits is not False and directory is not None:
        shape = generator.config.num_ws, generator.config.w_dim
        edits = directions.read_folder(directory, *shape, components=components, notify=notify)
    return Parts(generator, encoder, offsets, predictor, segmenter, edits)


def _learned(network: str, path: Path | None) -> LoadedNetwork:
    """The learned network at a path; without one, the demo's."""
    embedded = {"e4e": demo.ENCODER, "offsets": demo.OFFSETS, "invertibility": demo.PREDICTOR}
    return checkpoints.load_network(path or embedded[network], network, trusted=path is None)


def _segmenter(name: str, options: Options, found: Path | None) -> segmentation.Segmenter:
    if name in CLASSICAL_SEGMENTERS:
        return segmentation.load(name)
    path = found or registry.find_converted(segmenter_category(name), "segmenter")
    return segmentation.load(name, checkpoints.load_network(path, name), swap_channels=options.swap_channels)
