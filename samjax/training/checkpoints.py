"""The files of a training run: its states as Orbax checkpoints, and its metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from samjax.errors import UserError
from samjax.io import files


class Checkpoints:
    """The last and the best state of a run, written in the background; a context manager.

    A state is complete or absent, because Orbax renames it when it is written.
    """

    def __init__(self, directory: Path, best: str) -> None:
        """Opens the checkpoints of a directory, which is created if it is missing.

        Args:
          directory: the directory.
          best: name of the metric that is lowest for the best state.
        """
        import orbax.checkpoint as ocp

        files.output_directory(directory)
        self._best = best
        keep = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep.AnyPreservationPolicy([
                    keep.LatestN(1),
                    keep.BestN(get_metric_fn=lambda metrics: metrics[best], reverse=True, n=1),
                ]),
                best_fn=lambda metrics: metrics[best],
                best_mode="min",
            ),
        )  # fmt: skip
        self._args = ocp.args

    @property
    def last(self) -> int | None:
        """The step of the last state; None if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the best state; None if there is none."""
        return self._manager.best_step()

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Starts writing a state in the background, and returns.

        Args:
          step: number of steps taken.
          state: pytree of arrays.
          metrics: metrics of its validation. Without them, the state cannot become the best one.

        Raises:
          UserError: the state cannot be written.
        """
        metrics = {self._best: float("inf"), **(metrics or {})}
        try:
            self._manager.save(step, args=self._args.StandardSave(state), metrics=metrics, force=True)
        except OSError as error:
            raise UserError(f"cannot write {self._manager.directory}: {error.strerror or error}") from error

    def restore(self, step: int, like: Any) -> Any:
        """Reads the state of a step.

        Args:
          step: number of steps taken.
          like: a state with the shapes, types and shardings of the result.

        Raises:
          UserError: the state is damaged, or has arrays of other shapes.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        shapes = lambda tree: sorted(tuple(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
        try:
            # Checked first: Orbax reads all arrays concurrently, and reports the first mismatch late.
            if shapes(self._manager.item_metadata(step)) != shapes(like):
                raise ValueError("its arrays have other shapes")
            return self._manager.restore(step, args=self._args.StandardRestore(abstract))
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:160]
            raise UserError(
                f"{self._manager.directory / str(step)} cannot be read ({reason}): damaged, or of another preset?"
            ) from error

    def wait(self) -> None:
        """Waits until all states are written.

        Raises:
          UserError: a state cannot be written.
        """
        try:
            self._manager.wait_until_finished()
        except OSError as error:
            raise UserError(f"cannot write {self._manager.directory}: {error.strerror or error}") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for states that are being written, also after an error, and closes the checkpoints."""
        self._manager.close()


class Log:
    """The metrics of a run, one JSON object per line, and the same for TensorBoard; a context manager.

    Attributes:
      path: file of the JSON objects.
      rows: all metrics so far, each with its step.
    """

    def __init__(self, directory: Path, step: int, write: bool = True) -> None:
        """Opens the log of a directory.

        Args:
          directory: the directory.
          step: the step after which the run resumes. Metrics of later steps, by a run that was stopped, are dropped.
          write: whether to write files; otherwise metrics are kept in memory only.
        """
        self.path = files.output_directory(directory) / "metrics.jsonl"
        self.rows = [row for row in _rows(self.path) if row["step"] <= step]
        self._board = None
        if write:
            files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of a step."""
        row = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        self.rows.append(row)
        if self._board is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, float(value), step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # an incomplete last line of a killed run
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
