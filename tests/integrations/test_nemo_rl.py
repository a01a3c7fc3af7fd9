"""rhythm.integrations.nemo_rl on stand-ins for NeMo-RL's worker, policy and estimator, with the contract that
docs/trainers.md has: NeMo-RL needs CUDA.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron_stand_in import VOCABULARY, Model, pack, packed_params
from models import tiny_model
from torch import Tensor

import rhythm
from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.integrations import nemo_rl
from rhythm.integrations.adapter import credit_of_process
from rhythm.tap.megatron import attach
from rhythm.tap.megatron_layers import MicroBatch
from rhythm.tap.signals_config import SignalsConfig

LENS, PROMPTS, S = [19, 11, 24, 15, 20], [6, 3, 8, 5, 7], 26
SIGNALS = {"layers": 2, "window": 4, "horizon": [2, 8], "backend": "reference"}
ORDER = [3, 0, 4, 1, 2]  # in which the policy sends rows to its workers


class Worker:
    """DTensorPolicyWorkerV2Impl, as far as the adapter calls it."""

    def __init__(self, model: Any) -> None:
        self.model, self.dtype, self.autocast_enabled = model, torch.bfloat16, False
        self.cfg = {
            "logprob_batch_size": 2,
            "dtensor_cfg": {"tensor_parallel_size": 1, "context_parallel_size": 1},
        }
        self.calls = 0

    def get_logprobs(self, data: Any, micro_batch_size: int | None = None) -> Any:
        self.calls += 1
        return {"logprobs": torch.zeros(data["input_ids"].shape)}

    def get_reference_policy_logprobs(self, *, data: Any) -> Any:
        return {"reference_logprobs": self.get_logprobs(data=data)}


class MegatronWorker:
    """MegatronPolicyWorkerImpl, as far as the adapter calls it: rows are packed in their order, each padded to a
    multiple, and packed_seq_params has the places with the padding.
    """

    def __init__(self, **cfg: Any) -> None:
        self.model = Model()
        self.cfg = {"megatron_cfg": {"context_parallel_size": 1}, "sequence_packing": {"enabled": True}} | cfg

    def get_logprobs(self, *, data: Any, micro_batch_size: Any = None, require_router_replay: bool = True) -> Any:
        rows = [row[:n] for row, n in zip(data["input_ids"], data["input_lengths"].tolist(), strict=True)]
        for part in (rows[:3], rows[3:]):
            ids, stored = pack(part, 4)
            packed = packed_params(stored, cu_seqlens_q_padded=torch.tensor(stored, dtype=torch.int32))
            self.model(input_ids=ids, position_ids=None, attention_mask=None, packed_seq_params=packed)
        return {"logprobs": torch.zeros(data["input_ids"].shape)}

    def get_reference_policy_logprobs(self, *, data: Any, micro_batch_size: Any = None) -> Any:
        return {"reference_logprobs": self.get_logprobs(data=data, require_router_replay=False)}


class Policy:
    """Sorts the rows for its workers, and back."""

    def __init__(self, cluster: Any, config: Any, worker_extension_cls_fqn: str | None = None) -> None:
        self.worker, self.extension = cluster, worker_extension_cls_fqn

    def get_logprobs(self, data: Any, timer: Any = None) -> Any:
        output = self.worker.get_logprobs(data={name: x[ORDER] for name, x in data.items()})
        back = torch.tensor(ORDER).argsort()
        return {name: x[back] for name, x in output.items()}


class Estimator:
    """GRPO's: one advantage a row, expanded without a copy."""

    use_leave_one_out_baseline = True

    def compute_advantage(self, prompt_ids: Tensor, rewards: Tensor, mask: Tensor, **_: Any) -> Tensor:
        return rewards[:, None].expand(mask.shape)


@pytest.fixture(autouse=True)
def _options(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RHYTHM_CREDIT", f"{{credit: {{strategy: coupled}}, signals: {SIGNALS}}}")
    credit_of_process.cache_clear()
    yield
    credit_of_process.cache_clear()


@pytest.fixture
def model() -> Any:
    return tiny_model().eval()


def batch(vocabulary: int = 100) -> dict[str, Tensor]:
    position = torch.arange(S)
    inside = position < torch.tensor(LENS)[:, None]
    ids = torch.randint(4, vocabulary, (len(LENS), S), generator=torch.Generator().manual_seed(6))
    return {
        "input_ids": torch.where(inside, ids, 0),
        "input_lengths": torch.tensor(LENS),
        "token_mask": (inside & (position >= torch.tensor(PROMPTS)[:, None])).long(),
    }


def test_advantages_are_those_of_observe(model: Any) -> None:
    made = nemo_rl.worker_class(Worker, nemo_rl.dtensor_pass)(model)
    grpo = SimpleNamespace(Policy=Policy, _create_advantage_estimator=lambda config: Estimator())
    nemo_rl.install(grpo)
    policy = grpo.Policy(cluster=made, config={"dtensor_cfg": {"enabled": True}})
    assert policy.extension.endswith("RhythmWorker")
    estimator = grpo._create_advantage_estimator(SimpleNamespace(loss_fn=SimpleNamespace()))
    assert estimator.use_leave_one_out_baseline
    data, rewards = batch(), torch.tensor([1.0, -0.5, 2.0, 0.25, 1.5])
    output = policy.get_logprobs(data)
    assert list(output) == ["logprobs"]
    assert "rhythm_waad" not in made.get_reference_policy_logprobs(data=data)["reference_logprobs"]
    sample_mask = torch.tensor([1, 1, 1, 1, 0])
    mask = data["token_mask"] * sample_mask[:, None]
    got = estimator.compute_advantage(prompt_ids=None, rewards=rewards, mask=mask)
    signals = rhythm.observe(
        model,
        data["input_ids"],
        attention_mask=(torch.arange(S) < torch.tensor(LENS)[:, None]).long(),
        prompt_lens=PROMPTS,
        signals=SignalsConfig(**SIGNALS),
    )
    gamma = batch_credit_weights(signals, mask.bool(), CreditConfig(strategy="coupled"))
    assert gamma[mask.bool()].unique().numel() > 2
    plain = rewards[:, None].expand(mask.shape)
    torch.testing.assert_close(got, torch.where(plain >= 0, plain * gamma, plain), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="force_on_policy_ratio must be false"):
        estimator.compute_advantage(prompt_ids=None, rewards=rewards, mask=mask)


@pytest.mark.cluster  # the tap asks Megatron for its groups
def test_a_megatron_policy_is_read_in_its_own_pass() -> None:
    worker, data = nemo_rl.worker_class(MegatronWorker, nemo_rl.megatron_pass)(), batch(VOCABULARY)
    data["token_mask"][1] = 0  # a row that the loss leaves out
    prompts = [*PROMPTS[:1], LENS[1], *PROMPTS[2:]]
    none = SimpleNamespace(tensor=None, pipeline=None)
    with (
        attach(worker.model, SignalsConfig(**SIGNALS), groups=none) as tap,
        tap.reading(MicroBatch(range(5), LENS, prompts)),
    ):
        worker.model(input_ids=data["input_ids"])
    expected = tap.signals(data["token_mask"].bool())
    for _ in range(2):
        got = worker.get_logprobs(data=data, require_router_replay=False)
        torch.testing.assert_close(got["rhythm_waad"], expected.waad, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(got["rhythm_fai"], expected.fai, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert got["rhythm_waad"].isfinite().any()
    assert list(worker.get_reference_policy_logprobs(data=data)["reference_logprobs"]) == ["logprobs"]
    assert not any(module._forward_hooks for module in worker.model.modules())
    policy = nemo_rl.policy_class(Policy)(cluster=worker, config={"megatron_cfg": {"enabled": True}})
    assert policy.extension.endswith("RhythmMegatronWorker")


def test_refused_by_name(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = nemo_rl.worker_class(Worker, nemo_rl.dtensor_pass)(model)
    made.cfg["dtensor_cfg"]["tensor_parallel_size"] = 2
    with pytest.raises(ValueError, match=r"dtensor_cfg is \{'tensor': 2, 'context': 1\}"):
        made.get_logprobs(batch())
    for cfg, message in (
        ({"megatron_cfg": {"context_parallel_size": 2}}, "megatron_cfg.context_parallel_size is 2"),
        ({"sequence_packing": {"enabled": False}}, "sequence_packing.enabled is False"),
    ):
        with pytest.raises(ValueError, match=message):
            nemo_rl.worker_class(MegatronWorker, nemo_rl.megatron_pass)(**cfg).get_logprobs(data=batch())
    grpo = SimpleNamespace(Policy=Policy, _create_advantage_estimator=lambda config: Estimator())
    nemo_rl.install(grpo)
    gspo = SimpleNamespace(loss_fn=SimpleNamespace(sequence_level_importance_ratios=True))
    with pytest.raises(ValueError, match="sequence_level_importance_ratios is True"):
        grpo._create_advantage_estimator(gspo)
    monkeypatch.setenv("RHYTHM_CREDIT", "credit: {strategy: random}")
    credit_of_process.cache_clear()
    mask = batch()["token_mask"]
    mask[1, PROMPTS[1] + 2] = 0
    with pytest.raises(ValueError, match="the loss mask of response 1 leaves out 1 of its 8 tokens"):
        nemo_rl.RhythmEstimator(Estimator()).compute_advantage(None, torch.ones(5), mask)
