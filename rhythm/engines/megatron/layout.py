"""The parallel layout of the training model. Doesn't import Megatron, so configurations can be read without it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ParallelConfig(BaseModel, extra="forbid", frozen=True):
    """Parallel layout and layer implementation of the training model."""

    tensor: int = Field(default=1, ge=1, description="tensor parallel size: ranks that split every layer's matrices")
    pipeline: int = Field(default=1, ge=1, description="pipeline parallel size: stages that split the layers")
    data: int = Field(default=1, ge=1, description="data parallel size: copies of the model that split a batch")
    layer_spec: Literal["local", "transformer_engine"] = Field(
        default="local",
        description="Megatron's layers: local (plain torch), or transformer_engine, which needs a GPU",
    )
    recompute: bool = Field(default=False, description="recompute activations in the backward pass, to save memory")
    distributed_optimizer: bool = Field(
        default=True, description="split the optimizer's state among the data parallel ranks"
    )

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data
