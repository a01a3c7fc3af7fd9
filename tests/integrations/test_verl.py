"""rhythm.integrations.verl in verl: its engine's passes, its TransferQueue, its trainer's methods, on the CPU.
FSDP's sharding, the rollout and the Ray workers are left out: they need CUDA. Skipped where verl is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny_model
from torch import Tensor, distributed

import rhythm
from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.integrations.adapter import credit_of_process
from rhythm.tap.signals_config import SignalsConfig

pytest.importorskip("verl", reason="verl 0.9 is not installed")
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"

import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.transferqueue_utils import tqbridge
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

from rhythm.integrations import verl as adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LENS, PROMPTS = [21, 30, 17, 26, 24, 19], [6, 9, 4, 6, 8, 5]
SIGNALS = {"layers": 2, "window": 4, "horizon": [2, 8], "backend": "reference"}


@pytest.fixture(scope="module")
def _queue() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    import ray

    ray.init(num_cpus=16, include_dashboard=False, object_store_memory=200 << 20)
    tq.init()
    yield
    tq.close()
    ray.shutdown()
    distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RHYTHM_CREDIT", f"{{credit: {{strategy: coupled, mass: matched}}, signals: {SIGNALS}}}")
    monkeypatch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(transformer_impl, "get_device_name", lambda: "cpu")
    credit_of_process.cache_clear()
    yield
    credit_of_process.cache_clear()


def jagged(parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def texts(step: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(step)
    return [torch.randint(4, 100, (length,), generator=random) for length in LENS]


def engine_of(model: Any) -> Any:
    """verl's engine without FSDP: what `initialize` would have wrapped is there as it is."""
    kind = EngineRegistry.get_engine_cls("language_model", "fsdp2")
    assert kind is adapter.RhythmFSDPEngine
    engine = object.__new__(kind)
    engine.module, engine._autocast_dtype = model, torch.float32
    engine.ulysses_sequence_parallel_size, engine.use_ulysses_sp, engine.pad_to_length = 1, False, False
    engine.ulysses_device_mesh = None
    engine.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    engine.compute_entropy_from_logits = transformer_impl.verl_F.entropy_from_logits
    engine.get_data_parallel_group = lambda: None
    engine.get_data_parallel_size = lambda: 1
    engine._gradient_sync_context = lambda is_last_micro_batch: torch.enable_grad()
    return engine


class WorkerGroup:
    """The one method of verl's that is called, on the engine's own passes over micro-batches of two rows."""

    def __init__(self, engine: Any, remove_padding: bool) -> None:
        self.engine, self.remove_padding = engine, remove_padding

    def compute_log_prob(self, batch: Any) -> Any:
        @tqbridge()
        def bridged(data: TensorDict) -> TensorDict:
            options = {
                "use_dynamic_bsz": False,
                "micro_batch_size_per_gpu": 2,
                "use_remove_padding": self.remove_padding,
            }
            tu.assign_non_tensor(data, **options)
            output = self.engine.forward_backward_batch(data, None, forward_only=True)
            return TensorDict(output["model_output"], batch_size=len(LENS))

        return bridged(batch)


def trainer_of(engine: Any, remove_padding: bool) -> Any:
    trainer = object.__new__(adapter.RhythmTrainer)
    trainer.config = OmegaConf.create(
        {
            "data": {"seed": 1},
            "algorithm": {"use_kl_in_reward": False, "adv_estimator": "grpo", "gamma": 1.0, "lam": 1.0},
            "actor_rollout_ref": {
                "rollout": {"temperature": 1.0, "calculate_log_probs": False, "n": 3},
                "actor": {"loss_agg_mode": "token-mean", "loss_scale_factor": None},
            },
        }
    )
    trainer.actor_rollout_wg = WorkerGroup(engine, remove_padding)
    return trainer


def put(step: int) -> Any:
    """A rollout in the TransferQueue, as verl's agent loop leaves it."""
    ids, scores = texts(step), []
    for row, (length, prompt) in enumerate(zip(LENS, PROMPTS, strict=True)):
        score = torch.zeros(length - prompt)
        score[-1] = float((row + step) % 3)
        scores.append(score)
    fields = {
        "prompts": jagged([text[:prompt] for text, prompt in zip(ids, PROMPTS, strict=True)]),
        "responses": jagged([text[prompt:] for text, prompt in zip(ids, PROMPTS, strict=True)]),
        "response_mask": jagged([torch.ones_like(score, dtype=torch.long) for score in scores]),
        "loss_mask": jagged([torch.ones_like(score, dtype=torch.long) for score in scores]),
        "input_ids": jagged(ids),
        "position_ids": jagged([torch.arange(len(text)) for text in ids]),
        "rm_scores": jagged(scores),
        "uid": [f"{step}-{row // 3}" for row in range(len(LENS))],
    }
    keys = [f"{step}-{row // 3}_{row % 3}_0" for row in range(len(LENS))]  # prompt, sample, trajectory
    data = tu.get_tensordict(fields)
    return tq.kv_batch_put(keys=keys, partition_id="train", fields=data)


def expected(model: Any, step: int, plain: list[Tensor]) -> list[Tensor]:
    """From `rhythm.observe` on padded rows."""
    T = max(LENS)
    position = torch.arange(T)
    ids = torch.stack([torch.nn.functional.pad(text, (0, T - len(text))) for text in texts(step)])
    mask = position < torch.tensor(LENS)[:, None]
    response = mask & (position >= torch.tensor(PROMPTS)[:, None])
    signals = rhythm.observe(
        model, ids, attention_mask=mask.long(), prompt_lens=PROMPTS, signals=SignalsConfig(**SIGNALS)
    )
    gamma = batch_credit_weights(signals, response, CreditConfig(strategy="coupled", mass="matched"))
    assert gamma[response].unique().numel() > 2
    return [torch.where(a >= 0, a * g[inside], a) for a, g, inside in zip(plain, gamma, response, strict=True)]


@pytest.mark.usefixtures("_queue")
@pytest.mark.parametrize("remove_padding", [True, False], ids=["packed", "padded"])
def test_two_steps_of_verl_have_the_advantages_of_observe(remove_padding: bool) -> None:
    model = tiny_model()
    trainer = trainer_of(engine_of(model), remove_padding)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = None
    for step in (1, 2):
        trainer.global_steps = step
        batch = put(step)
        batch = trainer._compute_old_log_prob(batch, {})
        assert not batch.extra_info.get(adapter.WANTED)
        plain = super(adapter.RhythmTrainer, trainer)._compute_advantage(batch, {})
        plain = tq.kv_batch_get(plain.keys, "train", select_fields=["advantages"])["advantages"].unbind()
        metrics: dict[str, Any] = {}
        trainer._compute_advantage(batch, metrics)
        got = tq.kv_batch_get(batch.keys, "train", select_fields=["advantages", "old_log_probs"])
        for mine, wanted in zip(got["advantages"].unbind(), expected(model, step, list(plain)), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-7)
        assert metrics["rhythm/gamma_mean"] == pytest.approx(1.2, abs=0.02)
        assert any(not torch.equal(a, b) for a, b in zip(got["advantages"].unbind(), plain, strict=True))
        if before is not None:
            assert not torch.equal(before, got["old_log_probs"].unbind()[0])
        before = got["old_log_probs"].unbind()[0]
        ids = texts(step)[0][None]
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tq.kv_clear(keys=batch.keys, partition_id="train")
    assert model.config._attn_implementation == "sdpa"
