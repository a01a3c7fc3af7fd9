"""signals.source=training: γ from the training pass itself, against the pass before it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from rhythm.engines.local import packed as packing
from rhythm.engines.local.infer import GenerateInfer
from rhythm.engines.local.train import TorchTrain
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.loop import run
from rhythm.trainer.tapped import Taken, take_steps

pytestmark = pytest.mark.usefixtures("without_curves")

Configure = Callable[..., TrainConfig]
EVALUATED = 9
EVALUATION = ("evaluation.samples=0", f"evaluation.instances={EVALUATED}")
WHOLE = ("batch.mini_batch_size=16", "batch.micro_batch_size=4")
TRAINING = "signals.source=training"


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every log-prob pass of the trainer, but for those of evaluations."""
    rows: list[int] = []
    honest = TorchTrain.log_probs

    def log_probs(self: TorchTrain, rollout: Any, *options: Any) -> Any:
        if len(rollout.input_ids) != EVALUATED:  # an evaluation reads signals too
            rows.append(len(rollout.input_ids))
        return honest(self, rollout, *options)

    monkeypatch.setattr(TorchTrain, "log_probs", log_probs)
    return rows


def records_and_weights(config: TrainConfig) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    run_dir = run(config).run_dir
    weights = next((run_dir / "checkpoints" / f"step_{config.steps:06d}").rglob("model.safetensors"))
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()], load_file(weights)


@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("strategy", ["coupled", "entropy", "random"])
def test_one_gradient_step_is_as_inline_without_its_pass(
    small_config: Configure,
    tmp_path: Path,
    passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    every_row: bool,
) -> None:
    """Its means are those of the rows that it reads: the same as inline's if it reads `every_row`."""
    if every_row:
        monkeypatch.setattr(
            "rhythm.engines.local.train.rows_with_gradient", lambda batch, _: batch.rollout.finished | True
        )
    shared = (f"runs_dir={tmp_path}", "steps=2", f"credit.strategy={strategy}", *WHOLE, *EVALUATION)
    inline, expected = records_and_weights(small_config(*shared, "name=inline"))
    assert passes == [16, 16]
    training, weights = records_and_weights(small_config(*shared, "name=training", TRAINING))
    assert passes == [16, 16], "no pass but the training's own"
    for left, right in zip(inline[1:], training[1:], strict=True):
        of_all = ("gamma_mean", "entropy", "waad_mean", "fai_mean") if every_row else ()
        for key in ("loss", "grad_norm", "gamma_share", "reward", *of_all):
            assert right[key] == (None if left[key] is None else pytest.approx(left[key], rel=1e-4, abs=1e-6)), key
        assert right["gamma_mean"] > 1
        assert right["logprob_gap"] < 1e-4
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["coupled", "entropy", "random"])
def test_rows_without_a_gradient_are_not_read_nor_counted(
    small_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    steps: list[tuple[Any, Taken]] = []

    def kept(*arguments: Any) -> Taken:
        steps.append((arguments, take_steps(*arguments)))
        return steps[-1][1]

    monkeypatch.setattr("rhythm.trainer.step.take_steps", kept)
    shared = (f"runs_dir={tmp_path}", "steps=1", f"credit.strategy={strategy}", *WHOLE, *EVALUATION, TRAINING)
    record = records_and_weights(small_config(*shared))[0][1]
    (_, _, rollout, _, advantages, *_), taken = steps[0]
    learns, response = (advantages != 0)[:, None], rollout.response_mask
    assert 0 < learns.sum() < len(learns)
    assert torch.equal(taken.measured, response & learns)
    drawn = strategy == "random"  # of all rows: no pass is needed for it
    assert torch.equal(taken.gamma.isnan(), response & ~learns & ~torch.tensor(drawn))
    assert record["gamma_mean"] == pytest.approx(taken.gamma[response & (learns | drawn)].mean().item(), rel=1e-5)
    assert record["amplified_fraction"] == pytest.approx(
        (taken.gamma > 1)[response & (learns | drawn)].float().mean().item(), rel=1e-5
    )
    assert record["entropy"] == pytest.approx(taken.log_probs.entropy[response & learns].mean().item(), rel=1e-5)
    assert record["gamma_share"] > 0
    if taken.signals is not None:
        assert torch.equal(taken.signals.waad.isnan(), ~(response & learns))


@pytest.mark.parametrize("source", ["inline", "separate", "training"])
@pytest.mark.parametrize("packed", ["batch.max_tokens=100", "batch.share_prompts=true"])
def test_packed_micro_batches_train_the_same(
    small_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, packed: str
) -> None:
    shared_prompts: list[bool] = []

    def packed_states(*arguments: Any, share_prompts: bool, **options: Any) -> torch.Tensor:
        shared_prompts.append(share_prompts)
        return packing.packed_states(*arguments, share_prompts=share_prompts, **options)

    monkeypatch.setattr("rhythm.engines.local.train.packed_states", packed_states)
    shared = (f"runs_dir={tmp_path}", "steps=2", f"signals.source={source}", "batch.mini_batch_size=16", *EVALUATION)
    by_rows, expected = records_and_weights(small_config(*shared, "name=rows"))
    again, weights = records_and_weights(small_config(*shared, "name=packed", packed))
    assert {*shared_prompts} == {packed == "batch.share_prompts=true"}
    for left, right in zip(by_rows[1:], again[1:], strict=True):
        for key in ("loss", "grad_norm", "gamma_mean", "entropy", "waad_mean", "approx_kl", "clip_share", "reward"):
            assert right[key] == (None if left[key] is None else pytest.approx(left[key], rel=1e-4, abs=1e-6)), key
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("source", "rows"), [("trainer", [8]), ("rollout", [])])
def test_later_mini_batches_have_the_rollouts_log_probs(
    small_config: Configure, tmp_path: Path, passes: list[int], source: str, rows: list[int]
) -> None:
    """Two gradient steps: old log-probs of the second one's rows alone are computed, or taken from the rollout."""
    shared = (f"runs_dir={tmp_path}", "steps=1", "credit.strategy=random", *EVALUATION)
    inline, expected = records_and_weights(small_config(*shared, "name=inline"))
    passes.clear()
    override = (TRAINING, f"batch.old_logprobs={source}")
    training, weights = records_and_weights(small_config(*shared, "name=training", *override))
    assert passes == rows
    assert training[1]["approx_kl"] > 0
    for key in ("loss", "clip_share", "approx_kl", "grad_norm"):
        assert training[1][key] == pytest.approx(inline[1][key], rel=1e-3, abs=1e-6), key
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("strategy", "sizes", "mode"),
    [
        ("coupled", WHOLE, "token_truncate"),
        ("coupled", WHOLE, "token_mask"),
        ("random", (), "token_truncate"),
    ],
)
def test_the_loss_is_corrected_as_inline(
    small_config: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    sizes: tuple[str, ...],
    mode: str,
) -> None:
    """Rollouts whose log-probs are half a nat too high and too low by turns: ratios of 0.61 and 1.65, above 1.2 cut or
    masked. With two gradient steps the second one's old log-probs come from a pass before them.
    """
    honest = GenerateInfer.generate

    def generate(self: GenerateInfer, *arguments: Any) -> Any:
        rollout = honest(self, *arguments)
        shift_T = torch.where(torch.arange(rollout.logprobs.shape[1]) % 2 == 0, 0.5, -0.5)
        return replace(rollout, logprobs=rollout.logprobs + shift_T * rollout.response_mask)

    monkeypatch.setattr(GenerateInfer, "generate", generate)
    shared = (f"runs_dir={tmp_path}", "steps=1", f"credit.strategy={strategy}", *sizes, *EVALUATION)
    corrected = (f"correction.mode={mode}", "correction.high=1.2")
    plain, _ = records_and_weights(small_config(*shared, "name=plain", TRAINING))
    inline, expected = records_and_weights(small_config(*shared, *corrected, "name=inline"))
    training, weights = records_and_weights(small_config(*shared, *corrected, "name=training", TRAINING))
    assert training[1]["corrected_share"] == pytest.approx(0.5, abs=0.1)
    assert abs(training[1]["grad_norm"] - plain[1]["grad_norm"]) > 0.02 * plain[1]["grad_norm"]
    for key in ("loss", "grad_norm"):
        assert training[1][key] == pytest.approx(inline[1][key], rel=1e-3, abs=1e-6), key
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        ((TRAINING, "signals.grouping=batch"), "signals.grouping is 'batch': must be 'sequence'"),
        ((TRAINING, "credit.mass=matched"), "credit.mass is 'matched': must be 'as_is'"),
        (
            ("credit.strategy=random", "credit.random_like=coupled", TRAINING),
            "credit.random_like is 'coupled': must be",
        ),
        (("batch.old_logprobs=rollout",), "batch.old_logprobs is 'rollout': must be 'trainer' unless"),
        ((TRAINING, "batch.old_logprobs=rollout", "model.precision=bfloat16"), "'trainer' with model.precision"),
        (
            (
                TRAINING,
                "batch.old_logprobs=rollout",
                "cluster.gpus=0",
                "cluster.infer.engine=transformers",
                "cluster.infer.kv_cache_gib=null",
            ),
            "batch.old_logprobs is 'rollout': must be 'trainer' with a cluster",
        ),
        ((TRAINING, "batch.old_logprobs=rollout", "correction.mode=token_mask"), "correction.mode is 'token_mask'"),
    ],
)
def test_what_needs_all_rows_is_refused(small_config: Configure, overrides: tuple[str, ...], refusal: str) -> None:
    with pytest.raises((ValidationError, ValueError), match=refusal):
        small_config(*overrides)
