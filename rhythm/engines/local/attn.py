"""Attn by rhythm.observe on a model of its own, and what it shares with the tap round the trainer's own pass.

Shape suffixes: B responses, T positions, n heads of the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rhythm.credit.config import SignalsConfig
from rhythm.credit.heads import HeadGroups, select_heads
from rhythm.credit.signals import RhythmSignals
from rhythm.engines.batches import micro_batches, take_rows, trim
from rhythm.engines.interfaces import Rollout
from rhythm.engines.local.weights import load_weights
from rhythm.tap.observe import observe


class ObserveAttn:
    """Signals from a forward pass of their own, which ends after the last sampled layer."""

    def __init__(
        self, model: Any, tap: SignalsConfig, *, micro_batch_size: int, precision: torch.dtype = torch.float32
    ) -> None:
        """`model` is this engine's own, in float32; `precision`: type of autocast, float32 is none."""
        self._model = model.eval()
        self._tap = tap
        self._micro_batch_size = micro_batch_size
        self._precision = precision
        self._version = 0

    def signals(self, rollout: Rollout, groups: HeadGroups | None = None) -> RhythmSignals:
        """See rhythm.engines.interfaces.Attn."""
        with autocast(self._model, self._precision):
            if groups is None:
                groups = shared_groups(self._model, rollout, self._tap, self._micro_batch_size)
            return observe_rows(self._model, rollout, self._tap, groups, self._micro_batch_size)

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy `weights` in. Raises ValueError if `version` falls."""
        self._version = load_weights(self._model, weights, version, self._version)


class SignalRows:
    """The signals of a whole rollout, put together from its micro-batches."""

    def __init__(self, rollout: Rollout) -> None:
        self._shape = rollout.input_ids.shape
        self._parts: list[tuple[Tensor, RhythmSignals]] = []

    def put(self, index_n: Tensor, part: RhythmSignals) -> None:
        """The signals of rows `index_n`, at their first positions."""
        self._parts.append((index_n, part))

    def joined(self) -> RhythmSignals:
        """All rows, NaN where nothing was put; without entropy."""
        return RhythmSignals(
            waad=self._scattered(lambda part: part.waad),
            fai=self._scattered(lambda part: part.fai),
            entropy=None,
            span=self._gathered(lambda part: part.span),
            groups=HeadGroups(
                local=self._gathered(lambda part: part.groups.local.expand(part.span.shape)),
                global_=self._gathered(lambda part: part.groups.global_.expand(part.span.shape)),
            ),
            heads=self._parts[0][1].heads,
        )

    def _scattered(self, field: Callable[[RhythmSignals], Tensor]) -> Tensor:
        first = field(self._parts[0][1])
        joined_BT = first.new_full(self._shape, torch.nan)
        for index_n, part in self._parts:
            joined_BT[index_n, : field(part).shape[1]] = field(part)
        return joined_BT

    def _gathered(self, field: Callable[[RhythmSignals], Tensor]) -> Tensor:
        stacked_Bn = torch.cat([field(part) for _, part in self._parts])
        order_B = torch.cat([index_n for index_n, _ in self._parts])
        return stacked_Bn[order_B.argsort()]


def observe_rows(
    model: Any, rollout: Rollout, tap: SignalsConfig, groups: HeadGroups | None, micro_batch_size: int
) -> RhythmSignals:
    """rhythm.observe, a micro-batch at a time."""
    rows = SignalRows(rollout)
    for index_n, width in micro_batches(rollout, micro_batch_size):
        micro = trim(take_rows(rollout, index_n), width)
        part = observe(
            model,
            micro.input_ids,
            attention_mask=micro.attention_mask,
            prompt_lens=micro.prompt_lens,
            signals=tap,
            groups=groups,
        )
        rows.put(index_n, part)
    return rows.joined()


def shared_groups(model: Any, rollout: Rollout, tap: SignalsConfig, micro_batch_size: int) -> HeadGroups | None:
    """The head groups that all rows of a batch share, of one row; None where each sequence has its own.

    The spans of all rows must be known before the first token is scored, so this is one more pass over the
    batch, with `batch` at every step, with `calibrated` once a run.
    """
    if tap.grouping == "sequence":
        return None
    span_Bn = observe_rows(model, rollout, tap, None, micro_batch_size).span
    groups = select_heads(span_Bn, tap.quantile, per="batch")
    return HeadGroups(local=groups.local[:1], global_=groups.global_[:1])


def autocast(model: Any, precision: torch.dtype) -> torch.autocast:
    """Autocast on the model's device; none for float32."""
    return torch.autocast(model.device.type, precision, enabled=precision != torch.float32)
