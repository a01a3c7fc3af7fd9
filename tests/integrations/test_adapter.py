"""What the adapters share: reading a model whose parameters FSDP has sharded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import tiny_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rhythm
from rhythm.credit.config import CreditConfig
from rhythm.integrations.adapter import read_rows
from rhythm.tap.observe import response_entropy
from rhythm.tap.rhythm_credit import RhythmCredit
from rhythm.tap.signals_config import SignalsConfig

SIGNALS = SignalsConfig(layers=2, window=4, horizon=(2, 8), backend="reference")
PROMPTS = torch.tensor([5, 3, 7])


@pytest.fixture
def _group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def model() -> Any:
    return tiny_model().eval()


@pytest.mark.usefixtures("_group")
def test_fsdp_gives_the_signals_of_the_whole_model() -> None:
    ids = torch.randint(4, 100, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # padded on the left
    expected = rhythm.observe(model(), ids, attention_mask=mask, prompt_lens=PROMPTS, signals=SIGNALS)
    entropy = response_entropy(model(), ids, attention_mask=mask, prompt_lens=PROMPTS)
    sharded = model()
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for _ in range(2):  # a pass leaves nothing half done
        credit = RhythmCredit(strategy="coupled", signals=SIGNALS)
        for inputs in (None, {"logits_to_keep": 1}):  # with more of them, the positions are the model's
            signals, _ = read_rows(credit, sharded, ids, mask, PROMPTS, 2, sharded, inputs)
            assert signals is not None
            torch.testing.assert_close(signals.waad, expected.waad, rtol=0, atol=1e-5, equal_nan=True)
            torch.testing.assert_close(signals.fai, expected.fai, rtol=0, atol=1e-6, equal_nan=True)
        _, found = read_rows(RhythmCredit(strategy="entropy"), sharded, ids, mask, PROMPTS, 2, sharded)
        torch.testing.assert_close(found, entropy, rtol=0, atol=1e-5, equal_nan=True)
    none = read_rows(RhythmCredit(CreditConfig(strategy="random")), sharded, ids, mask, PROMPTS, 2, sharded)
    assert none == (None, None)
