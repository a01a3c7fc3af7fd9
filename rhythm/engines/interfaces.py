"""What passes between the trainer and its engines, and the interfaces that engines implement.

Shape suffixes: B responses, T positions of input_ids. Every per-token tensor is aligned with input_ids: the
value at [b, t] is that of the token input_ids[b, t], so that logprobs[b, t] is the log of
p(input_ids[b, t] | input_ids[b, :t]).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, Field
from torch import Tensor

from rhythm.credit.config import SignalsConfig
from rhythm.credit.heads import HeadGroups
from rhythm.credit.signals import RhythmSignals


class SamplingConfig(BaseModel, extra="forbid", frozen=True):
    """How responses are drawn."""

    temperature: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="divides the logits before sampling; 0 takes the likeliest token",
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="sample within this probability mass; 1 turns it off")
    top_k: int = Field(default=0, ge=0, description="sample among this many likeliest tokens; 0 turns it off")
    max_new_tokens: int = Field(default=1024, ge=1, description="longest response, in tokens, its end token included")
    rows_at_once: int = Field(default=256, ge=1, description="responses generated at once: a limit on memory")


@dataclass(frozen=True)
class Rollout:
    """One batch of responses, right-padded: prompt, response (with its end token if it ended), padding.

    Attributes:
        input_ids: int64 [B, T].
        attention_mask: bool [B, T], False on padding.
        response_mask: bool [B, T], True on the response, its end token included.
        prompt_lens: int64 [B], tokens.
        group: int64 [B], index of the prompt each row answers; rows of one prompt are adjacent.
        logprobs: fp32 [B, T], nats: of each token when it was sampled, at the sampling temperature and before
            top-p and top-k cut anything off; 0 outside the response.
        finished: bool [B]: the response ended by itself.
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
        """int64 [B], tokens of prompt and response."""
        return self.attention_mask.sum(dim=1)

    @property
    def response_lens(self) -> Tensor:
        """int64 [B], tokens."""
        return self.response_mask.sum(dim=1)


@dataclass(frozen=True)
class LogProbs:
    """logprobs: fp32 [B, T], nats; entropy: fp32 [B, T], nats, of the distribution each token was drawn from.

    Both at the sampling temperature; NaN outside the response.
    """

    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class TrainBatch:
    """What one gradient step learns from.

    Attributes:
        rollout: the responses.
        old_logprobs: fp32 [B, T], under the weights that made the rollout; NaN outside the response.
        advantages: fp32 [B, T], γ already applied.
        reference_logprobs: fp32 [B, T], under the initial weights, for the KL term; None without one.
    """

    rollout: Rollout
    old_logprobs: Tensor
    advantages: Tensor
    reference_logprobs: Tensor | None = None


@dataclass(frozen=True)
class StepMetrics:
    """What one gradient step reports.

    loss: as optimised; clip_share: share of tokens whose gradient the clip cut off; approx_kl: nats per token
    to the policy that made the rollout; kl: to the reference policy, NaN without one; grad_norm: before it
    was scaled down; lr: of this step.
    """

    loss: float
    clip_share: float
    approx_kl: float
    kl: float
    grad_norm: float
    lr: float


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is NaN or infinite. Raised before the step changes a weight; `batch` caused
    it.
    """

    def __init__(self, what: str, value: float, batch: TrainBatch) -> None:
        super().__init__(f"the {what} is {value}")
        self.what = what
        self.value = value
        self.batch = batch


class Infer(Protocol):
    """Prompts → responses."""

    def generate(self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingConfig, seed: int) -> Rollout:
        """`n` responses to each prompt. The same call with the same weights gives the same rollout."""


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
    """The policy that learns.

    statistics_seconds: spent in attention statistics by the last `log_probs`, 0 without `tap`; NaN where an engine
    doesn't measure it.
    """

    statistics_seconds: float

    def log_probs(
        self, rollout: Rollout, tap: SignalsConfig | None = None, groups: HeadGroups | None = None
    ) -> tuple[LogProbs, RhythmSignals | None]:
        """Log-probs and entropy of every response token; with `tap` the signals too, from the same forward
        pass.

        `groups` fixes the head groups, one row for all responses; None selects them as `tap` says.
        """

    def reference_log_probs(self, rollout: Rollout) -> Tensor:
        """fp32 [B, T]: log-probs under the initial weights; NaN outside the response."""

    def step(self, batch: TrainBatch) -> StepMetrics:
        """One gradient step. Raises NonFiniteError, leaving the weights as they were."""

    def weights(self) -> dict[str, Tensor]:
        """The current weights by their names in a transformers checkpoint; not copies."""

    def weights_stream(self) -> Iterator[tuple[str, Tensor]]:
        """The same one at a time, so that an engine which has to gather a weight holds one whole weight only.

        Where the engine is spread over several ranks, all of them iterate together, to the end.
        """

    def save(self, directory: Path) -> None:
        """Write all that `load` needs, the weights as an ordinary transformers checkpoint."""

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote, bit for bit."""


class Attn(Protocol):
    """Responses → signals."""

    def signals(self, rollout: Rollout, groups: HeadGroups | None = None) -> RhythmSignals:
        """WAAD, FAI and head groups of every response; `entropy` is None."""


class WeightSync(Protocol):
    """Gives the trainer's weights to the engines that generate and observe."""

    def sync(self, version: int) -> None:
        """Returns when all engines use the current weights; `version` is the training step that made them.

        A `version` below that of an earlier call is an error.
        """
