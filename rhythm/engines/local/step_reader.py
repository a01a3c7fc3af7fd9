"""Reads signals in the forward pass of a gradient step, and turns them into the advantages of its loss.

Shape suffixes: B responses of the gradient step, T positions, n rows of a micro-batch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rhythm.credit.signals import HeadStatistics, RhythmSignals
from rhythm.engines.interfaces import LogProbs, Rollout, ShapeAdvantages, TrainBatch
from rhythm.engines.local.attn import SignalRows
from rhythm.engines.watch import DeviceWatch
from rhythm.tap.signals_config import SignalsConfig


class StepReader:
    """Collects a gradient step's log-probs and signals, a micro-batch at a time, and shapes its advantages.

    tap: what is read; None: no signals. log_probs: of the rows so far, detached, NaN elsewhere. watch: measures the
    time of statistics and advantages.
    """

    def __init__(self, rollout: Rollout, tap: SignalsConfig | None, shape: ShapeAdvantages, watch: DeviceWatch) -> None:
        """`rollout`: all rows of the gradient step. Raises ValueError as `TappedTrain.tapped_step`."""
        check_grouping(tap)
        self.tap = tap
        self.watch = watch
        self._shape = shape
        self._rows = None if tap is None else SignalRows(rollout, tap, None)
        undefined_BT = torch.full(rollout.input_ids.shape, torch.nan, device=rollout.input_ids.device)
        self.log_probs = LogProbs(logprobs=undefined_BT, entropy=undefined_BT.clone())

    @torch.no_grad()
    def shaped(
        self, index_n: Tensor, micro: TrainBatch, now: LogProbs, statistics: HeadStatistics | None
    ) -> TrainBatch:
        """`micro`, the rows `index_n`, with the advantages that its loss takes."""
        width = now.logprobs.shape[1]
        self.log_probs.logprobs[index_n, :width] = now.logprobs
        self.log_probs.entropy[index_n, :width] = now.entropy
        signals = None
        with self.watch:
            if self._rows is not None and statistics is not None:
                signals = self._rows.put(index_n, statistics)
            return replace(micro, advantages=self._shape(micro, now.entropy.detach(), signals))

    def signals(self) -> RhythmSignals | None:
        """Of all rows, NaN for those that were not read; None without `tap`."""
        return None if self._rows is None else self._rows.joined()


def check_grouping(tap: SignalsConfig | None) -> None:
    """Raise ValueError as `TappedTrain.tapped_step`."""
    if tap is not None and tap.grouping != "sequence":
        raise ValueError(
            f"grouping is {tap.grouping!r}: must be 'sequence' where γ is needed in the training pass itself, "
            "before all rows have been read"
        )
