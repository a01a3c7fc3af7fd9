"""Computes attention statistics in Megatron's forward pass, on every rank for its heads, and combines them afterwards.

Heads are chosen over the whole model: the spans of all heads are sent to all ranks, each rank sums WAAD and FAI over
its own heads among the chosen ones, and the sums are all-reduced. So batch-wide grouping needs no second pass.

Shape suffixes: B responses, P positions of the batch, n heads of the pool, h heads of one layer on this rank,
T tokens of a packed micro-batch, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rhythm.credit.heads import HeadGroups, select_heads
from rhythm.credit.signals import RhythmSignals
from rhythm.engines.interfaces import Rollout
from rhythm.engines.megatron.core_attention import PackedAttention
from rhythm.engines.megatron.packing import Packed
from rhythm.engines.megatron.parallel import Groups
from rhythm.engines.watch import DeviceWatch
from rhythm.ops.statistics import attention_statistics
from rhythm.tap.signals_config import SignalsConfig


@dataclass(frozen=True)
class _Read:
    """Statistics of one layer and micro-batch. heads: indices in the pool, [h]; span [b, h], waad and fai [h, T]."""

    packed: Packed
    heads: Tensor
    span: Tensor
    waad: Tensor
    fai: Tensor


class MegatronTap:
    """Context around the forward passes of a batch. The statistics of this rank's sampled layers stay in memory until
    `signals`: 8 bytes per token and head.
    """

    def __init__(
        self,
        attentions: Sequence[PackedAttention],
        depth: int,
        tap: SignalsConfig,
        head_groups: HeadGroups | None,
        groups: Groups,
    ) -> None:
        """`attentions`: of this rank's stage; `depth`: layers of the whole model; `head_groups`: fixed head groups."""
        self._layers = tap.layers_of(depth)
        self._attentions = [attention for attention in attentions if attention.layer in self._layers]
        self._tap, self._head_groups, self._groups = tap, head_groups, groups
        self._packed: Packed | None = None
        self._reads: list[_Read] = []
        self._watch = DeviceWatch(groups.device)

    def __enter__(self) -> MegatronTap:
        for attention in self._attentions:
            attention.reader = self
        return self

    def __exit__(self, *_: object) -> None:
        for attention in self._attentions:
            attention.reader = None

    @property
    def seconds(self) -> float:
        """Seconds spent on the statistics on this rank."""
        return self._watch.seconds

    def next(self, packed: Packed) -> None:
        """Set the micro-batch of the next forward pass."""
        self._packed = packed

    def read(self, layer: int, q_THD: Tensor, k_TGD: Tensor, scale: float) -> None:
        """See rhythm.engines.megatron.core_attention.Reader. Raises RuntimeError before `next`."""
        packed = self._packed
        if packed is None:
            raise RuntimeError("a layer ran before MegatronTap.next was called with its micro-batch")
        with self._watch:
            statistics = attention_statistics(
                q_THD,
                k_TGD,
                cu_seqlens=packed.cu_seqlens,
                prompt_lens=packed.prompt_lens,
                scale=scale,
                window=self._tap.window,
                horizon=self._tap.horizon,
                backend=self._tap.backend,
            )
        assert statistics.span is not None
        h, tensor = q_THD.shape[1], self._groups.tensor
        first = (self._layers.index(layer) * tensor.size() + tensor.rank()) * h
        heads = torch.arange(first, first + h)
        self._reads.append(_Read(packed, heads, statistics.span, statistics.waad, statistics.fai))

    def signals(self, rollout: Rollout, query_heads: int) -> RhythmSignals:
        """Signals of the whole batch, on the CPU of every rank. A collective. `query_heads`: per layer of the whole
        model.
        """
        B, P = rollout.input_ids.shape
        own_Bn = torch.zeros(B, len(self._layers) * query_heads)
        for read in self._reads:
            own_Bn[read.packed.rows[:, None], read.heads] = read.span.float().cpu()
        span_Bn = self._groups.all_reduce_sum(own_Bn)
        chosen = self._chosen(span_Bn)
        sums_2BP = torch.zeros(2, B, P)
        for read in self._reads:
            rows, positions, sums_2T = _own_sums(read, chosen)
            sums_2BP[:, rows, positions] += sums_2T
        waad_BP, fai_BP = self._groups.all_reduce_sum(sums_2BP)
        outside_BP = ~rollout.response_mask
        return RhythmSignals(
            waad=(waad_BP / chosen.local.sum(dim=-1, keepdim=True)).masked_fill(outside_BP, torch.nan),
            fai=(fai_BP / chosen.global_.sum(dim=-1, keepdim=True)).masked_fill(outside_BP, torch.nan),
            entropy=None,
            span=span_Bn,
            groups=chosen,
            heads=tuple((layer, head) for layer in self._layers for head in range(query_heads)),
        )

    def _chosen(self, span_Bn: Tensor) -> HeadGroups:
        """The head groups per response, [B, n]."""
        if self._head_groups is not None:
            fixed = self._head_groups
            return HeadGroups(fixed.local.expand(span_Bn.shape), fixed.global_.expand(span_Bn.shape))
        return select_heads(span_Bn, self._tap.quantile, self._tap.per)


def _own_sums(read: _Read, chosen: HeadGroups) -> tuple[Tensor, Tensor, Tensor]:
    """(row, position) of each token of a micro-batch, and [2, T]: WAAD summed over the local, FAI over the global heads
    of its row among these heads.
    """
    packed = read.packed
    row_T = torch.repeat_interleave(packed.cu_seqlens.diff().long())
    sums = []
    for value_hT, group_Bn in ((read.waad, chosen.local), (read.fai, chosen.global_)):
        group_bh = group_Bn[packed.rows[:, None], read.heads].to(value_hT.device)
        # torch.where, not a product: NaN of a head outside the group must not reach the sum.
        sums.append(torch.where(group_bh[row_T].T, value_hT.float(), 0.0).sum(dim=0))
    return packed.rows[row_T.cpu()], packed.position_ids.cpu(), torch.stack(sums).cpu()
