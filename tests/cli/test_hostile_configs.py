"""Deliberately wrong configurations give one short message that names the fault, in bounded time."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from rhythm.cli.config_file import ConfigError, load_config
from rhythm.cli.train import main


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: caf\xe9\n", "is not UTF-8: byte 10 is 0xe9; save it as UTF-8"),
        (b"steps: " + b"9" * 5000, "a number of thousands of digits"),
        (b"steps: 2024-13-45\n", "not valid YAML: month must be in 1..12"),
        (b"? [1, 2]\n: 3\n", "a list can't be a key"),
        (b"? {a: 2}\n: 3\n", "a dict can't be a key"),
        (b"[" * 2000, "is nested more than 32 deep"),
        (b"a: " * 2000, "not valid YAML"),
        (b"batch: &x {mini_batch_size: 4}\noptimizer: {<<: *x}\n", "merges (<<) are not supported"),
        (b"steps: true\n", "steps is True: must be int"),
        (b"steps: 1:30\n", "steps is '1:30': input should be a valid integer"),
        (b"signals: {horizon: [true, 9]}\n", "signals.horizon is [True, 9]: must be [int, int | null]"),
        (b"sampling: {temperature: false}\n", "sampling.temperature is False: must be float"),
        (b"sampling: {temperature: .inf}\n", "sampling.temperature is inf: input should be a finite number"),
        (b"evaluation: {temperature: .inf}\n", "evaluation.temperature is inf"),
        (b"warm_start: {learning_rate: .inf}\n", "warm_start.learning_rate is inf"),
        (b"optimizer: {lr: .inf}\n", "optimizer.lr is inf"),
        (b"loss: {kl_coef: .inf}\n", "loss.kl_coef is inf"),
        (b"signals: {window: 1" + b"0" * 30 + b"}\n", "signals.window is 1000"),
        (b"signals: {window: 4294967296}\n", "signals.window is 4294967296: input should be less than or equal to 214"),
        (b"signals: {horizon: [1, 1" + b"0" * 22 + b"]}\n", "signals.horizon is [1, 1000"),
        (b"signals: {horizon: [1, 4294967296]}\n", "must be [low, high] with 0 <= low <= high <= 2147483647"),
        (
            b"task: {options: {train_size: 1000000000000}}\n",
            "task.options.train_size is 1000000000000: input should be",
        ),
        (b"task: {name: '..x:y'}\n", "task.name: cannot be imported: TypeError"),
        (b"name: ..\n", "name: must name a directory in runs_dir"),
        (b"name: .\n", "name: must name a directory in runs_dir"),
        (b"name: a/b\n", "name is 'a/b': string should match pattern"),
        (b"name: " + b"a" * 256, "string should have at most 255 characters"),
        (b"x" * 300_000, "has more than 256 KiB, too much for a configuration"),
    ],
)
def test_one_message(content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "bad.yaml"
    config.write_bytes(content)
    assert main([str(config), "--dry-run"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("rhythm-train: ")
    assert message in shown
    assert len(shown) < 1000


def test_true_is_still_a_bool(tmp_path: Path) -> None:
    config = tmp_path / "good.yaml"
    config.write_text("tensorboard: false\nsteps: 90\noptimizer: {lr: 1e-5, max_grad_norm: .inf}\nname: .hidden\n")
    loaded = load_config(config, ["signals.window=1000000000", "signals.horizon=[1, null]"])
    assert (loaded.tensorboard, loaded.steps, loaded.optimizer.lr, loaded.name) == (False, 90, 1e-5, ".hidden")
    assert (loaded.signals.window, loaded.signals.horizon) == (10**9, (1, None))


def test_many_unknown_keys_take_bounded_time_and_message(tmp_path: Path) -> None:
    """The nearest known key of the first few, and a count of the rest."""
    config = tmp_path / "many.yaml"
    config.write_text("optimiser: 1\n" + "".join(f"stepz{i}: 1\n" for i in range(10_000)))
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert time.process_time() - started < 15  # PyYAML's own time; with a suggestion for each key, 3 ms more a key
    lines = str(caught.value).splitlines()
    assert lines[0] == "optimiser: unknown key; did you mean optimizer?"
    assert lines[1] == "stepz0: unknown key; did you mean steps?"
    assert lines[-1] == "… and 9,981 more keys"
    assert len(lines) == 21
    assert sum("did you mean" in line for line in lines) == 5


OWN_TASK = """
from pydantic import BaseModel
from rhythm.tasks.countdown import Countdown

class Config(BaseModel, extra="forbid"):
    length: int = 5

class Sort(Countdown):
    config_class = Config
"""


def test_keys_of_another_task_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_sort_task.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "own.yaml"
    config.write_text("task: {options: {numbers: 3, max_number: 20, train_size: 9, lenght: 4}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(config, ["task.name=own_sort_task:Sort"])
    assert str(caught.value).splitlines() == [
        "task.options: numbers, max_number, train_size belong to task countdown",
        "task.options.lenght: unknown key; did you mean task.options.length?",
    ]
    config.write_text("task: {options: {numbers: 3}}\n")
    with pytest.raises(ConfigError, match=r"^task\.options: numbers belongs to task countdown$"):
        load_config(config, ["task.name=own_sort_task:Sort"])


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("batch.max_num_seqs=1", ""),  # a key of cluster.infer
        ("batch.mini_batchsize=1", "; did you mean batch.mini_batch_size?"),
        ("task.options.max_numbr=1", "; did you mean task.options.max_number?"),
        ("lr=1", "; did you mean optimizer.lr?"),  # no section is written: any may be meant
        ("optimizr.lr=1", "; did you mean optimizer?"),
    ],
)
def test_suggestions_stay_within_the_section(override: str, suggestion: str, tmp_path: Path) -> None:
    config = tmp_path / "it.yaml"
    config.write_text("name: it\n")
    with pytest.raises(ConfigError) as caught:
        load_config(config, [override])
    assert str(caught.value).partition(": unknown key")[2] == suggestion


def test_aliases_that_double_make_a_short_message(tmp_path: Path) -> None:
    doubling = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    config = tmp_path / "bomb.yaml"
    config.write_text(f"a0: &a0 [x]\n{doubling}steps: *a8\n")
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert "steps is [[[" in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_configuration_may_come_through_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("steps: 7\n",))
    writer.start()
    assert load_config(pipe).steps == 7
    writer.join()
