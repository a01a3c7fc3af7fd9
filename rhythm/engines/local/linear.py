"""Linear layers in fp32 by oneDNN, where MKL, whose products torch takes, would use half of the processor.

MKL runs its AVX2 kernels on AMD processors that have AVX-512; there oneDNN's take 40 to 60 % of the time, in the same
precision. Which one runs depends on the processor alone, so a run still repeats bit for bit.

Shape suffixes: N tokens (any leading dimensions), K inputs, M outputs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CPUINFO = Path("/proc/cpuinfo")


def use_onednn(model: nn.Module) -> None:
    """From here on compute the model's linear layers by oneDNN, if `onednn_is_faster`, for fp32 inputs on the CPU.

    The output embedding is left alone: `rhythm.engines.head` has its products. Weights, their names and everything else
    about the model stay as they are.
    """
    if not onednn_is_faster():
        return
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            module.__class__ = OneDnnLinear


@cache
def onednn_is_faster() -> bool:
    """Whether this processor is AMD's with AVX-512, and torch was built with MKL and oneDNN."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        words = set(_CPUINFO.read_text(encoding="utf-8", errors="replace").split())
    except OSError:  # not Linux
        return False
    return {"AuthenticAMD", "avx512f"} <= words


class OneDnnLinear(nn.Linear):
    """A torch.nn.Linear whose fp32 products on the CPU are oneDNN's; other dtypes, devices and autocast as before."""

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., K]; returns [..., M]. Differentiable once."""
        plain = input.dtype == self.weight.dtype == torch.float32 and input.is_cpu and input.numel() > 0
        if not plain or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            result: Tensor = _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return result
        return _product(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NK, weight_MK)
        return _product(x_NK, weight_MK, bias_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_NK, weight_MK = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        flat_NM = grad_NM.reshape(-1, grad_NM.shape[-1])
        return (
            _product(grad_NM, weight_MK.t()) if wanted[0] else None,
            _product(flat_NM.t(), x_NK.reshape(-1, x_NK.shape[-1]).t()) if wanted[1] else None,
            flat_NM.sum(dim=0) if wanted[2] else None,
        )


def _product(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x_NK, weight_MK, bias_M, "none", [], "")
    return result
