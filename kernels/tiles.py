"""Operands of the kernels: what launchers pass for q, k and v, and how kernels load and multiply their tiles.

Shape suffixes: M rows of a tile, N rows of another, D head size (padded to a power of two).
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))
INT32_MAX = 2**31 - 1
SMALLEST = 2.0**-126
"""The smallest normal fp32 number; GPUs flush smaller ones to 0."""
LARGEST = torch.finfo(torch.float32).max
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""The interpreter's fp32 products (numpy's) depend on their place in the tile, in the last digit; a GPU's do not."""
STEEP = tl.constexpr(1024.0)
"""From this size on, rounding base-2 exponents to fp32 shows in the weights: then products are subtracted before they
are scaled, which costs one instruction per score."""


class Strides(NamedTuple):
    """Strides of one operand, in elements."""

    batch: int  # 0 for packed tensors
    token: int
    head: int
    dim: int


class OperandStrides(NamedTuple):
    """Strides of the operands of a kernel; v is None where there are no values.

    They are apart from the pointers, which come first in a kernel's arguments: with pointers and integers mixed, ptxas
    was seen to take other registers for the same PTX.
    """

    q: Strides
    k: Strides
    v: Strides | None


class Form(NamedTuple):
    """What kernels are compiled for, besides the tile; they take it as a constant.

    Attributes:
        group: query heads per key head.
        batched: operands are [B, T, H, D] instead of [T, H, D].
        size, padded: head size, and the same padded to a power of two.
        wide: offsets within a tile need 64 bits.
        upcast: tiles are converted to fp32 after loading.
        precision: of fp32 products, "ieee" or "tf32".
        sign: -1, 0 or 1, the sign of the softmax scale.
    """

    group: int
    batched: bool
    size: int
    padded: int
    wide: bool
    upcast: bool
    precision: str
    sign: int


@triton.jit
def head_base(x, strides, sequence, start, head, form: tl.constexpr):
    """Pointer to the first element of a head of a sequence of x, by 64-bit offsets."""
    base = x + sequence.to(tl.int64) * strides.batch if form.batched else x + start.to(tl.int64) * strides.token
    return base + tl.cast(head, tl.int64) * strides.head


@triton.jit
def query_base(q, strides, sequence, first_row, missing, head, rows, form: tl.constexpr):
    """head_base of q, moved by its missing first rows: to where the row of the sequence's first token would be."""
    base = head_base(q, strides, sequence, first_row, head, form)
    if rows is not None:
        base -= tl.cast(missing, tl.int64) * strides.token
    return base


@triton.jit
def load_rows(
    base, strides, first, end, ROWS: tl.constexpr, MASKED: tl.constexpr, form: tl.constexpr, begin: tl.constexpr = None
):
    """[ROWS, D] rows of one head from row `first` on; 0 beyond the head size and, where MASKED, from row `end` on, and
    before `begin` if that is not None.

    base: from head_base. Offsets within the tile have 64 bits only where strides need them (form.wide): the steady
    loops have few of them.
    """
    place_M, dim_D = tl.arange(0, ROWS), tl.arange(0, form.padded)
    if form.wide:
        offset_MD = place_M[:, None].to(tl.int64) * strides.token + dim_D[None, :].to(tl.int64) * strides.dim
    else:
        offset_MD = place_M[:, None] * strides.token + dim_D[None, :] * strides.dim
    at_MD = base + tl.cast(first, tl.int64) * strides.token + offset_MD
    if MASKED:
        used_M = first + place_M < end
        if begin is not None:
            used_M = used_M & (first + place_M >= begin)
        x_MD = tl.load(at_MD, mask=used_M[:, None] & (dim_D < form.size)[None, :], other=0.0)
    elif form.size < form.padded:
        x_MD = tl.load(at_MD, mask=(dim_D < form.size)[None, :], other=0.0)
    else:
        x_MD = tl.load(at_MD)
    return x_MD.to(tl.float32) if form.upcast else x_MD


@triton.jit
def gather_rows(base, strides, row_M, used_M, form: tl.constexpr):
    """[M, D] the rows row_M of one head; 0 beyond the head size and where a row is not used."""
    dim_D = tl.arange(0, form.padded)
    at_MD = base + row_M[:, None].to(tl.int64) * strides.token + dim_D[None, :].to(tl.int64) * strides.dim
    x_MD = tl.load(at_MD, mask=used_M[:, None] & (dim_D < form.size)[None, :], other=0.0)
    return x_MD.to(tl.float32) if form.upcast else x_MD


@triton.jit
def load_q(base, strides, first, length, ROWS: tl.constexpr, form: tl.constexpr):
    """Rows of q times the sign of the scale, so that the largest product is the largest score."""
    return signed(load_rows(base, strides, first, length, ROWS, True, form), form.sign)


@triton.jit
def load_tma(descriptor, sequence, start, row, head, ROWS: tl.constexpr, form: tl.constexpr):
    """What load_rows gives without a mask, by the tensor memory accelerator. All rows must lie in the sequence.

    descriptor: of the whole tensor [B, T, H, D], from `tma_descriptor`.
    """
    PADDED: tl.constexpr = form.padded
    if form.batched:
        x_MD = tl.reshape(descriptor.load([sequence, row, head, 0]), [ROWS, PADDED])
    else:
        x_MD = tl.reshape(descriptor.load([0, start + row, head, 0]), [ROWS, PADDED])
    return x_MD.to(tl.float32) if form.upcast else x_MD


@triton.jit
def signed(x, SIGN: tl.constexpr):
    """x times the sign of the scale, exact in any type. For a scale of 0 all becomes 0, and what is not finite NaN."""
    if SIGN == 0:
        return x * 0.0
    elif SIGN < 0:
        return -x
    else:
        return x


@triton.jit
def finite_or_nan(x):
    """x with NaN in place of ±inf: a row whose lse is not finite has no weights."""
    return x + x * 0.0


@triton.jit
def dot(a_MD, b_ND, form: tl.constexpr):
    """[M, N] a bᵀ in fp32.

    Full fp32 can't use tensor cores and keeps both operands in registers: there 32 dimensions are multiplied at a time.
    """
    DIMS: tl.constexpr = a_MD.shape[1]
    if form.precision == "ieee" and a_MD.dtype == tl.float32 and DIMS > 32:
        one_MD, other_MD = tl.split(tl.reshape(a_MD, [a_MD.shape[0], DIMS // 2, 2]))
        one_ND, other_ND = tl.split(tl.reshape(b_ND, [b_ND.shape[0], DIMS // 2, 2]))
        return dot(one_MD, one_ND, form) + dot(other_MD, other_ND, form)
    else:
        return product(a_MD, tl.trans(b_ND), form)


@triton.jit
def product(a_MD, b_DN, form: tl.constexpr):
    """[M, N] a b in fp32. A b that stays is transposed ahead of the loops over a: in them Triton 3.9 leaves it in
    registers, and copies it to shared memory in every pass.
    """
    if INTERPRETED:
        return tl.dot(a_MD.to(tl.float64), b_DN.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    elif form.precision == "ieee" and a_MD.dtype == tl.float32 and a_MD.shape[1] > 32:
        return dot(a_MD, tl.trans(b_DN), form)
    else:
        return tl.dot(a_MD, b_DN, input_precision=form.precision)


def padded_size(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def strides_of(x: Tensor) -> Strides:
    """Strides of x, [T, H, D] or [B, T, H, D]."""
    return Strides(*(x.stride() if x.ndim == 4 else (0, *x.stride())))


def wide(x: Tensor, rows: int = 256) -> bool:
    """Whether offsets within a tile of up to `rows` rows need more than 32 bits."""
    return rows * abs(x.stride(-3)) + x.shape[-1] * abs(x.stride(-1)) > INT32_MAX


def dot_precision() -> str:
    """Precision of fp32 products, by torch's own switch: "ieee" (full fp32) or "tf32"."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def upcast(dtype: torch.dtype) -> bool:
    """Whether tiles must become fp32 before they are multiplied: Triton's interpreter can't multiply bf16 matrices."""
    return dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"


def tma_compatible(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can read x: its strides and first element are multiples of 16 bytes."""
    if x.stride(-1) != 1 or x.data_ptr() % 16:
        return False
    return all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])


def tma_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Describes x [(B,) T, H, D] to the tensor memory accelerator, in tiles of `rows` tokens of one head."""
    x_BTHD = x if x.ndim == 4 else x[None]
    return TensorDescriptor(x_BTHD, list(x_BTHD.shape), list(x_BTHD.stride()), [1, rows, 1, padded_size(x.shape[-1])])
