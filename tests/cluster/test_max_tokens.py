"""A budget of tokens reaches the engines that a cluster's processes build."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rhythm.cluster.config import TrainRole
from rhythm.credit.loss import LossConfig
from rhythm.engines.interfaces import Rollout
from rhythm.engines.local.train import OptimizerConfig
from rhythm.tap.signals_config import SignalsConfig
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint

pytestmark = pytest.mark.cluster


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    shape = TinyModelConfig(layers=2, hidden_size=32, mlp_size=32, query_heads=2, key_heads=1, head_size=16)
    save_checkpoint(build_model(shape, build_tokenizer()), build_tokenizer(), tmp_path)
    return tmp_path


def rollout(tokens: int) -> Rollout:
    ids = torch.arange(4, 4 + tokens)[None]
    inside = torch.ones_like(ids, dtype=torch.bool)
    return Rollout(
        input_ids=ids,
        attention_mask=inside,
        response_mask=inside & (torch.arange(tokens) >= 2),
        prompt_lens=torch.tensor([2]),
        group=torch.tensor([0]),
        logprobs=torch.zeros(1, tokens),
        finished=inside[:, 0],
    )


def test_the_trainers_budget(checkpoint: Path) -> None:
    from rhythm.cluster.hosts import _torch_train
    from rhythm.cluster.specs import TrainSpec

    spec = TrainSpec(
        role=TrainRole(engine="torch"),
        checkpoint=checkpoint,
        optimizer=OptimizerConfig(),
        loss=LossConfig(),
        temperature=1.0,
        micro_batch_size=2,
        precision="float32",
        reference=False,
        bucket_bytes=1 << 20,
        collective_seconds=60,
        max_tokens=8,
    )
    engine, _ = _torch_train(spec, 0, "", 0)
    assert engine.log_probs(rollout(8))[0].logprobs[0, 2:].isfinite().all()
    with pytest.raises(ValueError, match="max_tokens is 8: a row has 9 tokens"):
        engine.log_probs(rollout(9))


def test_the_statistics_budget(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rhythm.cluster.hosts import AttnHost
    from rhythm.cluster.specs import AttnSpec

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the host sets it for its process
    host = AttnHost((), "127.0.0.1")
    host.build(AttnSpec(checkpoint, SignalsConfig(layers=1), 2, "float32", max_tokens=8))
    assert host.signals(rollout(8), None).waad[0, 2:].isfinite().all()
    with pytest.raises(ValueError, match="max_tokens is 8: a row has 9 tokens"):
        host.signals(rollout(9), None)
