"""rhythm.integrations.roll on a stand-in for ROLL, which needs CUDA at import: its contract is in docs/trainers.md."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatron_stand_in import VOCABULARY, Model, pack, packed_params
from torch import Tensor

from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.integrations.adapter import credit_of_process
from rhythm.tap.attention_form import UnsupportedAttention
from rhythm.tap.megatron import attach
from rhythm.tap.megatron_layers import MicroBatch
from rhythm.tap.signals_config import SignalsConfig

pytestmark = [pytest.mark.cluster]  # the tap asks Megatron for its groups

LENS, PROMPTS, T = [19, 11, 24, 15], [6, 3, 8, 5], 26
SIGNALS = SignalsConfig(layers=(1, 2), window=4, horizon=(2, 6), backend="reference")


class Strategy:
    """ROLL's Megatron strategy, as far as a worker calls it: micro-batches of two rows, padded or packed."""

    def __init__(self, chunk: Model, packs: bool) -> None:
        self.model, self.packs = SimpleNamespace(get_models=lambda: [chunk]), packs
        self.trained: list[Tensor] = []
        self.drops_lengths = False

    def get_data_input(self, batch: Any) -> Any:
        return batch

    def forward_step(self, batch: Any, forward_func: Callable[..., Any]) -> None:
        (chunk,) = self.model.get_models()
        for rows in torch.arange(len(LENS)).split(batch.meta_info["micro_batch_size"]):
            part = {name: x[rows] for name, x in batch.batch.items()}
            ids, mask, loss_mask = part["input_ids"], part["attention_mask"], part["response_mask"].float()
            packed = None
            if self.packs:
                lens = mask.sum(dim=1).tolist()
                (ids, stored), (loss_mask, _) = (
                    pack([row[:n] for row, n in zip(x, lens, strict=True)], 4) for x in (ids, loss_mask)
                )
                bounds = [0, *torch.tensor(lens).cumsum(0).tolist()]
                packed = packed_params(bounds, cu_seqlens_q_padded=torch.tensor(stored, dtype=torch.int32))
                packed, mask = None if self.drops_lengths else packed, None
            chunk(input_ids=ids, attention_mask=mask, position_ids=None, packed_seq_params=packed, loss_mask=loss_mask)

    def train_step(self, batch: Any) -> None:
        self.trained.append(batch.batch["advantages"].clone())


class ActorPGWorker:
    """The part of ROLL's worker that the adapter takes over."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.worker_config = SimpleNamespace(infer_batch_size=2)
        self.pipeline_config = SimpleNamespace(seed=3)

    def forward_func_log_probs(self, data: Any, output: Tensor) -> Any:
        raise NotImplementedError

    def train_step(self, data: Any) -> str:
        data = self.strategy.get_data_input(data)
        for _ in range(2):  # ppo_epochs
            self.strategy.train_step(data)
        return "metrics"


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    decorator, worker = ModuleType("decorator"), ModuleType("actor_pg_worker")
    decorator.Dispatch = SimpleNamespace(DP_MP_DISPATCH_FIRST="first")  # type: ignore[attr-defined]
    decorator.register = lambda **_: lambda function: function  # type: ignore[attr-defined]
    worker.ActorPGWorker = ActorPGWorker  # type: ignore[attr-defined]
    for name in ("roll", "roll.distributed", "roll.distributed.scheduler", "roll.pipeline", "roll.pipeline.rlvr"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "roll.distributed.scheduler.decorator", decorator)
    monkeypatch.setitem(sys.modules, "roll.pipeline.rlvr.actor_pg_worker", worker)
    options = "layers: [1, 2], window: 4, horizon: [2, 6], backend: reference"
    monkeypatch.setenv("RHYTHM_CREDIT", f"{{credit: {{strategy: coupled}}, signals: {{{options}}}}}")
    credit_of_process.cache_clear()
    yield importlib.import_module("rhythm.integrations.roll")
    credit_of_process.cache_clear()
    del sys.modules["rhythm.integrations.roll"]


def batch() -> Any:
    position = torch.arange(T)
    mask = position < torch.tensor(LENS)[:, None]
    response = mask & (position >= torch.tensor(PROMPTS)[:, None])
    ids = torch.randint(1, VOCABULARY, (len(LENS), T), generator=torch.Generator().manual_seed(6))
    tensors = {
        "input_ids": torch.where(mask, ids, 0),
        "attention_mask": mask.long(),
        "response_mask": response.long(),
        "advantages": torch.tensor([1.0, -0.5, 2.0, 0.25])[:, None] * response[:, 1:],
    }
    return SimpleNamespace(batch=tensors, meta_info={"global_step": 4})


@pytest.mark.parametrize("packs", [False, True])
def test_advantages_are_multiplied_once_before_the_first_gradient_step(adapter: Any, packs: bool) -> None:
    model = Model().eval()
    strategy, data = Strategy(model, packs), batch()
    plain = data.batch["advantages"].clone()
    ids, response = data.batch["input_ids"], data.batch["response_mask"].bool()
    none = SimpleNamespace(tensor=None, pipeline=None)
    with attach(model, SIGNALS, groups=none) as tap, tap.reading(MicroBatch(range(4), LENS, PROMPTS)):
        model(input_ids=ids)
    gamma = batch_credit_weights(tap.signals(response), response, CreditConfig(strategy="coupled"))
    assert gamma[response].unique().numel() > 2
    expected = torch.where(plain >= 0, plain * gamma[:, 1:], plain)
    assert adapter.RhythmActorWorker(strategy).train_step(data) == "metrics"
    assert len(strategy.trained) == 2
    for trained in strategy.trained:
        torch.testing.assert_close(trained, expected, rtol=1e-6, atol=0)
    assert "get_data_input" not in vars(strategy)
    assert not any(module._forward_hooks for module in model.modules())


def test_refused_by_name(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batch()
    data.batch["response_mask"][2, PROMPTS[2] + 3] = 0
    with pytest.raises(ValueError, match="the loss mask of response 2 leaves out 1 of its"):
        adapter.RhythmActorWorker(Strategy(Model(), False)).train_step(data)
    strategy = Strategy(Model(), False)
    strategy.model = SimpleNamespace()
    with pytest.raises(ValueError, match="strategy is 'Strategy'; it must be megatron_train"):
        adapter.RhythmActorWorker(strategy).train_step(batch())
    worker = adapter.RhythmActorWorker(Strategy(Model(), False))
    worker.pipeline_config.importance_sampling = "seq"
    with pytest.raises(ValueError, match=r"importance_sampling is 'seq'.*one ratio"):
        worker.train_step(batch())
    without_lengths = Strategy(Model(), True)
    without_lengths.drops_lengths = True
    for strategy, message in (
        (Strategy(Model(context_parallel_size=2), True), "context parallelism, whose 2 ranks see parts"),
        (Strategy(Model(attention_dropout=0.1).train(), True), "attention dropout of 0.1 in train mode"),
        (without_lengths, "neither packed_seq_params nor a 2D attention_mask, so without the lengths"),
    ):
        with pytest.raises(UnsupportedAttention, match=message):
            adapter.RhythmActorWorker(strategy).train_step(batch())
    monkeypatch.setenv("RHYTHM_CREDIT", "credit: {strategy: entropy}")
    credit_of_process.cache_clear()
    with pytest.raises(ValueError, match="strategy of RHYTHM_CREDIT is 'entropy'"):
        adapter.RhythmActorWorker(Strategy(Model(), False)).train_step(batch())
