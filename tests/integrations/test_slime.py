"""rhythm.integrations.slime in slime's order of calls, on real ranks of Megatron with the tiny model. slime itself
needs CUDA and SGLang and does not run here: slime_loop.py keeps its contract.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron_case import LAYOUTS, OPTIONS, make_case, run_ranks
from megatron_stand_in import Model
from transformers import AutoModelForCausalLM

import rhythm
from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.integrations import slime
from rhythm.integrations.adapter import credit_of_process
from rhythm.tap.signals_config import SignalsConfig

pytestmark = [pytest.mark.cluster]

MASKED = 3
RHYTHM_CREDIT = """
credit: {strategy: coupled, mass: matched}
signals: {layers: 3, backend: reference}
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_case(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(autouse=True)
def _options(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RHYTHM_CREDIT", RHYTHM_CREDIT)
    credit_of_process.cache_clear()
    yield
    credit_of_process.cache_clear()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["one", "data", "pipeline", "both"])
def test_advantages_are_those_of_observe(case: Any, tmp_path: Path, layout: str) -> None:
    rollout = case.rollout
    model = AutoModelForCausalLM.from_pretrained(case.checkpoint, dtype=torch.float32)
    mask = rollout.response_mask.clone()
    mask[MASKED] = False
    signals = rhythm.observe(
        model,
        rollout.input_ids,
        attention_mask=rollout.attention_mask,
        prompt_lens=rollout.prompt_lens,
        signals=SignalsConfig(layers=3, backend="reference"),
    )
    gamma = batch_credit_weights(signals, mask, CreditConfig(strategy="coupled", mass="matched"))
    assert gamma[mask].unique().numel() > 1
    shaped = {}
    for results in run_ranks(
        tmp_path,
        scenario="called",
        file=str(Path(__file__).with_name("slime_loop.py")),
        parallel=LAYOUTS[layout],
        checkpoint=case.checkpoint,
        options=OPTIONS,
        rollout=rollout,
        masked=MASKED,
    ):
        assert results["hooks"] == 0
        assert "no pass of log-probs has run before the advantages" in results["refused"]
        for row, advantages in results["advantages"].items():
            plain = results["plain"][row]
            factor = gamma[row, rollout.response_mask[row]] if plain[0] >= 0 else 1.0
            torch.testing.assert_close(advantages, plain * factor, rtol=1e-6, atol=0)
            shaped[row] = advantages
    assert sorted(shaped) == list(range(7))


def arguments(**changes: Any) -> Any:
    return SimpleNamespace(
        **({"seed": 1, "advantage_estimator": "grpo", "context_parallel_size": 1, "qkv_format": "thd"} | changes)
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"advantage_estimator": "gspo"}, "advantage_estimator is 'gspo'.*one ratio"),
        ({"context_parallel_size": 2}, "context_parallel_size is 2"),
        ({"qkv_format": "bshd"}, "qkv_format is 'bshd'"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        slime.before_log_probs(arguments(**changes), [Model()], "")


def test_entropy_needs_slimes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHYTHM_CREDIT", "credit: {strategy: entropy}")
    credit_of_process.cache_clear()
    with pytest.raises(ValueError, match="use_rollout_entropy is False"):
        slime.before_log_probs(arguments(), [Model()], "")
    args = arguments(use_rollout_entropy=True)
    slime.before_log_probs(args, [Model()], "")
    data: dict[str, Any] = {
        "tokens": [torch.arange(6)],
        "total_lengths": [6],
        "response_lengths": [4],
        "loss_masks": [torch.ones(4)],
        "entropy": [torch.tensor([0.1, 2.0, 0.2, 1.0])],
        "advantages": [torch.ones(4)],
    }
    slime.shape_advantages(args, 0, data)
    assert data["advantages"][0].tolist() == [1.0, 1.5, 1.0, 1.5]
    data["loss_masks"] = [torch.tensor([1, 0, 1, 1])]
    with pytest.raises(ValueError, match="the loss mask of response 0 leaves out 1 of its 4 tokens"):
        slime.shape_advantages(args, 0, data)


def test_the_critic_is_left_alone() -> None:
    model = Model()
    model.role = "critic"  # type: ignore[assignment]
    slime.before_log_probs(arguments(advantage_estimator="gspo"), [model], "")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("strategy: coupled", r"RHYTHM_CREDIT holds \['strategy'\]"),
        ("coupled", "RHYTHM_CREDIT holds 'coupled'"),
        ("signals: {grouping: batch}", "grouping is 'batch'"),
    ],
)
def test_options_are_checked(monkeypatch: pytest.MonkeyPatch, text: str, named: str) -> None:
    monkeypatch.setenv("RHYTHM_CREDIT", text)
    credit_of_process.cache_clear()
    with pytest.raises(ValueError, match=named):
        credit_of_process()
