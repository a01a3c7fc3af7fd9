"""signals.source=training: γ is made of the signals that the training forward itself gives, without a pass of its own.

Each micro-batch goes tap → γ → loss. The first gradient step after a rollout has its weights, so that its own
log-probs are the old ones and its γ is that of signals.source=inline. A later mini-batch's γ is made of the weights of
that moment, which the gradient steps before it have moved; its old log-probs, which must be under the rollout's
weights, come from a pass before the first gradient step, or from the rollout (batch.old_logprobs).

Rows without a gradient, as those whose advantages are all 0, may be left out of the gradient step, as γ would change
nothing about them: they have no signals then, and no γ that these would make.

Shape suffixes: B responses, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rhythm.credit.advantages import token_advantages
from rhythm.credit.config import CreditConfig
from rhythm.credit.correction import Correction, CorrectionConfig, rollout_correction
from rhythm.credit.gamma import batch_credit_weights
from rhythm.credit.signals import RhythmSignals
from rhythm.engines.batches import take_rows
from rhythm.engines.interfaces import LogProbs, Rollout, StepMetrics, TappedStep, TappedTrain, Train, TrainBatch
from rhythm.seeds import generator
from rhythm.trainer.config import TrainConfig


@dataclass(frozen=True)
class Taken:
    """The gradient steps of a training step, and what their forward passes gave.

    Attributes:
        log_probs: under the rollout's weights; by the trainer where `measured`.
        measured: bool [B, T], the tokens whose log-probs the trainer computed.
        signals: of all rows, NaN for those that the engine left out; None where the strategy reads none.
        gamma: [B, T], NaN on response tokens of rows that the engine left out, where the strategy reads anything.
        correction: of the measured tokens.
        metrics: of each gradient step.
        statistics_seconds: of statistics and γ.
    """

    log_probs: LogProbs
    measured: Tensor
    signals: RhythmSignals | None
    gamma: Tensor
    correction: Correction
    metrics: list[StepMetrics]
    statistics_seconds: float


@dataclass(frozen=True)
class MicroBatchCredit:
    """γ and correction of a micro-batch: a ShapeAdvantages that can be sent to other processes."""

    credit: CreditConfig
    correction: CorrectionConfig

    def __call__(self, micro: TrainBatch, entropy_BT: Tensor, signals: RhythmSignals | None) -> Tensor:
        mask_BT, advantages_BT = micro.rollout.response_mask, micro.advantages
        assert micro.old_logprobs is not None
        if self.credit.reads:
            gamma_BT = batch_credit_weights(signals, mask_BT, self.credit, entropy=entropy_BT)
            advantages_BT = token_advantages(advantages_BT, gamma_BT, mask_BT, self.credit.apply_to)
        correction = rollout_correction(micro.rollout.logprobs, micro.old_logprobs, mask_BT, self.correction)
        return advantages_BT * correction.weight


def take_steps(
    train: Train,
    tapped: TappedTrain,
    rollout: Rollout,
    loss_mask_BT: Tensor,
    advantages_B: Tensor,
    rows: Sequence[Tensor],
    config: TrainConfig,
    step: int,
) -> Taken:
    """Take the gradient steps of training step `step`.

    Args:
        train, tapped: the same engine.
        rollout: all responses.
        loss_mask_BT: bool, its response_mask without the responses left out of the loss.
        advantages_B: fp32, without γ.
        rows: indices of each mini-batch's rows, in order.
        config: of the run; its signals.source is training.
        step: from 1.

    Raises NonFiniteError from the engine.
    """
    credit = config.credit
    response_BT = rollout.response_mask
    gamma_BT = torch.ones_like(response_BT, dtype=torch.float32)
    if not credit.reads:  # γ of the whole batch at once, as in the other sources
        gamma_BT = batch_credit_weights(None, response_BT, credit, generator(config.seed, "credit", step))
    batch = TrainBatch(
        rollout=replace(rollout, response_mask=loss_mask_BT),
        old_logprobs=None,
        advantages=token_advantages(advantages_B, gamma_BT, response_BT, credit.apply_to),
        reference_logprobs=train.reference_log_probs(rollout) if config.loss.kl_coef else None,
    )

    shape = MicroBatchCredit(credit, config.correction)
    old = _later_log_probs(train, rollout, rows, config)
    tap = config.signals if "attention" in credit.reads else None
    steps: list[TappedStep] = []
    seconds = 0.0
    for number, index in enumerate(rows):
        mini = take_rows(batch, index)
        if number:
            mini = replace(mini, old_logprobs=old.logprobs[index])
        steps.append(tapped.tapped_step(mini, tap, shape))
        seconds += tapped.statistics_seconds
    old.logprobs[rows[0]] = steps[0].log_probs.logprobs
    old.entropy[rows[0]] = steps[0].log_probs.entropy
    measured_BT = response_BT & ~old.entropy.isnan()
    signals = _in_row_order(steps, rows)
    if credit.reads:
        entropy_BT = torch.empty_like(old.entropy)
        for index, taken in zip(rows, steps, strict=True):
            entropy_BT[index] = taken.log_probs.entropy
        gamma_BT = batch_credit_weights(signals, loss_mask_BT, credit, entropy=entropy_BT)
        gamma_BT = gamma_BT.masked_fill(loss_mask_BT & entropy_BT.isnan(), torch.nan)
    return Taken(
        log_probs=old,
        measured=measured_BT,
        signals=signals,
        gamma=gamma_BT,
        correction=rollout_correction(rollout.logprobs, old.logprobs, measured_BT, config.correction),
        metrics=[taken.metrics for taken in steps],
        statistics_seconds=seconds,
    )


def _later_log_probs(train: Train, rollout: Rollout, rows: Sequence[Tensor], config: TrainConfig) -> LogProbs:
    """Under the current weights, [B, T], of all mini-batches but the first; those of the rollout have no entropies."""
    undefined_BT = torch.full_like(rollout.logprobs, torch.nan)
    log_probs = LogProbs(undefined_BT, undefined_BT.clone())
    if config.batch.old_logprobs == "rollout":
        return LogProbs(rollout.logprobs.clone(), log_probs.entropy)
    if len(rows) > 1:
        later = torch.cat(list(rows[1:]))
        scored, _ = train.log_probs(take_rows(rollout, later))
        log_probs.logprobs[later], log_probs.entropy[later] = scored.logprobs, scored.entropy
    return log_probs


def _in_row_order(steps: Sequence[TappedStep], rows: Sequence[Tensor]) -> RhythmSignals | None:
    parts = [taken.signals for taken in steps if taken.signals is not None]
    return take_rows(RhythmSignals.cat(parts), torch.cat(list(rows)).argsort()) if parts else None
