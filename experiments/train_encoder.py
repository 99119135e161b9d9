"""Trains an encoder for a generator on a folder of pictures: from an image to the W+ where its inversion starts.

    python experiments/train_encoder.py --gan_weights converted/ --image_folder photos/train \\
        --image_folder_val photos/val --output_folder output/encoder

Writes to OUTPUT_FOLDER: `encoder/` (the best by validation, which `--e4e_path` of the other scripts takes),
`checkpoints/`, metrics.jsonl, tensorboard/, curve.png, and a picture of images and what the generator makes of their
codes at every validation. Stopped at any time, even killed, the same command goes on as if nothing had happened.

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

from samjax import api, encoder_training
from samjax.encoder_training import EncoderTrainConfig
from samjax.errors import UserError
from samjax.io import checkpoints, datasets, images, training_report
from samjax.nets.e4e import E4EConfig

PRESETS = {
    "full": E4EConfig(),  # the authors', of the e4e paper
    "small": E4EConfig(widths=(16, 32, 64, 96), blocks=(1, 2, 2, 1), head_width=24),  # one million parameters
}


@dataclasses.dataclass(frozen=True)
class Arguments(trainer.Flags):
    image_category: Literal["demo", "cars", "faces", "cats", "custom"] | None = None
    """Size of the images and network of the loss; none: demo, or custom with gan_weights."""
    weights: Path | None = None
    """A folder with the category's files under their authors' names."""
    gan_weights: Path | None = None
    """A generator, converted or as distributed; none: the category's."""
    image_folder: Path = Path("images/train")
    """The images."""
    image_folder_val: Path = Path("images/val")
    """Others, for validation."""
    fit: Literal["stretch", "letterbox", "crop"] = "stretch"
    """How an image of another shape is brought to the category's size."""
    output_folder: Path = Path("output/encoder")
    preset: Literal["full", "small"] = "full"
    """Size of the encoder: that of e4e's authors, or one for small domains."""
    init: Path | None = None
    """A converted encoder to go on from; none: random weights."""
    batch_size: int = 8
    samples: int | None = None
    """Of the generator in each step, beside the images; none: as many as images."""
    lr: float = 1e-3
    """Adam's, highest."""
    lambda_delta: float = 1e-3
    lambda_w: float = 1.0
    """Weight of the error of the samples' styles."""
    lpips_type: Literal["vgg", "alex"] | None = None
    """Network of the loss; none: by category."""


def settle(args: Arguments, nets: networks.Networks) -> tuple[E4EConfig, Any]:
    """Sizes of the encoder, and the variables to start from (None: random)."""
    generator = nets.generator.config
    if args.init is None:
        config = dataclasses.replace(PRESETS[args.preset], num_styles=generator.num_ws, style_dim=generator.w_dim)
        return config, None
    config, variables, _ = checkpoints.load_network(args.init, "e4e")
    if (config.num_styles, config.style_dim) != (generator.num_ws, generator.w_dim):
        raise UserError(
            f"{args.init} gives {config.num_styles} styles of {config.style_dim}, the generator takes"
            f" {generator.num_ws} of {generator.w_dim}"
        )
    return config, variables


def main(args: Arguments) -> None:
    train_files, val_files = cli.image_files(args.image_folder), cli.image_files(args.image_folder_val)
    cli.connect(args.distributed, args.coordinator, args.num_processes, args.process_id)
    place, part = trainer.Placement(args.batch_size), (jax.process_index(), jax.process_count())
    nets = networks.load(
        networks.Flags(
            image_category=args.image_category, weights=args.weights, gan_weights=args.gan_weights,
            invertibility="measured", start="mean",
        ),
        segments_given=True,
    )  # fmt: skip
    encoder, variables = settle(args, nets)
    settings, generator = nets.category.config, nets.generator.config
    config = EncoderTrainConfig(
        num_steps=args.steps(len(train_files)), lr=args.lr, lambda_delta=args.lambda_delta, lambda_w=args.lambda_w,
        samples=args.batch_size if args.samples is None else args.samples,
        lpips_type=args.lpips_type or settings.lpips_type, seed=args.seed,
    )  # fmt: skip
    trainer.begin(args.output_folder, {
        "encoder": dataclasses.asdict(encoder), "training": dataclasses.asdict(config),
        "batch_size": args.batch_size, "data": [args.image_folder, args.image_folder_val],
        "generator": networks.origin(nets.generator),
    })  # fmt: skip
    models = api.load_models(nets.generator, dataclasses.replace(settings, lpips_type=config.lpips_type))
    frozen = place.replicate(models.networks)
    read = functools.partial(datasets.pictures, size=nets.category.target_size, fit=args.fit, seed=args.seed)
    source, val_source = read(train_files, train=True), read(val_files, train=False)
    step = functools.partial(encoder_training.step, encoder, generator, config, frozen)
    evaluate = functools.partial(encoder_training.evaluate, encoder, generator, config, frozen)

    def stream(source: Any, first: int, last: int) -> Any:
        batches = datasets.batches(source, args.batch_size, first, last, part=part)
        return (place.divide(images.to_float(batch)) for batch in batches)

    def validate(variables: Any) -> tuple[dict[str, float], np.ndarray]:
        rows, picture = [], np.zeros((1, 1, 3), np.uint8)
        for i, batch in enumerate(stream(val_source, 0, -(-len(val_files) // args.batch_size))):
            *terms, made = multihost_utils.process_allgather(evaluate(variables, batch), tiled=True)
            rows.append(np.stack(terms, 1))
            if i == 0:
                given = multihost_utils.process_allgather(batch, tiled=True)
                picture = training_report.pairs_picture(given[:8], made[:8], ("Image", "From its code"))
        mse, perceptual, delta = np.concatenate(rows)[: len(val_files)].mean(0).tolist()
        loss = config.lambda_mse * mse + config.lambda_lpips * perceptual + config.lambda_delta * delta
        return {"val_loss": loss, "val_mse": mse, "val_lpips": perceptual, "val_delta": delta}, picture

    trained = trainer.train(args, trainer.Job(
        num_steps=config.num_steps,
        state=place.replicate(encoder_training.init(encoder, config, models.networks, variables)),
        stream=lambda first: stream(source, first, config.num_steps),
        step=step,
        rate=lambda number: float(encoder_training.learning_rate(jnp.asarray(number), config)),
        validate=validate,
        every=args.val_frequency or args.epoch(len(train_files)),
        panels=(("LPIPS", "lpips", "val_lpips"), ("Mean squared error", "mse", "val_mse")),
    ))  # fmt: skip
    if part[0] == 0:
        trainer.save_network(args.output_folder / "encoder", encoder, trained)
        best = next(row for row in trained.rows if row["step"] == trained.best and "val_lpips" in row)
        print(f"best at step {trained.best}: LPIPS {best['val_lpips']:.3f} from the code alone, in validation")
        print(f"encoder: {args.output_folder / 'encoder'}")


if __name__ == "__main__":
    cli.run(Arguments, main)
