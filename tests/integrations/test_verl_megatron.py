"""rhythm.integrations.verl on stand-ins for verl: its Megatron engine, which needs CUDA, with the contract that
docs/trainers.md has, and what trainer and engines refuse.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatron_stand_in import VOCABULARY, Model, pack, packed_params
from torch import Tensor

from rhythm.integrations.adapter import credit_of_process
from rhythm.tap.megatron import attach
from rhythm.tap.megatron_layers import MicroBatch
from rhythm.tap.signals_config import SignalsConfig

pytestmark = [pytest.mark.cluster]  # the tap asks Megatron for its groups

LENS, PROMPTS = [19, 11, 24, 15, 20], [6, 3, 8, 5, 7]
SIGNALS = {"layers": [1, 2], "window": 4, "horizon": [2, 6], "backend": "reference"}


class MegatronEngineWithLMHead:
    """verl's engine as far as ours calls it: micro-batches of a dynamic batch, each row padded to a multiple of the
    tensor ranks; packed_seq_params has the places with the padding, and later stages get other input_ids.
    """

    def __init__(self, model: Model, **changes: Any) -> None:
        self.module = [model]
        self.engine_config = SimpleNamespace(**{"context_parallel_size": 1, "use_remove_padding": True} | changes)

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        step = partial(self.forward_step, logits_processor_func=loss_function, postprocess_micro_batch_func=None)
        for rows in ([3, 0], [4, 1], [2]):
            part = {name: jagged([data[name].unbind()[row] for row in rows]) for name in ("input_ids", "responses")}
            step(iter([part]), self.module[0])
        return {"model_output": {"log_probs": data["input_ids"]}, "loss": [], "metrics": {}}

    def forward_step(
        self, batch_iter: Iterator[Any], model: Any, logits_processor_func: Any, postprocess_micro_batch_func: Any
    ) -> None:
        ids, stored = pack(list(next(batch_iter)["input_ids"].unbind()), 4)
        packed = packed_params(stored, cu_seqlens_q_padded=torch.tensor(stored, dtype=torch.int32))
        model(input_ids=ids, attention_mask=None, position_ids=None, packed_seq_params=packed)


class FSDPEngineWithLMHead:
    """As far as ours looks at it before a pass."""

    ulysses_sequence_parallel_size, pad_to_length = 1, False


class PPOTrainerSync:
    def __init__(self, config: Any) -> None:
        self.config = config


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[dict[str, Any], type]]]:
    """What the adapter registers with verl when it is imported: (how, class)."""
    made: list[tuple[dict[str, Any], type]] = []

    def register(**how: Any) -> Any:
        return lambda kind: made.append((how, kind)) or kind

    registry = SimpleNamespace(register=register)
    names: dict[str, dict[str, Any]] = {
        "transfer_queue": {},
        "tensordict": {"TensorDict": dict},
        "verl": {},
        "verl.trainer.ppo.v1.trainer_base": {"register_trainer": lambda name: lambda kind: kind},
        "verl.trainer.ppo.v1.trainer_sync": {"PPOTrainerSync": PPOTrainerSync},
        "verl.utils": {
            "tensordict_utils": SimpleNamespace(get_non_tensor_data=lambda data, key, default: data.get(key, default))
        },
        "verl.workers": {},
        "verl.workers.engine": {
            "EngineRegistry": registry,
            "MegatronEngineWithLMHead": MegatronEngineWithLMHead,
        },
        "verl.workers.engine.fsdp.transformer_impl": {"FSDPEngineWithLMHead": FSDPEngineWithLMHead},
    }
    for name, values in names.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["verl.workers"])["engine"] = sys.modules["verl.workers.engine"]
    monkeypatch.delitem(sys.modules, "rhythm.integrations.verl", raising=False)
    monkeypatch.setenv("RHYTHM_CREDIT", f"{{credit: {{strategy: coupled}}, signals: {SIGNALS}}}")
    credit_of_process.cache_clear()
    importlib.import_module("rhythm.integrations.verl")
    yield made
    credit_of_process.cache_clear()
    del sys.modules["rhythm.integrations.verl"]


def batch(**more: Any) -> dict[str, Any]:
    random = torch.Generator().manual_seed(6)
    rows = [torch.randint(1, VOCABULARY, (n,), generator=random) for n in LENS]
    responses = [row[prompt:] for row, prompt in zip(rows, PROMPTS, strict=True)]
    return {"input_ids": jagged(rows), "responses": jagged(responses)} | more


def configuration(loss_mode: str = "vanilla", strategy: str = "fsdp", bypass_mode: bool = False) -> Any:
    actor = SimpleNamespace(policy_loss={"loss_mode": loss_mode}, strategy=strategy)
    return SimpleNamespace(
        actor_rollout_ref=SimpleNamespace(actor=actor),
        algorithm={"rollout_correction": {"bypass_mode": bypass_mode}},
    )


def test_signals_come_with_the_outputs_of_the_pass(registered: list[tuple[dict[str, Any], Any]]) -> None:
    (how, engine_class) = registered[-1]
    assert how == {
        "model_type": "language_model", "backend": "megatron", "device": "cuda", "vendor": ["nvidia", "amd"]
    }  # fmt: skip
    model = Model()
    engine, data = engine_class(model), batch(rhythm_signals=True)
    ids = torch.nested.to_padded_tensor(data["input_ids"], 0)
    none = SimpleNamespace(tensor=None, pipeline=None)
    with (
        attach(model, SignalsConfig(**SIGNALS), groups=none) as tap,
        tap.reading(MicroBatch(range(5), LENS, PROMPTS)),
    ):
        model(input_ids=ids)
    position = torch.arange(max(LENS))
    response = (position >= torch.tensor(PROMPTS)[:, None]) & (position < torch.tensor(LENS)[:, None])
    expected = tap.signals(response)
    for _ in range(2):
        output = engine.forward_backward_batch(data, None, forward_only=True)["model_output"]
        for name, wanted in (("rhythm_waad", expected.waad), ("rhythm_fai", expected.fai)):
            for got, row, n in zip(output[name].unbind(), wanted, LENS, strict=True):
                torch.testing.assert_close(got, row[:n], rtol=1e-5, atol=1e-6, equal_nan=True)
    # A pass that does not ask, and training, are verl's own.
    del engine.rhythm_micro
    for other, forward_only in ((batch(), True), (data, False)):
        assert list(engine.forward_backward_batch(other, None, forward_only)["model_output"]) == ["log_probs"]
    assert not hasattr(engine, "rhythm_micro")
    assert not any(module._forward_hooks for module in model.modules())


def test_refused_by_name(registered: list[tuple[dict[str, Any], Any]]) -> None:
    (_, fsdp_class), (_, engine_class) = registered
    for name, value, message in (
        ("ulysses_sequence_parallel_size", 2, "ulysses_sequence_parallel_size is 2; it must be 1"),
        ("pad_to_length", True, "pad_to_length is True; it must be False"),
    ):
        fsdp = fsdp_class()
        setattr(fsdp, name, value)
        with pytest.raises(ValueError, match=message):
            fsdp.forward_step(batch(rhythm_signals=True), None, forward_only=True)
    trainer_class = sys.modules["rhythm.integrations.verl"].RhythmTrainer
    for changes, message in (
        ({"loss_mode": "gspo"}, "actor.policy_loss.loss_mode is 'gspo'.*one ratio"),
        ({"loss_mode": "geo_mean"}, "actor.policy_loss.loss_mode is 'geo_mean'.*one ratio"),
        ({"strategy": "veomni"}, "actor.strategy is 'veomni'; it must be fsdp, fsdp2 or megatron"),
        ({"bypass_mode": True}, "rollout_correction.bypass_mode is True"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_class(configuration(**changes))
    assert trainer_class(configuration(strategy="megatron")).config
    for changes, message in (
        ({"context_parallel_size": 2}, "context_parallel_size is 2; it must be 1"),
        ({"use_remove_padding": False}, "use_remove_padding is False; it must be True"),
    ):
        with pytest.raises(ValueError, match=message):
            engine_class(Model(), **changes).forward_backward_batch(batch(rhythm_signals=True), None, forward_only=True)
