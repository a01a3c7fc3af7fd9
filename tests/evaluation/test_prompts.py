"""What rhythm-eval asks: what is refused before anything is written or loaded, which prompts are left out, and where a
response stops.
"""

from __future__ import annotations

import html
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rhythm.cli.eval import main
from rhythm.engines.local.infer import GenerateInfer
from rhythm.evaluation import engine
from rhythm.evaluation.config import EvaluationConfig, MachineConfig
from rhythm.evaluation.engine import open_infer, read_checkpoint
from rhythm.evaluation.run import evaluate_checkpoint

HERE = Path(__file__).parent
Evaluate = Callable[..., int]


@pytest.fixture
def evaluate(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """evaluate("key=value", …): the command with these words, into tmp_path / "out"; returns its exit code."""
    monkeypatch.syspath_prepend(HERE)
    given = ["--model", str(checkpoint), "--out", str(tmp_path / "out"), "sampling.max_new_tokens=6"]
    return lambda *words: main([*given, *words])


def settings(checkpoint: Path, **given: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"model": checkpoint, "tasks": ["words:Words"]} | given)


def rows(out: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "responses" / f"{task}.jsonl").read_text().splitlines()]


CHAT = "tasks=[{name: countdown, label: game, options: {chat: true, numbers: 2, train_size: 20, test_size: 4}}]"


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["", "dry run"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([CHAT], "task game: options.chat is true: the model's tokenizer has no chat template; leave it out"),
        (
            ["tasks=['words:Words']", "sampling.max_prompt_tokens=2"],
            "task Words: sampling.max_prompt_tokens is 2: no prompt has at most 2 tokens; the shortest has 3",
        ),
        (
            ["tasks=[{name: 'words:Long', options: {count: 1, longest: 1100}}]"],
            "task Long: the model's context is 1024: no prompt has at most 1023 tokens; the shortest has 1102",
        ),
        (["tasks=['words:Words']", "device=nowhere"], "device is 'nowhere'"),
        (["tasks=['words:Words']", "engine=vllm"], "or take engine=transformers"),
    ],
    ids=["chat", "max_prompt_tokens", "context", "device", "engine"],
)
def test_what_is_refused_before_anything_is_written_or_loaded(
    words: list[str],
    said: str,
    more: tuple[str, ...],
    evaluate: Evaluate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    monkeypatch.setattr(engine, "load_model", lambda *_, **__: pytest.fail("weights are loaded"))
    assert evaluate(*words, *more) == 2
    captured = capsys.readouterr()
    assert said in " ".join(captured.err.split())
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_what_was_refused_runs_once_it_is_corrected(evaluate: Evaluate, tmp_path: Path) -> None:
    """Not as another evaluation of a directory that the refused one has begun."""
    assert evaluate(CHAT) == 2
    assert evaluate(CHAT.replace("true", "false")) == 0
    assert len(rows(tmp_path / "out", "game")) == 4


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_checkpoint_with_a_damaged_file(
    name: str, evaluate: Evaluate, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    if name == "config.json":
        (copy / name).write_text("{")
    else:
        (copy / name).unlink()
    assert main(["--model", str(copy), "--out", str(tmp_path / "out"), "tasks=[countdown]"]) == 2
    assert f"model is {copy}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prompts_with_more_than_max_prompt_tokens_are_left_out_and_counted(
    evaluate: Evaluate, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three of the twelve prompts are a digit and >; with the token in front they have three tokens."""
    words = ("tasks=['words:Words']", "sampling.max_prompt_tokens=3", "samples=2")
    assert evaluate(*words, "--dry-run") == 0
    assert "# Words: 3 problems × 2 = 6 responses" in capsys.readouterr().out
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert evaluate(*words) == 0
    out = tmp_path / "out"
    assert {(row["problem"], row["prompt"]) for row in rows(out, "Words")} == {(0, "1>"), (3, "4>"), (6, "7>")}
    (scores,) = json.loads((out / "results.json").read_text())["tasks"]
    assert (scores["problems"], scores["left_out"]) == (3, 9)
    why = "more than 3 tokens (sampling.max_prompt_tokens is 3)"
    assert caplog.messages == [f"Words: left out 9 problems whose prompts have {why}"]
    page = html.unescape((out / "report.html").read_text())
    assert f"9 problems left out: the prompt has {why}" in page


@pytest.mark.parametrize("engine_stops", [True, False])
def test_a_response_ends_with_the_first_stop_string(
    engine_stops: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the engine goes on behind it."""
    monkeypatch.syspath_prepend(HERE)
    if not engine_stops:
        monkeypatch.setattr(engine, "GenerateInfer", lambda *model, tokenizer, **given: GenerateInfer(*model, **given))
    digits = [str(digit) for digit in range(10)]
    sampling = {"max_new_tokens": 12, "stop": digits}
    config = settings(checkpoint, samples=6, sampling=sampling)
    evaluate_checkpoint(config, MachineConfig(out=tmp_path / "out"))
    responses = rows(tmp_path / "out", "Words")
    stopped = [row for row in responses if any(digit in row["response"] for digit in digits)]
    assert len(stopped) > 10
    for row in stopped:
        assert row["response"][-1] in digits
        assert not any(digit in row["response"][:-1] for digit in digits)
        assert row["finished"]  # by itself: only the string can say so, no end token does
    assert min(row["tokens"] for row in stopped) == 1


def test_vllm_is_told_of_stop_strings(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its tokenizer vLLM refuses `sampling.stop`."""
    asked: list[dict[str, Any]] = []

    class StandIn:
        def __init__(self, *_: Any, **given: Any) -> None:
            asked.append(given)

        def close(self) -> None:
            asked[-1]["closed"] = True

    monkeypatch.setattr(engine, "VllmInfer", StandIn)
    read = read_checkpoint(settings(checkpoint), MachineConfig())
    for stop in ([], ["a"]):
        with open_infer(settings(checkpoint, engine="vllm", sampling={"stop": stop}), MachineConfig(), read):
            pass
    assert [given["stop_strings"] for given in asked] == [False, True]
    assert all(given["closed"] and given["max_length"] == read.context for given in asked)
