"""The `cluster` section of a run's configuration: roles and their engines, GPUs and deadlines."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.engines.parity import ParityConfig
from rhythm.engines.vllm.config import VllmConfig

LOOPBACK = "127.0.0.1"
PushKind = Literal["shared_memory", "nccl", "ipc", "object_store"]
"""How weights are sent from actor_train: the first three ways to vLLM; to transformers models by shared_memory,
or by Ray's object_store where they may be on other machines."""


class InferRole(VllmConfig, extra="forbid", frozen=True):
    """actor_infer: replicas that split a batch's prompts among them."""

    engine: Literal["vllm", "transformers"] = Field(
        default="vllm", description="vllm, or transformers (its generate method: slow, for tests and small models)"
    )
    replicas: int = Field(
        default=1, ge=1, description="number of engines, each with all weights; they split a batch's prompts"
    )

    @property
    def vllm(self) -> VllmConfig | None:
        """The vLLM settings of a replica; None for another engine."""
        if self.engine != "vllm":
            return None
        return VllmConfig.model_validate(self.model_dump(include=set(VllmConfig.model_fields)))


class TrainRole(ParallelConfig, extra="forbid", frozen=True):
    """actor_train: tensor × pipeline × data × context ranks."""

    engine: Literal["megatron", "torch"] = Field(
        default="megatron", description="megatron, or torch (the single-process engine, as one rank)"
    )
    offload: bool = Field(
        default=False,
        description="move gradients and optimizer to host memory while vLLM has the GPUs (placement colocated)",
    )

    @property
    def parallel(self) -> ParallelConfig:
        """Only the layout."""
        return ParallelConfig.model_validate(self.model_dump(include=set(ParallelConfig.model_fields)))

    @model_validator(mode="after")
    def _torch_is_one_rank(self) -> TrainRole:
        if self.engine == "torch" and self.ranks != 1:
            raise ValueError(f"engine is torch, with {self.ranks} ranks: tensor, pipeline, data and context must be 1")
        return self


class AttnRole(BaseModel, extra="forbid", frozen=True):
    """actor_attn, used with signals.source=separate."""

    replicas: int = Field(
        default=1, ge=1, description="number of models, each on its own GPU; they split a batch's responses"
    )


class Deadlines(BaseModel, extra="forbid", frozen=True):
    """Deadlines of remote calls. A process that misses one is killed and restarted, and its work repeated."""

    start: float = Field(default=900, gt=0, description="seconds for an engine to start and load its weights")
    generate: float = Field(default=3600, gt=0, description="seconds for a replica's part of a rollout")
    log_probs: float = Field(default=1800, gt=0, description="seconds for log-probs or signals of a batch")
    step: float = Field(default=1800, gt=0, description="seconds for one gradient step")
    push: float = Field(default=600, gt=0, description="seconds for a weight sync to all receivers")
    checkpoint: float = Field(default=1800, gt=0, description="seconds for writing or reading a checkpoint")


class ClusterConfig(BaseModel, extra="forbid", frozen=True):
    """Runs the engines in separate processes, on one machine or several."""

    placement: Literal["colocated", "separate"] = Field(
        default="colocated",
        description="colocated: trainer and vLLM take turns on the same GPUs; separate: each has its own GPUs",
    )
    nodes: int = Field(default=1, ge=1, description="number of machines, all with the same number of GPUs")
    gpus: int = Field(default=8, ge=0, description="GPUs of all machines together; 0: everything runs on CPUs")
    gpu_memory_gib: float = Field(default=80, gt=0, description="memory per GPU, for the plan")
    max_length: int = Field(default=1024, ge=2, description="longest prompt and response together, in tokens")
    infer: InferRole = InferRole()
    train: TrainRole = TrainRole()
    attn: AttnRole = AttnRole()
    deadlines: Deadlines = Deadlines()
    parity: ParityConfig = ParityConfig()
    rollout_ahead: Literal[0, 1] = Field(
        default=0,
        description="1: one step off: a step's rollout is generated while the step before trains, with weights one "
        "version older (placement separate, with a correction.mode); not those compared for parity. 0: synchronous",
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="how often the run may go back to its last checkpoint because a training rank (or a replica that "
        "generated ahead) was lost, and how often processes of each other role may be restarted, before it stops with "
        "an error",
    )
    bind_address: str = Field(default=LOOPBACK, description="address that Ray and the engines listen on")
    ray_address: str | None = Field(
        default=None, description="head of a Ray cluster to join, host:port; null: start Ray on this machine"
    )
    object_store_mib: int = Field(default=512, ge=80, description="size of the object store if Ray is started here")
    push_bucket_mib: int = Field(default=64, ge=1, description="size of the buckets in which weights are sent")
    threads: int = Field(default=1, ge=1, description="CPU threads per process")

    @property
    def gpus_per_node(self) -> int:
        """GPUs per machine."""
        return self.gpus // self.nodes

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the run's processes."""
        return ipaddress.ip_address(self.bind_address).is_loopback

    @field_validator("bind_address")
    @classmethod
    def _is_address(cls, value: str) -> str:
        try:
            return str(ipaddress.ip_address(value))
        except ValueError as error:
            raise ValueError(f"must be an IP address, got {value!r}") from error

    @model_validator(mode="after")
    def _one_loopback(self) -> ClusterConfig:
        if self.on_loopback and self.bind_address != LOOPBACK:
            raise ValueError(
                f"bind_address is {self.bind_address}: the only loopback address that Ray supports is {LOOPBACK}"
            )
        return self

    @model_validator(mode="after")
    def _can_be_ahead(self) -> ClusterConfig:
        if self.rollout_ahead and self.placement != "separate":
            raise ValueError(
                f"rollout_ahead is {self.rollout_ahead}: must be 0 with placement colocated, where vLLM sleeps while "
                "the trainer works; separate keeps it awake"
            )
        if self.rollout_ahead and self.parity.every_steps == 1:
            raise ValueError(
                "parity.every_steps is 1: must be more with rollout_ahead = 1: a rollout that is compared must be of "
                "the trainer's own weights, so it isn't generated ahead"
            )
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> ClusterConfig:
        if self.gpus % self.nodes:
            raise ValueError(f"gpus is {self.gpus}: must divide among nodes={self.nodes}")
        if self.nodes > 1 and self.gpus == 0:
            raise ValueError(f"nodes is {self.nodes}: must be 1 without GPUs (gpus: 0)")
        if self.nodes > 1 and self.ray_address is None:
            raise ValueError(
                f"nodes is {self.nodes}: ray_address must name the head of a Ray cluster (`ray start --head`)"
            )
        if self.nodes > 1 and self.on_loopback:
            raise ValueError(f"bind_address is {self.bind_address}: other nodes can't reach it; give this machine's")
        if self.gpus == 0 and self.infer.engine == "vllm" and self.infer.kv_cache_gib is None:
            raise ValueError("infer.kv_cache_gib is not set: on CPUs (gpus: 0) vLLM needs the size of its KV cache")
        return self
