"""Sequences, their signals by the op on each of them alone, and how signals of a Megatron model compare with these."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron_stand_in import VOCABULARY, Model, packed_params
from torch import Tensor

from rhythm.credit.heads import HeadGroups, select_heads
from rhythm.credit.signals import RhythmSignals, aggregate
from rhythm.ops.statistics import attention_statistics
from rhythm.tap.signals_config import SignalsConfig

LENS, PROMPTS = [23, 9, 30, 17, 12], [5, 1, 11, 17, 0]
SIGNALS = SignalsConfig(layers=(1, 2), window=4, horizon=(2, 6), backend="reference")
NO_GROUPS = SimpleNamespace(tensor=None, pipeline=None)
P = max(LENS)


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENS]


def response_mask() -> Tensor:
    position = torch.arange(P)
    return (position >= torch.tensor(PROMPTS)[:, None]) & (position < torch.tensor(LENS)[:, None])


def expected(groups: HeadGroups | None = None, per: Any = "sequence", **changes: Any) -> RhythmSignals:
    """From each sequence alone, by the op on what its core_attention got."""
    model = Model(**changes)
    spans, waads, fais = [], [], []
    for tokens, prompt in zip(sequences(), PROMPTS, strict=True):
        model(tokens[None], packed_seq_params=packed_params([0, len(tokens)]))
        of_layers = []
        for layer in SIGNALS.layers:  # type: ignore[union-attr]
            q, k = model.cores()[layer].seen[-1]
            form = {"scale": model.config.softmax_scale}
            frequency = model.config.window_attn_skip_freq
            if model.config.window_size and not (frequency and (layer + 1) % frequency == 0):
                form["sliding_window"] = model.config.window_size[0] + 1
            if model.config.softmax_type == "learnable":
                form["sinks"] = model.cores()[layer].softmax_offset.detach()
            of_layers.append(
                attention_statistics(q, k, prompt_lens=[prompt], window=4, horizon=(2, 6), backend="reference", **form)
            )
        spans.append(torch.cat([s.span[0] for s in of_layers]))
        for found, name in ((waads, "waad"), (fais, "fai")):
            values = torch.cat([getattr(s, name) for s in of_layers])
            found.append(torch.nn.functional.pad(values, (0, P - len(tokens)), value=torch.nan))
    span = torch.stack(spans)
    chosen = groups or select_heads(span, SIGNALS.quantile, per)
    return aggregate(torch.stack(waads), torch.stack(fais), span, chosen, response_mask())


def assert_same(actual: RhythmSignals, wanted: RhythmSignals, span: bool = True) -> None:
    assert torch.equal(actual.groups.local.expand_as(actual.span), wanted.groups.local.expand_as(actual.span))
    assert torch.equal(actual.groups.global_.expand_as(actual.span), wanted.groups.global_.expand_as(actual.span))
    for name in ("waad", "fai", *(["span"] if span else [])):
        torch.testing.assert_close(getattr(actual, name), getattr(wanted, name), rtol=0, atol=2e-5, equal_nan=True)
    assert actual.waad[response_mask()].isfinite().all()
