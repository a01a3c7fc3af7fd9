"""Writes a run's metrics, one line per step in metrics.jsonl and as TensorBoard events, and measures time by phase."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rhythm.system.writing import naming, replace_file
from rhythm.trainer.tracking import WandbMode, WandbRun

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

Record = dict[str, float]


class Stopwatch:
    """Measures the seconds a step spends in each phase."""

    def __init__(self) -> None:
        self._started = perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of a block to `phase`."""
        started = perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - started

    def move(self, seconds: float, *, of: str, to: str) -> None:
        """Move `seconds` from phase `of` to phase `to`, at most what `of` has; NaN moves nothing."""
        moved = min(seconds, self.seconds.get(of, 0.0)) if math.isfinite(seconds) else 0.0
        self.seconds[of] = self.seconds.get(of, 0.0) - moved
        self.seconds[to] = self.seconds.get(to, 0.0) + moved

    @property
    def total(self) -> float:
        """Seconds since this stopwatch was created."""
        return perf_counter() - self._started


class MetricsLog:
    """Writes metrics.jsonl and, if wanted, TensorBoard events, without the steps a resumed run repeats; logs to
    Weights & Biases.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool,
        after_step: int | None,
        wandb: WandbMode = "disabled",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Continue after `after_step`, or start from nothing for None.

        Missing or damaged lines of earlier steps are logged.

        `config`: of the run, for Weights & Biases.

        Raises ModuleNotFoundError, with the command that installs it, if TensorBoard or Weights & Biases is wanted and
        not installed, and ValueError if the latter can't start.
        """
        self._path = run_dir / "metrics.jsonl"
        self._events = run_dir / "tensorboard"
        _keep_steps(self._path, -1 if after_step is None else after_step)
        self._writer = None
        if tensorboard:
            with naming(self._events):
                self._writer = _summary_writer(self._events, after_step)
        self._wandb = None if wandb == "disabled" else WandbRun(run_dir, wandb, config or {})

    def write(self, record: Mapping[str, float]) -> None:
        """Append a step's numbers and flush them to disk. NaN and infinity are null in the file.

        Raises OSError naming the file; the line may then be incomplete, and is left out on resume.
        """
        step = int(record["step"])
        values = {k: v if math.isfinite(v) else None for k, v in record.items()} | {"step": step}
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._wandb is not None:
            self._wandb.write(values)
        if self._writer is not None:
            with naming(self._events):
                for key, value in values.items():
                    if key != "step" and value is not None:
                        self._writer.add_scalar(key, value, step)
                self._writer.flush()

    def close(self) -> None:
        """Finish the event file and the Weights & Biases run."""
        if self._wandb is not None:
            self._wandb.close()
        if self._writer is not None:
            with naming(self._events):
                self._writer.close()


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The lines of a metrics.jsonl, one dictionary per step; a last line cut short by a killed run is left out.

    Raises ValueError naming the first line that is not a step's numbers.
    """
    rows, damaged = _read(path)
    if damaged:
        raise ValueError(f"{path}, line {damaged[0]}, is not a step's numbers as JSON")
    return rows


def _read(path: Path) -> tuple[list[dict[str, float | None]], list[int]]:
    """The rows, and the line numbers (from 1) of finished lines that are not rows."""
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise ValueError("step is not a whole number")
        except (ValueError, TypeError, KeyError, RecursionError):  # neither UTF-8 nor JSON, no object, no step
            damaged.append(number)
        else:
            rows.append(row)
    return rows, damaged


def _keep_steps(path: Path, last: int) -> None:
    """Remove the lines of steps after `last` and an unfinished line; the file is replaced atomically."""
    rows, damaged = _read(path)
    if damaged:
        copy = path.with_name(f"{path.name}.damaged")
        replace_file(copy, path.read_bytes())
        log.warning("%s: removed what is not a step's numbers: %s; the old file is in %s", path, _lines(damaged), copy)
    kept = [row for row in rows if row["step"] is not None and row["step"] <= last]
    if missing := sorted(set(range(last + 1)) - {int(row["step"] or 0) for row in kept}):
        what = "has lost" if rows or damaged else "is missing or empty: it has lost"
        log.warning("%s %s the numbers of %d of the steps 0 to %d; the run continues without them", path, what,
                    len(missing), last)  # fmt: skip
    replace_file(path, "".join(json.dumps(row) + "\n" for row in kept))


def _lines(numbers: list[int]) -> str:
    """Up to five line numbers, for a message."""
    shown = ", ".join(map(str, numbers[:5]))
    return f"{'line' if len(numbers) == 1 else 'lines'} {shown}{' …' if len(numbers) > 5 else ''}"


def _summary_writer(directory: Path, after_step: int | None) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tensorboard=true needs TensorBoard: pip install '.[train]' in a clone of rhythm, or set tensorboard=false"
        ) from error
    return SummaryWriter(str(directory), purge_step=0 if after_step is None else after_step + 1)
