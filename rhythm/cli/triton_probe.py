"""Runs one Triton kernel in the interpreter: `TRITON_INTERPRET=1 python -P rhythm/cli/triton_probe.py`.

It runs in a separate process because Triton reads the variable when a kernel is defined.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


def double(x: Any, out: Any, n: int, BLOCK: tl.constexpr) -> None:
    i = tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


double_kernel = triton.jit(double)

if __name__ == "__main__":
    numbers = torch.arange(5, dtype=torch.float32)
    doubled = torch.full((5,), torch.nan)
    double_kernel[(1,)](numbers, doubled, 5, BLOCK=8)
    if not torch.equal(doubled, 2 * numbers):
        raise SystemExit(f"the interpreter computed {doubled.tolist()} as twice {numbers.tolist()}")
