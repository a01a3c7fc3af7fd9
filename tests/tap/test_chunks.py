"""Llama 4's chunked attention, against attention maps cut at the chunks; tests/tap/test_observe.py has whole models."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import transformers
from tensors import normal
from torch import Tensor

from rhythm import SignalsConfig, observe
from rhythm.ops import reference
from rhythm.tap.attention_form import MaskReader, UnsupportedAttention
from rhythm.tap.chunks import chunked_statistics
from rhythm.tap.output_check import CHECKED_SEQUENCES
from rhythm.tap.padding import PaddedBatch

WINDOW, CHUNK = 4, 7


def llama4() -> Any:
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **models.SIZES, **models.GQA, num_hidden_layers=4, num_local_experts=2, intermediate_size_mlp=32,
        pad_token_id=None, attention_chunk_size=CHUNK,
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("horizon", [(0, 3), (2, 12), (5, None), (8, 9), (0, 2**62), (2**62, None)], ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 7, 23])
def test_chunks_are_those_of_the_map(chunk: int, horizon: tuple[int, int | None]) -> None:
    """Sequences of several chunks, of one, empty and all prompt; prompts that end within a chunk and at its end."""
    lens, prompts = [23, 0, 4, 14, 9], [3, 0, 0, 7, 9]
    real = torch.arange(23) < torch.tensor(lens)[:, None]
    batch = PaddedBatch.from_mask(real, prompts)
    q, k = normal(sum(lens), 4, 8).double(), normal(sum(lens), 2, 8, seed=1).double()
    got = chunked_statistics(q, k, batch, chunk, horizon=horizon, window=WINDOW, scale=0.5)
    assert got.span is not None
    start = 0
    for i, (length, prompt) in enumerate(zip(lens, prompts, strict=True)):
        here = slice(start, start + length)
        weights = torch.zeros(4, length, length, dtype=torch.float64)
        for first in range(0, length, chunk):
            inside = slice(first, min(first + chunk, length))
            weights[:, inside, inside], _ = reference.attention_weights(q[here][inside], k[here][inside], 0.5)
        span, waad, fai = reference.sequence_statistics(weights, prompt_len=prompt, window=WINDOW, horizon=horizon)
        for actual, expected in ((got.span[i], span), (got.waad[:, here], waad), (got.fai[:, here], fai)):
            torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-6, atol=1e-9, equal_nan=True)
        start += length


def test_a_batch_larger_than_what_the_output_check_looks_at() -> None:
    model, input_ids = llama4(), tokens(CHECKED_SEQUENCES + 5, 20)
    signals = SignalsConfig(layers=[0, 1], window=WINDOW, horizon=(1, 9))
    together = observe(model, input_ids, prompt_lens=[3] * len(input_ids), signals=signals)
    for i in (0, 17):
        alone = models.signals_by_maps(model, input_ids[i], 3, signals)
        torch.testing.assert_close(together.span[i], alone.span[0], rtol=0, atol=1e-5)


def test_chunks_other_than_the_masks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama4()
    monkeypatch.setattr(MaskReader, "chunk", lambda self, call: CHUNK - 1)
    with pytest.raises(UnsupportedAttention, match="layer 1: packed rows, or chunks"):
        observe(model, tokens(1, 20), prompt_lens=[3], signals=SignalsConfig(layers=[1]))


def test_packed_rows_have_chunks_of_the_row() -> None:
    """transformers counts chunks from the row's first token, which makes another model of its later sequences."""
    model, signals = llama4(), SignalsConfig(layers=[1], window=WINDOW, horizon=(1, 9))
    with pytest.raises(UnsupportedAttention, match=r"a mask other than .* of the cu_seqlens given"):
        observe(model, tokens(1, 20), cu_seqlens=torch.tensor([0, 9, 20]), prompt_lens=[1, 2], signals=signals)
