"""Describes machine, software and commit of a measurement, and writes records."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import ROOT

RECORDS = ROOT / "benchmarks" / "records"


def machine() -> dict[str, object]:
    """Processor, cores, instruction set in use, system."""
    from rhythm import _C  # imported here, because a machine with a GPU may have only the source tree
    from rhythm.cli.doctor import cpu_model

    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "isa": _C.selected_isa(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def software() -> dict[str, str]:
    """Versions of Python, torch and rhythm; a source tree that is not installed has only its commit."""
    try:
        rhythm = version("rhythm")
    except PackageNotFoundError:
        rhythm = "not installed: the source tree"
    return {"python": platform.python_version(), "torch": torch.__version__, "rhythm": rhythm}


def commit() -> dict[str, object]:
    """The checked-out commit (None if there is none), and whether any file except records differs from it.

    In a copy of the source tree without its repository, RHYTHM_COMMIT names the commit.
    """
    head = _git("rev-parse", "--verify", "--quiet", "HEAD")
    if head is None and (name := os.environ.get("RHYTHM_COMMIT")):
        return {"hash": name, "dirty": None}
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/records")
    return {"hash": head or None, "dirty": changes != ""}


def record_path(device: str, where: Mapping[str, object], records: Path = RECORDS) -> Path:
    """records/<machine>/attention_<device>.json, where <machine> consists of processor, cores and instruction set."""
    name = f"{where['cpu']} {where['cores']} cores {where['isa']}"
    return records / re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-") / f"attention_{device}.json"


def write_record(path: Path, record: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _git(*arguments: str) -> str | None:
    """The output of git; None if there is no repository, no commit or no git."""
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None
