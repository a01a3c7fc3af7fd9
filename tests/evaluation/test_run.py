"""rhythm-eval: killed in real processes and continued, refused, and what its files say."""

from __future__ import annotations

import html
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from rhythm.cli.eval import main
from rhythm.engines.local.infer import GenerateInfer
from rhythm.evaluation.config import EvaluationConfig, MachineConfig
from rhythm.evaluation.run import default_directory, evaluate_checkpoint
from rhythm.seeds import derive_seed
from rhythm.tasks.isolation import IsolatedTask

HERE = Path(__file__).parent


def arguments(checkpoint: Path, out: Path, *words: str) -> list[str]:
    tasks = "tasks=[{name: 'words:Words', samples: 6, k: [1, 3]}, {name: 'words:Words', label: few, problems: 5}]"
    return ["--model", str(checkpoint), "--out", str(out), tasks, "sampling.max_new_tokens=6",
            "sampling.rows_at_once=8", *words]  # fmt: skip


def start(checkpoint: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    """On one thread: two evaluations of a test compare bit for bit."""
    return subprocess.Popen(
        [sys.executable, "-m", "rhythm.cli.eval", *arguments(checkpoint, out, *words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def evaluate(checkpoint: Path, out: Path, *words: str) -> str:
    """What `start` does to its end, in this process, which has loaded everything; returns its standard output."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as shown:
            patch.syspath_prepend(HERE)
            assert main(arguments(checkpoint, out, *words)) == 0
    finally:
        torch.set_num_threads(threads)
    return shown.getvalue()


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same evaluation, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert "pass@3" in evaluate(checkpoint, out)
    return out


def rows(out: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "responses" / f"{task}.jsonl").read_text().splitlines()]


def test_files_of_an_evaluation(whole: Path) -> None:
    responses = rows(whole, "Words")
    assert len(responses) == 12 * 6
    assert {(row["problem"], row["sample"]) for row in responses} == {(p, s) for p in range(12) for s in range(6)}
    for row in responses:
        assert row["seed"] == derive_seed(0, "evaluation", "Words", row["problem"], row["sample"])
        assert row["prompt"] == f"{str(1 + row['problem']) * (1 + row['problem'] % 3)}>"
        assert row["correct"] == row["response"][:1].isdigit() == bool(row["score"])
        assert 1 <= row["tokens"] <= 6
    results = json.loads((whole / "results.json").read_text())
    words, few = results["tasks"]
    right = [sum(row["correct"] for row in responses if row["problem"] == p) for p in range(12)]
    assert words["correct"] == right
    assert 0 < sum(right) < 72
    average = {each["name"]: each["value"] for each in words["estimates"]}
    assert average["avg@6"] == pytest.approx(sum(right) / 72)
    assert set(average) == {"pass@1", "pass@3", "avg@6"}
    assert (few["task"], few["problems"], few["samples"]) == ("few", 5, 1)
    assert results["settings"]["seed"] == 0
    assert not (whole / ".lock").exists()
    page = (whole / "report.html").read_text()
    assert f"problem 0: {right[0]} of 6 right" in page


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the first response": (lambda out: (out / "settings.json").is_file()),
    "after a batch": (lambda out: lines(out, "Words") >= 8),
    "in the middle": (lambda out: lines(out, "Words") >= 40),
    "in the second task": (lambda out: lines(out, "Words") >= 72),
}


def lines(out: Path, task: str) -> int:
    path = out / "responses" / f"{task}.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def same_results(first: Path, second: Path) -> None:
    for name in ("results.json", "report.html", "responses/Words.jsonl", "responses/few.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.slow
def test_killed_again_and_again_and_continued_equals_uninterrupted(
    checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for moment, happened in MOMENTS.items():
        process = start(checkpoint, out)
        deadline = time.monotonic() + 200
        while not happened(out):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, moment
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (out / "results.json").exists(), moment
    finish(start(checkpoint, out))
    same_results(out, whole)


def test_half_a_line_and_half_a_batch_are_generated_again(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    """What a kill in the middle of a write leaves: three whole batches, part of one, and a line cut off."""
    out = tmp_path / "out"
    (out / "responses").mkdir(parents=True)
    (out / "settings.json").write_bytes((whole / "settings.json").read_bytes())
    written = (whole / "responses" / "Words.jsonl").read_bytes().splitlines(keepends=True)
    (out / "responses" / "Words.jsonl").write_bytes(b"".join(written[:27]) + written[27][:30])
    evaluate(checkpoint, out)
    same_results(out, whole)


@pytest.mark.cluster
def test_vllm_answers_as_transformers_does(checkpoint: Path, tmp_path: Path) -> None:
    """Greedily: the same responses, but for ties that rounding decides."""
    words = ("sampling.temperature=0", "tasks=['words:Words']")
    evaluate(checkpoint, tmp_path / "transformers", *words)
    finish(
        start(checkpoint, tmp_path / "vllm", *words, "engine=vllm", "vllm.kv_cache_gib=0.0625", "vllm.max_num_seqs=16")
    )
    first, second = (rows(tmp_path / name, "Words") for name in ("transformers", "vllm"))
    assert [row["problem"] for row in first] == [row["problem"] for row in second]
    assert sum(a["response"] == b["response"] for a, b in zip(first, second, strict=True)) >= len(first) - 1


def test_the_seed_and_the_batch_size_decide(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    """Another seed gives other responses; other batches give the same ones."""
    evaluate(checkpoint, tmp_path / "other", "seed=1")
    assert [r["response"] for r in rows(tmp_path / "other", "Words")] != [r["response"] for r in rows(whole, "Words")]
    evaluate(checkpoint, tmp_path / "at-once", "sampling.rows_at_once=72")
    assert sorted((r["problem"], r["sample"], r["response"]) for r in rows(tmp_path / "at-once", "Words")) == sorted(
        (r["problem"], r["sample"], r["response"]) for r in rows(whole, "Words")
    )


def test_a_batch_is_scored_while_the_next_is_generated(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    generate, start = GenerateInfer.generate_each, IsolatedTask.start_rewards

    def generate_each(self: GenerateInfer, *given: Any) -> Any:
        seen.append("generate")
        return generate(self, *given)

    def start_rewards(self: IsolatedTask, *given: Any) -> Callable[[], Any]:
        seen.append("score")
        rewards = start(self, *given)
        return lambda: (seen.append("wait"), rewards())[1]

    monkeypatch.setattr(GenerateInfer, "generate_each", generate_each)
    monkeypatch.setattr(IsolatedTask, "start_rewards", start_rewards)
    evaluate(checkpoint, tmp_path / "out", "tasks=[{name: 'words:Words', samples: 2, problems: 12}]")
    assert seen == ["generate", "score", "generate", "score", "wait", "generate", "score", "wait", "wait"]
    assert len(rows(tmp_path / "out", "Words")) == 24


def test_another_evaluation_is_not_continued(
    checkpoint: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(HERE)
    assert main(arguments(checkpoint, whole, "seed=3")) == 2
    error = capsys.readouterr().err
    assert f"{whole} holds another evaluation (seed was 0, is 3): choose another out=…" in error
    assert "finished responses stay" in error


def test_the_context_limits_responses_and_leaves_problems_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(HERE)
    context = json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"]
    options = {"count": 3, "longest": context + 10}  # no prompt but the first is that long
    task = {"name": "words:Long", "options": options}
    found = evaluate_checkpoint(
        EvaluationConfig.model_validate({"model": checkpoint, "tasks": [task], "sampling": {"max_new_tokens": 9999}}),
        MachineConfig(out=tmp_path / "out"),
    )
    (scores,) = found.scores
    assert (scores.problems, scores.left_out) == (2, 1)
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    assert (
        f"1 problems left out: the prompt has more than {context - 1:,} tokens (the model's context is {context})"
        in (page)
    )
    for row in rows(tmp_path / "out", "Long"):
        assert row["tokens"] <= context - (len(row["prompt"]) + 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tasks=[countdown]", "samples=2", "k=[0]"], "k is 0 for task countdown: must be from 1 to samples = 2"),
        (["tasks=[{name: countdown, samples: 4, k: [8]}]"], "k is 8 for task countdown: must be from 1 to samples = 4"),
        (["tasks=[countdwn]"], "tasks[0].name: task is 'countdwn'"),
        (
            ["tasks=[{name: countdown, samples: 0}]"],
            "tasks[0].samples is 0: input should be greater than",
        ),
        (["tasks=[{name: countdown, sample: 3}]"], "tasks[0].sample: unknown key"),
        (["tasks=[countdown, countdown]"], "two tasks are called countdown: give each a label"),
        (["tasks=[]"], "must name at least one task"),
        (["tasks=countdown"], "must be a list of names or of mappings"),
        (["tasks=[countdown]", "samples=2", "sampling.temperature=0"], "samples is 2 for task countdown: must be 1"),
        (["tasks=[{name: countdown, options: {numbrs: 3}}]"], "tasks[0].options"),
        (["tasks=[{name: countdown, options: {numbers: 2, max_number: 2}}]"], "task countdown: train_size + test_size"),
        (["tasks=[nowhere:Task]"], "tasks[0].name: cannot be imported"),
        ([], "tasks: is required"),
        (["tasks=[countdown]", "modle=x"], "did you mean model?"),
    ],
)
def test_bad_input_is_named_before_anything_starts(
    words: list[str], said: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(checkpoint), "--out", str(tmp_path / "out"), *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path / "none"), "tasks=[countdown]"]) == 2
    assert f"model is {tmp_path / 'none'}: no such directory" in capsys.readouterr().err
    assert main(["--model", str(tmp_path), "tasks=[countdown]"]) == 2
    assert f"model is {tmp_path}: no checkpoint; it must be a directory with config.json" in capsys.readouterr().err


def test_dry_run_and_help_start_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(HERE)
    assert main([*arguments(checkpoint, tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "# Words: 12 problems × 6 = 72 responses; avg@6, pass@1, pass@3" in shown
    assert "# few: 5 problems × 1 = 5 responses; avg@1, pass@1" in shown
    assert not (tmp_path / "out").exists()
    config = tmp_path / "eval.yaml"
    config.write_text(shown)
    assert main([str(config), "--dry-run"]) == 0
    assert capsys.readouterr().out == shown  # what it prints is a configuration
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "samples  int = 1" in shown
    assert "sampling.top_p  float = 1.0" in shown


def test_default_directories() -> None:
    assert default_directory(Path("runs/a/checkpoints/step_000040")) == Path("evaluations/a-step_000040")
    assert default_directory(Path("models/Qwen3-4B")) == Path("evaluations/Qwen3-4B")
