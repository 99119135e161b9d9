"""Settings of an inversion, and presets of image categories: what the authors' program has as flags and constants."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

LATENT_NAMES = ("W+", "F4", "F6", "F8", "F10")
"""All latent layers, the most editable first."""

Segmenter = Literal["felzenszwalb", "slic", "ade20k", "bisenet", "mask_rcnn"]
Invertibility = Literal["measured", "predicted"]
Start = Literal["mean", "best", "encoder"]
Preset = Literal["reference", "fast"]
Precision = Literal["highest", "high", "default", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class InversionConfig:
    """How latents are optimised; the defaults are the authors' (SAM, CVPR 2022, and their public code).

    The first group only changes numbers in a compiled program; the second changes the program itself.

    Attributes:
      num_opt_steps: Adam steps.
      lr: highest learning rate; see `samjax.losses.learning_rate` for its course.
      lr_rampdown_length, lr_rampup_length: shares of the run in which it falls and rises.
      beta1, beta2: Adam's decay rates.
      lambda_mse, lambda_lpips: weights of the image terms.
      lambda_f_rec: weight of the offsets' squared distance from where they started.
      lambda_delta: weight of the distance between the styles of W+.
      lambda_mvg: weight of the prior on W+.

      latent_names: latent layers that are optimised, the most editable first.
      lpips_type: network of the perceptual term, "vgg" or "alex".
      noise: the generator's noise during optimisation: drawn anew at every step ("random"), stored, or none.
      loss_resolution: larger images are reduced to this size before they are compared.
      batch_size: items (targets with their masks) in one program.
      chunk_steps: steps between two looks of the host; None for 25, and 1 on a CPU, where XLA runs the inside of a
        longer loop on one thread.
      precision: of matrix products and convolutions while latents are optimised. "highest" is full float32 on every
        device; "high" and "default" are JAX's, which a CPU ignores (on NVIDIA's GPUs TF32; on TPUs three passes of
        bfloat16, or one); "bfloat16" keeps kernels and activations of LPIPS and of the generator's four highest
        resolutions in 16 bits, with sums in float32, and all else in full float32.
    """

    num_opt_steps: int = 1001
    lr: float = 0.05
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
    lpips_type: Literal["vgg", "alex"] = "vgg"
    noise: Literal["random", "const", "none"] = "random"
    loss_resolution: int = 256
    batch_size: int = 1
    chunk_steps: int | None = None
    precision: Precision = "highest"

    def __post_init__(self) -> None:
        for name in ("num_opt_steps", "loss_resolution", "batch_size", "chunk_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def half_precision(self) -> bool:
        """Whether the optimisation runs in bfloat16 where `precision` says."""
        return self.precision == "bfloat16"

    @property
    def matmul_precision(self) -> Literal["highest", "high", "default"]:
        """Of float32 products, for `jax.default_matmul_precision`."""
        return "highest" if self.precision == "bfloat16" else self.precision

    @property
    def stored_noise(self) -> Literal["const", "none"]:
        """Of images that are drawn from finished latents: no new noise."""
        return "none" if self.noise == "none" else "const"


def with_preset(config: InversionConfig, preset: Preset | None) -> InversionConfig:
    """`config` with another course: the authors' ("reference"), or a third of its steps ("fast"); None for its own.

    The fast one was compared on hard scenes of the demo (`experiments/evaluate.py --scene_seed 2`).
    """
    if preset is None:
        return config
    course = InversionConfig() if preset == "reference" else InversionConfig(340, lr=0.2, lr_rampup_length=0.0)
    fields = ("num_opt_steps", "lr", "lr_rampdown_length", "lr_rampup_length")
    return dataclasses.replace(config, **{name: getattr(course, name) for name in fields})


@dataclasses.dataclass(frozen=True)
class Category:
    """What belongs to one kind of pictures.

    Attributes:
      name: how a user asks for it.
      resolution: the generator's image size.
      target_size: (height, width) of target image, segments and maps. Where the height is smaller the generator's
        images are letterboxed: rows of zeros in the masks, and rows cut from the images, above and below.
      threshold: mean map value up to which a segment may use a layer.
      threshold_range: lowest and highest threshold of a sweep.
      segmenter: what finds segments where no label image is given: a classical method, or a network.
      invertibility: where error maps come from: a short inversion in each layer, or the predictor.
      start: where W+ starts: the mean style, the best of some samples, or the encoder's code.
      config: settings of its inversions, where the user gives none.
    """

    name: str
    resolution: int
    target_size: tuple[int, int] = (256, 256)
    threshold: float = 0.225
    threshold_range: tuple[float, float] = (0.1, 0.4)
    segmenter: Segmenter = "felzenszwalb"
    invertibility: Invertibility = "measured"
    start: Start = "mean"
    config: InversionConfig = InversionConfig()

    @classmethod
    def for_resolution(cls, resolution: int) -> Category:
        """For a generator of the user's own: square images, compared at 256 px or the generator's size if smaller."""
        size = min(resolution, 256)
        return cls("custom", resolution, target_size=(size, size))

    def sweep(self, step: float = 0.025) -> tuple[float, ...]:
        """The thresholds of a sweep: the range in steps, then 1, at which nearly every segment uses W+."""
        low, high = self.threshold_range
        count = round((high - low) / step) + 1
        return (*(round(low + i * step, 6) for i in range(count)), 1.0)


def _official(name: str, resolution: int, segmenter: Segmenter, **settings: Any) -> Category:
    """A category with networks of its own, by which the authors' program finds segments, maps and W+."""
    return Category(
        name, resolution, segmenter=segmenter, invertibility="predicted", start="encoder", **settings
    )  # fmt: skip


CATEGORIES = {
    category.name: category
    for category in (
        _official("cars", 512, "ade20k", target_size=(192, 256)),
        _official("faces", 1024, "bisenet"),
        _official("cats", 256, "mask_rcnn", threshold_range=(0.2, 0.45)),
        # AlexNet's LPIPS and few, large steps: a laptop's CPU makes the demo in a minute or two. The offsets of its
        # narrow generator must grow larger than those of config-f before they show, so they cost less.
        Category(
            "demo",
            256,
            threshold=0.35,  # chosen on hard scenes that no table shows: `evaluate.py --scene_seed 2`
            threshold_range=(0.2, 0.5),
            invertibility="predicted",
            start="encoder",
            config=InversionConfig(num_opt_steps=100, lr=0.1, lambda_f_rec=0.5, lpips_type="alex"),
        ),
    )
}
