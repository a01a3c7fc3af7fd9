"""The `cluster` section of a run's configuration: who trains, who generates, on which GPUs, and for how long."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.engines.parity import ParityConfig
from rhythm.engines.vllm.infer import VllmConfig

LOOPBACK = "127.0.0.1"
PushKind = Literal["shared_memory", "nccl", "ipc", "object_store"]
"""How weights get from actor_train to a receiver: vLLM's three, and Ray's object store for transformers models."""


class InferRole(VllmConfig, extra="forbid", frozen=True):
    """actor_infer: replicas that share a batch's prompts."""

    engine: Literal["vllm", "transformers"] = Field(
        default="vllm", description="vllm, or transformers' generate: slow, for tests and small models"
    )
    replicas: int = Field(default=1, ge=1, description="engines, each with all weights; they share the prompts")

    @property
    def vllm(self) -> VllmConfig | None:
        """Of a replica; None where the engine is another."""
        if self.engine != "vllm":
            return None
        return VllmConfig.model_validate(self.model_dump(include=set(VllmConfig.model_fields)))


class TrainRole(ParallelConfig, extra="forbid", frozen=True):
    """actor_train: tensor × pipeline × data ranks."""

    engine: Literal["megatron", "torch"] = Field(
        default="megatron", description="megatron, or the one-machine engine in a process of its own: one rank"
    )

    @property
    def parallel(self) -> ParallelConfig:
        """The layout alone."""
        return ParallelConfig.model_validate(self.model_dump(include=set(ParallelConfig.model_fields)))

    @model_validator(mode="after")
    def _torch_is_one_rank(self) -> TrainRole:
        if self.engine == "torch" and self.ranks != 1:
            raise ValueError(f"engine is torch, with {self.ranks} ranks: tensor, pipeline and data must be 1")
        return self


class AttnRole(BaseModel, extra="forbid", frozen=True):
    """actor_attn, where attn is `separate`."""

    replicas: int = Field(default=1, ge=1, description="models on a GPU each; they share a batch's responses")


class Deadlines(BaseModel, extra="forbid", frozen=True):
    """Seconds after which a call counts as lost; what was called is killed and its work done again."""

    start: float = Field(default=900, gt=0, description="an engine comes up, its weights loaded")
    generate: float = Field(default=3600, gt=0, description="a replica's part of a rollout")
    log_probs: float = Field(default=1800, gt=0, description="log-probs or signals of a batch")
    step: float = Field(default=1800, gt=0, description="one gradient step")
    push: float = Field(default=600, gt=0, description="weights from the trainer to all that read them")
    checkpoint: float = Field(default=1800, gt=0, description="a checkpoint is written or read")
    reward: float = Field(default=10, gt=0, description="one response is judged; past it the score is 0")


class ClusterConfig(BaseModel, extra="forbid", frozen=True):
    """Engines in processes of their own, on one machine or many."""

    placement: Literal["colocated", "separate"] = Field(
        default="colocated", description="trainer and vLLM take turns on the same GPUs, or have GPUs of their own"
    )
    nodes: int = Field(default=1, ge=1, description="machines, each with the same number of GPUs")
    gpus: int = Field(default=8, ge=0, description="GPUs of all machines together; 0: everything on CPUs")
    gpu_memory_gib: float = Field(default=80, gt=0, description="memory of a GPU, for the plan")
    max_length: int = Field(default=1024, ge=2, description="longest prompt and response together, in tokens")
    infer: InferRole = InferRole()
    train: TrainRole = TrainRole()
    attn: AttnRole = AttnRole()
    deadlines: Deadlines = Deadlines()
    parity: ParityConfig = ParityConfig()
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="times the run goes back to its last checkpoint after a training rank was lost, and times "
        "each other actor is started again, before it gives up",
    )
    bind_address: str = Field(default=LOOPBACK, description="address that Ray and the engines listen on")
    ray_address: str | None = Field(
        default=None, description="head of a Ray cluster to join, host:port; null starts Ray on this machine"
    )
    object_store_mib: int = Field(default=512, ge=80, description="shared memory of a Ray started here")
    push_bucket_mib: int = Field(default=64, ge=1, description="weights that are in flight at a time in a push")
    threads: int = Field(default=1, ge=1, description="CPU threads of each process")

    @property
    def gpus_per_node(self) -> int:
        """GPUs of one machine."""
        return self.gpus // self.nodes

    @property
    def on_loopback(self) -> bool:
        """Nothing outside this machine can reach the run's processes."""
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
            raise ValueError(f"bind_address is {self.bind_address}: the only loopback address Ray knows is {LOOPBACK}")
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> ClusterConfig:
        if self.gpus % self.nodes:
            raise ValueError(f"gpus is {self.gpus}: must divide among nodes={self.nodes}")
        if self.nodes > 1 and self.gpus == 0:
            raise ValueError(f"nodes is {self.nodes}: without GPUs there is one machine")
        if self.nodes > 1 and self.ray_address is None:
            raise ValueError(
                f"nodes is {self.nodes}: ray_address must name the head of a Ray cluster (`ray start --head`)"
            )
        if self.nodes > 1 and self.on_loopback:
            raise ValueError(f"bind_address is {self.bind_address}: other nodes can't reach it; give this machine's")
        if self.gpus == 0 and self.infer.engine == "vllm" and self.infer.kv_cache_gib is None:
            raise ValueError("infer.kv_cache_gib is not set: on CPUs (gpus: 0) vLLM needs the size of its KV cache")
        return self
