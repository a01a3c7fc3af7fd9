"""Reads signals in the forward passes of a gradient step, and turns them into the advantages of its loss.

A micro-batch's loss is computed on the last pipeline stage, and its sampled layers may be on any. So each stage sends
its statistics of a micro-batch to the last one as soon as it has run it, from host to host and without waiting, and the
last stage receives them before the loss: per micro-batch 8 bytes per token and head.

Shape suffixes: B responses of the gradient step, P positions, b rows of a micro-batch, T their tokens, W the longest
row's, h heads of one layer on this rank, n heads of the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from rhythm.credit.heads import HeadGroups
from rhythm.credit.signals import RhythmSignals
from rhythm.engines.batches import to_device
from rhythm.engines.interfaces import LogProbs, Rollout, ShapeAdvantages, TrainBatch
from rhythm.engines.megatron.packing import Packed
from rhythm.engines.megatron.parallel import Groups
from rhythm.engines.watch import DeviceWatch
from rhythm.tap.megatron import MegatronTap
from rhythm.tap.megatron_reads import Read


class StepReader:
    """Collects a gradient step's log-probs and signals, a micro-batch at a time, and shapes its advantages.

    watch: measures the time of statistics and advantages.
    """

    def __init__(self, tap: MegatronTap | None, shape: ShapeAdvantages, rollout: Rollout, groups: Groups) -> None:
        """`tap`: None reads no signals. `rollout`: all rows of the gradient step."""
        self._tap, self._shape, self._rollout, self._groups = tap, shape, rollout, groups
        self.watch = DeviceWatch(groups.device)
        if tap is not None:
            tap.watch = self.watch
        B, P = rollout.input_ids.shape
        n = 0 if tap is None else len(tap.layers) * tap.query_heads
        # Of the rows whose loss this rank contributes; zero elsewhere.
        self._tokens_4BP = torch.zeros(4, B, P)  # log-probs, entropies, WAAD, FAI
        self._heads_3Bn = torch.zeros(3, B, n)  # spans, local and global heads
        self._own: list[Read] = []
        self._sent: list[tuple[Any, Tensor]] = []

    @contextmanager
    def reading(self, packed: Packed) -> Iterator[None]:
        """Read the forward pass of this micro-batch, and pass on to the last stage what was read."""
        if self._tap is None:
            yield
            return
        with self._tap.reading(packed.micro):
            yield
        self._own = self._tap.take_reads()
        if self._own and not self._groups.last_stage:
            parts = [
                x.float().flatten() for read in self._own for x in (read.span, read.waad, read.fai) if x is not None
            ]
            message = torch.cat(parts).cpu()
            stages = self._groups.stages
            last = distributed.get_global_rank(stages, stages.size() - 1)
            # A tensor must live until it has been sent.
            self._sent = [(work, sent) for work, sent in self._sent if not work.is_completed()]
            self._sent.append((distributed.isend(message, last, group=stages), message))

    @torch.no_grad()
    def shaped(self, packed: Packed, micro: TrainBatch, now: LogProbs) -> TrainBatch:
        """`micro`, the rows of `packed` on its device, with the advantages that its loss takes. On the last stage."""
        signals = None
        with self.watch:
            if self._tap is not None:
                signals = self._signals(self._tap, packed)
            advantages_bW = self._shape(
                micro, now.entropy.detach(), None if signals is None else to_device(signals, packed.target.device)
            )
        if self._groups.is_output_rank:
            self._keep(packed, now, signals)
        return replace(micro, advantages=advantages_bW)

    def joined(self) -> tuple[LogProbs, RhythmSignals | None, float]:
        """Log-probs and signals of all rows, the latter None without a tap, and the seconds that statistics and
        advantages took on the slowest rank. A collective, after the last micro-batch.
        """
        for work, _ in self._sent:
            work.wait()
        tokens_4BP = self._groups.all_reduce_sum(self._tokens_4BP)
        tokens_4BP.masked_fill_(~self._rollout.response_mask, torch.nan)
        logprobs_BP, entropy_BP, waad_BP, fai_BP = tokens_4BP
        heads_3Bn = self._groups.all_reduce_sum(self._heads_3Bn)
        seconds = self._groups.largest(self.watch.seconds)
        if self._tap is None:
            return LogProbs(logprobs_BP, entropy_BP), None, seconds
        self._tap.check(self._groups.all_reduce_sum)
        span_Bn, local_Bn, global_Bn = heads_3Bn
        chosen = HeadGroups(local_Bn.bool(), global_Bn.bool())
        signals = RhythmSignals(waad_BP, fai_BP, None, span_Bn, chosen, self._tap.pool)
        return LogProbs(logprobs_BP, entropy_BP), signals, seconds

    def _signals(self, tap: MegatronTap, packed: Packed) -> RhythmSignals:
        """Of the micro-batch, at positions of its padded rows."""
        reads = [*self._received(tap, packed), *self._own]
        ranks_of_stage = partial(self._groups.all_reduce_sum, group=self._groups.stage)
        return tap.combined(reads, packed.target, ranks_of_stage, packed.micro.rows)

    def _received(self, tap: MegatronTap, packed: Packed) -> Iterator[Read]:
        """What the stages before this one have read of the micro-batch."""
        stages = self._groups.stages
        b, T, h = len(packed.rows), sum(packed.micro.lens), tap.query_heads // self._groups.tensor.size()
        parts = self._groups.context.size()
        for stage in range(stages.size() - 1):
            size = tap.depth // stages.size()
            layers = [layer for layer in tap.layers if layer // size == stage]
            if not layers:
                continue
            message = torch.empty(len(layers) * h * (b + 2 * T))
            distributed.recv(message, distributed.get_global_rank(stages, stage), group=stages)
            for layer, part in zip(layers, message.to(packed.target.device).chunk(len(layers)), strict=True):
                span, waad, fai = torch.split(part, [b * h, h * T, h * T])
                heads = tap.places(layer, h)
                yield Read(packed.micro, heads, span.view(b, h), waad.view(h, T), fai.view(h, T), parts)

    def _keep(self, packed: Packed, now: LogProbs, signals: RhythmSignals | None) -> None:
        rows, target_bW = packed.rows, packed.target.cpu()
        values = [now.logprobs, now.entropy]
        if signals is not None:
            values += [signals.waad, signals.fai]
            heads = (signals.span, signals.groups.local, signals.groups.global_)
            self._heads_3Bn[:, rows] = torch.stack([x.float() for x in heads])
        for kept_BP, value_bW in zip(self._tokens_4BP, values, strict=False):
            kept_BP[rows, : packed.width] = torch.where(target_bW, value_bW.cpu(), 0.0)
