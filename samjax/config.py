"""Settings: image categories, the settings of the optimization, user options, and how these are resolved."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from samjax.errors import UserError, check_seed, check_types, shown
from samjax.latents import LATENT_NAMES, latent_layers, parse_latent_names
from samjax.nets.stylegan2 import StyleGAN2Config

CategoryName = Literal["demo", "cars", "faces", "cats", "custom"]
Segmenter = Literal["felzenszwalb", "slic", "ade20k", "bisenet", "mask_rcnn"]
CLASSICAL_SEGMENTERS = ("felzenszwalb", "slic")
Invertibility = Literal["measured", "predicted"]
Start = Literal["mean", "best", "encoder", "learned"]
Preset = Literal["reference", "fast"]
Perceptual = Literal["vgg", "alex", "none"]
Precision = Literal["highest", "high", "default", "bfloat16"]
Fit = Literal["stretch", "letterbox", "crop"]


_LARGEST = float(np.finfo(np.float32).max)
_MOST = 2**31 - 1  # that a compiled program counts
_RANGES = {
    "lr": "it is above 0",
    "final_lr": "it is above 0",
    "layer_rate": "it is above 0",
    "beta1": "it is 0 or more, and below 1",
    "beta2": "it is 0 or more, and below 1",
}


# --- checks ---


def is_finite(value: Any) -> bool:
    """Whether a value is a number that float32 has, up to rounding: neither infinite, NaN, nor a boolean."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(float(value)) <= _LARGEST
    except OverflowError:
        return False


def check_strengths(strengths: Any, what: str = "--edit_strengths") -> tuple[float, ...]:
    """Checks that strengths of edits are finite numbers, of which there may be any number, and returns them."""
    found = as_list(strengths, what, "numbers")
    for strength in found:
        if not is_finite(strength):
            raise UserError(f"{what}: a strength must be a finite number, not {shown(strength)}")
    return tuple(map(float, found))


def check_threshold(threshold: Any, what: str = "the threshold") -> float:
    """Checks that a threshold is a finite number, 0 or more, and returns it."""
    if not is_finite(threshold) or threshold < 0:
        raise UserError(f"{what} must be a finite number, 0 or more, not {shown(threshold)}")
    return float(threshold)


def as_list(values: Any, what: str, of: str) -> list[Any]:
    """A list of what a caller gives as several values, an array or anything that can be iterated over.

    Args:
      values: what the caller gives.
      what: the name of the argument, for the message.
      of: what it is a list of, for the message.

    Raises:
      UserError: it is a single value, or text.
    """
    if hasattr(values, "__array__"):
        values = np.asarray(values).tolist()
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"{what} must be a list of {of}, not {shown(values)}")
    return list(values)


@functools.lru_cache(maxsize=32)
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


# --- settings of the optimization ---


@dataclasses.dataclass(frozen=True)
class InversionConfig:
    """How latents are optimized; the defaults are the authors' (SAM, CVPR 2022, and their public code).

    The first group changes numbers in a compiled program only; the second changes the program itself.

    Attributes:
      num_opt_steps: Adam steps; 0 for the start alone.
      final_steps: how many of them, the last ones, use LPIPS-VGG whatever `lpips_type` is, at `final_lr` and with new
        moments, and move W+ at a fifth of the rate. A squared error is cheap and quick to approach; it leaves blur, and
        AlexNet's features fine noise, which a few steps with VGG remove.
      final_lr: learning rate at the first of these steps; it falls along half a cosine.
      lr: highest learning rate; see `samjax.losses.learning_rate` for the schedule.
      layer_rate: learning rate of an F layer relative to that of the next coarser one. Adam moves every offset by about
        the rate, and a finer layer has four times as many: from a start that is close already, it needs a lower rate.
      lr_rampdown_length, lr_rampup_length: fractions of the run in which the learning rate falls and rises.
      beta1, beta2: Adam's decay rates.
      lambda_mse, lambda_lpips: weights of the image terms.
      lambda_f_rec: weight of the squared distance of the offsets from where they started.
      lambda_delta: weight of the distance between the styles of W+.
      lambda_mvg: weight of the prior on W+.

      latent_names: latent layers to optimize, the most editable first.
      lpips_type: network of the perceptual term, "vgg" or "alex"; "none" leaves the term out of all but final steps.
      noise: the generator's noise during optimization: drawn anew at every step ("random"), the stored one, or none.
      loss_resolution: larger images are reduced to this size before they are compared.
      batch_size: items (targets with their masks) in one program.
      chunk_steps: steps between two visits to the host; None means 25, or 1 on a CPU, where XLA runs the body of a
        longer loop on one thread.
      precision: precision of products and convolutions in the optimization. "highest" is full float32 on every device;
        "high" and "default" are JAX's, which a CPU ignores (TF32 on NVIDIA GPUs; three passes of bfloat16, or one, on
        TPUs); "bfloat16" keeps kernels and activations of LPIPS and of the generator's four highest resolutions in
        16 bits, with sums in float32, and everything else in full float32.

    Raises:
      UserError: a setting has another type, or a value that is not among its choices.
      ValueError: a setting is out of range.
    """

    num_opt_steps: int = 1001
    final_steps: int = 0
    lr: float = 0.05
    final_lr: float = 0.1
    layer_rate: float = 1.0
    lr_rampdown_length: float = 0.25
    lr_rampup_length: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    lambda_mse: float = 1.0
    lambda_lpips: float = 1.0
    lambda_f_rec: float = 5.0
    lambda_delta: float = 1e-3
    lambda_mvg: float = 1e-8

    latent_names: tuple[str, ...] = LATENT_NAMES
    lpips_type: Perceptual = "vgg"
    noise: Literal["random", "const", "none"] = "random"
    loss_resolution: int = 256
    batch_size: int = 1
    chunk_steps: int | None = None
    precision: Precision = "highest"

    def __post_init__(self) -> None:
        check_types(self, _hints(type(self)))
        lowest = {"num_opt_steps": 0, "final_steps": 0, "loss_resolution": 1, "batch_size": 1, "chunk_steps": 1}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {shown(value)}")
            if value is not None and value > _MOST:
                raise ValueError(f"{name} must be at most {_MOST}, not {shown(value)}")
        if unknown := [name for name in self.latent_names if name not in LATENT_NAMES]:
            raise ValueError(f"latent_names cannot have {', '.join(map(repr, unknown))}: choose from {LATENT_NAMES}")
        inside = {
            "lr": self.lr > 0,
            "final_lr": self.final_lr > 0,
            "layer_rate": self.layer_rate > 0,
            "beta1": 0 <= self.beta1 < 1,
            "beta2": 0 <= self.beta2 < 1,
        }
        names = (field.name for field in dataclasses.fields(self) if field.name.startswith(("lambda_", "lr_")))
        inside |= {name: getattr(self, name) >= 0 for name in names}
        for name, is_inside in inside.items():
            value = getattr(self, name)
            if not is_inside:  # nor if it is NaN
                raise ValueError(f"{name} cannot be {shown(value)}: {_RANGES.get(name, 'it is 0 or more')}")

    @property
    def net(self) -> Literal["vgg", "alex"]:
        """The LPIPS network of what needs one whatever the loss is: error maps, trainings, the best of samples."""
        return "vgg" if self.lpips_type == "none" else self.lpips_type

    @property
    def half_precision(self) -> bool:
        """Whether the parts that `precision` describes run in bfloat16."""
        return self.precision == "bfloat16"

    @property
    def matmul_precision(self) -> Literal["highest", "high", "default"]:
        """The precision of float32 products, for `jax.default_matmul_precision`."""
        return "highest" if self.precision == "bfloat16" else self.precision

    @property
    def stored_noise(self) -> Literal["const", "none"]:
        """The noise for images rendered from finished latents: never drawn anew."""
        return "none" if self.noise == "none" else "const"


# --- categories ---


@dataclasses.dataclass(frozen=True)
class Category:
    """One kind of image: its sizes, and the defaults of its inversions.

    Attributes:
      name: the name that users give.
      resolution: the generator's image size.
      target_size: (height, width) of target, segments and error maps. Where the height is smaller, the generator's
        images are letterboxed: masks get rows of zeros, and images lose rows, above and below.
      threshold: mean error up to which a segment may use a layer.
      threshold_range: lowest and highest threshold of a sweep.
      segmenter: how segments are found unless a label image is given: by a classical method, or a network.
      invertibility: where error maps come from: a short inversion in each layer, or the predictor.
      start: where latents start: W+ at the mean style, at the best of some samples, at the encoder's code, or at a code
        that is given; or all layers at what the offset encoder finds from that code.
      config: default settings of its inversions.
      learned: the same with the learned start; those of `config` if None.
      official: whether the authors of SAM distribute networks for it.

    Raises:
      UserError: an attribute has another type, or a value that is not among its choices.
      ValueError: a size or threshold is out of range.
    """

    name: str
    resolution: int
    target_size: tuple[int, int] = (256, 256)
    threshold: float = 0.225
    threshold_range: tuple[float, float] = (0.1, 0.4)
    segmenter: Segmenter = "felzenszwalb"
    invertibility: Invertibility = "measured"
    start: Start | Literal["given"] = "mean"
    config: InversionConfig = InversionConfig()
    learned: InversionConfig | None = None
    official: bool = False

    def __post_init__(self) -> None:
        check_types(self, _hints(type(self)))
        if len(self.target_size) != 2 or not all(1 <= size <= _MOST for size in (self.resolution, *self.target_size)):
            raise ValueError(f"resolution and target_size cannot be {self.resolution} and {shown(self.target_size)}")
        thresholds = (self.threshold, *self.threshold_range)
        if len(thresholds) != 3 or not all(is_finite(value) and value >= 0 for value in thresholds):
            raise ValueError(f"threshold and threshold_range cannot be {shown(thresholds)}: they are 0 or more")

    @property
    def settings(self) -> InversionConfig:
        """Default settings of inversions from its start."""
        return self.learned if self.start == "learned" and self.learned is not None else self.config

    @classmethod
    def for_resolution(cls, resolution: int) -> Category:
        """The category of a custom generator: square images, compared at 256 px or at its own size if smaller."""
        size = min(resolution, 256)
        return cls("custom", resolution, target_size=(size, size))

    def sweep(self, step: float = 0.025) -> tuple[float, ...]:
        """The thresholds of a sweep: the range in steps, then 1, at which nearly every segment uses W+.

        >>> Category("x", 256, threshold_range=(0.1, 0.2)).sweep()
        (0.1, 0.125, 0.15, 0.175, 0.2, 1.0)
        """
        low, high = self.threshold_range
        count = round((high - low) / step) + 1
        return (*(round(low + i * step, 6) for i in range(count)), 1.0)


def _official(name: str, resolution: int, segmenter: Segmenter, **settings: Any) -> Category:
    """A category whose networks the authors of SAM distribute."""
    return Category(
        name, resolution, segmenter=segmenter, invertibility="predicted", start="encoder", official=True, **settings
    )


CATEGORIES = {
    category.name: category
    for category in (
        _official("cars", 512, "ade20k", target_size=(192, 256)),
        _official("faces", 1024, "bisenet"),
        _official("cats", 256, "mask_rcnn", threshold_range=(0.2, 0.45)),
        # From the learned start a few steps with the squared error and fewer with LPIPS-VGG suffice. From elsewhere
        # AlexNet's LPIPS and a hundred large steps: the offsets of the narrow generator have to grow larger than those
        # of config-f before they show, so they cost less.
        Category(
            "demo",
            256,
            threshold=0.35,  # chosen on hard scenes that no table shows: `evaluate.py --scene_seed 2`
            threshold_range=(0.2, 0.5),
            invertibility="predicted",
            start="learned",
            config=InversionConfig(num_opt_steps=100, lr=0.1, lambda_f_rec=0.5, lpips_type="alex"),
            learned=InversionConfig(
                num_opt_steps=30,
                final_steps=6,
                lr=0.1,
                layer_rate=0.5,
                lr_rampdown_length=0.5,
                lr_rampup_length=0.0,
                beta2=0.99,
                lambda_mse=3.0,
                lambda_f_rec=3.0,
                lpips_type="none",
            ),
        ),
    )
}


def with_preset(category: Category, preset: Preset | None) -> InversionConfig:
    """The settings of a category's inversions with the schedule of a preset.

    "reference" is the authors' schedule. "fast" takes 60 steps: 48 with the squared error at a high rate, which find
    the large forms, and 12 with LPIPS-VGG. It was chosen on hard scenes of the demo
    (`experiments/evaluate.py --scene_seed 2`). Both are meant for any start. With None, the category has its own.
    """
    if preset is None:
        return category.settings
    names = ["num_opt_steps", "final_steps", "lr", "final_lr", "layer_rate", "beta2"]
    names += ["lr_rampdown_length", "lr_rampup_length"]
    schedule = InversionConfig()
    if preset == "fast":
        schedule = InversionConfig(60, 12, lr=0.2, lr_rampup_length=0.0, lambda_mse=3.0, lpips_type="none")
        names += ["lambda_mse", "lpips_type"]  # the authors' schedule leaves these to the category
    return dataclasses.replace(category.config, **{name: getattr(schedule, name) for name in names})


def segmenter_category(segmenter: str) -> str:
    """The category whose files include a segmentation network."""
    return next(category.name for category in CATEGORIES.values() if category.segmenter == segmenter)


# --- options ---


@dataclasses.dataclass(frozen=True)
class Options:
    """How images are inverted and edited: flags of every program, and keyword arguments of `Pipeline`.

    Options that the authors' script also has keep its names and meanings.
    """

    image_category: CategoryName | None = None
    """Image sizes, letterboxing, and the defaults below that are "the category's". Default: demo, or custom with
    gan_weights."""
    weights: Path | None = None
    """A directory with the category's files under the names their authors gave them. Default: the files fetched by
    `python -m ckpt_convert get`."""
    gan_weights: Path | None = None
    """A generator, converted or as distributed. Default: the category's."""
    class_idx: int | None = None
    """Class of the images, for a generator with classes; the mean style and the prior are then those of the class.
    Default: those of all classes."""
    e4e_path: Path | None = None
    """An e4e encoder, converted or as distributed. Default: the category's."""
    offsets_path: Path | None = None
    """An offset encoder, for the start "learned". Default: the demo's."""
    inv_model_path: Path | None = None
    """An invertibility predictor, converted or as distributed. Default: the category's."""

    segmenter: Segmenter | None = None
    """How segments are found: felzenszwalb and slic by color, the others by a network: ade20k (150 classes of scenes),
    bisenet (parts of faces), mask_rcnn (the 80 classes of COCO). Default: the category's."""
    swap_channels: bool = False
    """Swaps red and blue for mask_rcnn, as the authors' script does; for comparisons with it."""
    invertibility: Invertibility | None = None
    """Where error maps come from: "measured" by a short inversion in each layer, or "predicted" by a network.
    Default: the category's, or predicted with inv_model_path."""
    start: Start | None = None
    """Where latents start: W+ at the mean style, at the best of 256 samples by LPIPS, or at the encoder's code; or all
    layers at what an offset encoder finds from that code ("learned"). Default: the category's, learned with
    offsets_path, or encoder with e4e_path."""
    start_latent: Path | None = None
    """Codes in W or W+ at which W+ starts instead: the only code of a .npy, .npz, .safetensors, .pt, .pth or .pkl file,
    or the one that has the name of the image."""
    latent_names: str | None = None
    """Candidate latent layers, separated by commas. Default: all of W+,F4,F6,F8,F10 that the generator has."""
    fit: Fit = "stretch"
    """How an image of another aspect ratio is fitted to the category's size."""
    invertibility_steps: int | None = None
    """Steps of each inversion that measures error maps; 0 for the start alone, which is of use if it is learned.
    Default: num_opt_steps, at most 501."""
    threshold: float | None = None
    """Mean error up to which a segment may use a layer. Default: the category's."""

    preset: Preset | None = None
    """The schedule: "reference" is the authors'; "fast" takes 60 steps, of which the last 12 use LPIPS-VGG. The flags
    that follow override it. Default: the category's."""
    num_opt_steps: int | None = None
    """Adam steps; 0 for the start alone. The defaults of this flag and those up to lambda_mvg are the category's: for
    all but the demo the authors' 1001, 0.05, 0.25, 0.05, 0.9, 0.999, vgg, 1, 1, 5, 1e-3, 1e-8."""
    final_steps: int | None = None
    """How many of the steps, the last ones, use LPIPS-VGG whatever lpips_type is. Default: the category's, which is 0
    for all but the demo."""
    lr: float | None = None
    """Highest learning rate."""
    final_lr: float | None = None
    """Learning rate at the first of the final steps, from which it falls."""
    layer_rate: float | None = None
    """Learning rate of an F layer relative to that of the next coarser one."""
    lr_rampdown_length: float | None = None
    """Fraction of the run in which the learning rate falls."""
    lr_rampup_length: float | None = None
    """Fraction of the run in which the learning rate rises."""
    beta1: float | None = None
    """Adam's decay rate of the gradient's mean."""
    beta2: float | None = None
    """Adam's decay rate of the gradient's square."""
    lpips_type: Perceptual | None = None
    """Network of the perceptual loss; "none" for none but in final steps."""
    lambda_mse: float | None = None
    """Weight of the squared error."""
    lambda_lpips: float | None = None
    """Weight of LPIPS."""
    lambda_f_rec: float | None = None
    """Weight of the squared offsets of the F layers."""
    lambda_delta: float | None = None
    """Weight of the distance between the styles of W+."""
    lambda_mvg: float | None = None
    """Weight of the prior on W+."""
    precision: Precision | None = None
    """Precision of the optimization: "highest", the default, is full float32; "high" and "default" are faster on GPUs
    and TPUs only; "bfloat16" uses 16 bits in LPIPS and in the generator's highest resolutions."""
    noise: Literal["random", "const", "none"] = "random"
    """The generator's noise during optimization."""
    batch_size: int | None = None
    """Inversions in one program. Default: 1 on a CPU; elsewhere as many as fit, at most 8, or 16 in a sweep."""
    seed: int = 0
    """Seed of the noise, of the prior's samples, and of the samples that --start best tries."""

    generate_edits: bool | None = None
    """Applies the directions in edits_folder. Default: whenever there are any."""
    edits_folder: Path | None = None
    """A directory of directions: .npy, .npz, .safetensors, .pt, .pth or .pkl files, as samjax and other programs write
    them. Default: the category's."""
    components: tuple[str, ...] = ()
    """Components of GANSpace's and SeFa's files, each with the styles on which it acts, such as 0:0-5 16:3-6 22:9-11. A
    range ends before its second number, as in e4e's editor. Default: the first eight, on all styles."""
    edit_strengths: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0)
    """Strengths of the edits: multiples of each direction."""


def checked(options: Options) -> Options:
    """Checks the types and ranges of options, which programs and Python code may give, and makes paths of text.

    Raises:
      UserError: an option has another type, a value that is not among its choices, or one out of range.
    """
    if not isinstance(options, Options):
        raise UserError(f"options are a samjax.config.Options, not {shown(options)}")
    hints = _hints(type(options))
    check_types(options, hints)
    check_seed(options.seed)
    check_strengths(options.edit_strengths)
    if options.threshold is not None:
        check_threshold(options.threshold, "--threshold")
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and not is_finite(value):
            raise UserError(f"--{field.name} must be a finite number, not {shown(value)}")
    for name in ("lr_rampdown_length", "lr_rampup_length"):
        length = getattr(options, name)
        if length is not None and not 0 <= length <= 1:
            raise UserError(f"--{name} is a fraction of the run, from 0 to 1, not {length}")
    paths = {
        name: Path(value)
        for name, hint in hints.items()
        if isinstance(value := getattr(options, name, None), str) and Path in (hint, *typing.get_args(hint))
    }
    return dataclasses.replace(options, **paths) if paths else options


def resolve_category(
    options: Options,
    *,
    generator: bool = False,
    encoder: bool = False,
    offsets: bool = False,
    predictor: bool = False,
) -> Category:
    """The category that options select, with the options overriding its defaults.

    The sizes of the category "custom" are preliminary; `resolve` takes them from the generator.

    Args:
      options: the user's options.
      generator: whether the caller supplies a generator, in addition to any in the options.
      encoder: whether the caller supplies an encoder.
      offsets: whether the caller supplies an offset encoder.
      predictor: whether the caller supplies a predictor.

    Raises:
      UserError: the options need a network that neither they nor the category provide.
    """
    options = checked(options)
    generator = generator or options.gan_weights is not None
    encoder, predictor = encoder or options.e4e_path is not None, predictor or options.inv_model_path is not None
    offsets = offsets or options.offsets_path is not None
    name = options.image_category or ("custom" if generator else "demo")
    if name == "custom" and not generator:
        raise UserError("--image_category custom needs --gan_weights, the generator")
    known = CATEGORIES.get(name)
    category = known or Category.for_resolution(256)
    # The demo's encoder and predictor were trained for the demo's generator only.
    own = known if category.official or not generator else None
    if options.start_latent is not None and (options.start is not None or encoder or offsets):
        raise UserError("--start_latent replaces --start, --e4e_path and --offsets_path: leave them out")
    start = options.start or ("learned" if offsets else "encoder" if encoder else own.start if own else "mean")
    start = "given" if options.start_latent is not None else start
    maps = options.invertibility or ("predicted" if predictor else own.invertibility if own else "measured")
    for wanted, given, flag in (
        (start in ("encoder", "learned"), encoder, f"--start {start} needs --e4e_path"),
        (maps == "predicted", predictor, "--invertibility predicted needs --inv_model_path"),
    ):
        if wanted and not given and not own:
            raise UserError(f"{flag}: the category {name} has no such network")
    # The demo's offset encoder was trained with the demo's encoder.
    if start == "learned" and not offsets and (own is None or own.learned is None or encoder):
        raise UserError("--start learned needs --offsets_path, which experiments/train_offsets.py makes")
    threshold = category.threshold if options.threshold is None else options.threshold
    return dataclasses.replace(
        category,
        segmenter=options.segmenter or category.segmenter,
        invertibility=maps,
        start=start,
        threshold=threshold,
    )


def required_roles(options: Options, *, segmenter: bool = True) -> tuple[str, ...]:
    """Networks of an official category that are needed in addition to those whose paths the options give.

    Args:
      options: the user's options.
      segmenter: whether segments have to be found.

    Returns:
      Any of "generator", "encoder", "invertibility" and "segmenter"; the last one only if it is the category's own
      (`segmenter_category` tells where to find another one).

    Raises:
      UserError: as `resolve_category`.
    """
    category = resolve_category(options)
    if not category.official:
        return ()
    own = category.segmenter == CATEGORIES[category.name].segmenter
    wanted = {
        "generator": options.gan_weights is None,
        "encoder": category.start in ("encoder", "learned") and options.e4e_path is None,
        "invertibility": category.invertibility == "predicted" and options.inv_model_path is None,
        "segmenter": segmenter and own,
    }
    return tuple(role for role, needed in wanted.items() if needed)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options, fully resolved for one generator.

    Attributes:
      category: the category, with the sizes, threshold and sources of this run.
      config: settings of every inversion.
      measure_steps: steps of each inversion that measures error maps.
    """

    category: Category
    config: InversionConfig
    measure_steps: int


def check_generator(generator: StyleGAN2Config, class_idx: int | None) -> None:
    """Checks that samjax can invert with a generator, and that it has a class, if one is given.

    Raises:
      UserError: it cannot, or the class is missing.
    """
    if generator.img_channels not in (1, 3):
        raise UserError(
            f"this generator draws images of {generator.img_channels} channels; samjax inverts with generators of RGB"
            " and of gray images only"
        )
    check_class(generator, class_idx)


def check_class(generator: StyleGAN2Config, class_idx: int | None) -> None:
    """Checks that a generator has a class, if one is given.

    Raises:
      UserError: it does not.
    """
    if class_idx is not None and not generator.c_dim:
        raise UserError("this generator has no classes: leave --class_idx out")
    if class_idx is not None and not 0 <= class_idx < generator.c_dim:
        raise UserError(f"--class_idx {class_idx}: this generator has the classes 0 to {generator.c_dim - 1}")


def resolve(
    options: Options,
    generator: StyleGAN2Config,
    *,
    category: Category | None = None,
    max_batch_size: int = 8,
    devices: int = 1,
) -> Settings:
    """Resolves options: the one place that decides category, schedule, steps, layers and batch size.

    Args:
      options: the user's options.
      generator: sizes of the generator.
      category: as returned by `resolve_category`; derived from the options if None.
      max_batch_size: upper limit of the default batch size, for each device; at least 1.
      devices: number of devices over which each batch is divided.

    Raises:
      UserError: values out of range, layers or a class that the generator does not have, or a generator whose images do
        not have the category's size, or are neither RGB nor gray.

    >>> settings = resolve(Options(preset="fast", lr=0.1), StyleGAN2Config(256))
    >>> settings.category.name, settings.config.num_opt_steps, settings.config.lr
    ('demo', 60, 0.1)
    """
    options = checked(options)
    if not isinstance(max_batch_size, numbers.Integral) or max_batch_size < 1:
        raise UserError(f"max_batch_size must be at least 1, not {shown(max_batch_size)}")
    check_generator(generator, options.class_idx)
    category = category or resolve_category(options)
    made = generator.img_resolution
    if category.name not in CATEGORIES:
        own = Category.for_resolution(made)
        category = dataclasses.replace(category, resolution=made, target_size=own.target_size)
    elif made != category.resolution:
        raise UserError(
            f"the generator makes {made} px images, the category {category.name} has {category.resolution} px: leave"
            " --image_category out, or give another generator"
        )
    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(InversionConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    if options.latent_names is None:
        given["latent_names"] = tuple(layer.name for layer in latent_layers(generator))
    else:
        given["latent_names"] = parse_latent_names(options.latent_names, generator)
    given.setdefault("batch_size", devices * default_batch_size(generator, max_batch_size))
    if given["batch_size"] % devices:
        raise UserError(
            f"--batch_size {given['batch_size']} does not divide evenly over the {devices} devices: give a multiple of"
            f" {devices}"
        )
    try:
        config = with_preset(category, options.preset)
        config = dataclasses.replace(config, **given, loss_resolution=max(category.target_size))
    except ValueError as error:  # which begins with the name of the option
        raise UserError(f"--{error}") from error
    steps = options.invertibility_steps
    if steps is not None and not 0 <= steps <= _MOST:
        raise UserError(f"--invertibility_steps must be at least 0, and at most {_MOST}, not {steps}")
    return Settings(category, config, min(config.num_opt_steps, 501) if steps is None else steps)


def default_batch_size(generator: StyleGAN2Config, max_batch_size: int = 8) -> int:
    """Items to optimize at once by default: one on a CPU, elsewhere as many as fit, at most `max_batch_size`.

    An item takes about six times the memory of the generator's activations (as counted by XLA for 256 to 1024 px). The
    estimate allows twice that, and 256 MiB for LPIPS.
    """
    if jax.default_backend() == "cpu":
        return 1
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if memory is None:
        return max_batch_size
    activations = 4 * sum(r * r * generator.channels(r) for r in generator.block_resolutions)
    return max(1, min(max_batch_size, int((memory - 2**30) / (12 * activations + 2**28))))
