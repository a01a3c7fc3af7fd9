"""Computes attention statistics in Megatron's forward pass, on every rank for its heads, and combines them afterwards.

Heads are chosen over the whole model: the spans of all heads are sent to all ranks, each rank sums WAAD and FAI over
its own heads among the chosen ones, and the sums are all-reduced. So batch-wide grouping needs no second pass.

Shape suffixes: B responses, P positions of the batch, n heads of the pool, h heads of one layer on this rank,
T tokens of a packed micro-batch, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from rhythm.credit.heads import HeadGroups, select_heads
from rhythm.credit.signals import RhythmSignals
from rhythm.engines.megatron.core_attention import PackedAttention
from rhythm.engines.megatron.packing import Packed
from rhythm.engines.megatron.parallel import Groups
from rhythm.engines.watch import DeviceWatch
from rhythm.ops.statistics import attention_statistics
from rhythm.tap.signals_config import SignalsConfig


@dataclass(frozen=True)
class Read:
    """Statistics of one layer and micro-batch. heads: indices in the pool, [h]; fp32: span [b, h], waad and
    fai [h, T].
    """

    packed: Packed
    heads: Tensor
    span: Tensor
    waad: Tensor
    fai: Tensor


class MegatronTap:
    """Reads the forward passes of a batch. The statistics of this rank's sampled layers stay in memory until `signals`:
    8 bytes per token and head. layers: the sampled ones; query_heads: of each, over all tensor ranks; watch: the time
    spent on the statistics.
    """

    def __init__(
        self,
        attentions: Sequence[PackedAttention],
        config: Any,
        tap: SignalsConfig,
        head_groups: HeadGroups | None,
        groups: Groups,
    ) -> None:
        """`attentions`: of this rank's stage; `config`: of the transformers model; `head_groups`: fixed ones."""
        self.layers = tap.layers_of(config.num_hidden_layers)
        self._depth: int = config.num_hidden_layers
        self.query_heads: int = config.num_attention_heads
        self._attentions = [attention for attention in attentions if attention.layer in self.layers]
        self._tap, self._head_groups, self._groups = tap, head_groups, groups
        self._packed: Packed
        self._reads: list[Read] = []
        self.watch = DeviceWatch(groups.device)

    @contextmanager
    def reading(self, packed: Packed) -> Iterator[None]:
        """Read the forward pass of this micro-batch. Layers that run outside are not read: with recomputation they run
        again in the backward pass.
        """
        self._packed = packed
        for attention in self._attentions:
            attention.reader = self
        try:
            yield
        finally:
            for attention in self._attentions:
                attention.reader = None

    def read(self, layer: int, q_THD: Tensor, k_TGD: Tensor, scale: float) -> None:
        """See rhythm.engines.megatron.core_attention.Reader."""
        packed = self._packed
        with self.watch, torch.no_grad():
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
        heads = self.places(layer, q_THD.shape[1])
        self._reads.append(Read(packed, heads, statistics.span, statistics.waad, statistics.fai))

    @property
    def pool(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) of every head that is read, over all ranks."""
        return tuple((layer, head) for layer in self.layers for head in range(self.query_heads))

    def layers_of_stage(self, stage: int) -> list[int]:
        """The sampled layers of a pipeline stage."""
        size = self._depth // self._groups.pipeline.size()
        return [layer for layer in self.layers if layer // size == stage]

    def signals(self, response_mask_BP: Tensor) -> RhythmSignals:
        """Signals of the whole batch, on the CPU of every rank. A collective."""
        return self.combined(self._reads, response_mask_BP, self._groups.all_reduce_sum)

    def take_reads(self) -> list[Read]:
        """The reads so far, by layer in each micro-batch; they are forgotten here."""
        reads, self._reads = self._reads, []
        return reads

    def places(self, layer: int, h: int) -> Tensor:
        """Indices in the pool of this rank's h heads of a layer, [h]."""
        tensor = self._groups.tensor
        first = (self.layers.index(layer) * tensor.size() + tensor.rank()) * h
        return torch.arange(first, first + h)

    def combined(
        self, reads: Sequence[Read], response_mask_BP: Tensor, all_reduce: Callable[[Tensor], Tensor]
    ) -> RhythmSignals:
        """Signals of the rows that the reads of all ranks are of, on the CPU. `all_reduce`: sums over these ranks."""
        B, P = response_mask_BP.shape
        own_Bn = torch.zeros(B, len(self.layers) * self.query_heads)
        for read in reads:
            own_Bn[read.packed.rows[:, None], read.heads] = read.span.float().cpu()
        span_Bn = all_reduce(own_Bn)
        chosen = self._chosen(span_Bn)
        sums_2BP = torch.zeros(2, B, P)
        for read in reads:
            rows, positions, sums_2T = _own_sums(read, chosen)
            sums_2BP[:, rows, positions] += sums_2T
        waad_BP, fai_BP = all_reduce(sums_2BP)
        outside_BP = ~response_mask_BP
        return RhythmSignals(
            waad=(waad_BP / chosen.local.sum(dim=-1, keepdim=True)).masked_fill(outside_BP, torch.nan),
            fai=(fai_BP / chosen.global_.sum(dim=-1, keepdim=True)).masked_fill(outside_BP, torch.nan),
            entropy=None,
            span=span_Bn,
            groups=chosen,
            heads=self.pool,
        )

    def _chosen(self, span_Bn: Tensor) -> HeadGroups:
        """The head groups per response, [B, n]."""
        if self._head_groups is not None:
            fixed = self._head_groups
            return HeadGroups(fixed.local.expand(span_Bn.shape), fixed.global_.expand(span_Bn.shape))
        return select_heads(span_Bn, self._tap.quantile, self._tap.per)


def slowest(watch: DeviceWatch, groups: Groups) -> float:
    """The seconds of the rank whose watch has the most. A collective."""
    seconds = torch.tensor([watch.seconds], dtype=torch.float64, device=groups.device)
    distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
    return float(seconds)


def _own_sums(read: Read, chosen: HeadGroups) -> tuple[Tensor, Tensor, Tensor]:
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
