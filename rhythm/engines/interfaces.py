"""What passes between the trainer and its engines, and the interfaces that engines implement.

Shape suffixes: B responses, T positions of input_ids. Every per-token tensor is aligned with input_ids: the
value at [b, t] is that of the token input_ids[b, t], so that logprobs[b, t] is the log of
p(input_ids[b, t] | input_ids[b, :t]).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, Field, field_validator
from torch import Tensor

from rhythm.credit.heads import HeadGroups
from rhythm.credit.signals import RhythmSignals
from rhythm.ops.backends import NAMES as BACKENDS

HORIZONS: dict[str, tuple[int, int | None]] = {"paper": (10, 50), "revised": (10, 100)}
"""Horizons of FAI by name: the paper's, and its revised version's."""

MAX_TOKENS = 2**31 - 1
"""Of a window or a horizon: longer than any sequence."""


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


class TapConfig(BaseModel, extra="forbid", frozen=True):
    """How attention statistics become WAAD and FAI."""

    layers: int = Field(
        default=5, ge=1, description="sampled layers of the middle third; their query heads form the pool"
    )
    window: int = Field(default=10, ge=1, le=MAX_TOKENS, description="W of WAAD (eq. 9), in tokens")
    horizon: tuple[int, int | None] = Field(
        default=(10, 50),
        description="[low, high] of FAI (eq. 10) in tokens, high null: to the end; or paper, or revised",
    )
    quantile: float = Field(
        default=0.3, gt=0, le=0.5, description="share of the pool that is local, and that is global"
    )
    grouping: Literal["sequence", "batch", "calibrated"] = Field(
        default="sequence",
        description="who shares head groups: none, a batch, or all batches (fixed on the first)",
    )
    backend: str = Field(default="auto", description="backend of the statistics; auto takes the fastest there is")

    @field_validator("backend")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in BACKENDS:
            raise ValueError(f"must be one of {', '.join(BACKENDS)}, got {value!r}")
        return value

    @field_validator("horizon", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if isinstance(value, str):
            if value not in HORIZONS:
                raise ValueError(f"must be [low, high] or one of {sorted(HORIZONS)}, got {value!r}")
            return HORIZONS[value]
        return value

    @field_validator("horizon")
    @classmethod
    def _upright(cls, value: tuple[int, int | None]) -> tuple[int, int | None]:
        low, high = value
        if low < 0 or (high is not None and high < low) or max(low, high or 0) > MAX_TOKENS:
            raise ValueError(f"must be [low, high] with 0 <= low <= high <= {MAX_TOKENS}, got {list(value)}")
        return value


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


class Train(Protocol):
    """The policy that learns.

    statistics_seconds: spent in attention statistics by the last `log_probs`, 0 without `tap`; NaN where an engine
    doesn't measure it.
    """

    statistics_seconds: float

    def log_probs(
        self, rollout: Rollout, tap: TapConfig | None = None, groups: HeadGroups | None = None
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
