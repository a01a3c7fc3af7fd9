"""What a sweep is: a base configuration, methods as sets of overrides, and seeds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from rhythm.trainer.config import TrainConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
_SET_BY_THE_SWEEP = ("name", "seed", "warm_start.seed", "runs_dir")
# Where a run is computed and what it keeps, not what it learns.
_NOT_SETTINGS = {"name", "runs_dir", "tensorboard", "wandb", "profile_steps", "checkpoint", "seed"}


class SweepConfig(BaseModel, extra="forbid", frozen=True):
    """The configuration of rhythm-sweep."""

    name: str = Field(default="sweep", description="directory of the runs (below runs_dir) and of the results")
    base: Path = Field(
        default=Path("configs/countdown_tiny.yaml"),
        description="configuration of rhythm-train that all runs start from; relative to the sweep's file",
    )
    overrides: dict[str, Any] = Field(default={}, description="keys of rhythm-train that all runs share")
    methods: dict[str, dict[str, Any]] = Field(
        default={}, description="name of a method → keys of rhythm-train that make it, such as {credit.strategy: none}"
    )
    seeds: tuple[int, ...] = Field(
        default=(1, 2, 3, 4, 5), description="of prompts, sampling and warm start; all methods of a seed share them"
    )
    jobs: int | None = Field(
        default=None, ge=1, description="runs at once; null: one per GPU, without GPUs one per CPU of this process"
    )
    threads: int = Field(default=1, ge=1, description="CPU threads of a run")
    runs_dir: Path = Field(default=Path("runs"), description="directory that holds the directory of the runs")
    out: Path = Field(default=Path("docs/experiments"), description="directory that holds the directory of the results")
    keep_checkpoints: bool = Field(default=False, description="keep checkpoints of finished runs")

    @field_validator("methods")
    @classmethod
    def _named(cls, methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, keys in methods.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"a method is named by letters, digits, _ and ., got {name!r}")
            if taken := [key for key in keys if key in _SET_BY_THE_SWEEP]:
                raise ValueError(f"{name} sets {taken[0]}, which the sweep itself sets")
        return methods

    @field_validator("overrides")
    @classmethod
    def _not_its_own(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        if taken := [key for key in overrides if key in _SET_BY_THE_SWEEP]:
            raise ValueError(f"{taken[0]} is set by the sweep itself")
        return overrides

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"must be letters, digits, _ and ., got {name!r}")
        return name

    @model_validator(mode="after")
    def _something_to_run(self) -> Self:
        if not self.methods:
            raise ValueError("methods is empty: name at least one, such as methods: {grpo: {credit.strategy: none}}")
        if not self.seeds:
            raise ValueError("seeds is empty: give at least one")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different and not negative, got {list(self.seeds)}")
        return self

    @property
    def results(self) -> Path:
        """The directory of runs.csv and curves.csv."""
        return self.out / self.name

    @property
    def runs(self) -> Path:
        """The directory that contains the run directories."""
        return self.runs_dir / self.name


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep. settings: the `fingerprint` of its configuration."""

    method: str
    seed: int
    config: TrainConfig
    settings: str

    @property
    def name(self) -> str:
        """The run's name within the sweep, which is that of its directory."""
        return self.config.name


def plan(sweep: SweepConfig, resolve: Callable[[Sequence[str]], TrainConfig]) -> list[PlannedRun]:
    """Returns all runs, seed by seed, so that a sweep that is stopped early has complete seeds.

    Args:
        resolve: the base configuration with `key=value` overrides. Its errors pass through; every method is checked.
    """
    runs = []
    for seed in sweep.seeds:
        for method, keys in sweep.methods.items():
            values = {
                **sweep.overrides,
                **keys,
                "name": f"{method}-{seed}",
                "runs_dir": str(sweep.runs),
                "seed": seed,
                "warm_start.seed": seed,
            }
            config = resolve([f"{key}={json.dumps(value)}" for key, value in values.items()])
            runs.append(PlannedRun(method, seed, config, fingerprint(config)))
    return runs


def fingerprint(config: TrainConfig) -> str:
    """12 hexadecimal digits of all keys that decide what a run learns and differ from their defaults: a key that a
    later version adds changes nothing.
    """
    values = config.model_dump(mode="json", exclude=_NOT_SETTINGS, exclude_defaults=True)
    values.get("warm_start", {}).pop("cache_dir", None)
    values.get("warm_start", {}).pop("seed", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
