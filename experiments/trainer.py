"""What the training scripts share: flags, where arrays lie, and a loop that goes on where it was killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from samjax.errors import UserError
from samjax.io import checkpoints, files, images, runs, training_report


@dataclasses.dataclass(frozen=True)
class Flags:
    """What both trainings take."""

    output_folder: Path = Path("output/training")
    """Folder of the network, checkpoints, figures and pictures."""
    num_steps: int | None = None
    """Steps in all; none: as many as `epochs` take."""
    epochs: int = 100
    batch_size: int = 16
    """Over all devices and machines."""
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

    def steps(self, examples: int) -> int:
        """Steps in all, with so many examples."""
        return self.num_steps or self.epochs * self.epoch(examples)

    def epoch(self, examples: int) -> int:
        """Steps of an epoch."""
        return max(examples // self.batch_size, 1)


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

    def divide(self, batch: Any) -> Any:
        """A global batch from this process's part of it."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._divided, np.asarray(x)), batch)

    def replicate(self, tree: Any) -> Any:
        """The same arrays on every device."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._whole, np.asarray(x)), tree)


class Job(NamedTuple):
    """A training.

    Attributes:
      num_steps: in all.
      state: before the first step, on the devices; it has a field `step`, and `variables` of the network.
      stream: from the number of a step, the batches from there on, on the devices.
      step: from state and batch to the new state and metrics (a NamedTuple of arrays []).
      rate: the learning rate of a step, by its number.
      validate: from variables to figures, "val_loss" among them, and a picture.
      every: steps between validations.
      panels: of the curve; see `training_report.curve_picture`.
    """

    num_steps: int
    state: Any
    stream: Callable[[int], Iterable[Any]]
    step: Callable[[Any, Any], tuple[Any, Any]]
    rate: Callable[[int], float]
    validate: Callable[[Any], tuple[dict[str, float], np.ndarray]]
    every: int
    panels: Sequence[tuple[str, str, str]]


class Trained(NamedTuple):
    """The best state's step and variables, and the figures of every step that has any."""

    best: int
    variables: Any
    rows: list[dict[str, Any]]


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the output folder, and makes sure that a run which goes on has the settings that it began with.

    Args:
      folder: of the run.
      settings: whatever its course depends on, for JSON.

    Raises:
      UserError: other settings, or the folder cannot be written.
    """
    files.output_folder(folder)
    if jax.process_index():
        return
    path, now = folder / "settings.json", json.loads(json.dumps(settings, default=str))
    try:
        before = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        files.write_json(path, now)
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): choose another --output_folder") from error
    if changed := sorted(key for key in now if not isinstance(before, dict) or now[key] != before.get(key)):
        raise UserError(
            f"{folder} holds a training with other settings ({', '.join(changed)}): choose another --output_folder,"
            " or remove that one"
        )


def train(args: Flags, job: Job) -> Trained:
    """Runs a training to its end, from wherever an earlier run was stopped.

    Writes to `args.output_folder`: checkpoints/, metrics.jsonl, tensorboard/, pictures/ and curve.png; of several
    processes the first one does.

    Raises:
      UserError: a checkpoint is damaged, or the disk refuses.
    """
    folder, chief = args.output_folder, jax.process_index() == 0
    with runs.Checkpoints(folder / "checkpoints", "val_loss") as saved:
        state = job.state
        if saved.last is not None:
            state = saved.restore(saved.last, state)
            if chief:
                print(f"resuming after step {saved.last} of {job.num_steps}", flush=True)
        with runs.Log(folder, int(state.step), write=chief) as log:
            state = run(args, job, state, saved, log)
        saved.wait()
        best = saved.best if saved.best is not None else saved.last
        assert best is not None
        variables = jax.tree.map(np.asarray, saved.restore(best, state).variables)
    if chief:
        images.save_png(folder / "curve.png", training_report.curve_picture(log.rows, job.panels))
    return Trained(best, variables, log.rows)


def run(args: Flags, job: Job, state: Any, saved: runs.Checkpoints, log: runs.Log) -> Any:
    """The loop itself; gives the last state."""
    first, began, chief = int(state.step), time.perf_counter(), jax.process_index() == 0
    with tqdm.tqdm(total=job.num_steps, initial=first, unit="step", disable=not chief) as bar:
        for number, batch in enumerate(job.stream(first), first + 1):
            state, metrics = job.step(state, batch)
            last = number == job.num_steps
            if number % args.log_frequency == 0 or last:
                row = {name: float(value) for name, value in metrics._asdict().items()}
                bar.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
                log.write(number, {**row, "lr": job.rate(number - 1), "seconds": time.perf_counter() - began})
            if number % job.every == 0 or last:
                figures, picture = job.validate(state.variables)
                log.write(number, figures)
                if chief:
                    images.save_png(args.output_folder / "pictures" / f"{number:06d}.png", picture)
                saved.save(number, state, figures)
            elif number % args.save_frequency == 0:
                saved.save(number, state)
            bar.update()
    return state


def save_network(folder: Path, config: Any, trained: Trained) -> None:
    """Writes a trained network beside its run's settings, by which it is known; the same run's is replaced."""
    settings = (folder.parent / "settings.json").read_bytes()
    origin = {
        "source": {"sha256": hashlib.sha256(settings + str(trained.best).encode()).hexdigest()},
        "source_format": f"trained by samjax, step {trained.best}",
        "licence": "of the pictures and the generator that it was trained with", "notes": [],
    }  # fmt: skip
    checkpoints.save_network(folder, config, trained.variables, origin)
