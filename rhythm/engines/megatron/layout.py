"""How a model is spread over ranks. Needs no Megatron: configurations are read where it isn't installed, too."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ParallelConfig(BaseModel, extra="forbid", frozen=True):
    """Layout and layers of the training model."""

    tensor: int = Field(default=1, ge=1, description="ranks that share every layer's matrices")
    pipeline: int = Field(default=1, ge=1, description="stages that share the layers")
    data: int = Field(default=1, ge=1, description="copies of the model that share a batch's responses")
    layer_spec: Literal["local", "transformer_engine"] = Field(
        default="local", description="Megatron's layers: plain torch, or TransformerEngine's, which needs a GPU"
    )
    recompute: bool = Field(default=False, description="compute activations again in the backward pass: less memory")
    distributed_optimizer: bool = Field(default=True, description="data ranks share the optimizer's state")

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.tensor * self.pipeline * self.data
