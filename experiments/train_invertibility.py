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
import json
import time
from pathlib import Path
from typing import Any, Literal

import cli
import jax
import jax.numpy as jnp
import networks
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from samjax import training
from samjax.config import CATEGORIES
from samjax.errors import UserError
from samjax.io import checkpoints, datasets, files, images, runs, training_report, weights
from samjax.nets.deeplab import PredictorConfig

PRESETS = {
    "full": PredictorConfig(),  # the authors', 59 million parameters
    "small": PredictorConfig(blocks=(1, 1, 1, 1), width=16, decoder_width=32, low_level_width=16),  # one million
}


@dataclasses.dataclass(frozen=True)
class Arguments(networks.Flags):
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

    num_steps: int | None = None
    """Steps in all; none: as many as `epochs` take."""
    epochs: int = 100
    batch_size: int = 16
    """Over all devices and machines."""
    lr: float = 1e-4
    """Of the backbone; all else has ten times as much."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    segment_weight: float = 1.0
    """Weight of the error of segment means; 0: the paper's loss."""
    lpips_type: Literal["vgg", "alex"] = "vgg"
    """Network of the true maps; thresholds belong to it."""
    bfloat16: bool = False
    """Runs the predictor in half precision."""
    threshold: float | None = None
    """At which layers are compared in validation; none: by category, else 0.225."""
    seed: int = 0

    val_frequency: int | None = None
    """Steps between validations; none: an epoch."""
    save_frequency: int = 250
    """Steps between checkpoints."""
    log_frequency: int = 10
    """Steps between lines in metrics.jsonl."""

    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    """As in `invert_folder.py`."""


class Placement:
    """Where arrays lie: batches divided over all devices of all processes, everything else whole on each."""

    def __init__(self, batch_size: int) -> None:
        devices = jax.device_count()
        if batch_size % devices:
            raise UserError(
                f"--batch_size {batch_size} does not divide by the {devices} devices: give a multiple of {devices}"
            )
        mesh = Mesh(np.asarray(jax.devices()), ("batch",))
        self._divided = NamedSharding(mesh, PartitionSpec("batch"))
        self._whole = NamedSharding(mesh, PartitionSpec())

    def divide(self, batch: training.Batch) -> training.Batch:
        """A global batch from this process's part of it."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._divided, x), batch)

    def replicate(self, tree: Any) -> Any:
        """The same arrays on every device."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._whole, np.asarray(x)), tree)


def settle(args: Arguments, data: datasets.Dataset) -> tuple[PredictorConfig, training.TrainConfig, Any]:
    """Sizes of the predictor, settings of the training, and the variables to start from (None: random)."""
    predictor = dataclasses.replace(PRESETS[args.preset], latent_names=data.latent_names)
    variables = None
    if args.init is not None:
        predictor, variables, _ = checkpoints.load_network(args.init, "invertibility")
        if predictor.latent_names != data.latent_names:
            raise UserError(
                f"{args.init} has maps of {','.join(predictor.latent_names)}, the data {','.join(data.latent_names)}"
            )
    if args.batch_size < 2:
        raise UserError("--batch_size must be at least 2: batch normalisation needs more than one image")
    epoch = max(len(data.examples) // args.batch_size, 1)
    config = training.TrainConfig(
        num_steps=args.num_steps or args.epochs * epoch, lr=args.lr, momentum=args.momentum,
        weight_decay=args.weight_decay, segment_weight=args.segment_weight, lpips_type=args.lpips_type,
        bfloat16=args.bfloat16, seed=args.seed,
    )  # fmt: skip
    return predictor, config, variables


def check_settings(args: Arguments, predictor: PredictorConfig, config: training.TrainConfig) -> None:
    """Makes sure that a run which goes on has the settings that it began with."""
    settings = json.loads(json.dumps({
        "predictor": dataclasses.asdict(predictor), "training": dataclasses.asdict(config),
        "batch_size": args.batch_size, "size": [args.target_H, args.target_W],
        "data": [str(args.dataset_folder_train), str(args.dataset_folder_val)],
    }))  # fmt: skip
    path = args.output_folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = sorted(key for key in settings if settings[key] != before.get(key))
        if changed:
            raise UserError(
                f"{args.output_folder} holds a training with other settings ({', '.join(changed)}): choose another"
                " --output_folder, or remove that one"
            )
    else:
        files.write_json(path, settings)


def validate(
    predictor: PredictorConfig, config: training.TrainConfig, params: Any, variables: Any, place: Placement,
    args: Arguments, source: Any, threshold: float,
) -> tuple[dict[str, float], list[tuple[np.ndarray, ...]]]:  # fmt: skip
    """Figures over the validation set, and (image, predicted, true) of its first few."""
    count, part = len(source), (jax.process_index(), jax.process_count())
    rows, shown = [], []
    number = -(-count // args.batch_size)
    tau = jnp.asarray(threshold, jnp.float32)
    for i, batch in enumerate(datasets.batches(source, args.batch_size, 0, number, part=part)):
        metrics, same, predicted, true = training.evaluate(
            predictor, config, params, variables, place.divide(batch), tau
        )
        figures = multihost_utils.process_allgather((*metrics, same), tiled=True)
        rows.append(np.stack(figures, 1)[: count - i * args.batch_size])  # what fills the last batch up does not count
        if i == 0:
            maps = multihost_utils.process_allgather((predicted, true), tiled=True)
            shown = list(zip(batch.images[:4], *(np.asarray(m)[:4] for m in maps), strict=False))
    means = np.concatenate(rows).mean(0)
    names = ("loss", "pixel", "segment", "segment_error", "same_layer")
    return {f"val_{name}": float(mean) for name, mean in zip(names, means, strict=True)}, shown


def main(args: Arguments) -> None:
    wanted = args.latent_space_name.split(",") if args.latent_space_name else None
    data = datasets.find(args.dataset_folder_train, wanted)
    val = datasets.find(args.dataset_folder_val, data.latent_names)
    predictor, config, variables = settle(args, data)
    cli.connect(args.distributed, args.coordinator, args.num_processes, args.process_id)
    place, main_process = Placement(args.batch_size), jax.process_index() == 0
    preset = CATEGORIES.get(args.image_category or "")
    threshold = args.threshold or (preset.threshold if preset else 0.225)
    files.output_folder(args.output_folder)
    if main_process:
        check_settings(args, predictor, config)
    size, part = (args.target_H, args.target_W), (jax.process_index(), jax.process_count())
    if main_process:
        segment = networks.segmenter(args)
        for name, each in (("train", data), ("val", val)):
            datasets.cached_segments(args.output_folder / "segments" / name, each, size, segment)
    multihost_utils.sync_global_devices("segments")
    labels = {
        name: datasets.cached_segments(args.output_folder / "segments" / name, each, size, _never)
        for name, each in (("train", data), ("val", val))
    }
    source = datasets.samples(data, labels["train"], size, train=True, seed=args.seed)
    val_source = datasets.samples(val, labels["val"], size, train=False)

    params = place.replicate(weights.load_lpips(args.lpips_type))
    state = place.replicate(training.init(predictor, config, variables))
    saved = runs.Checkpoints(args.output_folder / "checkpoints", "val_loss")
    if saved.last is not None:
        state = saved.restore(saved.last, state)
        if main_process:
            print(f"resuming after step {saved.last} of {config.num_steps}", flush=True)
    first = int(state.step)
    log = runs.Log(args.output_folder, first, tensorboard=main_process) if main_process else None
    every = args.val_frequency or max(len(data.examples) // args.batch_size, 1)
    figures = {"val_loss": float("inf")} if log is None else last_figures(log)
    stream = datasets.batches(source, args.batch_size, first, config.num_steps, part=part)
    began = time.perf_counter()
    with tqdm.tqdm(total=config.num_steps, initial=first, unit="step", disable=not main_process) as bar:
        for batch in stream:
            state, metrics = training.step(predictor, config, params, state, place.divide(batch))
            number = bar.n + 1
            bar.update()
            if number % args.log_frequency == 0 or number == config.num_steps:
                row = {name: float(value) for name, value in metrics._asdict().items()}
                row["lr"] = float(training.learning_rate(jnp.asarray(number - 1), config))
                row["seconds"] = time.perf_counter() - began
                bar.set_postfix({name: f"{row[name]:.4g}" for name in ("loss", "segment_error")}, refresh=False)
                if log is not None:
                    log.write(number, row)
            if number % every == 0 or number == config.num_steps:
                figures, shown = validate(
                    predictor, config, params, state.variables, place, args, val_source, threshold
                )
                if log is not None:
                    log.write(number, figures)
                    picture = training_report.maps_picture(shown, predictor.latent_names)
                    images.save_png(args.output_folder / "maps" / f"{number:06d}.png", picture)
                saved.save(number, state, figures)
            elif number % args.save_frequency == 0:
                saved.save(number, state, figures)
    saved.wait()
    finish(args, predictor, saved, state, log, main_process)
    saved.close()


def last_figures(log: runs.Log) -> dict[str, float]:
    """Those of the last validation, which stand for a state between two."""
    rows = [row for row in log.rows if "val_loss" in row]
    return {"val_loss": rows[-1]["val_loss"]} if rows else {"val_loss": float("inf")}


def finish(
    args: Arguments, predictor: PredictorConfig, saved: runs.Checkpoints, state: Any, log: runs.Log | None,
    main_process: bool,
) -> None:  # fmt: skip
    """The best predictor as a network to use, and the curve."""
    best = saved.best if saved.best is not None else saved.last
    assert best is not None
    variables = saved.restore(best, state).variables
    if not main_process or log is None:
        return
    log.close()
    origin = {"source": {"file": str(args.output_folder)}, "source_format": f"trained by samjax, step {best}",
              "licence": "yours", "notes": []}  # fmt: skip
    checkpoints.save_network(
        args.output_folder / "predictor", predictor, jax.tree.map(np.asarray, variables), origin
    )
    images.save_png(args.output_folder / "curve.png", training_report.curve_picture(log.rows))
    last = [row for row in log.rows if "val_loss" in row][-1]
    print(
        f"best at step {best}; at the end: error of segment means {last['val_segment_error']:.4f}, "
        f"{last['val_same_layer']:.1%} of the area gets the layer of the true maps"
    )
    print(f"predictor: {args.output_folder / 'predictor'}")


def _never(_: np.ndarray) -> np.ndarray:
    raise UserError("the label images of some pictures have disappeared: start again")


if __name__ == "__main__":
    cli.run(Arguments, main)
