"""Trains an invertibility predictor on what `invert_folder.py` made, here or in the authors' program.

    python experiments/train_invertibility.py --dataset_folder_train data/train --dataset_folder_val data/val \\
        --output_folder output/predictor

Writes to OUTPUT_FOLDER: `predictor/` (the best by validation, which `invert.py --inv_model_path` takes),
`checkpoints/`, metrics.jsonl, tensorboard/, curve.png, and a picture of true and predicted maps at every validation.
Stopped at any time, even killed, the same command goes on as if nothing had happened.

Batches are divided over all devices; several machines train as one by the flags of `invert_folder.py` (--distributed,
or --coordinator HOST:PORT --num_processes N --process_id I).
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import cli
import jax
import jax.numpy as jnp
import networks
import numpy as np
import trainer
from jax.experimental import multihost_utils

from samjax import training
from samjax.config import CATEGORIES, Segmenter
from samjax.errors import UserError
from samjax.io import checkpoints, datasets, training_report, weights
from samjax.nets.deeplab import PredictorConfig
from samjax.training import TrainConfig

PRESETS = {
    "full": PredictorConfig(),  # the authors', 59 million parameters
    "small": PredictorConfig(blocks=(1, 1, 1, 1), width=16, decoder_width=32, low_level_width=16),  # one million
}
LEARNING_RATES = {"full": 1e-4, "small": 1e-2}  # the small one has no pretrained weights to keep


@dataclasses.dataclass(frozen=True)
class Arguments(trainer.Flags):
    dataset_folder_train: Path = Path("data/train")
    """Images with their inversions, as `invert_folder.py` writes them."""
    dataset_folder_val: Path = Path("data/val")
    """The same of other images."""
    output_folder: Path = Path("output/predictor")
    preset: Literal["full", "small"] = "full"
    """Size of the predictor: that of the official categories, or one for small domains."""
    init: Path | None = None
    """A converted predictor to go on from; none: random weights."""
    latent_space_name: str | None = None
    """Layers, separated by commas; none: all that the data have."""
    target_H: int = 256
    target_W: int = 256
    """Size to which images are brought."""

    image_category: Literal["demo", "cars", "faces", "cats", "custom"] | None = None
    """For what is said to be by category."""
    segmenter: Segmenter | None = None
    """What finds segments: felzenszwalb, slic, ade20k, bisenet or mask_rcnn; none: by category."""
    weights: Path | None = None
    """A folder with the segmenter's file under its authors' name."""
    threshold: float | None = None
    """At which layers are compared in validation; none: by category, else 0.225."""

    lr: float | None = None
    """Of the backbone; all else has ten times as much; none: 1e-4 for full, the authors', and 1e-2 for small."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    segment_weight: float = 1.0
    """Weight of the error of segment means; 0: the paper's loss."""
    lpips_type: Literal["vgg", "alex"] = "vgg"
    """Network of the true maps; thresholds belong to it."""
    cache_targets: bool = False
    """Makes the true maps once instead of in every step, and leaves the blur of augmentation out: for a CPU, where they
    cost nearly all of the time."""
    bfloat16: bool = False
    """Runs the predictor in half precision."""


def settle(args: Arguments, latent_names: tuple[str, ...]) -> tuple[PredictorConfig, Any]:
    """Sizes of the predictor, and the variables to start from (None: random)."""
    if args.batch_size < 2:
        raise UserError("--batch_size must be at least 2: batch normalisation needs more than one image")
    if args.init is None:
        return dataclasses.replace(PRESETS[args.preset], latent_names=latent_names), None
    predictor, variables, _ = checkpoints.load_network(args.init, "invertibility")
    known = predictor.latent_names
    if known != latent_names:
        raise UserError(f"{args.init} has maps of {','.join(known)}, the data have {','.join(latent_names)}")
    return predictor, variables


def label_images(
    args: Arguments, data: dict[str, datasets.Dataset], size: tuple[int, int]
) -> dict[str, datasets.Labels]:
    """The segments of all images, found by the first process and kept in the output folder."""
    folder = args.output_folder / "segments"
    if jax.process_index() == 0:
        flags = networks.Flags(image_category=args.image_category, weights=args.weights, segmenter=args.segmenter)
        segment = networks.segmenter(flags)
        for name, each in data.items():
            datasets.cache_segments(folder / name, each, size, segment)
    multihost_utils.sync_global_devices("segments")
    return {name: functools.partial(datasets.read_labels, folder / name, size) for name in data}


def make_targets(
    args: Arguments, data: dict[str, datasets.Dataset], size: tuple[int, int], params: Any, part: tuple[int, int]
) -> dict[str, datasets.Targets]:
    """The true maps of all images, by each process a part, kept in the output folder."""

    @jax.jit
    def compare(params: Any, image: jax.Array, inversions: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return training.true_maps(params, training.Batch(image[None], inversions[None], None), args.lpips_type)[0]

    # An argument: what a compiled function merely sees becomes a part of its program: 59 MB of VGG16.
    of_image = functools.partial(compare, jax.device_put(params))
    folder = args.output_folder / "targets"
    for name, each in data.items():
        datasets.cache_targets(folder / name, each, size, of_image, part=part)
    multihost_utils.sync_global_devices("targets")
    return {name: functools.partial(datasets.read_targets, folder / name) for name in data}


def main(args: Arguments) -> None:
    wanted = args.latent_space_name.split(",") if args.latent_space_name else None
    data = {"train": datasets.find(args.dataset_folder_train, wanted)}
    latent_names = data["train"].latent_names
    data["val"] = datasets.find(args.dataset_folder_val, latent_names)
    predictor, variables = settle(args, latent_names)
    cli.connect(args.distributed, args.coordinator, args.num_processes, args.process_id)
    place, part = trainer.Placement(args.batch_size), (jax.process_index(), jax.process_count())
    count, val_count = (len(each.examples) for each in data.values())
    config = TrainConfig(
        num_steps=args.steps(count), lr=args.lr or LEARNING_RATES[args.preset], momentum=args.momentum,
        weight_decay=args.weight_decay, segment_weight=args.segment_weight, lpips_type=args.lpips_type,
        bfloat16=args.bfloat16, seed=args.seed,
    )  # fmt: skip
    preset = CATEGORIES.get(args.image_category or "")
    threshold = args.threshold or (preset.threshold if preset else 0.225)
    settings = {
        "predictor": dataclasses.asdict(predictor), "training": dataclasses.asdict(config),
        "batch_size": args.batch_size, "size": [args.target_H, args.target_W], "init": args.init,
        "data": [args.dataset_folder_train, args.dataset_folder_val], "images": [count, val_count],
        "segmenter": [args.image_category, args.segmenter], "cache_targets": args.cache_targets,
    }  # fmt: skip
    trainer.begin(args.output_folder, settings)
    size = (args.target_H, args.target_W)
    labels = label_images(args, data, size)
    lpips = weights.load_lpips(args.lpips_type)
    targets = make_targets(args, data, size, lpips, part) if args.cache_targets else dict.fromkeys(data)
    source, val_source = (
        datasets.samples(data[name], labels[name], size, train=name == "train", seed=args.seed, targets=targets[name])
        for name in data
    )
    params, tau = place.replicate(lpips), jnp.asarray(threshold, jnp.float32)

    def stream(source: Any, first: int, last: int) -> Any:
        batches = datasets.batches(source, args.batch_size, first, last, part=part)
        return (place.divide(datasets.to_batch(batch)) for batch in batches)

    def validate(variables: Any) -> tuple[dict[str, float], np.ndarray]:
        rows, picture = [], np.zeros((1, 1, 3), np.uint8)
        for i, batch in enumerate(stream(val_source, 0, -(-val_count // args.batch_size))):
            found = training.evaluate(predictor, config, params, variables, batch, tau)
            metrics, same, *maps = multihost_utils.process_allgather(found, tiled=True)
            rows.append(np.stack((*metrics, same), 1))
            if i == 0:
                shown = (multihost_utils.process_allgather(batch.images, tiled=True), *maps)
                some = min(4, val_count)
                picture = training_report.maps_picture([*zip(*(x[:some] for x in shown), strict=True)], latent_names)
        # What fills the last batch up does not count.
        means = np.concatenate(rows)[:val_count].mean(0)
        names = (*training.Metrics._fields, "same_layer")
        return {f"val_{name}": float(mean) for name, mean in zip(names, means, strict=True)}, picture

    trained = trainer.train(args, trainer.Job(
        num_steps=config.num_steps,
        state=place.replicate(training.init(predictor, config, variables)),
        stream=lambda first: stream(source, first, config.num_steps),
        step=functools.partial(training.step, predictor, config, params),
        rate=lambda number: float(training.learning_rate(jnp.asarray(number), config)),
        validate=validate,
        every=args.val_frequency or args.epoch(count),
        panels=(("Loss", "loss", "val_loss"), ("Error of segment means", "segment_error", "val_segment_error")),
    ))  # fmt: skip
    if part[0] == 0:
        trainer.save_network(args.output_folder / "predictor", predictor, trained)
        best = next(row for row in trained.rows if row["step"] == trained.best and "val_loss" in row)
        print(
            f"best at step {trained.best}: error of segment means {best['val_segment_error']:.4f},"
            f" {best['val_same_layer']:.1%} of the area gets the layer of the true maps, in validation"
        )
        print(f"predictor: {args.output_folder / 'predictor'}")


if __name__ == "__main__":
    cli.run(Arguments, main)
