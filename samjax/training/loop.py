"""The training loop: options that trainings share, placement of arrays on devices, validation, and resuming."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from samjax.errors import UserError, check_least, check_seed
from samjax.io import checkpoints, images
from samjax.report import training as report
from samjax.training.checkpoints import Checkpoints, Log


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """Options of every training."""

    output_folder: Path = Path("output/training")
    """Directory of the network, checkpoints, metrics and figures."""
    num_steps: int | None = None
    """Training steps. Default: those of `epochs`."""
    epochs: int = 100
    """Passes over the training images, unless num_steps is given."""
    batch_size: int = 16
    """Images in a batch over all devices and machines."""
    seed: int = 0
    """Seed of initial weights, data order and everything random in a step."""
    val_frequency: int | None = None
    """Steps between validations. Default: an epoch."""
    save_frequency: int = 250
    """Steps between checkpoints."""
    log_frequency: int = 10
    """Steps between lines of metrics.jsonl."""

    def check(self) -> None:
        """Checks the options that need no files, which programs do before any work.

        Raises:
          UserError: a number is out of range.
        """
        counts = ("num_steps", "epochs", "batch_size", "val_frequency", "save_frequency", "log_frequency")
        check_least(self, dict.fromkeys(counts, 1))
        check_seed(self.seed)

    def epoch_steps(self, examples: int) -> int:
        """Steps of an epoch with this number of examples."""
        return max(examples // self.batch_size, 1)

    def total_steps(self, examples: int) -> int:
        """Steps of the run with this number of examples."""
        return self.epochs * self.epoch_steps(examples) if self.num_steps is None else self.num_steps


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """How a program joins the other processes of its run: arguments of `samjax.runtime.connect`."""

    distributed: bool = False
    """Joins the other processes of this run as the environment describes them (TPU pods, Slurm, Open MPI)."""
    coordinator: str | None = None
    """Address of the first process, HOST:PORT, if the environment does not define it; needs the next two flags."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, from 0."""


class Placement:
    """Places arrays on devices: batches are sharded over all devices of all processes, everything else replicated."""

    def __init__(self, batch_size: int) -> None:
        """Uses all devices.

        Raises:
          UserError: `batch_size` is not a multiple of their number.
        """
        devices = jax.device_count()
        if batch_size % devices:
            raise UserError(
                f"--batch_size {batch_size} does not divide evenly over the {devices} devices: give a multiple of"
                f" {devices}"
            )
        mesh = Mesh(np.asarray(jax.devices()), ("batch",))
        self._sharded = NamedSharding(mesh, PartitionSpec("batch"))
        self._replicated = NamedSharding(mesh, PartitionSpec())

    def shard(self, batch: Any) -> Any:
        """A global batch from this process's part of it."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._sharded, np.asarray(x)), batch)

    def replicate(self, tree: Any) -> Any:
        """The same arrays on every device."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._replicated, np.asarray(x)), tree)


class Job(NamedTuple):
    """A training, as `run` takes it.

    Attributes:
      num_steps: length of the run.
      state: the state before the first step, on the devices. It has the fields `step`, the number of steps taken, and
        `variables`, those of the network.
      batches: maps a number of steps to the batches from there on, on the devices.
      step: maps state and batch to the new state and metrics (a NamedTuple of arrays [] with the field `loss`).
      learning_rate: maps a number of steps to the learning rate.
      validate: maps variables to metrics, with "val_loss" among them, and to a figure, uint8 [H, W, 3].
      val_frequency: steps between validations.
      panels: panels of the figure of all metrics; see `samjax.report.training.curve_figure`.
    """

    num_steps: int
    state: Any
    batches: Callable[[int], Iterable[Any]]
    step: Callable[[Any, Any], tuple[Any, Any]]
    learning_rate: Callable[[int], Any]
    validate: Callable[[Any], tuple[dict[str, float], np.ndarray]]
    val_frequency: int
    panels: Sequence[tuple[str, str, str]]


class Trained(NamedTuple):
    """The best state of a run by its validation loss.

    Attributes:
      step: steps taken before it.
      variables: variables of the network, host arrays.
      metrics: metrics of its validation.
    """

    step: int
    variables: Any
    metrics: dict[str, float]


def run(options: LoopOptions, job: Job) -> Trained:
    """Runs a training to its end, resuming from the last checkpoint in its directory.

    Writes checkpoints/, metrics.jsonl, tensorboard/, figures/ and curve.png to `options.output_folder`. If there are
    several processes, all write checkpoints, and the first one writes the other files.

    Raises:
      UserError: a checkpoint is damaged, or a file cannot be written.
    """
    directory, first_process = options.output_folder, jax.process_index() == 0
    with Checkpoints(directory / "checkpoints", "val_loss") as saved:
        state = job.state
        if saved.last is not None:
            state = saved.restore(saved.last, state)
            if first_process:
                print(f"resuming after step {saved.last} of {job.num_steps}", flush=True)
        with Log(directory, int(state.step), write=first_process) as log:
            state = _steps(options, job, state, saved, log)
        saved.wait()
        best = saved.best if saved.best is not None else saved.last
        assert best is not None
        variables = jax.tree.map(np.asarray, saved.restore(best, state).variables)
    if first_process:
        images.save_png(directory / "curve.png", report.curve_figure(log.rows, job.panels))
    metrics = next(row for row in log.rows if row["step"] == best and "val_loss" in row)
    return Trained(best, variables, metrics)


def _steps(options: LoopOptions, job: Job, state: Any, saved: Checkpoints, log: Log) -> Any:
    """Takes the remaining steps; returns the last state."""
    first, start, first_process = int(state.step), time.perf_counter(), jax.process_index() == 0
    with tqdm.tqdm(total=job.num_steps, initial=first, unit="step", disable=not first_process) as bar:
        for number, batch in enumerate(job.batches(first), first + 1):
            state, metrics = job.step(state, batch)
            last = number == job.num_steps
            if number % options.log_frequency == 0 or last:
                row = {name: float(value) for name, value in metrics._asdict().items()}
                bar.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
                rate, seconds = float(job.learning_rate(number - 1)), time.perf_counter() - start
                log.write(number, {**row, "lr": rate, "seconds": seconds})
            if number % job.val_frequency == 0 or last:
                val_metrics, figure = job.validate(state.variables)
                log.write(number, val_metrics)
                if first_process:
                    images.save_png(options.output_folder / "figures" / f"{number:06d}.png", figure)
                saved.save(number, state, val_metrics)
            elif number % options.save_frequency == 0:
                saved.save(number, state)
            bar.update()
    return state


def save_network(directory: Path, config: Any, trained: Trained) -> None:
    """Writes a trained network, replacing the one that the same run wrote before.

    Args:
      directory: directory of the network, in that of the run, whose settings.json identifies the network.
      config: sizes of the network.
      trained: the best state.

    Raises:
      UserError: the directory holds something else, or cannot be written.
    """
    settings = (directory.parent / "settings.json").read_bytes()
    origin = {
        "source": {"sha256": hashlib.sha256(settings + str(trained.step).encode()).hexdigest()},
        "source_format": f"trained by samjax, step {trained.step}",
        "licence": "that of the images and the generator it was trained with",
        "notes": [],
    }
    checkpoints.save_network(directory, config, trained.variables, origin)
