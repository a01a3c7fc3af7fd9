"""Shared by all prototypes: checks of inputs, the scale, tensor descriptors, and results.

Shape suffixes: T tokens, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.implementations import Outputs
from benchmarks.shapes import Inputs
from rhythm.kernels.tiles import LOG2_E, tma_compatible

HEAD_SIZES = (64, 128)


def check(inputs: Inputs) -> None:
    """
    Raises:
        ValueError: inputs that the prototypes do not take.
    """
    shape, q = inputs.shape, inputs.q
    if q.dtype != torch.bfloat16:
        raise ValueError(f"inputs are {q.dtype}; prototypes take torch.bfloat16")
    if shape.prompt:
        raise ValueError(f"shape.prompt is {shape.prompt}; prototypes take sequences without a prompt (0)")
    if shape.head_size not in HEAD_SIZES:
        raise ValueError(f"shape.head_size is {shape.head_size}; prototypes take {HEAD_SIZES[0]} or {HEAD_SIZES[1]}")
    for name, x in (("q", q), ("k", inputs.k), ("v", inputs.v)):
        if not x.is_contiguous() or not (x.is_meta or tma_compatible(x)):
            raise ValueError(
                f"{name} has strides {x.stride()}; prototypes take contiguous tensors, aligned to 16 bytes"
            )


@dataclass(frozen=True)
class Results:
    """Memory for one call's results.

    Attributes:
        row_span_HT: Σ_s A[t, s]·(t − s), fp32.
        lse_HT: fp32, natural log.
        out: [T, Hq, D] in q's type, or q itself where no output is computed.
        flags: int32, one for a block of a head: 1 where its sums overflowed. Every block writes its own.
    """

    row_span_HT: Tensor
    lse_HT: Tensor
    out: Tensor
    flags: Tensor

    def outputs(self, values: bool = False) -> Outputs:
        """By name, with the rows' spans averaged."""
        outputs = {"span": self.row_span_HT.mean(dim=1)[None], "lse": self.lse_HT}
        return outputs | ({"out": self.out} if values else {})


def results(inputs: Inputs, rows: int, values: bool = False) -> Results:
    """Memory without contents, with a flag for each block of `rows` rows of each head."""
    q, heads, tokens = inputs.q, inputs.shape.query_heads, inputs.shape.tokens
    row_span_HT, lse_HT = (torch.empty((heads, tokens), dtype=torch.float32, device=q.device) for _ in range(2))
    flags = torch.empty(heads * blocks(inputs, rows), dtype=torch.int32, device=q.device)
    return Results(row_span_HT, lse_HT, torch.empty_like(q) if values else q, flags)


def blocks(inputs: Inputs, rows: int) -> int:
    return -(-inputs.shape.tokens // rows)


def tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of x [T, H, D] for tiles of `rows` tokens of one head; beyond T it reads 0."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 1, x.shape[-1]])


def common(inputs: Inputs) -> dict[str, int | float]:
    """Arguments that every kernel takes, by name; the scale becomes one of base-2 exponents."""
    shape = inputs.shape
    return {
        "tokens": shape.tokens,
        "heads": shape.query_heads,
        "scale": inputs.scale * LOG2_E.value,
        "GROUP": shape.query_heads // shape.key_heads,
        "D": shape.head_size,
        "enable_fp_fusion": True,  # a multiply and an add are one instruction; Triton's default is about to change
    }


def two_programs() -> dict[str, int]:
    """The launch option that lets two programs of 8 warps share a multiprocessor: 128 registers per thread.

    Triton 3.6 stays within them; later versions were seen to spill (3.9), and are left to take what they need.
    """
    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return {"maxnreg": 128} if (major, minor) < (3, 7) else {}
