"""Tiles of q, k and v: how kernels address them, and what all launchers pass on for it.

Shape suffixes: M rows of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rhythm.kernels.sequences import Sequences

LOG2_E = 1.4426950408889634
INT32_MAX = 2**31 - 1
SMALLEST = 2.0**-126
"""The smallest normal fp32: what is below counts as 0 on a GPU."""
LARGEST = torch.finfo(torch.float32).max
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""There numpy's fp32 products depend on their place in the tile, in the last digit, and a GPU's do not."""
STEEP = tl.constexpr(1024.0)
"""Base-2 exponents from here on, rounded to fp32, show in weights: then products are subtracted before they are scaled,
which costs an instruction a score."""


@triton.jit
def head_base(x, sequence, start, head, stride_batch, stride_token, stride_head, BATCHED: tl.constexpr):
    """The first element of a head of a sequence, by 64-bit offsets."""
    base = x + sequence.to(tl.int64) * stride_batch if BATCHED else x + start.to(tl.int64) * stride_token
    return base + tl.cast(head, tl.int64) * stride_head


@triton.jit
def load_rows(
    base, first, end, stride_token, stride_dim,
    ROWS: tl.constexpr, MASKED: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """[ROWS, PADDED] from row `first` of one head on; 0 beyond the head size and, where MASKED, from row `end` on.

    Offsets within the tile have 64 bits only where strides ask for it (WIDE): the steady loops have few of them.
    """
    place_M, dim_D = tl.arange(0, ROWS), tl.arange(0, PADDED)
    if WIDE:
        offset_MD = place_M[:, None].to(tl.int64) * stride_token + dim_D[None, :].to(tl.int64) * stride_dim
    else:
        offset_MD = place_M[:, None] * stride_token + dim_D[None, :] * stride_dim
    at_MD = base + tl.cast(first, tl.int64) * stride_token + offset_MD
    if MASKED:
        x_MD = tl.load(at_MD, mask=(first + place_M < end)[:, None] & (dim_D < SIZE)[None, :], other=0.0)
    elif SIZE < PADDED:
        x_MD = tl.load(at_MD, mask=(dim_D < SIZE)[None, :], other=0.0)
    else:
        x_MD = tl.load(at_MD)
    return x_MD.to(tl.float32) if UPCAST else x_MD


@triton.jit
def load_q(
    base, first, length, stride_token, stride_dim,
    SIGN: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows of q with the sign of the scale, so that the largest product is the largest score."""
    return signed(
        load_rows(base, first, length, stride_token, stride_dim, ROWS, True, SIZE, PADDED, WIDE, UPCAST), SIGN
    )


@triton.jit
def load_descriptor(
    descriptor, sequence, start, row, head,
    ROWS: tl.constexpr, PADDED: tl.constexpr, BATCHED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same by the tensor memory accelerator, from a descriptor of [B, T, H, D]; all rows lie in the sequence."""
    if BATCHED:
        x_MD = tl.reshape(descriptor.load([sequence, row, head, 0]), [ROWS, PADDED])
    else:
        x_MD = tl.reshape(descriptor.load([0, start + row, head, 0]), [ROWS, PADDED])
    return x_MD.to(tl.float32) if UPCAST else x_MD


@triton.jit
def signed(x, SIGN: tl.constexpr):
    """x with the sign of the scale, exact in any type. A scale of 0: all becomes 0, and what is not finite NaN."""
    if SIGN == 0:
        return x * 0.0
    elif SIGN < 0:
        return -x
    else:
        return x


@triton.jit
def finite_or_nan(x):
    """±inf becomes NaN: a row whose lse is not finite has no weights."""
    return x + x * 0.0


@triton.jit
def product(a_MD, b_ND, PRECISION: tl.constexpr):
    """a bᵀ in fp32. Full fp32 has no tensor cores and keeps both operands in registers: 32 dimensions at a time."""
    DIMS: tl.constexpr = a_MD.shape[1]
    if PRECISION == "ieee" and a_MD.dtype == tl.float32 and DIMS > 32:
        one_MD, other_MD = tl.split(tl.reshape(a_MD, [a_MD.shape[0], DIMS // 2, 2]))
        one_ND, other_ND = tl.split(tl.reshape(b_ND, [b_ND.shape[0], DIMS // 2, 2]))
        return product(one_MD, one_ND, PRECISION) + product(other_MD, other_ND, PRECISION)
    else:
        if INTERPRETED:
            return tl.dot(a_MD.to(tl.float64), tl.trans(b_ND).to(tl.float64), out_dtype=tl.float64).to(tl.float32)
        else:
            return tl.dot(a_MD, tl.trans(b_ND), input_precision=PRECISION)


def padded_size(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def strides(x: Tensor) -> tuple[int, int, int, int]:
    """(batch, token, head, dim) of x [T, H, D] or [B, T, H, D]; the batch stride of packed x is 0."""
    batch, token, head, dim = x.stride() if x.ndim == 4 else (0, *x.stride())
    return batch, token, head, dim


def scales(scale: float) -> dict[str, float]:
    """The scale in parts: of base-2 exponents and of natural ones, both above 0, and SIGN for `signed`.

    With SIGN 0 all products are 0: masked scores are −inf, and −inf · 0 would be NaN. A finite scale stays finite: the
    largest product's difference of 0 must stay 0.
    """
    natural = abs(scale)
    if natural <= 2.0**-150:  # 0 in fp32
        return {"scale": LOG2_E, "natural_scale": 1.0, "SIGN": 0}
    if natural > LARGEST:
        natural = math.inf
    base2 = min(max(natural * LOG2_E, SMALLEST), LARGEST) if natural < math.inf else math.inf
    return {"scale": base2, "natural_scale": natural, "SIGN": -1 if scale < 0 else 1}


def common_arguments(q: Tensor, k: Tensor, sequences: Sequences, scale: float) -> dict[str, Any]:
    """The arguments that every sweep over q and k takes, by name; `scale` becomes one of base-2 exponents, above 0."""
    of_scale = scales(scale)
    packed, prompts = sequences.cu_seqlens is not None, sequences.prompt_lens is not None
    names = ("batch", "token", "head", "dim")
    return {
        "q": q,
        "k": k,
        "cu_seqlens": sequences.cu_seqlens if packed else q,
        "prompt_lens": sequences.prompt_lens if prompts else q,
        **{f"q_{name}": stride for name, stride in zip(names, strides(q), strict=True)},
        **{f"k_{name}": stride for name, stride in zip(names, strides(k), strict=True)},
        "sequences": sequences.count,
        "tokens": sequences.tokens,
        "heads": q.shape[-2],
        "scale": of_scale["scale"],
        "SIGN": of_scale["SIGN"],
        "GROUP": q.shape[-2] // k.shape[-2],
        "PACKED": packed,
        "PROMPTS": prompts,
        "BATCHED": q.ndim == 4,
        "SIZE": q.shape[-1],
        "PADDED": padded_size(q.shape[-1]),
        "WIDE": wide(q) or wide(k),
        "UPCAST": upcast(q.dtype),
        "PRECISION": dot_precision(),
        "enable_fp_fusion": True,  # a multiply and an add are one instruction; Triton's default is about to change
    }


def wide(x: Tensor, rows: int = 256) -> bool:
    """Whether offsets within a tile of up to `rows` rows need more than 32 bits."""
    return rows * abs(x.stride(-3)) + x.shape[-1] * abs(x.stride(-1)) > INT32_MAX


def dot_precision() -> str:
    """Of fp32 products: torch's own switch between full fp32 and TF32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def upcast(dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies the bit patterns of bf16 matrices: there they are made fp32 first."""
    return dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"


def describable(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can read x: its strides and first element are multiples of 16 bytes."""
    if x.stride(-1) != 1 or x.data_ptr() % 16:
        return False
    return all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of x [(B,) T, H, D] for tiles of `rows` tokens of one head."""
    x_BTHD = x if x.ndim == 4 else x[None]
    return TensorDescriptor(x_BTHD, list(x_BTHD.shape), list(x_BTHD.stride()), [1, rows, 1, padded_size(x.shape[-1])])
