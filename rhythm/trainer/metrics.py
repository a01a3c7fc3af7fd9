"""The numbers of a run: a line a step in metrics.jsonl, the same as TensorBoard events, and the time by
phase.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Record = dict[str, float]


class Stopwatch:
    """Seconds by phase of a step."""

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
        """Count `seconds` of phase `of` as phase `to`, never more than it has; NaN moves none."""
        moved = min(seconds, self.seconds.get(of, 0.0)) if math.isfinite(seconds) else 0.0
        self.seconds[of] = self.seconds.get(of, 0.0) - moved
        self.seconds[to] = self.seconds.get(to, 0.0) + moved

    @property
    def total(self) -> float:
        """Seconds since this stopwatch was made."""
        return perf_counter() - self._started


class MetricsLog:
    """metrics.jsonl and, if wanted, TensorBoard events, both without the steps a resumed run does again."""

    def __init__(self, run_dir: Path, *, tensorboard: bool, after_step: int | None) -> None:
        """Continue after `after_step`, or start anew for None.

        Raises ModuleNotFoundError, saying what to do, if TensorBoard is wanted and not installed.
        """
        self._path = run_dir / "metrics.jsonl"
        _keep_steps(self._path, -1 if after_step is None else after_step)
        self._writer = _summary_writer(run_dir / "tensorboard", after_step) if tensorboard else None

    def write(self, record: Mapping[str, float]) -> None:
        """Append a step's numbers, on the disk before this returns. Undefined ones are null in the file."""
        step = int(record["step"])
        values = {k: v if math.isfinite(v) else None for k, v in record.items()} | {"step": step}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._writer is not None:
            for key, value in values.items():
                if key != "step" and value is not None:
                    self._writer.add_scalar(key, value, step)
            self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The lines of a metrics.jsonl, one dictionary a step; a last line cut short by a killed run is left
    out.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _keep_steps(path: Path, last: int) -> None:
    """Drop the lines of later steps and a line that was never finished; the file is replaced in one go."""
    kept = [row for row in read_metrics(path) if row["step"] is not None and row["step"] <= last]
    aside = path.with_name(path.name + ".part")
    aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    aside.replace(path)


def _summary_writer(directory: Path, after_step: int | None) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tensorboard=true needs TensorBoard: pip install '.[train]' in a clone of rhythm, or set tensorboard=false"
        ) from error
    return SummaryWriter(str(directory), purge_step=0 if after_step is None else after_step + 1)
