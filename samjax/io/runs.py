"""A training run on disk: its state in Orbax checkpoints, and its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from samjax.errors import UserError
from samjax.io import files


class Checkpoints:
    """States of a run: the last one and the best one, written while the run goes on.

    A state is whole or not there: Orbax writes beside and renames. A context manager.
    """

    def __init__(self, folder: Path, best: str) -> None:
        """`folder` is made if missing; the best state is that with the lowest figure `best`."""
        import orbax.checkpoint as ocp

        files.output_folder(folder)
        self._best = best
        keep = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep.AnyPreservationPolicy([
                    keep.LatestN(1),
                    keep.BestN(get_metric_fn=lambda figures: figures[best], reverse=True, n=1),
                ]),
                best_fn=lambda figures: figures[best],
                best_mode="min",
            ),
        )  # fmt: skip
        self._args = ocp.args

    @property
    def last(self) -> int | None:
        """The step of the last whole state."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the best state."""
        return self._manager.best_step()

    def save(self, step: int, state: Any, figures: Mapping[str, float] | None = None) -> None:
        """Begins to write a state; returns before it is written.

        Args:
          step: its number.
          state: a pytree of arrays.
          figures: of its validation; a state without can be the last one, but not the best.

        Raises:
          UserError: the disk refuses.
        """
        metrics = {self._best: float("inf"), **(figures or {})}
        try:
            self._manager.save(step, args=self._args.StandardSave(state), metrics=metrics, force=True)
        except OSError as error:
            raise UserError(f"cannot write {self._manager.directory}: {error.strerror or error}") from error

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, with shapes, types and places of the arrays of `like`.

        Raises:
          UserError: it is damaged, or of a predictor of another size.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        shapes = lambda tree: sorted(tuple(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
        try:
            # Orbax reads all arrays at once, and what waits when one does not fit complains much later.
            if shapes(self._manager.item_metadata(step)) != shapes(like):
                raise ValueError("it has arrays of other shapes")
            return self._manager.restore(step, args=self._args.StandardRestore(abstract))
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:160]
            raise UserError(
                f"{self._manager.directory / str(step)} cannot be read ({reason}): damaged, or of another preset?"
            ) from error

    def wait(self) -> None:
        """Waits until everything is written. Raises UserError if the disk refuses."""
        try:
            self._manager.wait_until_finished()
        except OSError as error:
            raise UserError(f"cannot write {self._manager.directory}: {error.strerror or error}") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for what is being written, however the block ends, and lets go."""
        self._manager.close()


class Log:
    """Figures by step: one JSON object a line, and TensorBoard's files beside it.

    What an earlier run wrote after the step at which this one goes on is dropped: it comes again. A context manager.
    """

    def __init__(self, folder: Path, step: int, write: bool = True) -> None:
        """Goes on after `step` of what is in `folder`; without `write` the figures are kept in memory alone."""
        self.path = files.output_folder(folder) / "metrics.jsonl"
        self.rows = [row for row in _rows(self.path) if row["step"] <= step]
        self._board = None
        if write:
            files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds the figures of a step."""
        row = {"step": step, **{name: float(value) for name, value in figures.items()}}
        self.rows.append(row)
        if self._board is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in figures.items():
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
            continue  # the last line of a run that was killed
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
