"""Sends the metrics of a run to Weights & Biases, and profiles chosen steps."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rhythm.system.extras import needs
from rhythm.system.writing import naming, replace_file

WandbMode = Literal["disabled", "offline", "online"]
_ID_FILE = "wandb_id"


class WandbRun:
    """One Weights & Biases run per run directory. A resumed run goes on in it: its id is kept in `wandb_id`.

    Metrics are plotted against `step`, so that steps which a resumed run repeats replace nothing and are not dropped.
    """

    def __init__(self, run_dir: Path, mode: Literal["offline", "online"], config: Mapping[str, Any]) -> None:
        """Raises ModuleNotFoundError, saying what to install, without wandb, and ValueError where it can't start."""
        with needs(f"wandb={mode}"):
            import wandb
        id_file = run_dir / _ID_FILE
        with naming(id_file):
            if not id_file.exists():
                replace_file(id_file, secrets.token_hex(4))
            run_id = id_file.read_text(encoding="utf-8").strip()
        try:
            self._run = wandb.init(
                dir=run_dir,
                mode=mode,
                id=run_id,
                resume="allow",
                name=run_dir.name,
                config=dict(config),
                settings=wandb.Settings(console="off"),  # leaves stdout and stderr alone
            )
        except wandb.errors.Error as error:
            raise ValueError(f"wandb={mode}: Weights & Biases could not start: {error}") from error
        self._run.define_metric("*", step_metric="step")

    def write(self, values: Mapping[str, float | None]) -> None:
        """Log one step's numbers, without the undefined ones (None)."""
        self._run.log({key: value for key, value in values.items() if value is not None})

    def close(self) -> None:
        """Finish the run; online, this waits until everything is sent."""
        self._run.finish()


@contextmanager
def profiled(path: Path) -> Iterator[None]:
    """Profile the block with torch's profiler and write a Chrome trace to `path` (open it in Perfetto)."""
    from torch.profiler import profile

    with profile(record_shapes=True) as profiler:  # CPU, and CUDA where there is one
        yield
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
