"""Opens a run's directory: checks that a run may start or continue there, and writes its configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rhythm.system.directory_lock import content
from rhythm.system.renamed import renamed_keys
from rhythm.system.writing import replace_file
from rhythm.trainer.checkpoint import RunState, latest_checkpoint
from rhythm.trainer.config import RENAMED, TrainConfig

log = logging.getLogger(__name__)

CONFIG, CHECKPOINTS, SAMPLES, LOGS = "config.yaml", "checkpoints", "samples", "logs"

# Keys that may change when a run is resumed: its length, intervals, directories and memory-related sizes.
_FREE = (
    "steps",
    "runs_dir",
    "tensorboard",
    "wandb",
    "profile_steps",
    "evaluation.",
    "checkpoint.",
    "warm_start.cache_dir",
    "cluster.",
)
_FREE_SIZES = (
    "batch.micro_batch_size",
    "batch.log_prob_micro_batch_size",
    "batch.max_tokens",
    "batch.share_prompts",
    "optimizer.token_chunk",
    "model.device",
    "model.gradient_checkpointing",
)
_NOT_FREE = ("cluster.train.engine",)  # each trainer reads only its own checkpoints


class RunDirectoryError(ValueError):
    """The run can't be started or continued in its directory; the message says why and what to do."""


def open_run_dir(config: TrainConfig, *, resume: bool) -> tuple[Path, RunState] | None:
    """Create the directory and write config.yaml; returns the checkpoint to continue from and its state, if any.

    The caller must hold the directory's lock (rhythm.system.directory_lock).

    Raises:
        RunDirectoryError: without `resume`, the directory is not empty; with it, its run has another configuration,
            or one that can't be read.
        DamagedCheckpointError: with `resume`, all checkpoints are damaged.
        OSError: config.yaml can't be written.
    """
    directory = config.run_dir
    resumed = None
    if content(directory):
        if not resume:
            raise RunDirectoryError(
                f"{directory} holds a run: continue it with --resume, choose another name=…, or delete it"
            )
        _check_same(directory / CONFIG, config)
        resumed = latest_checkpoint(directory / CHECKPOINTS)
    directory.mkdir(parents=True, exist_ok=True)
    if resume and resumed is None:
        log.info("no checkpoint in %s: starting from the beginning", directory)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    replace_file(directory / CONFIG, text)
    return resumed


def _check_same(path: Path, config: TrainConfig) -> None:
    if not path.is_file():
        log.warning("%s is missing: can't check that the run began with the same configuration", path)
        return
    written = _read(path)
    if said := renamed_keys(written, RENAMED):
        raise RunDirectoryError(f"{path} is from an older version: {said}. Start a run with another name")
    before = dict(_flat(written))
    now = dict(_flat(config.model_dump(mode="json")))
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and (key in _NOT_FREE or not (key.startswith(_FREE) or key in _FREE_SIZES))
    ]
    if changed:
        listed = ", ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed[:5])
        raise RunDirectoryError(f"{path.parent} was started with another configuration: {listed}")


def _read(path: Path) -> Mapping[str, Any]:
    """The keys of config.yaml. Raises RunDirectoryError for content that no run writes."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        problem = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "is not YAML"
    else:
        if isinstance(values, Mapping):
            return values
        problem = "is empty" if values is None else "holds no keys"
    raise RunDirectoryError(
        f"{path} is damaged: it {problem}. Restore the configuration that the run began with, or delete the file to "
        "continue without checking it"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
