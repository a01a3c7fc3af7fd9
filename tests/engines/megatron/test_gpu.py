"""The Megatron engine on a GPU: TransformerEngine's layers, and packed flash attention in bfloat16."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rhythm.credit.loss import LossConfig
from rhythm.engines.interfaces import Rollout
from rhythm.engines.local.train import OptimizerConfig, TorchTrain
from rhythm.engines.megatron import core_attention
from rhythm.engines.megatron.context import ContextRows
from rhythm.engines.megatron.core_attention import packed_attention
from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.engines.megatron.packing import PackedRows
from rhythm.engines.megatron.parallel import Rendezvous
from rhythm.engines.megatron.train import MegatronTrain
from rhythm.tap.context_parallel import shard_places
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_transformer_engines_layers_give_the_same_log_probs(tmp_path: Path) -> None:
    model = build_model(TinyModelConfig(layers=4), build_tokenizer())
    save_checkpoint(model, build_tokenizer(), tmp_path)
    ids = torch.randint(4, 100, (3, 50), generator=torch.Generator().manual_seed(0))
    everything = torch.ones(3, 50, dtype=torch.bool)
    rollout = Rollout(
        input_ids=ids,
        attention_mask=everything,
        response_mask=everything & (torch.arange(50) >= 5),
        prompt_lens=torch.full((3,), 5),
        group=torch.arange(3),
        logprobs=torch.zeros(3, 50),
        finished=everything[:, 0],
    )
    options = {"optimizer": OptimizerConfig(), "loss": LossConfig(), "temperature": 1.0, "micro_batch_size": 2}
    reference = TorchTrain(AutoModelForCausalLM.from_pretrained(tmp_path), build_tokenizer(), **options)
    engine = MegatronTrain(
        tmp_path,
        Rendezvous(0, 1, "127.0.0.1", 29_541),
        ParallelConfig(layer_spec="transformer_engine"),
        precision=torch.bfloat16,
        **options,
    )
    gap = (engine.log_probs(rollout)[0].logprobs - reference.log_probs(rollout)[0].logprobs).abs()
    weights = engine.weights()
    expected = reference.weights()
    engine.close()
    assert gap.nanmean() < 0.02
    for name, tensor in weights.items():
        assert torch.equal(tensor.cpu(), expected[name].bfloat16()), name


def test_packed_flash_attention_is_that_of_each_sequence() -> None:
    random = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(300, heads, 64, generator=random, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    )
    cu_seqlens = torch.tensor([0, 1, 130, 300], dtype=torch.int32, device="cuda")
    packed = PackedRows("thd", cu_seqlens, cu_seqlens, max_seqlen_q=170, max_seqlen_kv=170, bounds=cu_seqlens)
    out = packed_attention(q, k, v, packed, 0.125)
    exact = packed_attention(q.float(), k.float(), v.float(), packed, 0.125)
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)
    mine = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    theirs = torch.autograd.grad(exact.square().sum(), (q, k, v))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=8e-2, rtol=8e-2)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_flash_attention_of_a_context_parallel_rank(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random, rows = torch.Generator("cuda").manual_seed(0), [120, 6, 174]
    q, k, v = (
        torch.randn(300, heads, 64, generator=random, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, 2, 2)
    )
    places = torch.cat([shard_places(rows, 3, r) for r in range(3)]).cuda()  # in the order of the ranks
    monkeypatch.setattr(core_attention, "gathered_with_gradient", lambda *_: torch.stack([k, v], dim=1)[places])
    group = SimpleNamespace(size=lambda: 3, rank=lambda: rank)
    context = ContextRows.of(rows, group, torch.device("cuda"))  # type: ignore[arg-type]
    here = context.places.cuda()
    out = packed_attention(q[here], k[here], v[here], PackedRows("thd", context=context), 0.125)
    bounds = torch.tensor([0, 120, 126, 300], dtype=torch.int32)
    exact = packed_attention(q.float(), k.float(), v.float(), PackedRows("thd", bounds), 0.125)[here]
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)
    mine = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    theirs = torch.autograd.grad(exact.square().sum(), (q, k, v))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=8e-2, rtol=8e-2)
