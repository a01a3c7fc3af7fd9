"""Runs one training step: rollouts → rewards → old log-probs and signals → γ → advantages → gradient steps.

With Engines.ahead the rollout of the next step is drawn meanwhile (rhythm.trainer.ahead).

Shape suffixes: B responses, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rhythm.credit.advantages import gamma_share, group_advantages, token_advantages
from rhythm.credit.config import CreditConfig
from rhythm.credit.correction import Correction, rollout_correction
from rhythm.credit.gamma import batch_credit_weights
from rhythm.credit.heads import HeadGroups, shared_heads, turnover
from rhythm.credit.signals import RhythmSignals
from rhythm.engines.batches import take_rows
from rhythm.engines.interfaces import (
    Attn,
    Infer,
    LogProbs,
    Rollout,
    StepMetrics,
    TappedTrain,
    Train,
    TrainBatch,
    WeightSync,
)
from rhythm.seeds import derive_seed, generator
from rhythm.tap.signals_config import SignalsConfig
from rhythm.tasks import Task
from rhythm.tasks.scoring import FAULTS
from rhythm.trainer.ahead import InferAhead, drawing
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.drawing import Drawn, draw, zero_variance_share
from rhythm.trainer.metrics import Record, Stopwatch
from rhythm.trainer.tapped import take_steps


class Meter(Protocol):
    """Counts what the engines do during a step."""

    def clear(self) -> None:
        """Reset the counts at the beginning of a step."""

    def pop_metrics(self, step_seconds: float) -> Record:
        """The metrics since the last reset; resets the counts."""


@dataclass(frozen=True)
class Engines:
    """The engines of a run.

    attn: only with signals.source=separate. weight_sync: copies the trainer's weights to infer and attn. tapped: only
    with signals.source=training: `train`, which reads the signals. check: compares the log-probs of Infer and Train for
    a rollout; returns metrics, raises where they differ too much. meter: counts how long each role worked in a step.
    ahead: `infer` while the trainer works, only with cluster.rollout_ahead.
    """

    infer: Infer
    train: Train
    attn: Attn | None
    weight_sync: WeightSync
    tapped: TappedTrain | None = None
    check: Callable[[Rollout, LogProbs, int], Record] | None = None
    meter: Meter | None = None
    ahead: InferAhead | None = None


@dataclass(frozen=True)
class TokenCredit:
    """Old log-probs, signals and γ of a rollout, under the trainer's weights before the step.

    signals: None where the strategy reads none. gamma: [B, T]. measured: bool [B, T], the tokens whose log-probs are
    known. With signals.source=training only the first mini-batch's signals are under those weights, and signals and γ
    are NaN for rows left out of the gradient steps.
    """

    log_probs: LogProbs
    signals: RhythmSignals | None
    gamma: Tensor
    measured: Tensor


class StepAbandonedError(Exception):
    """The run was asked to stop before the step's first gradient step, so no weight has changed."""


def credit_tokens(
    engines: Engines,
    rollout: Rollout,
    tap: SignalsConfig,
    credit: CreditConfig,
    *,
    groups: HeadGroups | None,
    generator: torch.Generator,
    watch: Stopwatch,
    always_signals: bool = False,
) -> TokenCredit:
    """Old log-probs, signals and γ of a rollout. Signals come from the Attn engine if there is one, else from the
    log-prob pass.

    The phase "attention" of `watch` is the method's extra cost: the statistics, in either pass, and γ.
    """
    wanted = always_signals or "attention" in credit.reads
    inline = tap if wanted and engines.attn is None else None
    with watch("training"):
        log_probs, signals = engines.train.log_probs(rollout, inline, groups)
    if inline is not None:
        watch.move(engines.train.statistics_seconds, of="training", to="attention")
    with watch("attention"):
        if wanted and engines.attn is not None:
            signals = replace(engines.attn.signals(rollout, groups), entropy=log_probs.entropy)
        gamma_BT = batch_credit_weights(signals, rollout.response_mask, credit, generator, entropy=log_probs.entropy)
    return TokenCredit(log_probs, signals, gamma_BT, rollout.response_mask)


def train_step(
    engines: Engines,
    task: Task[Any],
    tokenizer: Any,
    config: TrainConfig,
    *,
    step: int,
    groups: HeadGroups | None,
    drawn: Drawn | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
    phase: Callable[[str], None] = lambda name: None,
) -> tuple[Record, HeadGroups | None, Drawn | None]:
    """Run training step `step` (from 1). Returns its metrics, and what to pass to the next step: the head groups, which
    change only in the step that calibrates them, and what was drawn ahead for it, None where nothing was.

    `drawn`: what the step before has drawn ahead for this one.

    Raises StepAbandonedError if `stop_asked()` before the first gradient step, NonFiniteError from the Train engine,
    and what engines.check raises.
    """
    watch = Stopwatch()
    if engines.meter is not None:
        engines.meter.clear()
    torch.manual_seed(derive_seed(config.seed, "dropout", step))
    staleness = 0.0 if drawn is None else 1.0
    if drawn is None:
        phase("rollout")
        with watch("rollout"):
            drawn = draw(engines.infer, task, tokenizer, config, step=step, stop_asked=stop_asked)
    _leave_if(stop_asked)
    # Log-probs of older weights say nothing about the weights that the two engines hold now.
    unchecked = replace(engines, check=None) if staleness else engines
    with _next_drawn(engines, task, tokenizer, config, step) as following:
        if engines.tapped is not None:
            phase("training")
            trained, more = _train_tapped(unchecked, engines.tapped, drawn, config, step, watch)
        else:
            trained, more, groups = _train(unchecked, drawn, config, step, groups, watch, stop_asked, phase)
        if engines.ahead is not None:
            phase("rollout")
            more = {**more, "staleness": staleness}
        with watch("rollout"):
            next_drawn = following()
    return _finish(engines, drawn, trained, more, config, step, watch, phase), groups, next_drawn


def _next_drawn(
    engines: Engines, task: Task[Any], tokenizer: Any, config: TrainConfig, step: int
) -> AbstractContextManager[Callable[[], Drawn | None]]:
    """Context in which what comes after `step` is drawn, if that is due; gives what waits for it."""
    if engines.ahead is None or not config.draws_ahead(step + 1):
        return nullcontext(lambda: None)
    return drawing(engines.ahead, lambda infer: draw(infer, task, tokenizer, config, step=step + 1))


def _train(
    engines: Engines,
    drawn: Drawn,
    config: TrainConfig,
    step: int,
    groups: HeadGroups | None,
    watch: Stopwatch,
    stop_asked: Callable[[], bool],
    phase: Callable[[str], None],
) -> tuple[Trained, Record, HeadGroups | None]:
    """Log-probs, γ and the gradient steps; returns more metrics, and the head groups for the next step."""
    scored = drawn.scored
    phase("attention")
    held, groups = groups, None if config.signals.calibrates(step) else groups
    credited = credit_tokens(
        engines,
        scored.rollout,
        config.signals,
        config.credit,
        groups=groups,
        generator=generator(config.seed, "credit", step),
        watch=watch,
    )
    more = engines.check(scored.rollout, credited.log_probs, step) if engines.check is not None else {}
    if config.signals.grouping == "calibrated" and credited.signals is not None:
        chosen = shared_heads(credited.signals.span, config.signals.quantile)
        more = {**_turnover(held, chosen), **more}
        groups = chosen if groups is None else groups
    _leave_if(stop_asked)
    phase("training")
    with watch("training"):
        rollout = scored.rollout
        correction = rollout_correction(
            rollout.logprobs, credited.log_probs.logprobs, rollout.response_mask, config.correction
        )
        batch, advantages_B = _train_batch(engines.train, drawn, credited, correction, config)
        step_metrics = [engines.train.step(part) for part in mini_batches(batch, config, step)]
    return Trained(credited, correction, advantages_B, step_metrics), more, groups


@dataclass(frozen=True)
class Trained:
    """What a training step's gradient steps took and gave. advantages: [B], without γ."""

    credited: TokenCredit
    correction: Correction
    advantages: Tensor
    metrics: list[StepMetrics]


def _train_tapped(
    engines: Engines, tapped: TappedTrain, drawn: Drawn, config: TrainConfig, step: int, watch: Stopwatch
) -> tuple[Trained, Record]:
    """The gradient steps with signals.source=training; returns more metrics. The phase "attention" of `watch` is as in
    `credit_tokens`.
    """
    rollout, train = drawn.scored.rollout, engines.train
    with watch("training"):
        advantages_B = group_advantages(drawn.rewards, rollout.group, config.advantages)
        rows = _mini_batch_rows(rollout, config, step)
        taken = take_steps(train, tapped, rollout, _loss_mask(rollout, config), advantages_B, rows, config, step)
    watch.move(taken.statistics_seconds, of="training", to="attention")
    credited = TokenCredit(taken.log_probs, taken.signals, taken.gamma, taken.measured)
    measured = replace(rollout, response_mask=credited.measured)
    more = engines.check(measured, credited.log_probs, step) if engines.check is not None else {}
    return Trained(credited, taken.correction, advantages_B, taken.metrics), more


def _finish(
    engines: Engines,
    drawn: Drawn,
    trained: Trained,
    more: Record,
    config: TrainConfig,
    step: int,
    watch: Stopwatch,
    phase: Callable[[str], None],
) -> Record:
    """Push the weights; returns the step's metrics, with `more` among them."""
    credited = trained.credited
    phase("push")
    with watch("push"):
        engines.weight_sync.sync(step)
    total = watch.total
    unknown = math.nan if math.isnan(engines.train.statistics_seconds) else 0.0
    return {
        "step": float(step),
        **_rollout_metrics(drawn, credited),
        **drawn.metrics,
        **_mean_metrics(trained.metrics),
        **_credit_metrics(credited, trained.advantages, drawn.scored.rollout.response_mask, config.credit),
        **_correction_metrics(trained.correction),
        **more,
        **(engines.meter.pop_metrics(total) if engines.meter is not None else {}),
        "attention_share": watch.seconds["attention"] / total + unknown,
        **{f"seconds_{name}": seconds for name, seconds in watch.seconds.items()},
    }


def _turnover(held: HeadGroups | None, chosen: HeadGroups) -> Record:
    """Jaccard distance of the calibrated groups to those that this batch would choose, or does; NaN at the first."""
    local, global_ = (math.nan, math.nan) if held is None else turnover(held, chosen)
    return {"head_turnover_local": local, "head_turnover_global": global_}


def mini_batches(batch: TrainBatch, config: TrainConfig, step: int) -> Iterator[TrainBatch]:
    """The batch's rows, or its prompts with their rows, shuffled by (seed, step) and split into the mini-batches of the
    gradient steps.
    """
    return (take_rows(batch, index) for index in _mini_batch_rows(batch.rollout, config, step))


def _mini_batch_rows(rollout: Rollout, config: TrainConfig, step: int) -> tuple[Tensor, ...]:
    rows = torch.arange(len(rollout.prompt_lens))
    # Rows of a prompt are adjacent.
    units = rows.view(-1, config.batch.responses_per_prompt if config.batch.shuffle == "prompts" else 1)
    order = torch.randperm(len(units), generator=generator(config.seed, "mini-batches", step))
    return torch.split(units[order].flatten(), config.batch.mini_batch_size)


def _loss_mask(rollout: Rollout, config: TrainConfig) -> Tensor:
    """bool [B, T]: the response tokens, without those of responses left out as overlong."""
    return rollout.response_mask & rollout.finished[:, None] if config.overlong.mask else rollout.response_mask


def _train_batch(
    train: Train, drawn: Drawn, credited: TokenCredit, correction: Correction, config: TrainConfig
) -> tuple[TrainBatch, Tensor]:
    rollout = drawn.scored.rollout
    advantages_B = group_advantages(drawn.rewards, rollout.group, config.advantages)
    advantages_BT = token_advantages(advantages_B, credited.gamma, rollout.response_mask, config.credit.apply_to)
    advantages_BT = advantages_BT * correction.weight
    reference = train.reference_log_probs(rollout) if config.loss.kl_coef else None
    rollout = replace(rollout, response_mask=_loss_mask(rollout, config))
    return TrainBatch(rollout, credited.log_probs.logprobs, advantages_BT, reference), advantages_B


def _leave_if(stop_asked: Callable[[], bool]) -> None:
    if stop_asked():
        raise StepAbandonedError


def _rollout_metrics(drawn: Drawn, credited: TokenCredit) -> Record:
    """Means over responses (reward … response_length), over groups (zero_variance_share) and over tokens (entropy, and
    logprob_gap: |log-prob of the Infer engine − log-prob of the Train engine| of the sampled token)."""
    scored = drawn.scored
    rollout, mask_BT, measured_BT = scored.rollout, scored.rollout.response_mask, credited.measured
    gap_BT = (rollout.logprobs - credited.log_probs.logprobs).abs()
    return {
        "reward": float(scored.scores.double().mean()),
        "train_accuracy": scored.accuracy,
        "format_share": scored.format_share,
        **{f"rewards_{kind}": float(sum(reward.fault == kind for reward in scored.rewards)) for kind in FAULTS},
        "zero_variance_share": zero_variance_share(drawn.rewards, rollout.group),
        "finished_share": float(rollout.finished.double().mean()),
        "response_length": float(rollout.response_lens.double().mean()),
        "response_tokens": float(mask_BT.sum()),
        "entropy": float(credited.log_probs.entropy[measured_BT].double().mean()),
        "logprob_gap": float(gap_BT[measured_BT].double().mean()),
    }


def _mean_metrics(step_metrics: list[StepMetrics]) -> Record:
    """Means over the gradient steps."""
    return {
        field.name: sum(getattr(metrics, field.name) for metrics in step_metrics) / len(step_metrics)
        for field in fields(StepMetrics)
    }


def _credit_metrics(credited: TokenCredit, advantages_B: Tensor, mask_BT: Tensor, credit: CreditConfig) -> Record:
    """Mean γ over all response tokens that have one, the bonus mass (mean γ − 1), γ's share of the advantages, and mean
    WAAD (tokens) and FAI where defined.
    """
    mask_BT = mask_BT & ~credited.gamma.isnan()
    share = gamma_share(advantages_B, credited.gamma, mask_BT, credit.apply_to)
    signals = credited.signals
    gamma_mean = float(credited.gamma[mask_BT].double().mean())
    return {
        "gamma_mean": gamma_mean,
        "bonus_mass": gamma_mean - 1,
        "gamma_share": float(share.mass),
        "amplified_fraction": float(share.amplified),
        "applied_fraction": float(share.applied),
        "waad_mean": math.nan if signals is None else float(signals.waad[mask_BT].double().nanmean()),
        "fai_mean": math.nan if signals is None else float(signals.fai[mask_BT].double().nanmean()),
    }


def _correction_metrics(correction: Correction) -> Record:
    """Ratios trainer/rollout of the sampled tokens, and the share that the correction cut or masked."""
    return {
        "rollout_ratio_mean": float(correction.ratio_mean),
        "rollout_ratio_max": float(correction.ratio_max),
        "rollout_sequence_ratio_mean": float(correction.sequence_ratio_mean),
        "rollout_kl": float(correction.kl),
        "corrected_share": float(correction.outside),
    }
