"""Settings of a vLLM engine."""

from __future__ import annotations

from pydantic import BaseModel, Field


class VllmConfig(BaseModel, extra="forbid", frozen=True):
    """Settings of a vLLM engine."""

    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs per replica")
    gpu_memory_utilization: float = Field(
        default=0.85, gt=0, lt=1, description="fraction of a GPU's memory that vLLM uses, for weights and KV cache"
    )
    kv_cache_gib: float | None = Field(
        default=None,
        gt=0,
        description="size of the KV cache per GPU in GiB, instead of gpu_memory_utilization; required on CPUs",
    )
    max_num_seqs: int = Field(default=256, ge=1, description="responses that a replica generates at a time")
    max_num_batched_tokens: int = Field(
        default=4096, ge=1, description="tokens per forward pass; scoring needs as many rows of fp32 logits"
    )
    enforce_eager: bool = Field(default=False, description="don't use CUDA graphs; always true on CPUs")
    enable_prefix_caching: bool = Field(
        default=False, description="share a prompt's KV cache among its responses, within a call of generate"
    )
