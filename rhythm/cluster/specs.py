"""What goes to the processes of a cluster run and comes back: descriptions of engines, and replies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rhythm.cluster.config import TrainRole
from rhythm.credit.loss import LossConfig
from rhythm.engines.local.train import OptimizerConfig
from rhythm.engines.vllm.config import VllmConfig
from rhythm.tap.signals_config import SignalsConfig

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Reply:
    """A method's return value, and the seconds it took."""

    value: Any
    seconds: float


@dataclass(frozen=True)
class Part:
    """A piece of a result, sent before the Reply."""

    value: Any


@dataclass(frozen=True)
class NotFinite:
    """Returned instead of a step's metrics: a NonFiniteError without its batch, which the driver has already."""

    what: str
    value: float


@dataclass(frozen=True)
class TrainSpec:
    """How to build actor_train. checkpoint: the initial weights, also those of the KL term's reference."""

    role: TrainRole
    checkpoint: Path
    optimizer: OptimizerConfig
    loss: LossConfig
    temperature: float
    micro_batch_size: int
    precision: Precision
    reference: bool
    bucket_bytes: int
    collective_seconds: float
    trust_remote_code: bool = False
    max_tokens: int | None = None
    log_prob_micro_batch_size: int | None = None
    share_prompts: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class InferSpec:
    """How to build a replica of actor_infer. checkpoint: must not be deleted, because lost replicas start from it
    again. vllm: None for transformers' generate. stop_strings: sampling.stop will not be empty.
    """

    vllm: VllmConfig | None
    checkpoint: Path
    max_length: int
    end_ids: tuple[int, ...]
    pad_id: int
    precision: Precision
    trust_remote_code: bool = False
    stop_strings: bool = False


@dataclass(frozen=True)
class AttnSpec:
    """How to build a replica of actor_attn. checkpoint: must not be deleted, as for InferSpec."""

    checkpoint: Path
    tap: SignalsConfig
    micro_batch_size: int
    precision: Precision
    trust_remote_code: bool = False
    max_tokens: int | None = None
