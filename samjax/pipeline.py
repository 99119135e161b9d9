"""SAM from an image to its edits: `Pipeline`.

    sam = samjax.Pipeline.from_pretrained("demo")
    result = sam.invert("photo.png")
    sam.edit(result, {"blue_car": 2}).save("edited.png")

An image goes one way: `analyze` finds its segments, where W+ starts, and the error map of each latent layer;
`layer_selection` gives each segment a layer; `driver` optimizes the latents; the resulting `Inversion` can be edited,
and shown by `samjax.report`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from samjax import (
    analysis,
    driver,
    editing,
    layer_selection,
    learned_start,
    loading,
    losses,
    metrics,
    results,
    runtime,
    segmentation,
)
from samjax.analysis import Analysis
from samjax.config import (
    CATEGORIES,
    CLASSICAL_SEGMENTERS,
    Category,
    InversionConfig,
    Options,
    Start,
    as_list,
    check_strengths,
    check_threshold,
    checked,
    resolve,
    resolve_category,
)
from samjax.driver import OnProgress
from samjax.errors import UserError, shown
from samjax.inversion import Items, Networks, Terms, lpips_features
from samjax.io import checkpoints, directions, files, images, provenance, styles, weights
from samjax.io.checkpoints import LoadedNetwork
from samjax.latents import RESOLUTIONS, init_latents, latent_layers, single_layer_masks
from samjax.layer_selection import Assignment
from samjax.nets import lpips, stylegan2
from samjax.nets.deeplab import PredictorConfig
from samjax.nets.e4e import E4EConfig
from samjax.nets.offset_encoder import OffsetEncoderConfig
from samjax.nets.stylegan2 import StyleGAN2Config
from samjax.results import Edits, Inversion

if TYPE_CHECKING:
    from PIL import Image

    ImageLike = str | Path | Image.Image | ArrayLike
    StartLike = str | Path | ArrayLike | Mapping[str, Any]


class Pipeline:
    """A generator with everything needed to invert and edit images.

    Attributes:
      options: as the user gave them.
      name: display name of the generator.
      category: sizes, threshold and sources, with the options applied.
      config: settings of every inversion.
      measure_steps: steps of each inversion that measures error maps.
      generator, encoder, offsets, predictor: the networks; all but the generator are None if they are not used.
      segmenter: maps an image [h, w, 3] in [-1, 1] to labels [h, w].
      directions: name to direction [num_ws, w_dim].
      layers: the latent layers in use, the most editable first.
      networks: the frozen parameters, and the prior on W+.
      gray: whether the generator's images are gray; they are three equal channels here, and so are targets.
      vgg: parameters of LPIPS-VGG, which measures error maps and results even if the loss uses another network.
    """

    def __init__(
        self,
        generator: LoadedNetwork | str | Path,
        *,
        encoder: LoadedNetwork | None = None,
        offsets: LoadedNetwork | None = None,
        predictor: LoadedNetwork | None = None,
        segmenter: segmentation.Segmenter | None = None,
        directions: Mapping[str, ArrayLike] | None = None,
        name: str | None = None,
        category: Category | None = None,
        options: Options | None = None,
        max_batch_size: int = 8,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        """Builds a pipeline from networks in memory; `from_pretrained` and `from_options` also find and load them.

        Args:
          generator: from `samjax.io.checkpoints.load_generator` or `ckpt_convert.load`, or the path of a converted one.
          encoder: e4e encoder, which gives the start of W+; if None, W+ starts at the mean style.
          offsets: offset encoder, which gives the start of all layers from there; needs the encoder.
          predictor: predictor of error maps; if None, they are measured by an inversion in each layer.
          segmenter: finds segments; the category's if None.
          directions: name to direction [num_ws, w_dim] (leading axes of 1 are allowed).
          name: display name of the generator.
          category: the category, with the options applied; derived from the options if None.
          options: the user's options.
          max_batch_size: upper limit of the default batch size.
          notify: called with one line for each message, such as a change to an input image.

        Raises:
          UserError: networks or options are inconsistent, or weights are missing or damaged.
        """
        runtime.configure()
        self.options = checked(Options() if options is None else options)
        if isinstance(generator, str | Path):
            name = name or Path(generator).name
            generator = checkpoints.load_generator(generator)
        _check_kinds(generator, encoder, offsets, predictor, segmenter, directions, category)
        category = category or resolve_category(
            self.options,
            generator=True,
            encoder=encoder is not None,
            offsets=offsets is not None,
            predictor=predictor is not None,
        )
        settings = resolve(self.options, generator.config, category=category, max_batch_size=max_batch_size)
        self._notify, self.gray = notify, generator.config.img_channels == 1
        class_idx = self.options.class_idx
        if generator.config.c_dim and class_idx is None:
            classes = generator.config.c_dim
            warn = notify or images.warn
            warn(f"the generator has {classes} classes: its prior is that of all; class_idx chooses one")
        made_rgb = stylegan2.as_rgb(generator.config, generator.params)
        generator = LoadedNetwork(*made_rgb, generator.manifest)
        self.name = name or "custom"
        self.category, self.config, self.measure_steps = settings.category, settings.config, settings.measure_steps
        self.generator, self.encoder, self.offsets, self.predictor = generator, encoder, offsets, predictor
        self._check_networks()
        given = self.options.start_latent
        self._codes = {} if given is None else styles.read(given, *self.layers_shape)
        self.segmenter = segmenter
        if segmenter is None and self.category.segmenter in CLASSICAL_SEGMENTERS:
            self.segmenter = segmentation.load(self.category.segmenter)
        self.directions = {key: self._direction(value) for key, value in (directions or {}).items()}
        self.layers = latent_layers(generator.config, self.config.latent_names)
        self.vgg = weights.load_lpips("vgg")
        perceptual = self.vgg if self.config.net == "vgg" else weights.load_lpips(self.config.net)
        key = jax.random.key(self.options.seed)
        prior = losses.generator_prior(generator.config, generator.params, key=key, class_idx=class_idx)
        self.networks = Networks(generator.params, perceptual, prior, self.vgg)

    @classmethod
    def from_pretrained(cls, name: str | Path = "demo", **options: Any) -> Pipeline:
        """A pipeline for a category, or for your own generator.

        Args:
          name: "demo", which is part of the package; "cars", "faces" or "cats", once `python -m ckpt_convert get NAME`
            has downloaded them; or a converted generator's directory or .safetensors file.
          **options: fields of `samjax.config.Options`, such as `num_opt_steps=50`.

        Raises:
          UserError: networks are missing (the message says how to get them) or damaged, or options are wrong.
        """
        if not isinstance(name, str | Path):
            raise UserError(f"give the name of a category or the path of a generator, not {shown(name)}")
        if str(name) in CATEGORIES and not (isinstance(name, Path) and name.exists()):
            given: dict[str, Any] = {"image_category": str(name)}
        elif Path(name).exists():
            given = {"gan_weights": Path(name)}
        else:
            raise UserError(f"{name} is neither a file nor a category: choose from {', '.join(CATEGORIES)}")
        if unknown := options.keys() - ({field.name for field in dataclasses.fields(Options)} - given.keys()):
            raise UserError(f"{', '.join(sorted(unknown))} cannot be given here: see samjax.config.Options")
        return cls.from_options(Options(**given, **options))

    @classmethod
    def from_options(
        cls,
        options: Options,
        *,
        name: str | None = None,
        segments_given: bool = False,
        max_batch_size: int = 8,
        notify: Callable[[str], None] | None = None,
    ) -> Pipeline:
        """A pipeline with the networks and directions that options select.

        Args:
          options: the user's options, with converted networks; `ckpt_convert.get.prepare` converts others.
          name: display name of the generator; by default that of the category or of the generator's path.
          segments_given: whether segments are given with every image, so that no segmenter is needed.
          max_batch_size: upper limit of the default batch size.
          notify: see `Pipeline`.

        Raises:
          UserError: see `from_pretrained`.
        """
        options = checked(options)
        category = resolve_category(options)
        parts = loading.load(options, category, segments_given=segments_given, notify=notify)
        return cls(
            parts.generator,
            encoder=parts.encoder,
            offsets=parts.offsets,
            predictor=parts.predictor,
            segmenter=parts.segmenter,
            directions=parts.directions,
            name=name or (category.name if options.gan_weights is None else options.gan_weights.name),
            category=category,
            options=options,
            max_batch_size=max_batch_size,
            notify=notify,
        )

    # --- from an image to its inversion ---

    def analyze(
        self,
        image: ImageLike,
        *,
        segments: str | Path | ArrayLike | None = None,
        segment_names: Mapping[int, str] | None = None,
        maps: ArrayLike | None = None,
        start: StartLike | None = None,
        name: str | None = None,
        directory: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Analysis:
        """Finds the segments of an image, where W+ starts, and the error map of each latent layer.

        Args:
          image: a path, a PIL image, or an array [H, W, 3], uint8 or float in [-1, 1].
          segments: a label image: a path, or integers [H, W] of the image's size or [h, w] of the target's. The
            segmenter finds them if None.
          segment_names: label, which is an integer, to the name of what the segment shows.
          maps: [L, h, w] error maps; predicted or measured if None.
          start: where latents start: "mean", "best", "encoder" or "learned", as in `samjax.config.Options`; or a code
            in W or W+: an array [num_ws, w_dim] or [w_dim], a mapping such as `{"W+": array}` or an inversion's
            latents, or a file; of several codes, the one that has the name of the image. As the options specify if
            None.
          name: name of the image; that of its file if None.
          directory: keeps measured maps, and finds them there again; see `invert`.
          on_progress: see `invert`.

        Raises:
          UserError: an image, segments or arrays that cannot be used.
          DivergedError: a loss is not finite.
        """
        if name is not None and not isinstance(name, str):
            raise UserError(f"name must be text, not {shown(name)}")
        named = image if isinstance(image, str | Path) else name or "image"
        start_kind, code = self._chosen_start(start, named)
        shows = {} if segment_names is None else segment_names
        if not isinstance(shows, Mapping) or not all(
            isinstance(label, numbers.Integral) and isinstance(text, str) for label, text in shows.items()
        ):
            raise UserError('segment_names maps labels, which are integers, to names, such as {7: "car"}')
        source, target = self.read_image(image, notify=self._notify)
        height, width = self.category.target_size
        size = images.image_size(image) if isinstance(image, str | Path) else source.shape[:2]
        if segments is None and self.segmenter is None:
            raise UserError("this pipeline was made without a segmenter: give segments")
        labels = self.segmenter(target) if segments is None else self._labels(segments, size)  # type: ignore[misc]
        taken = Analysis(
            name=name or Path(named).stem,
            source=source,
            target=target,
            segments=labels,
            segment_names={int(label): text for label, text in shows.items()},
            segments_from=self.category.segmenter if segments is None else "given",
            ws=self.start(target, start_kind) if code is None else code,
            ws_from=start_kind,
            layers=tuple(layer.name for layer in self.layers),
            maps=np.zeros((len(self.layers), height, width), np.float32),
            singles={},
            fingerprint=self.fingerprint,
        )
        if directory is not None:
            self._check_settings(taken, directory)
        if maps is not None:
            given = self._array(maps, "maps", taken.maps.shape)
            if given.min() < 0:
                raise UserError(f"maps are errors of at least 0; the smallest is {given.min():g}")
            return dataclasses.replace(taken, maps=given, maps_from="given")
        if self.predictor is not None:
            config, params, _ = self.predictor
            made = analysis.predict_maps(config, params, target[None])[0]
            chosen = [config.latent_names.index(layer.name) for layer in self.layers]
            return dataclasses.replace(taken, maps=made[chosen], maps_from="predicted")
        return self._measured(taken, directory, on_progress)

    def invert(
        self,
        image: ImageLike | Analysis | Inversion,
        *,
        threshold: float | None = None,
        layers: Mapping[int, str] | None = None,
        segments: str | Path | ArrayLike | None = None,
        start: StartLike | None = None,
        num_opt_steps: int | None = None,
        directory: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Inversion:
        """Inverts an image: each segment takes the first layer whose mean error is at most a threshold.

        Args:
          image: as in `analyze`, or its result. An `Inversion` is continued: its analysis, and by default its
            threshold and layers, are used again; if no segment changes its layer, optimization starts from its latents.
          threshold: mean error up to which a segment may use a layer; the category's if None.
          layers: label to layer ("W+", "F4", ...) of segments whose layer is chosen by hand.
          segments: as in `analyze`, for an image.
          start: as in `analyze`, for an image.
          num_opt_steps: steps of this inversion, 0 for the start alone; those of the options if None.
          directory: keeps what is finished, and finds it there again when the same call is repeated.
          on_progress: called between chunks of steps; None draws a progress bar if standard error is a terminal.

        Raises:
          UserError: arguments cannot be used, or `directory` holds results of other settings.
          DivergedError: a loss is not finite.
        """
        self._check_choices([] if threshold is None else [threshold], layers, num_opt_steps)
        before = image if isinstance(image, Inversion) else None
        known = self._analysis(image, segments, directory, on_progress, start)
        if threshold is None:
            threshold = self.category.threshold if before is None else before.threshold
        forced = (before.forced if before is not None else {}) if layers is None else layers
        (result,) = self._invert(
            known, [threshold], forced, num_opt_steps=num_opt_steps, directory=directory, on_progress=on_progress,
            before=before,
        )  # fmt: skip
        return result

    def sweep(
        self,
        image: ImageLike | Analysis,
        thresholds: Sequence[float] | None = None,
        *,
        layers: Mapping[int, str] | None = None,
        segments: str | Path | ArrayLike | None = None,
        directory: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Inversion]:
        """Inverts one image at several thresholds; thresholds that choose the same layers are optimized once.

        Args:
          image: as in `invert`.
          thresholds: those of the category's sweep if None.
          layers: as in `invert`.
          segments: as in `invert`.
          directory: as in `invert`.
          on_progress: as in `invert`.

        Returns:
          An inversion for each threshold.

        Raises:
          UserError: see `invert`.
          DivergedError: see `invert`.
        """
        chosen = list(self.category.sweep()) if thresholds is None else as_list(thresholds, "thresholds", "numbers")
        self._check_choices(chosen, layers)
        known = self._analysis(image, segments, directory, on_progress)
        return self._invert(known, chosen, layers or {}, directory=directory, on_progress=on_progress)

    def invert_batch(
        self,
        images: Sequence[ImageLike | Analysis],
        *,
        threshold: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Inversion]:
        """Inverts many images with one compiled program, `config.batch_size` at a time.

        Args:
          images: each as in `invert`.
          threshold: as in `invert`.
          on_progress: as in `invert`.

        Returns:
          An inversion for each image, equal to that of the image alone up to rounding, or to the bit at batch size 1.

        Raises:
          UserError: see `invert`.
          DivergedError: see `invert`; `items` are positions in `images`.
        """
        threshold = check_threshold(self.category.threshold if threshold is None else threshold)
        if (
            isinstance(images, str | Path | Analysis | Mapping)
            or getattr(images, "ndim", 4) != 4
            or not isinstance(images, Iterable)
        ):
            raise UserError("invert_batch takes a list of images: use invert for one")
        known = [self._analysis(image, None, None, on_progress) for image in images]
        if not known:
            return []
        assignments = [layer_selection.assign_layers(one.maps, one.segments, threshold) for one in known]
        layer_maps = np.concatenate([assignment.layer_maps for assignment in assignments])
        began = time.perf_counter()
        latents, terms = self._optimize(known, layer_maps, self.config, None, on_progress)
        seconds = (time.perf_counter() - began) / len(known)
        return [
            self._result(
                one,
                threshold,
                {},
                assignments[i],
                {name: value[i : i + 1] for name, value in latents.items()},
                Terms(*(term[:, i] for term in terms)),
                seconds,
                baselines=self._baselines(one),
            )
            for i, one in enumerate(known)
        ]

    def single_layers(self, known: Analysis) -> dict[str, Inversion]:
        """The inversions in each layer alone that measured the error maps.

        Args:
          known: as returned by `analyze`.

        Returns:
          Layer name to inversion, the most editable layer first; empty if the maps were predicted or given.
        """
        self._check_analysis(known)
        return {layer: self._single_layer(known, i) for i, layer in enumerate(known.layers)} if known.singles else {}

    # --- edits ---

    def edit(
        self,
        inversion: Inversion,
        directions: Mapping[str | Path, float] | ArrayLike | str | Path,
        strength: float = 1.0,
    ) -> Image.Image:
        """Edits an inverted image, along several directions at once.

        Args:
          inversion: as returned by `invert`.
          directions: direction to strength, each direction a name in `self.directions` or a file; or a single
            direction, which may also be an array [num_ws, w_dim].
          strength: strength of a single direction.

        Returns:
          The edited image at the generator's own size, without the letterbox.

        Raises:
          UserError: a name is unknown, or a file or array is not a direction of this generator.
        """
        return images.to_pil(inversion.full_size(self.edit_array(inversion, directions, strength)))

    def edit_array(
        self,
        inversion: Inversion,
        directions: Mapping[str | Path, float] | ArrayLike | str | Path,
        strength: float = 1.0,
    ) -> np.ndarray:
        """Like `edit`, but returns the generator's image: [R, R, 3] float32, in [-1, 1] up to overshoot."""
        self._check_own(inversion)
        if isinstance(directions, Mapping) and strength != 1.0:
            raise UserError("a mapping of directions has their strengths: leave strength out")
        if isinstance(directions, list | tuple) and any(isinstance(each, str | Path) for each in directions):
            raise UserError('several directions are given with their strengths, such as {"dusk": 1, "blue_car": 2}')
        given = list(directions.items()) if isinstance(directions, Mapping) else [(directions, strength)]
        factors = check_strengths([factor for _, factor in given], "edit")
        total = np.zeros(self.layers_shape, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # which `_edit` finds in the image
            for (direction, _), factor in zip(given, factors, strict=True):
                total += np.float32(factor) * self._direction(direction)
        return self._edit(inversion, total[None], (1.0,))[0, 0]

    def edit_sweep(
        self, inversion: Inversion, strengths: Sequence[float] | None = None, names: Sequence[str] | None = None
    ) -> Edits:
        """Edits an inverted image, and its baselines, along each direction by itself at several strengths.

        Args:
          inversion: as returned by `invert`.
          strengths: multiples of each direction; those of the options if None.
          names: names in `directions`; all if None.

        Returns:
          Direction to strength to method ("SAM", or a baseline) to [R, R, 3] float32, in [-1, 1] up to overshoot.

        Raises:
          UserError: a name is unknown.
        """
        self._check_own(inversion)
        wanted = list(self.directions) if names is None else as_list(names, "names", "directions")
        chosen = {name: self._direction(name) for name in wanted}
        strengths = check_strengths(self.options.edit_strengths if strengths is None else strengths, "strengths")
        vectors = np.reshape(list(chosen.values()), (-1, *self.layers_shape))
        methods = {**inversion.baselines, "SAM": inversion}
        made = {method: self._edit(item, vectors, strengths) for method, item in methods.items()}
        return {
            name: {
                strength: {method: images[d, s] for method, images in made.items()}
                for s, strength in enumerate(strengths)
            }
            for d, name in enumerate(chosen)
        }

    # --- images and files ---

    def render(self, latents: Mapping[str, Any], masks: Mapping[str, Any]) -> np.ndarray:
        """Images [N, R, R, 3] of latents and masks [N, ...], with the stored noise."""
        return driver.render(
            self.generator.config, self.generator.params, latents, masks,
            noise=self.config.stored_noise, precision=self.config.matmul_precision, batch_size=self.config.batch_size,
        )  # fmt: skip

    def read_image(
        self, image: ImageLike, *, notify: Callable[[str], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads an image, and fits it to the size at which it is reconstructed.

        Args:
          image: as in `analyze`.
          notify: called with one line for each change to the image; changes are warnings if None.

        Returns:
          The image, uint8 [H, W, 3], and the target, [h, w, 3] in [-1, 1]; in gray, with three equal channels, if the
          generator's images are.

        Raises:
          UserError: an image that cannot be used.
        """
        notify = notify or images.warn
        source = images.as_image(image, notify=notify)
        if self.gray and not np.array_equal(source, gray := images.to_gray(source)):
            notify("the image is inverted in gray, as the generator draws it")
            source = gray
        height, width = self.category.target_size
        return source, images.to_float(images.fit(source, height, width, self.options.fit))

    def start(self, target: np.ndarray, kind: Start | None = None) -> np.ndarray:
        """Where W+ starts for a target [h, w, 3]; [num_ws, w_dim]. A code that the options give is not considered.

        Args:
          target: the target.
          kind: "mean", "best", or "encoder" or "learned" for the encoder's code; the category's, or the encoder's code
            if there is an encoder, if None.

        Raises:
          UserError: the pipeline does not have the networks.
        """
        usual = "mean" if self.category.start == "given" else self.category.start
        kind = kind or ("encoder" if self.encoder is not None else usual)
        if kind in ("encoder", "learned"):
            if self.encoder is None or (kind == "learned" and self.offsets is None):
                lacking = "encoder (e4e_path)" if self.encoder is None else "offset encoder (offsets_path)"
                raise UserError(f"the start {kind!r} is not possible: this pipeline has no {lacking}")
            return analysis.encode(self.encoder.config, self.encoder.params, target[None])[0]
        key = jax.random.fold_in(jax.random.key(self.options.seed), 1)
        return analysis.start_latents(
            self.generator.config, self.networks, target[None], self.config, kind=kind, key=key,
            class_idx=self.options.class_idx,
        )[0]  # fmt: skip

    def start_latents(
        self, targets: np.ndarray, ws: np.ndarray, masks: Mapping[str, Any], learned: Sequence[bool] | None = None
    ) -> dict[str, np.ndarray]:
        """Where the latents of all layers start.

        Args:
          targets: [N, h, w, 3] in [-1, 1].
          ws: [N, num_ws, w_dim], where W+ starts.
          masks: {"F4": [N, 16, 16, 1], ...}.
          learned: [N], whether the offset encoder corrects W+ and finds the offsets, which otherwise are zero; the
            category's choice for all if None.

        Returns:
          {"W+": [N, num_ws, w_dim], "F4": [N, 16, 16, C], ...}.

        Raises:
          UserError: the pipeline has no offset encoder.
        """
        start = {name: np.array(value) for name, value in init_latents(self.layers, jnp.asarray(ws)).items()}
        chosen = [self.category.start == "learned"] * len(ws) if learned is None else learned
        rows = np.flatnonzero(chosen)
        if not rows.size:
            return start
        if self.offsets is None:
            raise UserError(
                "the analysis has the learned start, and this pipeline has no offset encoder: analyze again"
            )
        of_rows = lambda arrays: {name: np.asarray(value)[rows] for name, value in arrays.items()}  # noqa: E731
        found = learned_start.learned_latents(
            self.offsets.config, self.offsets.params, self.generator.config, self.generator.params,
            targets[rows], of_rows(masks), of_rows(start),
            noise=self.config.stored_noise, precision=self.config.matmul_precision, batch_size=self.config.batch_size,
        )  # fmt: skip
        for name, value in found.items():
            start[name][rows] = value
        return start

    def _chosen_start(self, start: StartLike | None, image: str | Path) -> tuple[Any, np.ndarray | None]:
        """The kind of start that the caller or the options choose, and the code [num_ws, w_dim] if they give one."""
        if start is None and not self._codes:
            return self.category.start, None
        if isinstance(start, str) and start in get_args(Start):
            return start, None
        if start is None:
            code = styles.choose(self._codes, image, self.options.start_latent or "")
        elif isinstance(start, str | Path):
            code = styles.choose(styles.read(start, *self.layers_shape), image, start)
        else:
            code = styles.choose(styles.collect(start, *self.layers_shape, "start"), image, "start")
        return "given", code

    def start_image(self, known: Analysis) -> np.ndarray:
        """The generator's image of where W+ starts; [R, R, 3].

        Raises:
          UserError: the analysis is by another generator.
        """
        self._check_analysis(known)
        latents = init_latents(self.layers, jnp.asarray(known.ws)[None])
        masks = {name: np.asarray(mask)[:1] for name, mask in single_layer_masks(self.layers).items()}
        return self.render(latents, masks)[0]

    def load(self, directory: str | Path) -> Inversion:
        """Loads an inversion written by `Inversion.save`, to edit it, or to invert again from its analysis.

        Raises:
          UserError: the files are missing, damaged, or of another generator.
        """
        arrays, notes = results.read(directory)
        if notes["fingerprint"] != self.fingerprint:
            raise UserError(
                f"{directory} holds an inversion by another generator ({notes['generator']}): load it with that one"
            )
        if notes["layers"] != tuple(layer.name for layer in self.layers):
            raise UserError(
                f"{directory} holds an inversion in the layers {', '.join(notes['layers'])}: give --latent_names"
            )
        sizes = [(each.resolution, each.target_size) for each in (notes["category"], self.category)]
        if sizes[0] != sizes[1]:
            raise UserError(f"{directory} holds an inversion of the category {notes['category'].name}")
        results.check_arrays(arrays, self.layers, self.category.target_size, Path(directory))
        kept: dict[str, Any] = {
            **{name: notes[name] for name in ("name", "segment_names", "segments_from", "ws_from", "layers")},
            **{name: notes[name] for name in ("maps_from", "fingerprint")},
            **{name: arrays[name] for name in ("source", "target", "segments", "ws", "maps")},
        }
        known = Analysis(
            **kept,
            singles={key.removeprefix("single_"): a for key, a in arrays.items() if key.startswith("single_")},
        )
        self._check_choices([notes["threshold"]], notes["forced"])
        assignment = self._assign(known, [notes["threshold"]], notes["forced"])
        latents = {key.removeprefix("latent_"): a for key, a in arrays.items() if key.startswith("latent_")}
        loaded = self._result(
            known, notes["threshold"], notes["forced"], assignment, latents, Terms(*arrays["terms"]), notes["seconds"],
            baselines=self._baselines(known),
        )  # fmt: skip
        as_saved = {key: notes[key] for key in ("category", "config", "measure_steps", "generator", "metrics")}
        return dataclasses.replace(loaded, **as_saved)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the generator's parameters."""
        return provenance.fingerprint(self.generator.config, self.generator.params)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that inversions depend on, except for the image, its segments, and their layers."""
        unused = {"batch_size", "chunk_steps"} | (set() if self.config.final_steps else {"final_steps", "final_lr"})
        return {
            **{name: value for name, value in dataclasses.asdict(self.config).items() if name not in unused},
            "seed": self.options.seed,
            "start": self.category.start,
            **({} if self.options.class_idx is None else {"class_idx": self.options.class_idx}),
            **({"start_latent": provenance.fingerprint(self._codes)} if self._codes else {}),
            "encoder": _source(self.encoder),
            **({"offsets": _source(self.offsets)} if self.category.start == "learned" else {}),
            "invertibility": self.category.invertibility,
            "measure_steps": self.measure_steps if self.predictor is None else None,
            "predictor": _source(self.predictor),
            "generator": self.fingerprint,
        }

    @property
    def layers_shape(self) -> tuple[int, int]:
        """(num_ws, w_dim) of W+."""
        return self.generator.config.num_ws, self.generator.config.w_dim

    # --- internals ---

    def _check_own(self, inversion: Inversion) -> None:
        """Checks that an inversion is one by this generator."""
        if not isinstance(inversion, Inversion):
            raise UserError(f"give an inversion, as returned by invert, not {shown(inversion)}")
        if inversion.fingerprint != self.fingerprint:
            raise UserError(f"the inversion is by another generator ({inversion.generator}): invert the image again")

    def _check_networks(self) -> None:
        config = self.generator.config
        if self.encoder is not None:
            given = self.encoder.config
            if (given.num_styles, given.style_dim) != (config.num_ws, config.w_dim):
                raise UserError(
                    f"the encoder gives {given.num_styles} styles of {given.style_dim}, the generator takes "
                    f"{config.num_ws} of {config.w_dim}: use networks that belong together"
                )
            if given.max_size < max(self.category.target_size):
                raise UserError(
                    f"the encoder takes images of at most {given.max_size} px, the target has "
                    f"{max(self.category.target_size)} px: use networks that belong together"
                )
        if self.offsets is not None:
            learned_start.check(self.offsets.config, config)
            names = [name for name in self.config.latent_names if name != "W+"]
            if unknown := [name for name in names if RESOLUTIONS[name] not in self.offsets.config.resolutions]:
                raise UserError(
                    f"the offset encoder has no {', '.join(unknown)}: leave these out of --latent_names, or give"
                    " another --start"
                )
        if self.predictor is not None:
            known = self.predictor.config.latent_names
            if unknown := [name for name in self.config.latent_names if name not in known]:
                raise UserError(
                    f"the invertibility predictor has no maps of {', '.join(unknown)}: choose --latent_names from "
                    f"{','.join(known)}, or --invertibility measured"
                )

    def _analysis(
        self,
        image: ImageLike | Analysis | Inversion,
        segments: Any,
        directory: str | Path | None,
        on_progress: OnProgress | None,
        start: StartLike | None = None,
    ) -> Analysis:
        if isinstance(image, Inversion):
            self._check_own(image)
        if directory is not None and not isinstance(directory, str | Path):
            raise UserError(f"directory must be a path, not {shown(directory)}")
        known = image.analysis if isinstance(image, Inversion) else image
        if not isinstance(known, Analysis):
            return self.analyze(known, segments=segments, start=start, directory=directory, on_progress=on_progress)
        for what, value in (("segments", segments), ("a start", start)):
            if value is not None:
                raise UserError(f"{what} can be given with an image only: pass it to analyze")
        self._check_analysis(known)
        return known

    def _check_analysis(self, known: Analysis) -> None:
        """Checks that an analysis is one by this pipeline, or by another with this generator and these layers."""
        if not isinstance(known, Analysis):
            raise UserError(f"give an analysis, as returned by analyze, not {shown(known)}")
        if known.layers != tuple(layer.name for layer in self.layers):
            raise UserError(f"the analysis is of the layers {', '.join(known.layers)}: analyze the image again")
        if known.target.shape[:2] != self.category.target_size:
            raise UserError(f"the analysis is of {known.target.shape[:2]} px: analyze the image again")
        if known.fingerprint not in ("", self.fingerprint) or known.ws.shape != self.layers_shape:
            raise UserError("the analysis is by another generator: analyze the image again")

    def _labels(self, segments: str | Path | ArrayLike, size: tuple[int, int]) -> np.ndarray:
        height, width = self.category.target_size
        if isinstance(segments, str | Path):
            return images.read_segments(segments, height, width, size, self.options.fit)
        labels = self._as_array(segments, "segments")
        if labels.dtype.kind not in "iu" or labels.ndim != 2:
            raise UserError(f"segments must be integers [H, W], not {labels.dtype} {list(labels.shape)}")
        if labels.shape == (height, width):
            return images.fit_labels(labels, height, width)
        if labels.shape != tuple(size):
            raise UserError(
                f"segments of {labels.shape[0]} x {labels.shape[1]} pixels do not fit the image, which has "
                f"{size[0]} x {size[1]}"
            )
        return images.fit_labels(labels, height, width, self.options.fit)

    def _start_latents(self, known: Sequence[Analysis], masks: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Where the latents of N analyzed images start, with masks [N, ...]; [N, ...] each."""
        targets, ws = np.stack([one.target for one in known]), np.stack([one.ws for one in known])
        return self.start_latents(targets, ws, masks, [one.ws_from == "learned" for one in known])

    def _measured(self, known: Analysis, directory: str | Path | None, on_progress: OnProgress | None) -> Analysis:
        """`known` with maps measured by an inversion in each layer, or read from `directory`."""
        path = None if directory is None else Path(directory) / "measured.npz"
        if path is not None and path.exists():
            self._note(f"resuming: the single-layer inversions are done ({path.name})")
            kept = files.read_npz(path)
            results.check_measured(kept, self.layers, self.category.target_size, path)
        else:
            config = driver.even_batches(self.config, len(self.layers))
            config = dataclasses.replace(config, num_opt_steps=self.measure_steps)
            began = time.perf_counter()
            with _progress("single layers", on_progress) as watch:
                alone = self._start_latents([known] * len(self.layers), single_layer_masks(self.layers))
                maps, latents, terms = analysis.measure_maps(
                    self.generator.config, self.networks, known.target[None],
                    {name: value[None] for name, value in alone.items()}, config, seed=self.options.seed,
                    map_params=self.vgg, map_net="vgg", on_progress=watch,
                )  # fmt: skip
            kept = {"maps": maps[0], "terms": np.stack([term[:, 0] for term in terms])}
            kept |= {f"latent_{name}": value[0] for name, value in latents.items()}
            kept |= {"seconds": np.asarray((time.perf_counter() - began) / len(self.layers))}
            if path is not None:
                files.write_npz(path, kept)
        singles = {name: array for name, array in kept.items() if name != "maps"}
        return dataclasses.replace(known, maps=kept["maps"], singles=singles, maps_from="measured")

    def _check_choices(
        self, thresholds: Sequence[float], layers: Mapping[int, str] | None, num_opt_steps: int | None = None
    ) -> None:
        """Checks what the caller chooses for an inversion, as far as that is possible before the image is analyzed."""
        for threshold in thresholds:
            check_threshold(threshold)
        if layers is not None and not isinstance(layers, Mapping):
            raise UserError(f'layers maps segments to layers, such as {{3: "F10"}}; it is {shown(layers)}')
        names = [layer.name for layer in self.layers]
        if unknown := [layer for layer in (layers or {}).values() if layer not in names]:
            raise UserError(f"unknown latent layer {', '.join(map(shown, unknown))}: choose from {', '.join(names)}")
        if num_opt_steps is not None:
            try:
                dataclasses.replace(self.config, num_opt_steps=num_opt_steps)
            except ValueError as error:
                raise UserError(str(error)) from error

    def _assign(self, known: Analysis, thresholds: Sequence[float], forced: Mapping[int, str]) -> Assignment:
        """The layer of each segment at each threshold."""
        names, labels = list(known.layers), set(np.unique(known.segments).tolist())
        if absent := [label for label in forced if label not in labels]:
            missing, present = (", ".join(map(shown, each)) for each in (absent, sorted(labels)))
            raise UserError(f"the image has no segment {missing}: its segments are {present}")
        chosen = layer_selection.assign_layers(known.maps, known.segments, list(thresholds))
        indices = {label: names.index(layer) for label, layer in forced.items()}
        return layer_selection.force_layers(chosen, known.segments, indices)

    def _invert(
        self,
        known: Analysis,
        thresholds: list[float],
        forced: Mapping[int, str],
        *,
        num_opt_steps: int | None = None,
        directory: str | Path | None = None,
        on_progress: OnProgress | None = None,
        before: Inversion | None = None,
    ) -> list[Inversion]:
        """An inversion for each threshold; equal layer maps are optimized once, and finished ones are not repeated."""
        steps = self.config.num_opt_steps if num_opt_steps is None else num_opt_steps
        config = dataclasses.replace(self.config, num_opt_steps=steps)
        assignment = self._assign(known, thresholds, forced)
        if directory is not None:
            self._check_settings(known, directory)
        continues = before is not None and np.array_equal(before.assignment.layer_maps, assignment.layer_maps)
        begin = before.latents if before is not None and continues else None

        first, position = layer_selection.unique_layer_maps(assignment.layer_maps)
        if len(first) < len(thresholds):
            self._note(f"{len(thresholds)} thresholds give {len(first)} different layer maps")
        paths = [Path(directory) / f"latents_T{t:.3f}.npz" if directory else None for t in thresholds]
        done: dict[int, dict[str, np.ndarray]] = {}
        for i, path in enumerate(paths):
            kept = None if continues else self._kept(path, assignment.layer_maps[i], config.num_opt_steps)
            if kept is not None:
                self._note(f"resuming: threshold {thresholds[i]:.3f} is done")
                done[position[i]], paths[i] = kept, None  # nothing to write
        if todo := [k for k in range(len(first)) if k not in done]:
            began = time.perf_counter()
            chosen = assignment.layer_maps[[first[k] for k in todo]]
            latents, terms = self._optimize([known] * len(todo), chosen, config, begin, on_progress)
            seconds = np.asarray((time.perf_counter() - began) / len(todo))
            for i, k in enumerate(todo):
                done[k] = {f"latent_{name}": value[i : i + 1] for name, value in latents.items()}
                done[k] |= {"terms": np.stack([term[:, i] for term in terms]), "seconds": seconds}

        baselines, made = self._baselines(known), []
        for i, threshold in enumerate(thresholds):
            arrays, layer_map = done[position[i]], assignment.layer_maps[i : i + 1]
            if (path := paths[i]) is not None:
                files.write_npz(path, {**arrays, "layer_map": layer_map[0]})
            latents = {name.removeprefix("latent_"): a for name, a in arrays.items() if name.startswith("latent_")}
            one = assignment._replace(layers=assignment.layers[i : i + 1], layer_maps=layer_map)
            terms, seconds = Terms(*arrays["terms"]), float(arrays["seconds"])
            made.append(self._result(known, threshold, forced, one, latents, terms, seconds, baselines=baselines))
        return made

    def _kept(self, path: Path | None, layer_map: np.ndarray, num_opt_steps: int) -> dict[str, np.ndarray] | None:
        """The finished inversion at `path`, if there is one with this layer map and number of steps."""
        if path is None or not path.exists():
            return None
        arrays = files.read_npz(path)
        results.check_kept(arrays, self.layers, self.category.target_size, path)
        fits = np.array_equal(arrays["layer_map"], layer_map) and arrays["terms"].shape[1] == num_opt_steps
        return arrays if fits else None

    def _optimize(
        self,
        known: Sequence[Analysis],
        layer_maps: np.ndarray,
        config: InversionConfig,
        begin: Mapping[str, np.ndarray] | None,
        on_progress: OnProgress | None,
    ) -> tuple[dict[str, np.ndarray], Terms]:
        """Optimizes N items, each an analyzed image with a layer map [h, w].

        Optimization starts from the latents `begin` of one item, or from where W+ starts if None.

        Returns:
          Latents [N, ...], and loss terms [steps, N].
        """
        masks = layer_selection.stack_masks(layer_maps, self.layers)
        start = self._start_latents(known, masks)
        items = Items(np.stack([one.target for one in known]), masks, start, np.full(len(known), self.options.seed))
        config = driver.even_batches(config, len(known))
        states = None if begin is None else driver.starting_states(items, begin, config)
        with _progress("SAM", on_progress) as watch:
            latents, terms = driver.run(
                self.generator.config, self.networks, items, config, on_progress=watch, states=states
            )
        return {name: np.asarray(value) for name, value in latents.items()}, terms

    def _baselines(self, known: Analysis) -> dict[str, Inversion]:
        """The inversions in the first and in the last layer alone, if they measured the maps."""
        ends = (0, len(known.layers) - 1) if known.singles else ()
        return {known.layers[i]: self._single_layer(known, i) for i in ends}

    def _single_layer(self, known: Analysis, i: int) -> Inversion:
        """The inversion in layer i alone, of an analysis with measured maps."""
        threshold = self.category.threshold
        forced = layer_selection.everywhere(known.segments, known.layers[i])
        singles = {name: array[i : i + 1] for name, array in known.singles.items() if name.startswith("latent_")}
        latents = {name.removeprefix("latent_"): array for name, array in singles.items()}
        masks = {name: np.asarray(mask)[i : i + 1] for name, mask in single_layer_masks(self.layers).items()}
        assignment, terms = self._assign(known, [threshold], forced), Terms(*known.singles["terms"][:, :, i])
        seconds = float(known.singles.get("seconds", math.nan))
        return self._result(known, threshold, forced, assignment, latents, terms, seconds, masks=masks)

    def _result(
        self,
        known: Analysis,
        threshold: float,
        forced: Mapping[int, str],
        assignment: Assignment,
        latents: Mapping[str, np.ndarray],
        terms: Terms,
        seconds: float,
        *,
        masks: Mapping[str, np.ndarray] | None = None,
        baselines: Mapping[str, Inversion] | None = None,
    ) -> Inversion:
        """The `Inversion` of finished latents, with the image they form and its metrics."""
        masks = layer_selection.stack_masks(assignment.layer_maps, self.layers) if masks is None else masks
        image = self.render(latents, masks)[0]
        height, width = known.target.shape[:2]
        made = losses.comparable(jnp.asarray(image)[None], max(height, width), height, width)
        pair = (lpips_features(self.vgg, x, "vgg", "highest", False) for x in (made, jnp.asarray(known.target)[None]))
        distance = float(_distance(self.vgg, *pair)[0])
        quality = metrics.quality(np.asarray(made[0]), known.target)
        return Inversion(
            analysis=known,
            category=self.category,
            config=dataclasses.replace(self.config, num_opt_steps=len(terms.total)),
            measure_steps=self.measure_steps,
            generator=self.name,
            fingerprint=self.fingerprint,
            threshold=threshold,
            forced=dict(forced),
            assignment=assignment,
            latents=latents,
            masks=masks,
            image=image,
            terms=terms,
            metrics={"MSE": quality.mse, "PSNR": quality.psnr, "SSIM": quality.ssim, "LPIPS": distance},
            seconds=seconds,
            baselines=baselines or {},
        )

    def _edit(self, inversion: Inversion, vectors: np.ndarray, strengths: Sequence[float]) -> np.ndarray:
        """[D, S, R, R, 3] of directions [D, num_ws, w_dim]."""
        at_once = 4 if jax.default_backend() == "cpu" else 16  # a CPU is not faster with more
        made = editing.edit(
            self.generator.config, self.generator.params, inversion.latents, inversion.masks, vectors, strengths,
            noise=self.config.stored_noise, precision=self.config.matmul_precision,
            batch_size=max(min(at_once, len(vectors) * len(strengths)), 1),
        )  # fmt: skip
        if not np.isfinite(made).all():
            raise UserError("the edited image has values that are not finite: give smaller strengths")
        return made

    def _direction(self, direction: str | Path | ArrayLike) -> np.ndarray:
        """[num_ws, w_dim], from a name, a file, or an array."""
        if isinstance(direction, str) and direction in self.directions:
            return self.directions[direction]
        if isinstance(direction, str | Path):
            if not Path(direction).suffix:
                known = ", ".join(self.directions) or "none"
                raise UserError(
                    f"there is no direction {str(direction)!r}: choose from {known}; a file needs its suffix"
                )
            return directions.read_one(direction, *self.layers_shape)
        return directions.check(self._as_array(direction, "the direction"), *self.layers_shape, "the direction")

    def _check_settings(self, known: Analysis, directory: str | Path) -> None:
        """Checks that results in `directory` were made with the same settings."""
        settings = {
            **self.settings,
            "target": provenance.fingerprint(known.target),
            "start": known.ws_from,
            **({"offsets": _source(self.offsets)} if known.ws_from == "learned" else {}),
            **({"ws": provenance.fingerprint(known.ws)} if known.ws_from == "given" else {}),
            "segments": [known.segments_from, self.options.swap_channels]
            if known.segments_from != "given"
            else provenance.fingerprint(known.segments),
        }
        provenance.check_settings(Path(directory) / "settings.json", settings, "directory")

    @staticmethod
    def _as_array(values: ArrayLike, what: str) -> np.ndarray:
        try:
            return np.asarray(values)
        except Exception as error:  # ragged lists, and objects with conversions of their own
            raise UserError(f"{what} must be an array, not {shown(values)}") from error

    def _array(self, values: ArrayLike, what: str, shape: tuple[int, ...]) -> np.ndarray:
        array = self._as_array(values, what)
        if array.shape != tuple(shape) or array.dtype.kind not in "fiu":
            raise UserError(f"{what} must be numbers {list(shape)}, not {array.dtype} {list(array.shape)}")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{what} hold values that are not finite")
        return array

    def _note(self, line: str) -> None:
        if self._notify is not None:
            self._notify(line)


def _check_kinds(
    generator: Any, encoder: Any, offsets: Any, predictor: Any, segmenter: Any, directions: Any, category: Any
) -> None:
    """Raises a UserError that names the argument of `Pipeline` that is something else, if there is one."""

    def is_network(value: Any, config: type) -> bool:
        return isinstance(value, LoadedNetwork) and isinstance(value.config, config)

    by_name = "a function (the options choose one by its name)"
    for name, value, is_right, wanted in (
        ("generator", generator, is_network(generator, StyleGAN2Config), "a loaded generator, or the path of one"),
        ("encoder", encoder, encoder is None or is_network(encoder, E4EConfig), "a loaded encoder"),
        ("offsets", offsets, offsets is None or is_network(offsets, OffsetEncoderConfig), "a loaded offset encoder"),
        ("predictor", predictor, predictor is None or is_network(predictor, PredictorConfig), "a loaded predictor"),
        ("segmenter", segmenter, segmenter is None or callable(segmenter), by_name),
        ("directions", directions, isinstance(directions, Mapping | None), "a mapping of names to directions"),
        ("category", category, isinstance(category, Category | None), "a samjax.config.Category"),
    ):
        if not is_right:
            raise UserError(f"{name} must be {wanted}, not {shown(value)}")


@contextlib.contextmanager
def _progress(description: str, on_progress: OnProgress | None) -> Iterator[OnProgress]:
    """`on_progress`, or a progress bar if standard error is a terminal."""
    if on_progress is not None:
        yield on_progress
        return
    with driver.progress_bar(description, disable=None) as bar:
        yield bar


_distance = jax.jit(lpips.distance)


def _source(network: LoadedNetwork | None) -> str | None:
    """Identifies a network: the hash of its source file."""
    return None if network is None else str(network.manifest.get("source", {}).get("sha256"))[:16]
