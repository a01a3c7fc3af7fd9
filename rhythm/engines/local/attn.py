"""Implements Attn by rhythm.observe on a separate copy of the model, and joins signals of micro-batches.

Shape suffixes: B responses, T positions, n heads of the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rhythm.credit.heads import HeadGroups, select_heads, shared_heads
from rhythm.credit.signals import HeadStatistics, RhythmSignals
from rhythm.engines.batches import micro_batches, take_rows, trim
from rhythm.engines.interfaces import Rollout
from rhythm.engines.local.linear import use_onednn
from rhythm.engines.local.norms import use_fast_norms
from rhythm.engines.local.short_attention import short_attention
from rhythm.engines.local.weights import load_weights
from rhythm.tap.observe import observe_heads
from rhythm.tap.signals_config import SignalsConfig


class ObserveAttn:
    """Computes signals in a separate forward pass, which stops after the last sampled layer."""

    def __init__(
        self,
        model: Any,
        tap: SignalsConfig,
        *,
        micro_batch_size: int,
        max_tokens: int | None = None,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """`model`: this engine's own copy, in float32 or `precision`; `max_tokens`: tokens of a micro-batch at most,
        padding counted, instead of micro_batch_size rows; `precision`: dtype of autocast, float32 for none.
        """
        use_onednn(model)
        use_fast_norms(model)
        self._model = model.eval()
        self._tap = tap
        self._micro_batch_size, self._max_tokens = micro_batch_size, max_tokens
        self._precision = precision
        self._version = 0

    def signals(self, rollout: Rollout, groups: HeadGroups | None = None) -> RhythmSignals:
        """See rhythm.engines.interfaces.Attn."""
        with autocast(self._model, self._precision), short_attention(self._model):
            rows = SignalRows(rollout, self._tap, groups)
            parts = list(micro_batches(rollout, self._micro_batch_size, self._max_tokens))
            for i, (index_n, width) in enumerate(parts):
                micro = trim(take_rows(rollout, index_n), width)
                statistics = observe_heads(
                    self._model,
                    micro.input_ids,
                    attention_mask=micro.attention_mask,
                    prompt_lens=micro.prompt_lens,
                    signals=self._tap,
                    span=rows.needs_span(i, len(parts)),
                )
                rows.put(index_n, statistics)
            return rows.joined()

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy `weights` into the model. Raises ValueError if `version` is lower than before."""
        self._version = load_weights(self._model, weights, version, self._version)


class SignalRows:
    """Joins the signals of a rollout from those of its micro-batches.

    If all rows share their head groups, these can be chosen only after the last micro-batch. Until then the statistics
    per head stay in memory: 8 bytes per position and head.
    """

    def __init__(self, rollout: Rollout, tap: SignalsConfig, groups: HeadGroups | None) -> None:
        """`groups`: fixed head groups; None: select them as `tap` says."""
        self._rows, self._width = rollout.input_ids.shape
        self._tap, self._groups = tap, groups
        self._waiting: list[tuple[Tensor, HeadStatistics]] = []
        self._parts: list[tuple[Tensor, RhythmSignals]] = []

    def needs_span(self, part: int, parts: int) -> bool:
        """Whether micro-batch `part` of `parts` should have spans. With fixed head groups the middle one has, of middle
        length where they are in order of length, which tells how far the choice of heads has changed; the others then
        cost less.
        """
        return self._groups is None or part == parts // 2

    def put(self, index_n: Tensor, part: HeadStatistics) -> RhythmSignals | None:
        """Add the statistics of rows `index_n`, which start at position 0. Returns their signals, or None if these need
        all rows.
        """
        if self._groups is None and self._tap.per == "batch":
            self._waiting.append((index_n, part))
            return None
        groups = self._groups or select_heads(part.span, self._tap.quantile)
        signals = part.signals(groups)
        self._parts.append((index_n, signals))
        return signals

    def joined(self) -> RhythmSignals:
        """The signals of all rows, without entropy: NaN where there are none, and rows that were not put in have no
        heads in their groups.
        """
        if self._waiting:
            span_Bn = _in_order([(index_n, part.span) for index_n, part in self._waiting])
            shared = shared_heads(span_Bn, self._tap.quantile)
            self._parts = [(index_n, part.signals(shared)) for index_n, part in self._waiting]
            self._waiting = []
        heads = self._parts[0][1].heads
        n = self._parts[0][1].span.shape[1]
        return RhythmSignals(
            waad=self._scattered(lambda part: part.waad, self._width),
            fai=self._scattered(lambda part: part.fai, self._width),
            entropy=None,
            span=self._scattered(lambda part: part.span, n),
            groups=HeadGroups(
                local=self._scattered(lambda part: part.groups.local.expand(part.span.shape), n),
                global_=self._scattered(lambda part: part.groups.global_.expand(part.span.shape), n),
            ),
            heads=heads,
        )

    def _scattered(self, field: Callable[[RhythmSignals], Tensor], width: int) -> Tensor:
        """[B, width], NaN or False where no part has a value."""
        first = field(self._parts[0][1])
        joined = first.new_full((self._rows, width), torch.nan if first.is_floating_point() else 0)
        for index_n, part in self._parts:
            joined[index_n, : field(part).shape[1]] = field(part)
        return joined


def _in_order(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Join (row indices, values) parts, which contain every row once, to [B, n] in row order."""
    order_B = torch.cat([index_n for index_n, _ in parts])
    return torch.cat([value_bn for _, value_bn in parts])[order_B.argsort()]


def autocast(model: Any, precision: torch.dtype) -> torch.autocast:
    """Autocast on the model's device; disabled for float32."""
    return torch.autocast(model.device.type, precision, enabled=precision != torch.float32)
