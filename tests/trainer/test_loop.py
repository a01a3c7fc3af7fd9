"""Runs in this process: sources of signals, the effect of γ, and a loss that is not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rhythm.engines.local.train import TorchTrain
from rhythm.tasks import Reward
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.loop import NonFiniteRunError, run

pytestmark = pytest.mark.usefixtures("without_curves")

Configure = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_inline_and_separate_give_the_same_run(small_config: Configure, tmp_path: Path) -> None:
    """γ from the old-log-prob pass and γ from a pass of its own: same γ, so the same losses and rewards."""
    results = []
    for source in ("inline", "separate"):
        names = (f"runs_dir={tmp_path}", f"name={source}", f"signals.source={source}")
        summary = run(small_config(*names, "steps=3", "evaluation.instances=9"))
        results.append(rows(summary.run_dir))
    for inline, separate in zip(*results, strict=True):
        for key in ("reward", "loss", "gamma_mean", "gamma_share", "waad_mean", "fai_mean", "accuracy"):
            assert inline.get(key) == separate.get(key), key
    assert [row.get("accuracy_instances") for row in results[0]] == [9, None, 9, 9]  # where it was evaluated
    assert 0 < results[0][1]["amplified_fraction"] < 1
    assert results[0][1]["gamma_mean"] > 1


def test_strategies_change_the_run_and_none_does_not_amplify(small_config: Configure, tmp_path: Path) -> None:
    gammas = {}
    for strategy in ("none", "random", "entropy", "local_chunk", "global_anchor", "coupled"):
        overrides = (f"runs_dir={tmp_path}", f"name={strategy}", f"credit.strategy={strategy}", "steps=1")
        record = rows(run(small_config(*overrides, "evaluation.samples=8", "evaluation.temperature=1")).run_dir)[1]
        assert (record["gamma_mean"] == 1) == (strategy == "none")
        samples = (tmp_path / strategy / "samples" / "step_000001.jsonl").read_text().splitlines()
        gammas[strategy] = tuple(tuple(json.loads(line)["gamma"]) for line in samples)
    assert len(set(gammas.values())) == len(gammas)


def test_a_loss_that_is_not_finite_stops_the_run(
    small_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is kept, loadable without pickled code, and no weight has changed."""
    honest, calls, before = TorchTrain.step, [], {}

    def poisoned(self: TorchTrain, batch: object) -> object:
        calls.append(1)
        if len(calls) == 3:  # the first gradient step of the second training step
            batch.advantages[batch.rollout.response_mask] = torch.nan
            before.update({name: x.clone() for name, x in self.weights().items()})
            try:
                return honest(self, batch)
            finally:
                assert all(torch.equal(x, before[name]) for name, x in self.weights().items())
        return honest(self, batch)

    monkeypatch.setattr(TorchTrain, "step", poisoned)
    with pytest.raises(NonFiniteRunError, match=r"step 2: .*failed_batch_step_000002\.pt"):
        run(small_config(f"runs_dir={tmp_path}"))
    kept = torch.load(tmp_path / "small" / "failed_batch_step_000002.pt", weights_only=True)
    assert kept["step"] == 2
    assert kept["batch"]["advantages"].isnan().any()
    assert [row["step"] for row in rows(tmp_path / "small")] == [0, 1]
    assert before


def test_the_trained_policy_is_an_ordinary_checkpoint(small_config: Configure, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(small_config(f"runs_dir={tmp_path}", "steps=1"))
    checkpoint = tmp_path / "small" / "checkpoints" / "step_000001"
    folder = next(path.parent for path in checkpoint.rglob("config.json"))
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "qwen3"
    assert AutoTokenizer.from_pretrained(folder).decode([5]) == " "
    # and a run can start from it
    summary = run(small_config(f"runs_dir={tmp_path}", "name=second", "steps=1", f"model.path={folder}"))
    assert summary.step == 1


FAULTY = """
import math, time
from rhythm.tasks import Reward
from rhythm.tasks.countdown import Countdown

class Faulty(Countdown):
    def reward(self, instance, response):
        place = self.train.index(instance) if instance in self.train else -1
        if place == 0:
            return None
        if place == 1:
            return Reward(math.nan, correct=True, format_ok=True)
        if place == 2:
            raise RuntimeError("no reward for this")
        if place == 3:
            time.sleep(600)
        return super().reward(instance, response)
"""


def test_faulty_rewards_are_counted_and_the_run_goes_on(
    small_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faulty_rewards.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    # A step that sees every one of the sixty training instances twice.
    sizes = ("batch.prompts_per_batch=60", "batch.responses_per_prompt=2", "evaluation.samples=0")
    task = ("task.name=faulty_rewards:Faulty", "reward.seconds=1")
    config = small_config(f"runs_dir={tmp_path}", "name=faulty", "steps=1", *task, *sizes)
    run(config)
    row = rows(config.run_dir)[1]
    assert (row["rewards_invalid"], row["rewards_raised"], row["rewards_late"]) == (4, 2, 2)
    assert row["loss"] is not None


def test_the_loss_is_corrected_for_the_engine_that_generated(
    small_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts that claim log-probs half a nat higher: every ratio is exp(−½), and so is every advantage's factor."""
    from rhythm.engines.local.infer import GenerateInfer

    honest_generate, honest_step, seen = GenerateInfer.generate, TorchTrain.step, []

    def generate(self: GenerateInfer, *arguments: Any) -> Any:
        rollout = honest_generate(self, *arguments)
        return replace(rollout, logprobs=rollout.logprobs + 0.5 * rollout.response_mask)

    def step(self: TorchTrain, batch: Any) -> Any:
        seen.append(batch)
        return honest_step(self, batch)

    monkeypatch.setattr(TorchTrain, "step", step)
    overrides = (f"runs_dir={tmp_path}", "steps=1", "evaluation.samples=0")
    run(small_config(*overrides, "name=honest", "correction.mode=token_truncate"))
    monkeypatch.setattr(GenerateInfer, "generate", generate)
    records = {}
    for mode in ("none", "token_truncate", "token_mask", "sequence_mask"):
        records[mode] = rows(run(small_config(*overrides, f"name={mode}", f"correction.mode={mode}",
                                              "correction.low=0.5")).run_dir)[1]  # fmt: skip
    honest, plain, truncated, masked, sequences = (
        torch.cat([x.advantages for x in seen[i : i + 2]]) for i in range(0, 10, 2)
    )
    assert honest.abs().sum() > 0
    torch.testing.assert_close(plain, honest, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(truncated, honest * math.exp(-0.5), rtol=1e-4, atol=1e-5)
    assert torch.equal(masked, truncated)
    assert not sequences.any()  # exp(−½) for each of several tokens is below ½ together
    assert [record["corrected_share"] for record in records.values()] == [0, 0, 0, 1]
    for record in records.values():
        assert record["rollout_ratio_mean"] == pytest.approx(math.exp(-0.5), rel=1e-4)
        assert record["rollout_kl"] == pytest.approx(math.exp(-0.5) - 1 + 0.5, rel=1e-3)


def test_the_best_checkpoint_is_kept(small_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies by script: the best is after step 3, where no checkpoint is due; on resume it is still known."""
    from rhythm.trainer import loop

    accuracy = {0: 0.3, 1: 0.2, 2: 0.4, 3: 0.9, 4: 0.5, 5: 0.9, 6: 0.1, 7: 0.1}
    honest = loop.evaluate

    def scripted(*arguments: Any, step: int, **options: Any) -> Any:
        scored = honest(*arguments, step=step, **options)
        right = round(accuracy[step] * 10)
        rewards = [Reward(0.0, correct=i < right, format_ok=True) for i in range(len(scored.rewards))]
        return replace(scored, rewards=rewards)

    monkeypatch.setattr(loop, "evaluate", scripted)
    options = (
        f"runs_dir={tmp_path}", "evaluation.every_steps=1", "evaluation.instances=10", "evaluation.samples=0",
        "evaluation.rhythm_responses=0", "checkpoint.every_steps=4", "checkpoint.keep=1",
    )  # fmt: skip

    def left() -> list[str]:
        return sorted(path.name for path in (tmp_path / "small" / "checkpoints").iterdir())

    summary = run(small_config(*options, "steps=5", "checkpoint.keep_best=true"))
    assert (summary.best_step, summary.best_accuracy) == (3, 0.9)
    assert left() == ["step_000003", "step_000005"]
    run(small_config(*options, "steps=6", "checkpoint.keep_best=true"), resume=True)
    assert left() == ["step_000003", "step_000006"]
    run(small_config(*options, "steps=7"), resume=True)
    assert left() == ["step_000007"]
