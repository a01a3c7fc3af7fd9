"""The configuration of a run, composed of sections that are defined beside the code they configure."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, PositiveInt, field_validator, model_validator

from rhythm.cluster.config import ClusterConfig
from rhythm.credit.advantages import AdvantageConfig
from rhythm.credit.config import CreditConfig
from rhythm.credit.correction import CorrectionConfig
from rhythm.credit.loss import LossConfig
from rhythm.credit.overlong import OverlongConfig
from rhythm.engines.interfaces import SamplingConfig
from rhythm.engines.local.train import OptimizerConfig
from rhythm.system.renamed import renamed_keys
from rhythm.tap.signals_config import SignalsConfig
from rhythm.tasks.config import TaskConfig
from rhythm.tasks.isolation import RewardConfig
from rhythm.tiny.warm_start import WarmStartConfig
from rhythm.trainer.checkpoint import CheckpointConfig
from rhythm.trainer.evaluation import EvalConfig


class ModelConfig(BaseModel, extra="forbid", frozen=True):
    """The policy model."""

    path: Path | None = Field(
        default=None,
        description="directory of a transformers checkpoint; null: the tiny model, warm-started on the task",
    )
    device: str = Field(default="auto", description="auto (CUDA if available, else cpu), cpu, cuda, cuda:1 …")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype of the forward and backward pass; weights and optimizer stay float32",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="keep only the layers' inputs for the backward pass, which computes the rest again: less memory, a "
        "third more time; rows are padded then (engine torch only: Megatron has cluster.train.recompute)",
    )
    trust_remote_code: bool = Field(default=False, description="run Python code contained in the checkpoint")


class BatchConfig(BaseModel, extra="forbid", frozen=True):
    """Batch sizes. The defaults are the paper's: 512 responses in mini-batches of 32, so 16 gradient steps."""

    prompts_per_batch: int = Field(default=64, ge=1, description="prompts per training step")
    responses_per_prompt: int = Field(default=8, ge=2, description="responses per prompt (GRPO's group size)")
    mini_batch_size: int = Field(default=32, ge=1, description="responses per gradient step")
    micro_batch_size: int = Field(
        default=8, ge=1, description="responses per forward and backward pass; limits memory, not the result"
    )
    log_prob_micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="responses per forward pass without gradients, which keeps little in memory: old log-probs and "
        "signals (engine torch only); null: micro_batch_size",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens per forward and backward pass at most, prompts and responses together, instead of "
        "micro_batch_size responses, which are then packed without padding; null: micro_batch_size",
    )
    share_prompts: bool = Field(
        default=False,
        description="whether the prompt of several responses in a micro-batch goes through the model once, with the "
        "responses packed behind it (engine torch only)",
    )
    shuffle: Literal["responses", "prompts"] = Field(
        default="responses",
        description="what is shuffled into mini-batches: single responses, or prompts with all of their responses, so "
        "that share_prompts finds them together",
    )
    old_logprobs: Literal["trainer", "rollout"] = Field(
        default="trainer",
        description="signals.source training: old log-probs of all mini-batches but the first, whose own forward pass "
        "has them: from a pass of the trainer before the first gradient step, or those of the rollout (float32 only)",
    )

    extra_rounds: int = Field(
        default=0,
        ge=0,
        description="rounds of dynamic sampling at most: groups whose rewards all tie are replaced by groups of other "
        "prompts (DAPO; verl's filter_groups.max_num_gen_batches, less one)",
    )

    @property
    def batch_size(self) -> int:
        """Responses per training step."""
        return self.prompts_per_batch * self.responses_per_prompt

    @property
    def gradient_steps(self) -> int:
        """Gradient steps per training step."""
        return self.batch_size // self.mini_batch_size

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes accumulated into one gradient step."""
        return self.mini_batch_size // self.micro_batch_size

    @model_validator(mode="after")
    def _sizes_divide(self) -> BatchConfig:
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"mini_batch_size is {self.mini_batch_size}: must divide the batch, prompts_per_batch × "
                f"responses_per_prompt = {self.prompts_per_batch} × {self.responses_per_prompt}"
                f" = {self.batch_size}"
            )
        if self.max_tokens is None and self.mini_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}: must divide mini_batch_size = {self.mini_batch_size}"
            )
        if self.shuffle == "prompts" and self.mini_batch_size % self.responses_per_prompt:
            raise ValueError(
                f"mini_batch_size is {self.mini_batch_size}: must be a multiple of responses_per_prompt = "
                f"{self.responses_per_prompt} where shuffle is prompts"
            )
        return self


class RunSignalsConfig(SignalsConfig, frozen=True):
    """How attention statistics become WAAD and FAI, and which forward pass they are computed in."""

    source: Literal["inline", "separate", "training"] = Field(
        default="inline",
        description="inline: signals are computed in the old-log-prob pass; separate: in a forward pass of their own; "
        "training: in the training pass itself, under the weights of each gradient step",
    )
    recalibrate_steps: int | None = Field(
        default=None,
        ge=1,
        description="grouping calibrated: training steps after which the head groups are chosen anew; null: never",
    )

    @model_validator(mode="after")
    def _calibrated_before(self) -> RunSignalsConfig:
        if self.recalibrate_steps is not None and self.grouping != "calibrated":
            raise ValueError(f"recalibrate_steps is {self.recalibrate_steps}, which needs grouping calibrated, not "
                             f"{self.grouping}")  # fmt: skip
        return self

    def calibrates(self, step: int) -> bool:
        """Whether the head groups of calibrated grouping are chosen in step 1, 2, …"""
        if self.grouping != "calibrated":
            return False
        return step == 1 or (self.recalibrate_steps is not None and (step - 1) % self.recalibrate_steps == 0)


RENAMED = {
    "attn": "signals.source",
    "credit.q": "credit.top_fraction",
    "cluster.deadlines.reward": "reward.seconds",
}
"""Old key → current key."""


class TrainConfig(BaseModel, extra="forbid", frozen=True):
    """The configuration of a training run."""

    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9._-]+$", max_length=255, description="the run's directory under runs_dir"
    )
    runs_dir: Path = Field(default=Path("runs"), description="directory that contains the run directories")
    seed: int = Field(default=0, ge=0, description="seed of prompt order, sampling, shuffling and the random control")
    steps: int = Field(default=500, ge=0, description="training steps")
    tensorboard: bool = Field(default=True, description="also write TensorBoard events")
    wandb: Literal["disabled", "offline", "online"] = Field(
        default="disabled",
        description="also log to Weights & Biases; offline: into the run's directory, for `wandb sync`",
    )
    profile_steps: tuple[PositiveInt, ...] = Field(
        default=(),
        description="steps whose torch profiler trace is written to profile/step_*.json; not on a cluster",
    )
    task: TaskConfig = TaskConfig()
    reward: RewardConfig = RewardConfig()
    model: ModelConfig = ModelConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    batch: BatchConfig = BatchConfig()
    sampling: SamplingConfig = SamplingConfig()
    signals: RunSignalsConfig = RunSignalsConfig()
    credit: CreditConfig = CreditConfig()
    advantages: AdvantageConfig = AdvantageConfig()
    overlong: OverlongConfig = OverlongConfig()
    loss: LossConfig = LossConfig()
    correction: CorrectionConfig = CorrectionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig | None = Field(
        default=None,
        description="run the engines in separate processes, on one machine or several; null: in this process",
    )

    @property
    def run_dir(self) -> Path:
        """Directory of the run's files."""
        return self.runs_dir / self.name

    @field_validator("name")
    @classmethod
    def _is_a_directory_of_its_own(cls, name: str) -> str:
        if not name.strip("."):
            raise ValueError(f"must name a directory in runs_dir, not runs_dir itself or its parent, got {name!r}")
        return name

    def draws_ahead(self, step: int) -> bool:
        """Whether the rollout of step 1, 2, … is drawn while the step before trains (cluster.rollout_ahead)."""
        if self.cluster is None or not self.cluster.rollout_ahead:
            return False
        return 1 < step <= self.steps and step % self.cluster.parity.every_steps != 0

    @model_validator(mode="before")
    @classmethod
    def _by_todays_names(cls, values: object) -> object:
        if said := renamed_keys(values, RENAMED):
            raise ValueError(said)
        return values

    @model_validator(mode="after")
    def _profiles_this_process(self) -> TrainConfig:
        if self.profile_steps and self.cluster is not None:
            raise ValueError(
                f"profile_steps is {list(self.profile_steps)}: must be empty with a cluster: "
                "its engines run in other processes"
            )
        return self

    @model_validator(mode="after")
    def _corrects_what_is_ahead(self) -> TrainConfig:
        if self.cluster is not None and self.cluster.rollout_ahead and self.correction.mode == "none":
            raise ValueError(
                "correction.mode is 'none': must be another with cluster.rollout_ahead = "
                f"{self.cluster.rollout_ahead}, whose rollouts are of older weights than the trainer's"
            )
        return self

    @model_validator(mode="after")
    def _in_torch_alone(self) -> TrainConfig:
        if self.cluster is None or self.cluster.train.engine != "megatron":
            return self
        where = "with cluster.train.engine = megatron"
        if self.batch.share_prompts:
            raise ValueError(f"batch.share_prompts is true: must be false {where}")
        if self.model.gradient_checkpointing:
            raise ValueError(f"model.gradient_checkpointing is true: {where} it is cluster.train.recompute")
        if (rows := self.batch.log_prob_micro_batch_size) is not None:
            raise ValueError(f"batch.log_prob_micro_batch_size is {rows}: must be null {where}")
        return self

    @model_validator(mode="after")
    def _signals_of_the_training_pass(self) -> TrainConfig:
        if self.signals.source != "training":
            if self.batch.old_logprobs == "rollout":
                raise ValueError(
                    "batch.old_logprobs is 'rollout': must be 'trainer' unless signals.source is training: "
                    f"with {self.signals.source} a pass over the batch has them"
                )
            return self
        reads, alone = self.credit.reads, "where signals.source is training, before all rows have been read"
        if "attention" in reads and self.signals.grouping != "sequence":
            raise ValueError(f"signals.grouping is {self.signals.grouping!r}: must be 'sequence' {alone}")
        if reads and self.credit.mass == "matched":
            raise ValueError(f"credit.mass is 'matched': must be 'as_is' {alone}")
        if reads and self.credit.random_like is not None:
            raise ValueError(f"credit.random_like is {self.credit.random_like!r}: must be null {alone}")
        if self.batch.old_logprobs == "rollout":
            if self.cluster is not None:
                raise ValueError(
                    "batch.old_logprobs is 'rollout': must be 'trainer' with a cluster, whose engines round differently"
                )
            if self.model.precision != "float32":
                raise ValueError(
                    f"batch.old_logprobs is 'rollout': must be 'trainer' with model.precision = "
                    f"{self.model.precision}: the rollout's log-probs are rounded otherwise than the trainer's"
                )
            if self.correction.mode != "none":
                raise ValueError(
                    f"correction.mode is {self.correction.mode!r}: must be 'none' where batch.old_logprobs is "
                    "rollout, which leaves nothing to compare with"
                )
        return self

    @model_validator(mode="after")
    def _samples(self) -> TrainConfig:
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0: must be positive, or all responses to a prompt are equal")
        return self

    @model_validator(mode="after")
    def _penalty_within_the_response(self) -> TrainConfig:
        longest = self.overlong.max_tokens or self.sampling.max_new_tokens
        if (self.overlong.penalty_tokens or 0) > longest:
            raise ValueError(
                f"overlong.penalty_tokens is {self.overlong.penalty_tokens}: must be at most {longest}, the longest "
                "response in tokens (overlong.max_tokens, or sampling.max_new_tokens)"
            )
        return self
