"""Checks of the ops' arguments: every refusal names the argument, what it was and what is allowed.

The static checks read shapes, types and devices only, so they also run under torch.compile; the value checks
(`check_values`) read the contents of cu_seqlens and prompt_lens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from rhythm.shapes import MAX_INT, check_dense, index, integer

MAX_SEQUENCES = 2**24  # a batch of more than that without a token would be hours of nothing
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_HEAD_SIZE = 256


@dataclass(frozen=True)
class Layout:
    """Where the sequences lie on the flattened token axis: as the caller's tensors, and read from them as numbers.

    Attributes:
        tokens: T, of all sequences together.
        count: B.
        cu_seqlens: int32 [B + 1] on q's device; None: B sequences of T / B tokens.
        prompt_tensor: int32 or int64 [B] on q's device; None: no prompts.
    """

    tokens: int
    count: int
    cu_seqlens: Tensor | None
    prompt_tensor: Tensor | None

    @cached_property
    def bounds(self) -> list[int]:
        """Sequence i is tokens bounds[i] … bounds[i + 1] − 1. Waits for the device."""
        if self.cu_seqlens is None:
            return [i * self.tokens // self.count for i in range(self.count + 1)] if self.count else [0]
        return [int(bound) for bound in self.cu_seqlens.tolist()]

    @cached_property
    def prompt_lens(self) -> list[int]:
        """Waits for the device."""
        return [0] * self.count if self.prompt_tensor is None else [int(n) for n in self.prompt_tensor.tolist()]


def prompt_lens_tensor(prompt_lens: object, device: torch.device) -> Tensor:
    """prompt_lens as a tensor: tensors as they are, a sequence of integers as int64 on the device."""
    if isinstance(prompt_lens, Tensor) and prompt_lens.ndim:
        return prompt_lens
    several = isinstance(prompt_lens, Iterable) and not isinstance(prompt_lens, (str, Tensor))
    numbers = list(prompt_lens) if several else None  # type: ignore[call-overload]  # an Iterable
    if numbers is None:
        one, example = index(prompt_lens), ""
        if one is not None:
            prompt_lens, example = one, f" ([{one}] for one sequence)"
        raise ValueError(
            f"prompt_lens is {prompt_lens!r}; it must be int32 or int64 [B], or a sequence of integers{example}"
        )
    # An entry too low or too high for its sequence is refused by `check_values`, which knows the sequence.
    checked = [integer(f"prompt_lens[{i}]", number, -MAX_INT) for i, number in enumerate(numbers)]
    return torch.tensor(checked, dtype=torch.int64, device=device)


def check_name(argument: str, name: object, allowed: Sequence[str]) -> None:
    if not isinstance(name, str) or name not in allowed:
        raise ValueError(f"{argument} is {name!r}; allowed are {', '.join(allowed)}")


def check_tensors(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """q [T, Hq, D] or [B, T, Hq, D]; k and v the same with Hkv heads, Hkv dividing Hq."""
    check_dense("q", q)
    if q.ndim not in (3, 4):
        raise ValueError(f"q has shape {tuple(q.shape)}; allowed are [T, Hq, D] and [B, T, Hq, D]")
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    for name, x in (("k", k), ("v", v)):
        if x is None:
            continue
        check_dense(name, x)
        if x.ndim != q.ndim or x.shape[:-2] != q.shape[:-2] or x.shape[-1] != q.shape[-1]:
            wanted = [*q.shape[:-2], "Hkv", q.shape[-1]]
            raise ValueError(f"{name} has shape {tuple(x.shape)}; q's shape {tuple(q.shape)} allows {wanted}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; it must be q's, {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; it must be on q's device, {q.device}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; it must be k's, {tuple(k.shape)}")
    if not 1 <= q.shape[-1] <= MAX_HEAD_SIZE:
        raise ValueError(f"q has head size {q.shape[-1]}; allowed are 1 to {MAX_HEAD_SIZE}")
    if q.ndim == 4 and q.shape[0] > MAX_SEQUENCES:
        raise ValueError(f"q has shape {tuple(q.shape)}, {q.shape[0]} sequences; allowed are {MAX_SEQUENCES}")
    query_heads, key_heads = q.shape[-2], k.shape[-2]
    if key_heads < 1 or query_heads < 1 or query_heads % key_heads:
        raise ValueError(f"q has {query_heads} heads and k has {key_heads}; k's must divide q's, both at least 1")


def check_options(
    scale: float, window: int, horizon: tuple[int, int | None]
) -> tuple[float, int, tuple[int, int | None]]:
    """A finite scale, window ≥ 1, and 0 ≤ H_lo ≤ H_hi (H_hi None: to the end of the sequence).

    Returns:
        The same as Python's numbers.
    """
    scale = _finite(scale)
    window = integer("window", window, 1)
    if not isinstance(horizon, (tuple, list)) or len(horizon) != 2:
        raise ValueError(f"horizon is {horizon!r}; it must be a pair (lo, hi)")
    lo, hi = index(horizon[0]), None if horizon[1] is None else index(horizon[1])
    if lo is None or (hi is None and horizon[1] is not None):
        raise ValueError(f"horizon is {horizon!r}; it must be (lo, hi), integers, or hi None")
    if lo < 0 or (hi is not None and hi < lo):
        raise ValueError(f"horizon is {horizon!r}; it must be (lo, hi) with 0 <= lo <= hi, or hi None")
    if max(lo, hi or 0) > MAX_INT:
        raise ValueError(f"horizon is {horizon!r}; it must be (lo, hi) with hi <= {MAX_INT}, or hi None")
    return scale, window, (lo, hi)


def _finite(scale: object) -> float:
    try:
        # A string such as "0.5" would be taken by float, too.
        number = None if isinstance(scale, (str, bytes, bool)) else float(scale)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not abs(number) < float("inf"):
        raise ValueError(f"scale is {scale!r}; it must be finite, a number")
    return number


def check_lse(lse: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """lse fp32 of the statistics' own shape, on q's device."""
    if lse is None:
        return
    check_dense("lse", lse)
    if tuple(lse.shape) != tuple(shape):
        raise ValueError(f"lse has shape {tuple(lse.shape)}; it must be {tuple(shape)}")
    if lse.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"lse has dtype {lse.dtype}; allowed are torch.float32, and torch.float64 for float64 q")
    if lse.device != device:
        raise ValueError(f"lse is on {lse.device}; it must be on q's device, {device}")


def check_sequences(q: Tensor, cu_seqlens: Tensor | None, prompt_lens: Tensor | None) -> None:
    """Types and shapes of cu_seqlens int32 [B + 1] (packed q only) and prompt_lens int32 or int64 [B]."""
    if cu_seqlens is not None:
        check_dense("cu_seqlens", cu_seqlens)
        if q.ndim == 4:
            raise ValueError(f"cu_seqlens goes with packed q [T, Hq, D]; q has shape {tuple(q.shape)}")
        if cu_seqlens.dtype != torch.int32:
            raise ValueError(f"cu_seqlens has dtype {cu_seqlens.dtype}; it must be torch.int32")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be [B + 1]")
        if cu_seqlens.device != q.device:
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; it must be on q's device, {q.device}")
    if prompt_lens is not None:
        check_dense("prompt_lens", prompt_lens)
        count = q.shape[0] if q.ndim == 4 else 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if prompt_lens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"prompt_lens has dtype {prompt_lens.dtype}; allowed are torch.int32 and torch.int64")
        if tuple(prompt_lens.shape) != (count,):
            raise ValueError(f"prompt_lens has shape {tuple(prompt_lens.shape)}; it must be ({count},), one a sequence")
        if prompt_lens.device != q.device:
            raise ValueError(f"prompt_lens is on {prompt_lens.device}; it must be on q's device, {q.device}")


def layout(q: Tensor, cu_seqlens: Tensor | None, prompt_lens: Tensor | None) -> Layout:
    """The sequences of q, after the checks of the values in cu_seqlens and prompt_lens.

    Values on a GPU are not read, since that would wait for it, unless RHYTHM_CHECK_VALUES=1 asks for the checks; the
    kernels cut what lies beyond the tensors.
    """
    if q.ndim == 4:
        tokens, count = q.shape[0] * q.shape[1], q.shape[0]
    else:
        tokens, count = q.shape[0], 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    result = Layout(tokens, count, cu_seqlens, prompt_lens)
    if q.device.type == "cpu" or os.environ.get("RHYTHM_CHECK_VALUES") == "1":
        check_values(result)
    return result


def check_values(layout: Layout) -> None:
    """cu_seqlens runs from 0 to T without falling; each prompt is at most as long as its sequence."""
    bounds, tokens = layout.bounds, layout.tokens
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}; it must cover 0 to T = {tokens}")
    for i, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens falls from {start} to {end} at entry {i + 1}; it must not fall")
    for i, (prompt, (start, end)) in enumerate(zip(layout.prompt_lens, pairwise(bounds), strict=True)):
        if not 0 <= prompt <= end - start:
            raise ValueError(f"prompt_lens[{i}] is {prompt}; its sequence allows 0 to {end - start}")
