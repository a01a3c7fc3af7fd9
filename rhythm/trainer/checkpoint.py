"""Writes and finds checkpoints. Each is written under a temporary name, checksummed and renamed; damaged ones are
skipped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, Field

from rhythm.system.writing import naming, remove

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
STATE = "state.json"
_ASIDE = ".writing-"
_HASHED_AT_ONCE = 8  # files, of gigabytes each for a large model; hashlib lets other threads run meanwhile
_NAME = re.compile(r"step_[0-9]{6,18}")


class CheckpointConfig(BaseModel, extra="forbid", frozen=True):
    """When checkpoints are written, and how many are kept."""

    every_steps: int = Field(
        default=50, ge=1, description="training steps between checkpoints; the last step always gets one"
    )
    keep: int = Field(
        default=2, ge=1, description="newest checkpoints kept; with 1, a damaged one leaves nothing to resume from"
    )
    keep_best: bool = Field(
        default=False,
        description="also write one after each step evaluated as the best so far, and keep the best beside the newest; "
        "the start is never written",
    )


class RunState(BaseModel, extra="forbid", frozen=True):
    """The trainer's own state in a checkpoint, in addition to the engine's weights and optimizer."""

    step: int = Field(ge=0, description="training steps done")
    best_accuracy: float | None = Field(default=None, description="best held-out accuracy so far")
    best_step: int | None = Field(default=None, description="step after which best_accuracy was measured")
    local_heads: list[bool] | None = Field(default=None, description="grouping=calibrated: which heads are local")
    global_heads: list[bool] | None = Field(default=None, description="grouping=calibrated: which heads are global")
    watched_local: list[bool] | None = Field(default=None, description="local heads at the last evaluation")
    watched_global: list[bool] | None = Field(default=None, description="global heads at the last evaluation")


class DamagedCheckpointError(RuntimeError):
    """There are checkpoints, but all of them are damaged."""


def save_checkpoint(
    directory: Path, state: RunState, write: Callable[[Path], None], keep: int, keep_best: bool = False
) -> Path:
    """Write `directory`/step_N and delete all but the newest `keep` checkpoints; returns the new one's path. With
    `keep_best` the checkpoint of `state.best_step` is kept as well, if there is one.

    `write` fills the folder it is given. The folder gets its final name only once all of it is on disk, so every
    step_N is complete, even if the process or the machine stops while writing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step_{state.step:06d}"
    aside = directory / f"{_ASIDE}{final.name}"
    _remove_leftovers(directory)
    with naming(directory):
        aside.mkdir()
        try:
            with naming(aside), _staying(aside):
                write(aside)
            (aside / STATE).write_text(state.model_dump_json(indent=1), encoding="utf-8")
            files = _files(aside)
            names = [str(path.relative_to(aside)) for path in files]
            with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
                sums = dict(zip(names, pool.map(_sha256, files), strict=True))
            (aside / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
            for path in [*_files(aside), *(p for p in aside.rglob("*") if p.is_dir()), aside]:
                _sync(path)
        except OSError:  # on a full disk, free the space that the unfinished checkpoint takes
            shutil.rmtree(aside, ignore_errors=True)
            raise
    remove(final)  # if it exists it is damaged and was skipped on resume: replace it
    aside.rename(final)
    _sync(directory)
    # Newer ones are damaged and were skipped on resume: they must not count among those kept.
    newer = [path for path in _checkpoints(directory) if _step(path) > state.step]
    for path in newer + _checkpoints(directory)[len(newer) + keep :]:
        if not (keep_best and _step(path) == state.best_step):
            remove(path)
    return final


@contextmanager
def _staying(directory: Path) -> Iterator[None]:
    """Context for filling `directory`. Raises FileNotFoundError if it was removed meanwhile: libraries create one that
    is missing, so that what they write after that would look complete.
    """
    descriptor = os.open(directory, os.O_RDONLY)  # while it is open its inode belongs to no other directory
    try:
        yield
    finally:
        made = os.fstat(descriptor)
        os.close(descriptor)
        if not directory.exists() or not os.path.samestat(made, directory.stat()):
            raise FileNotFoundError(errno.ENOENT, "removed while the checkpoint was written", str(directory))


def latest_checkpoint(directory: Path) -> tuple[Path, RunState] | None:
    """The newest undamaged checkpoint and its state; None if there are no checkpoints.

    For each damaged one the bad file is logged, and the checkpoint before it is tried.

    Raises:
        DamagedCheckpointError: all checkpoints are damaged.
        OSError: a checkpoint can't be read.
    """
    checkpoints = _checkpoints(directory)
    for path in checkpoints:
        fault = find_damage(path)
        if fault is None:
            return path, RunState.model_validate_json((path / STATE).read_bytes())
        log.warning("checkpoint %s is damaged (%s); trying the one before it", path, fault)
    if checkpoints:
        raise DamagedCheckpointError(f"every checkpoint in {directory} is damaged; start again without --resume")
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Why a checkpoint can't be used, naming the file; None if it is undamaged."""
    if not checkpoint.is_dir():
        return "it is not a directory"
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_bytes())
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (ValueError, RecursionError):  # neither UTF-8 nor JSON
        return f"{CHECKSUMS} cannot be read"
    if not isinstance(sums, dict) or STATE not in sums:
        return f"{CHECKSUMS} does not list {STATE}"
    for name in sums:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        found = pool.map(_sha256, (checkpoint / name for name in sums))
        for (name, expected), sha in zip(sums.items(), found, strict=True):
            if sha != expected:
                return f"{name} does not match its checksum"
    try:
        state = RunState.model_validate_json((checkpoint / STATE).read_bytes())
    except ValueError:
        return f"{STATE} is not a state of this version"
    return None if state.step == _step(checkpoint) else f"{STATE} is from step {state.step}"


def _checkpoints(directory: Path) -> list[Path]:
    """Newest first; entries whose name is not step_N are ignored."""
    return sorted((path for path in directory.glob("step_*") if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _remove_leftovers(directory: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in directory.glob(f"{_ASIDE}*"):
        remove(path)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
