"""Files of a run that are damaged, missing or don't fit on the disk: messages, and what is kept."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rhythm.cli import train as command
from rhythm.cli.report import main as report
from rhythm.trainer.checkpoint import DamagedCheckpointError, RunState, find_damage, latest_checkpoint, save_checkpoint
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.metrics import MetricsLog, read_metrics
from rhythm.trainer.run_dir import RunDirectoryError, open_run_dir
from rhythm.trainer.samples import write_samples

Configure = Callable[..., TrainConfig]


def write(directory: Path) -> None:
    (directory / "weights").write_bytes(b"weights")


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# --- checkpoints


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    for step in (2, 4):
        save_checkpoint(tmp_path, RunState(step=step), write, keep=2)
    return tmp_path


def test_what_is_no_checkpoint_is_passed_over(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    (checkpoints / "step_abc").mkdir()
    (checkpoints / "step_000006").touch()
    latest = latest_checkpoint(checkpoints)
    assert latest == (checkpoints / "step_000004", RunState(step=4))
    assert "step_000006 is damaged (it is not a directory)" in caplog.text
    save_checkpoint(checkpoints, RunState(step=6), write, keep=2)
    assert find_damage(checkpoints / "step_000006") is None
    assert {path.name for path in checkpoints.iterdir()} == {"step_abc", "step_000004", "step_000006"}


def test_files_are_hashed_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=60)  # passed only if two files are being hashed
    digest = hashlib.file_digest

    def meeting(file: Any, name: str) -> Any:
        if file.name.endswith(".safetensors"):
            both.wait()
        return digest(file, name)

    def fill(directory: Path) -> None:
        for i in range(2):
            (directory / f"{i}.safetensors").write_bytes(bytes([i]) * 1000)

    monkeypatch.setattr(hashlib, "file_digest", meeting)
    path = save_checkpoint(tmp_path, RunState(step=2), fill, keep=2)
    sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
    assert sums["1.safetensors"] == hashlib.sha256(bytes([1]) * 1000).hexdigest()
    assert find_damage(path) is None
    (path / "1.safetensors").write_bytes(bytes([2]) * 1000)
    assert find_damage(path) == "1.safetensors does not match its checksum"


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    best = {2: 2, 4: 2, 6: 2, 8: 8, 10: 8}
    left = []
    for step, best_step in best.items():
        state = RunState(step=step, best_accuracy=0.5, best_step=best_step)
        save_checkpoint(tmp_path, state, write, keep=1, keep_best=True)
        left.append(sorted(int(path.name[5:]) for path in tmp_path.iterdir()))
    assert left == [[2], [2, 4], [2, 6], [8], [8, 10]]
    save_checkpoint(tmp_path, RunState(step=12, best_step=8), write, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000012"]


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        ("[]", "state.json is not a state of this version"),
        ("\xff", "state.json is not a state of this version"),
        ('{"step": "x"}', "state.json is not a state of this version"),
        ('{"step": 1000000000}', "state.json is from step 1000000000"),
    ],
)
def test_a_state_with_the_right_checksum_and_wrong_content(state: str, fault: str, checkpoints: Path) -> None:
    content, sums = state.encode("latin-1"), checkpoints / "step_000004" / "checksums.json"
    (sums.parent / "state.json").write_bytes(content)
    listed = json.loads(sums.read_text()) | {"state.json": hashlib.sha256(content).hexdigest()}
    sums.write_text(json.dumps(listed))
    assert find_damage(sums.parent) == fault
    assert latest_checkpoint(checkpoints) == (checkpoints / "step_000002", RunState(step=2))


def test_sums_that_are_nested(checkpoints: Path) -> None:
    for step in (2, 4):
        (checkpoints / f"step_{step:06d}" / "checksums.json").write_text("[" * 100_000)
    with pytest.raises(DamagedCheckpointError, match="every checkpoint"):
        latest_checkpoint(checkpoints)


@pytest.mark.parametrize("when", ["the weights", "the sums"])
def test_no_room_for_a_checkpoint(when: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ones before stay, the room is given back, and the error says what it is."""

    def no_weights(directory: Path) -> None:
        write(directory)
        raise RuntimeError("unexpected pos 118592 vs 118484")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_checkpoint(checkpoints, RunState(step=6), no_weights if when == "the weights" else write, keep=2)
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value.filename).startswith(str(checkpoints))
    monkeypatch.undo()
    assert {path.name for path in checkpoints.iterdir()} == {"step_000002", "step_000004"}
    assert latest_checkpoint(checkpoints) == (checkpoints / "step_000004", RunState(step=4))


@pytest.mark.parametrize("then", ["raises", "makes it again"])
def test_a_checkpoint_that_is_removed_while_it_is_written(then: str, checkpoints: Path) -> None:
    def removed(directory: Path) -> None:
        write(directory)
        shutil.rmtree(checkpoints)
        if then == "raises":
            raise RuntimeError("Parent directory does not exist")
        directory.mkdir(parents=True)
        write(directory)

    with pytest.raises(FileNotFoundError, match="removed while the checkpoint was written") as caught:
        save_checkpoint(checkpoints, RunState(step=6), removed, keep=2)
    assert caught.value.filename == str(checkpoints / ".writing-step_000006")
    assert latest_checkpoint(checkpoints) is None
    save_checkpoint(checkpoints, RunState(step=8), write, keep=2)
    assert latest_checkpoint(checkpoints) == (checkpoints / "step_000008", RunState(step=8))


# --- metrics.jsonl

ROWS = [{"step": step, "reward": 0.5} for step in range(5)]


def metrics(directory: Path, lines: list[str]) -> Path:
    path = directory / "metrics.jsonl"
    path.write_bytes("".join(lines).encode("latin-1"))
    return path


def resume(directory: Path, caplog: pytest.LogCaptureFixture) -> list[object]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        MetricsLog(directory, tensorboard=False, after_step=4).close()
    return [row["step"] for row in read_metrics(directory / "metrics.jsonl")]


def test_whole_metrics_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics(tmp_path, [json.dumps(row) + "\n" for row in [*ROWS, {"step": 5}]] + ['{"step": 6, "rew'])
    assert resume(tmp_path, caplog) == [0, 1, 2, 3, 4]
    assert caplog.text == ""


@pytest.mark.parametrize("garbage", ["{garbage\n", "7\n", "\xff\xfe\n", '{"step": "x"}\n', "[" * 100_000 + "\n"])
def test_garbage_is_left_out_and_kept_aside(garbage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps(row) + "\n" for row in ROWS]
    path = metrics(tmp_path, [*lines[:2], garbage, *lines[2:]])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3, is not a step's numbers"):
        read_metrics(path)
    assert resume(tmp_path, caplog) == [0, 1, 2, 3, 4]
    assert "removed what is not a step's numbers: line 3; the old file is in" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (None, "is missing or empty: it has lost the numbers of 5 of the steps 0 to 4"),
        (0, "is missing or empty: it has lost the numbers of 5 of the steps 0 to 4"),
        (3, "has lost the numbers of 2 of the steps 0 to 4; the run continues without them"),
    ],
)
def test_lost_steps_are_said(kept: int | None, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if kept is not None:
        metrics(tmp_path, [json.dumps(row) + "\n" for row in ROWS[:kept]])
    assert resume(tmp_path, caplog) == list(range(kept or 0))
    assert said in caplog.text


def test_no_room_for_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path, tensorboard=False, after_step=None)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        log.write({"step": 0.0})
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")


def test_no_room_for_samples(tmp_path: Path) -> None:
    write_samples(tmp_path, 2, [{"text": "old"}])
    (tmp_path / ".step_000002.jsonl.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write_samples(tmp_path, 2, [{"text": "new"}])
    assert caught.value.filename == str(tmp_path / "step_000002.jsonl")
    assert [json.loads(path.read_text())["text"] for path in tmp_path.iterdir()] == ["old"]


# --- config.yaml


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "is empty"), (b"name: \xe9\n", "is not UTF-8"), (b"a: [1\n", "is not YAML"), (b"- 1\n", "holds no keys"),
     (b"[" * 3000, "is not YAML"), (b"? [1]\n: 2\n", "is not YAML")],
)  # fmt: skip
def test_a_damaged_configuration_is_named(
    content: bytes, problem: str, small_config: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(f"runs_dir={tmp_path}")
    assert open_run_dir(config, resume=False) is None
    path = config.run_dir / "config.yaml"
    whole = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=rf"config\.yaml is damaged: it {problem}.*or delete the file"):
        open_run_dir(config, resume=True)
    assert path.read_bytes() == content
    path.unlink()
    (config.run_dir / "samples").mkdir()
    assert open_run_dir(config, resume=True) is None
    assert "config.yaml is missing: can't check that the run began with the same configuration" in caplog.text
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("old", "said"),
    [
        ({"attn": "inline"}, "attn is now signals.source"),
        ({"credit": {"q": 0.4}}, "credit.q is now credit.top_fraction"),
        (
            {"attn": "inline", "credit": {"q": 0.4}},
            "attn is now signals.source; credit.q is now credit.top_fraction",
        ),
    ],
)
def test_a_run_with_keys_of_another_name_is_not_continued(
    old: dict[str, Any], said: str, small_config: Configure, tmp_path: Path
) -> None:
    config = small_config(f"runs_dir={tmp_path}")
    open_run_dir(config, resume=False)
    path = config.run_dir / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | old))
    before = path.read_bytes()
    with pytest.raises(RunDirectoryError, match=re.escape(f"config.yaml is from an older version: {said}.")):
        open_run_dir(config, resume=True)
    assert path.read_bytes() == before


def test_the_configuration_is_replaced_in_one_go(
    small_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(f"runs_dir={tmp_path}")
    open_run_dir(config, resume=False)
    whole = (config.run_dir / "config.yaml").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        open_run_dir(small_config(f"runs_dir={tmp_path}", "steps=9"), resume=True)
    assert (config.run_dir / "config.yaml").read_bytes() == whole


# --- a whole run


def test_a_run_stopped_by_a_full_disk_can_be_resumed(
    small_config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rhythm.engines.local.train import TorchTrain

    save, steps = TorchTrain.save, []

    def crowded(self: TorchTrain, directory: Path) -> None:
        steps.append(directory.name)
        if len(steps) == 2:
            monkeypatch.setattr(os, "fsync", full)
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 118592 vs 118484")
        save(self, directory)

    monkeypatch.setattr(TorchTrain, "save", crowded)
    arguments = [str(small_config_file), f"runs_dir={tmp_path}", "name=full", "evaluation.samples=0"]
    assert command.main(arguments) == 6
    run = tmp_path / "full"
    shown = capsys.readouterr().err.splitlines()
    assert shown[-2] == f"rhythm-train: {run}/checkpoints/.writing-step_000004: disk full"
    assert shown[-1] == "finished files are kept (step_000002); solve the problem, then continue with --resume"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    assert ".lock" not in {path.name for path in run.iterdir()}
    monkeypatch.undo()
    assert command.main([*arguments, "--resume"]) == 0
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(7))


def test_no_room_for_a_warm_start(small_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rhythm.tiny import warm_start as module
    from rhythm.trainer.setup import build_task

    def crowded(model: object, tokenizer: object, directory: Path) -> None:
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_checkpoint", crowded)
    monkeypatch.setattr(module, "train", lambda *arguments, **keys: [1.0])
    config = small_config(f"warm_start.cache_dir={tmp_path}")
    with pytest.raises(OSError, match="No space left") as caught:
        module.warm_start(build_task(config), config.warm_start)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


# --- the report


@pytest.mark.parametrize("number", ["1e999", "9" * 400, '"x"', "null"])
def test_a_report_of_a_step_that_is_no_number(number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics(tmp_path, ['{"step": 1}\n', f'{{"step": {number}}}\n'])
    assert report([str(tmp_path)]) == 2
    assert "metrics.jsonl, line 2, must be an object with a step" in capsys.readouterr().err


def test_a_report_of_numbers_no_float_holds(tmp_path: Path) -> None:
    """They are as undefined as null."""
    values = ", ".join(f'"{key}": {value}' for key, value in {"reward": "1e999", "loss": "9" * 400}.items())
    metrics(tmp_path, [f'{{"step": 1, {values}, "accuracy": 0.5}}\n'])
    (tmp_path / "samples").mkdir()
    sample = f'{{"step": 1, "tokens": ["\\ud800x"], "waad": [{"9" * 400}], "reward": {"9" * 400}}}\n'
    (tmp_path / "samples" / "step_000001.jsonl").write_text(sample)
    (tmp_path / "config.yaml").write_bytes(b"name: \xe9\n")
    assert report([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "token 0 · WAAD undefined" in page
    assert "50.0%" in page


def test_a_report_that_is_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics(tmp_path, ['{"step": 1}\n', '{"step": 2, "é": 1}\n'])
    assert report([str(tmp_path)]) == 2
    assert "metrics.jsonl, line 2, is not JSON" in capsys.readouterr().err
