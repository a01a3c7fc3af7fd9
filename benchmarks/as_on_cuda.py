"""Has a CPU keep and allocate the tensors that CUDA's kernels would, for counting them.

Three operations differ: torch's RMSNorm is one kernel on CUDA and several operators on a CPU; attention over packed
rows, likewise, is one kernel; and a product of bfloat16 matrices with a result in fp32 exists only on CUDA. Within
`as_on_cuda` these return the right values, and what is counted of them is inputs, outputs and workspaces of the CUDA
kernels, as torch's sources have them (`_fused_rms_norm`, `_varlen_attn`, `mm` with out_dtype).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.live_memory import LiveMemory, replaced
from rhythm.engines import head
from rhythm.engines.megatron import core_attention


@contextmanager
def as_on_cuda(memory: LiveMemory) -> Iterator[None]:
    """Replaces the three operations, whose own intermediate results `memory` doesn't count."""
    sdpa = core_attention.packed_attention

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
            with memory.paused():
                scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
                y = (x * scale).to(x.dtype) * weight
            memory.follow([y, scale])
            ctx.save_for_backward(x, weight, scale)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            x, weight, scale = ctx.saved_tensors
            with memory.paused():
                normed, scaled = x.float() * scale, grad.float() * weight
                grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
                grad_x = scale * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
                grad_x = grad_x.to(x.dtype)
            memory.follow([grad_x, grad_weight])
            return grad_x, grad_weight, None

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: Any, scale: float, window: Any) -> Tensor:
            with memory.paused():
                out = sdpa(q, k, v, packed, scale, window).contiguous()
                lse = torch.empty(q.shape[1], q.shape[0])
            memory.follow([out, lse])
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.options = packed, scale, window
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            q, k, v, _, lse = ctx.saved_tensors
            with memory.paused(), torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (q, k, v)]
                grads = torch.autograd.grad(sdpa(*inputs, *ctx.options), inputs, grad)
            # dQ in fp32, dK and dV of every query head, and a sum per row, until the kernel ends.
            work = [torch.empty(q.shape), torch.empty_like(q), torch.empty_like(q), torch.empty_like(lse)]
            memory.follow(grads)
            del work
            return *grads, None, None, None

    def norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        result: Tensor = Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return result

    def attention(*args: Any) -> Tensor:
        result: Tensor = Attention.apply(*args)  # type: ignore[no-untyped-call]
        return result

    def product(a: Tensor, b: Tensor) -> Tensor:
        with memory.paused():
            y = torch.mm(a.float(), b.float())
        memory.follow(y)
        return y

    with replaced(
        {
            (torch.nn.functional, "rms_norm"): norm,
            (core_attention, "packed_attention"): attention,
            (head, "_operand"): lambda x, dtype: x.to(dtype),
            (head, "_product"): product,
        }
    ):
        yield
