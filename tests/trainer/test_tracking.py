"""Weights & Biases gets the same metrics as metrics.jsonl; chosen steps write a trace of torch's profiler."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2

from rhythm.system import extras
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.loop import run
from rhythm.trainer.metrics import MetricsLog

pytestmark = pytest.mark.usefixtures("without_curves")


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format, in blocks of 32 KiB."""
    data, position, parts = path.read_bytes(), 7, b""
    while position < len(data):
        if (left := 32768 - position % 32768) < 7:  # too short for a header: padding
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def logged(run_dir: Path) -> list[dict[str, float]]:
    """The rows of all offline runs under `run_dir`, in the order in which they were logged."""
    rows = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
    return rows


def test_offline_runs_hold_what_metrics_jsonl_does(small_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    overrides = (f"runs_dir={tmp_path}", "name=tracked", "wandb=offline", "evaluation.samples=0")
    run(small_config(*overrides, "steps=1", "checkpoint.every_steps=1"))
    run_id = (tmp_path / "tracked" / "wandb_id").read_text()
    time.sleep(1)  # wandb names an offline run's folder by the second
    run(small_config(*overrides, "steps=2", "checkpoint.every_steps=1"), resume=True)  # goes on in the same run
    lines = [json.loads(line) for line in (tmp_path / "tracked" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    expected = [{key: value for key, value in line.items() if value is not None} for line in lines]
    assert logged(tmp_path / "tracked") == expected
    assert (tmp_path / "tracked" / "wandb_id").read_text() == run_id
    assert {path.name.split("-")[-1] for path in (tmp_path / "tracked" / "wandb").glob("offline-run-*")} == {run_id}


def test_without_wandb_the_command_that_installs_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"wandb=offline needs wandb.*\[wandb\]"):
        MetricsLog(tmp_path, tensorboard=False, after_step=None, wandb="offline")
    assert extras.EXTRAS["wandb"] == "wandb"


def test_chosen_steps_leave_a_trace(small_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    overrides = (f"runs_dir={tmp_path}", "name=profiled", "steps=2", "profile_steps=[2]", "evaluation.samples=0")
    run(small_config(*overrides))
    traces = list((tmp_path / "profiled" / "profile").iterdir())
    assert [trace.name for trace in traces] == ["step_000002.json"]
    names = {event["name"] for event in json.loads(traces[0].read_text())["traceEvents"]}
    assert {"aten::linear", "Optimizer.step#AdamW.step"} <= names  # forward pass and gradient step


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("profile_steps=[0]",), "profile_steps"),
        (("profile_steps=[1]", "cluster.gpus=0", "cluster.infer.kv_cache_gib=1"), "must be empty with a cluster"),
        (("wandb=maybe",), "wandb is .maybe."),
    ],
)
def test_what_cannot_be_tracked_is_refused(
    overrides: tuple[str, ...], message: str, small_config: Callable[..., TrainConfig]
) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(*overrides)
