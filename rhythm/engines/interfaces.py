"""The interfaces of engines, and the data that the trainer exchanges with them.

Shape suffixes: B responses, T positions of input_ids. Every per-token tensor is aligned with input_ids: the
value at [b, t] belongs to the token input_ids[b, t], so logprobs[b, t] is log p(input_ids[b, t] | input_ids[b, :t]).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, Field, field_validator
from torch import Tensor

from rhythm.credit.heads import HeadGroups
from rhythm.credit.signals import RhythmSignals
from rhythm.tap.signals_config import SignalsConfig


class SamplingConfig(BaseModel, extra="forbid", frozen=True):
    """How responses are sampled."""

    temperature: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="sampling temperature; 0: the most likely token (greedy)",
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus sampling: probability mass; 1 turns it off")
    top_k: int = Field(default=0, ge=0, description="sample among the k most likely tokens; 0 turns it off")
    max_new_tokens: int = Field(
        default=1024,
        ge=1,
        description="longest response in tokens, including its end token; less where the context has no room for it",
    )
    rows_at_once: int = Field(
        default=256, ge=1, description="responses generated at once, to limit memory; vLLM ignores it"
    )
    max_prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="instances with longer prompts are left out; null: those that leave no room for a response",
    )
    stop: tuple[str, ...] = Field(
        default=(), description="strings that end a response; the first one found is its end and part of it"
    )

    @field_validator("stop")
    @classmethod
    def _no_empty_string(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("holds an empty string, which every text contains")
        return stop


@dataclass(frozen=True)
class Rollout:
    """One batch of responses, right-padded: prompt, response (with its end token if it ended), padding.

    Attributes:
        input_ids: int64 [B, T].
        attention_mask: bool [B, T], False on padding.
        response_mask: bool [B, T], True on the response, including its end token.
        prompt_lens: int64 [B], tokens.
        group: int64 [B], index of each row's prompt; rows of one prompt are adjacent.
        logprobs: fp32 [B, T], nats: log-prob of each sampled token at the sampling temperature, before top-p and
            top-k; 0 outside the response.
        finished: bool [B], whether the response ended with an end token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    prompt_lens: Tensor
    group: Tensor
    logprobs: Tensor
    finished: Tensor

    @property
    def lens(self) -> Tensor:
        """Tokens of prompt and response, int64 [B]."""
        return self.attention_mask.sum(dim=1)

    @property
    def response_lens(self) -> Tensor:
        """Tokens of the response, int64 [B]."""
        return self.response_mask.sum(dim=1)


@dataclass(frozen=True)
class LogProbs:
    """Log-probs of tokens and entropies of the distributions they were sampled from.

    logprobs, entropy: fp32 [B, T], nats, at the sampling temperature; NaN outside the response.
    """

    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class TrainBatch:
    """The input of one gradient step.

    Attributes:
        rollout: the responses.
        old_logprobs: fp32 [B, T], under the weights before the rollout's first gradient step, which generated it
            (one step off: older ones did); NaN outside the response. None: those of the step's own forward pass, which
            are the same until the first gradient step changes a weight.
        advantages: fp32 [B, T], with γ applied.
        reference_logprobs: fp32 [B, T], under the initial weights, for the KL term; None without one.
    """

    rollout: Rollout
    old_logprobs: Tensor | None
    advantages: Tensor
    reference_logprobs: Tensor | None = None


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one gradient step.

    loss: the optimized loss; clip_share: fraction of tokens whose gradient was clipped to 0 (with cispo: whose ratio
    was clipped); dual_clip_share: the same for the dual clip; approx_kl: KL divergence to the policy of the old
    log-probs, nats per token of the rows with a gradient (of all in Megatron's tapped steps); kl: to the reference
    policy, NaN without one; grad_norm: before clipping; lr: learning rate of this step.
    """

    loss: float
    clip_share: float
    dual_clip_share: float
    approx_kl: float
    kl: float
    grad_norm: float
    lr: float

    @classmethod
    def of(cls, sums_5: Tensor, *, token_share: float, grad_norm: float, lr: float, has_reference: bool) -> StepMetrics:
        """From the sum of its micro-batches' `LossOutput.parts`. token_share: of the batch's tokens, those that went
        through the model; the others, without an advantage, would have been cut off by no clip.
        """
        loss, clip_share, dual_clip_share, approx_kl, kl = sums_5.tolist()
        return cls(
            loss,
            clip_share,
            dual_clip_share,
            approx_kl / token_share if token_share else 0.0,
            kl if has_reference else math.nan,
            grad_norm,
            lr,
        )


class NonFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite. Raised before the step changes a weight. `batch`: the batch that caused
    it.
    """

    def __init__(self, what: str, value: float, batch: TrainBatch) -> None:
        super().__init__(f"the {what} is {value}")
        self.what = what
        self.value = value
        self.batch = batch


class EngineLostError(RuntimeError):
    """A process that an engine consists of has died, so the engine can't be used any more; another can be started."""


class Infer(Protocol):
    """Generates responses."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingConfig,
        seed: int,
        done: Callable[[Rollout], None] | None = None,
    ) -> Rollout:
        """Sample `n` responses per prompt. The same call with the same weights gives the same rollout.

        done: called with some rows of the rollout as soon as they are generated, each row at most once, those of a
            prompt in their order.
        """


class SeededInfer(Protocol):
    """An Infer engine whose responses are independent of one another."""

    def generate_each(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> Rollout:
        """One response to each prompt, drawn by its own seed: a function of weights, prompt, sampling and that seed,
        whatever rows it is generated with, up to the rounding of differently shaped sums.

        Raises ValueError without prompts and for an empty prompt.
        """


class Train(Protocol):
    """Trains the policy.

    statistics_seconds: time that the last `log_probs` spent on attention statistics; 0 without `tap`, NaN if the engine
    doesn't measure it.
    """

    statistics_seconds: float

    def log_probs(
        self, rollout: Rollout, tap: SignalsConfig | None = None, groups: HeadGroups | None = None
    ) -> tuple[LogProbs, RhythmSignals | None]:
        """Log-probs and entropies of all response tokens; with `tap` also the signals, from the same forward pass.

        `groups`: fixed head groups, one row for all responses; None: select them as `tap` says. With them the span of
        some responses may be NaN.
        """

    def reference_log_probs(self, rollout: Rollout) -> Tensor:
        """Log-probs under the initial weights, fp32 [B, T]; NaN outside the response."""

    def step(self, batch: TrainBatch) -> StepMetrics:
        """Run one gradient step. Rows without a gradient (`rows_with_gradient`) need not go through the model.

        Raises NonFiniteError, with the weights unchanged.
        """

    def weights(self) -> dict[str, Tensor]:
        """The current weights by their names in a transformers checkpoint. They may share memory with the model."""

    def weights_stream(self) -> Iterator[tuple[str, Tensor]]:
        """The same weights one at a time, so that an engine that must gather them needs memory for only one.

        If the engine has several ranks, all of them must iterate together, to the end.
        """

    def save(self, directory: Path) -> None:
        """Write everything that `load` needs, with the weights as an ordinary transformers checkpoint."""

    def load(self, directory: Path) -> None:
        """Restore the state that `save` wrote, bit for bit."""


ShapeAdvantages = Callable[[TrainBatch, Tensor, RhythmSignals | None], Tensor]
"""(some rows with their old_logprobs, entropies [B, T], signals) → the advantages [B, T] that their loss takes, 0 where
the rows' own are.
"""


@dataclass(frozen=True)
class TappedStep:
    """A gradient step, and what was read in its forward pass, before the step changed the weights.

    log_probs: of the tokens in the batch's response_mask. signals: None if none were asked for. Both are NaN for rows
    that did not go through the model, where no row without a gradient (`rows_with_gradient`) need go.
    """

    metrics: StepMetrics
    log_probs: LogProbs
    signals: RhythmSignals | None


class TappedTrain(Protocol):
    """A Train engine that reads signals in the forward pass of the gradient step itself: tap, then γ, then loss.

    statistics_seconds: as in Train, of the last `tapped_step`: statistics and advantages.
    """

    statistics_seconds: float

    def tapped_step(self, batch: TrainBatch, tap: SignalsConfig | None, shape: ShapeAdvantages) -> TappedStep:
        """Run one gradient step whose advantages `shape` makes from the batch's and the signals, a micro-batch at a
        time. `tap`: None reads no signals. Rows need go through the model as in `Train.step`.

        Raises NonFiniteError, with the weights unchanged, and ValueError if the tap's head groups are not those of each
        sequence: others are known only after the last micro-batch.
        """


class LeavesGpu(Protocol):
    """A Train engine that shares its GPU with an Infer engine, in turns."""

    def leave_gpu(self, *, offload: bool) -> None:
        """Give back memory that is cached and, with `offload`, move gradients and optimizer to host memory until the
        next step, save or load. Weights stay.
        """


class Attn(Protocol):
    """Computes signals in a forward pass of its own."""

    def signals(self, rollout: Rollout, groups: HeadGroups | None = None) -> RhythmSignals:
        """WAAD, FAI and head groups of every response; `entropy` is None. `groups` as in Train.log_probs."""


class WeightSync(Protocol):
    """Copies the trainer's weights to the Infer and Attn engines."""

    def sync(self, version: int) -> None:
        """Copy the current weights; returns when all engines use them. `version`: the training step that made them; it
        must not be lower than in an earlier call.
        """
