"""The parallel layout of the training model. Doesn't import Megatron, so configurations can be read without it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ParallelConfig(BaseModel, extra="forbid", frozen=True):
    """Parallel layout and layer implementation of the training model."""

    tensor: int = Field(default=1, ge=1, description="tensor parallel size: ranks that split every layer's matrices")
    pipeline: int = Field(default=1, ge=1, description="pipeline parallel size: stages that split the layers")
    data: int = Field(default=1, ge=1, description="data parallel size: copies of the model that split a batch")
    context: int = Field(
        default=1,
        ge=1,
        description="context parallel size: ranks that split every sequence, and gather keys and values in each layer",
    )
    sequence_parallel: bool = Field(
        default=True,
        description="between the layers' matrices the tensor ranks split the tokens, too, instead of each having all "
        "of them: a share of the memory, for the same bytes sent; nothing with tensor 1",
    )
    layer_spec: Literal["local", "transformer_engine"] = Field(
        default="local",
        description="Megatron's layers: local (plain torch), or transformer_engine, which needs a GPU",
    )
    recompute: bool = Field(default=False, description="recompute activations in the backward pass, to save memory")
    distributed_optimizer: bool = Field(
        default=True, description="split the optimizer's state among the data and context parallel ranks"
    )

    overlap_gradients: bool = Field(
        default=True,
        description="sum gradients over the data and context parallel ranks while the backward pass still runs (models "
        "with experts: after it)",
    )

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def splits_tokens(self) -> bool:
        """Whether the tensor ranks split the tokens between the layers' matrices."""
        return self.sequence_parallel and self.tensor > 1

    @property
    def optimizer_shares(self) -> int:
        """Ranks among which the optimizer's state of the same weights is split."""
        return self.data * self.context if self.distributed_optimizer else 1

    @property
    def sizes(self) -> str:
        """The sizes as a product, with the context parallel one if it is not 1."""
        sizes = [self.tensor, self.pipeline, self.data] + [self.context] * (self.context > 1)
        return " × ".join(map(str, sizes))

    @property
    def names(self) -> str:
        """What `sizes` multiplies."""
        return "tensor × pipeline × data" + " × context" * (self.context > 1)
