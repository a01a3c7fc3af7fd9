"""Computes the signals, peaks, heads and maps of a response from one forward pass.

Shape suffixes: M response tokens, n heads of the pool, H query heads of a layer, L layers, A anchors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rhythm.analysis.attention import TILE_ELEMENTS, ObservedAttention
from rhythm.analysis.config import AnalysisConfig
from rhythm.analysis.forward import LayerHeads, Observer, Pass
from rhythm.analysis.maps import MeanMap, mean_map
from rhythm.analysis.receivers import choose_receivers, receiver_count
from rhythm.analysis.response import Anchor, Attender, AttentionMap, Head, HeadMap, Maps, Peaks, ResponseHeads, Tokens
from rhythm.analysis.text import sentence_numbers, token_texts
from rhythm.credit.gamma import batch_credit_weights
from rhythm.credit.heads import HeadGroups, select_heads
from rhythm.credit.peaks import find_peaks
from rhythm.credit.signals import RhythmSignals, aggregate

SIGNIFICANT_DIGITS = 7  # of fp32, in the files
MAP_DIGITS = 4


@dataclass(frozen=True)
class Observation:
    """The fields of `rhythm.analysis.results.ResponseResult` that come from the forward pass."""

    tokens: Tokens
    peaks: Peaks
    chunks: tuple[int, ...]
    anchors: tuple[Anchor, ...]
    heads: ResponseHeads
    maps: Maps | None


def observe_response(
    observer: Observer,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    config: AnalysisConfig,
    *,
    maps: bool,
    generator: torch.Generator | None = None,
) -> Observation:
    """Run the model once over prompt and response.

    Args:
        prompt_ids, response_ids: at least one token each.
        maps: whether to compute the mean attention maps.
        generator: for the credit strategy "random".

    Raises:
        ValueError: no tokens; UnsupportedAttention (a ValueError): see `Observer`.
    """
    for name, ids in (("prompt", prompt_ids), ("response", response_ids)):
        if not ids:
            raise ValueError(f"the {name} has no tokens")
    texts = token_texts(tokenizer, response_ids)
    sentences = sentence_numbers(texts)
    seen = observer.observe([*prompt_ids, *response_ids], len(prompt_ids), sentences)
    pool = _Pool.of(seen, observer.pool)

    groups = select_heads(pool.span_n[None], config.signals.quantile)
    count = receiver_count(config.receivers.share, len(pool.span_n), int(groups.global_.sum()))
    receivers_n = choose_receivers(pool.kurtosis_n, count)
    receivers_sentence_n = choose_receivers(pool.kurtosis_sentence_n, count)
    signals, fai_receiver_M = _signals(pool, groups, receivers_n, seen.entropy)
    mask_1M = torch.ones(1, len(response_ids), dtype=torch.bool)
    gamma_M = batch_credit_weights(signals, mask_1M, config.credit, generator)[0]
    tokens = Tokens(
        ids=tuple(response_ids),
        texts=tuple(texts),
        waad=numbers(signals.waad[0]),
        fai=numbers(signals.fai[0]),
        fai_receiver=numbers(fai_receiver_M),
        entropy=numbers(seen.entropy),
        logprob=numbers(seen.logprob),
        gamma=numbers(gamma_M),
    )
    peaks = Peaks(
        waad=find_peaks(tokens.waad, config.peaks),
        fai=find_peaks(tokens.fai, config.peaks),
        fai_receiver=find_peaks(tokens.fai_receiver, config.peaks),
        entropy=find_peaks(tokens.entropy, config.peaks),
    )
    local, global_ = pool.named(groups.local[0]), pool.named(groups.global_[0])
    return Observation(
        tokens=tokens,
        peaks=peaks,
        chunks=(0, *peaks.waad),
        anchors=_anchors(pool, groups.global_[0], tokens, peaks, config),
        heads=ResponseHeads(
            span=_head_map(seen, observer, "span"),
            kurtosis=_head_map(seen, observer, "kurtosis"),
            kurtosis_sentence=_head_map(seen, observer, "kurtosis_sentence"),
            local=local,
            global_=global_,
            receiver=pool.named(receivers_n),
            receiver_sentence=pool.named(receivers_sentence_n),
            sentences=max(sentences) + 1,
            **{name: _head_map(seen, observer, name) for name in ("entropy", "sink_mass", "prompt_mass")},
        ),
        maps=_maps(pool, local, global_, len(prompt_ids)) if maps else None,
    )


def numbers(x: Tensor) -> tuple[float, ...]:
    """The values, rounded to the significant digits of fp32; NaN and infinities are kept."""
    return tuple(_rounded(value, SIGNIFICANT_DIGITS) for value in x.tolist())


@dataclass(frozen=True)
class _Pool:
    """The heads that may be chosen, in order of layers."""

    layers: dict[int, LayerHeads]
    heads: tuple[Head, ...]

    @staticmethod
    def of(seen: Pass, layers: Sequence[int]) -> _Pool:
        chosen = {layer: seen.layers[layer] for layer in layers}
        heads = ((layer, head) for layer, of_layer in chosen.items() for head in range(len(of_layer.span)))
        return _Pool(chosen, tuple(heads))

    @property
    def span_n(self) -> Tensor:
        return torch.cat([layer.span for layer in self.layers.values()])

    @property
    def kurtosis_n(self) -> Tensor:
        return torch.cat([layer.kurtosis for layer in self.layers.values()])

    @property
    def kurtosis_sentence_n(self) -> Tensor:
        return torch.cat([layer.kurtosis_sentence for layer in self.layers.values()])

    @property
    def waad_nM(self) -> Tensor:
        return torch.cat([layer.waad for layer in self.layers.values() if layer.waad is not None])

    @property
    def fai_nM(self) -> Tensor:
        return torch.cat([layer.fai for layer in self.layers.values() if layer.fai is not None])

    @property
    def attentions(self) -> dict[int, ObservedAttention]:
        return {index: layer.attention for index, layer in self.layers.items() if layer.attention is not None}

    def named(self, chosen_n: Tensor) -> tuple[Head, ...]:
        return tuple(self.heads[i] for i in chosen_n.nonzero()[:, 0].tolist())


def _signals(pool: _Pool, groups: HeadGroups, receivers_n: Tensor, entropy_M: Tensor) -> tuple[RhythmSignals, Tensor]:
    """The signals of the response [1, M], and FAI over the receiver heads [M], all NaN without receiver heads."""
    mask_1M = torch.ones(1, len(entropy_M), dtype=torch.bool)
    stacked = pool.waad_nM[None], pool.fai_nM[None], pool.span_n[None]
    signals = aggregate(*stacked, groups, mask_1M, entropy_M[None])
    receivers = HeadGroups(groups.local, receivers_n[None])
    return signals, aggregate(*stacked, receivers, mask_1M).fai[0]


def _anchors(pool: _Pool, global_n: Tensor, tokens: Tokens, peaks: Peaks, config: AnalysisConfig) -> tuple[Anchor, ...]:
    """The peaks of FAI in order, the strongest ones with attenders and reach."""
    strongest = sorted(sorted(peaks.fai, key=lambda i: -tokens.fai[i])[: config.attended_anchors])
    attended = {anchor.token: anchor for anchor in _attended(pool, global_n, strongest, config.attenders)}
    return tuple(attended.get(i, Anchor(i, ())) for i in peaks.fai)


def _attended(pool: _Pool, global_n: Tensor, anchors: Sequence[int], count: int) -> list[Anchor]:
    """Each with the later tokens of largest attention to it, averaged over the global heads, and its reach."""
    attended: list[Anchor] = []
    chosen = pool.named(global_n)
    attentions = pool.attentions
    if not anchors:
        return attended
    first = next(iter(attentions.values()))
    prompt_len, n = first.prompt_len, first.query.shape[0]
    device, heads = first.query.device, first.query.shape[1]
    row_M = torch.arange(prompt_len, n, device=device)
    anchor_A = torch.tensor(anchors, device=device)
    for part_A in torch.split(anchor_A, max(1, TILE_ELEMENTS // (heads * len(row_M)))):
        weight_MA = torch.zeros(len(row_M), len(part_A), device=device)
        for layer, attention in attentions.items():
            of_layer = torch.tensor([head for at, head in chosen if at == layer], dtype=torch.long, device=device)
            weight_MA += attention.weights(row_M, part_A + prompt_len, of_layer).sum(dim=0)
        weight_MA /= len(chosen)
        distance_MA = torch.arange(len(row_M), device=device)[:, None] - part_A
        later_MA = weight_MA * (distance_MA > 0)
        reach_A = (later_MA * distance_MA).sum(dim=0) / later_MA.sum(dim=0)
        best = weight_MA.masked_fill(distance_MA <= 0, -torch.inf).topk(min(count, len(row_M)), dim=0)
        for column, (token, reach) in enumerate(zip(part_A.tolist(), numbers(reach_A), strict=True)):
            pairs = zip(best.indices[:, column].tolist(), best.values[:, column].tolist(), strict=True)
            attenders = tuple(Attender(i, _rounded(w, SIGNIFICANT_DIGITS)) for i, w in pairs if w > 0)
            attended.append(Anchor(token, attenders, reach))
    return attended


def _head_map(seen: Pass, observer: Observer, name: str) -> HeadMap:
    """[L][H]; NaN for layers whose attention can't be read."""
    heads = observer.config.num_attention_heads
    return tuple(
        numbers(getattr(seen.layers[layer], name)) if layer in seen.layers else (math.nan,) * heads
        for layer in range(observer.config.num_hidden_layers)
    )


def _maps(pool: _Pool, local: tuple[Head, ...], global_: tuple[Head, ...], prompt_len: int) -> Maps:
    drawn = [_map(mean_map(pool.attentions, heads, prompt_len=prompt_len)) for heads in (local, global_)]
    return Maps(local=drawn[0], global_=drawn[1])


def _map(mean: MeanMap) -> AttentionMap:
    def rows(x: Tensor) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(_rounded(value, MAP_DIGITS) for value in row) for row in x.tolist())

    return AttentionMap(rows(mean.weights), mean.cell, mean.prompt_columns, rows(mean.band))


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
