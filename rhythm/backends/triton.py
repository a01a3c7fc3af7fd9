"""The Triton kernels (kernels/) as a backend: CUDA tensors in fp32, fp16 and bf16.

With TRITON_INTERPRET=1 in the environment they run in Triton's interpreter, on CPU tensors, for tests.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from rhythm.arguments import Layout
from rhythm.backends.outputs import Outputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = 8  # the major one: bf16 and asynchronous copies


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; Triton reads the variable when it defines them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def unavailable() -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not interpreted():
        return "torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    wanted = "cpu" if interpreted() else "cuda"
    if device.type != wanted:
        where = " in the interpreter" if interpreted() else ""
        return f"it is on {device}; the triton backend takes {wanted} tensors{where}"
    if dtype not in DTYPES:
        return f"it has dtype {dtype}; the triton backend takes {', '.join(map(str, DTYPES))}"
    return None if interpreted() else too_old(device)


@cache
def too_old(device: torch.device) -> str | None:
    """Why the kernels can't run on this GPU, and what can."""
    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major >= MIN_CAPABILITY:
        return None
    return (
        f"it is on a {torch.cuda.get_device_name(device)} of compute capability {major}.{minor}; the kernels need "
        f"{MIN_CAPABILITY}.0 or later, and backend 'reference' runs there (backend 'cpu' for tensors on the CPU)"
    )


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    layout: Layout,
    *,
    scale: float,
    window: int,
    horizon: tuple[int, int | None],
    lse_HT: Tensor | None,
    span: bool,
) -> Outputs:
    from rhythm.kernels import Sequences, bands, column_sweep, mean_span, row_sweep

    heads, tokens = q.shape[-2], layout.tokens
    waad_HT, fai_HT, lse_out_HT = (torch.full((heads, tokens), torch.nan, device=q.device) for _ in range(3))
    undefined_BH, out_THD = waad_HT.new_full((layout.count, heads), torch.nan), None
    if tokens == 0:
        return Outputs(undefined_BH, waad_HT, fai_HT, lse_out_HT, None if v is None else torch.empty_like(q))
    sequences = Sequences(layout.cu_seqlens, layout.prompt_tensor, tokens, layout.count)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        if lse_HT is not None and not span:
            lse_HT = lse_HT.float().contiguous()
            bands(q, k, lse_HT, sequences, waad_HT, fai_HT, lse_out_HT, scale=scale, window=window, horizon=horizon)
            span_BH = undefined_BH
        else:
            row_span_HT = torch.empty_like(waad_HT)
            out_THD = row_sweep(q, k, v, sequences, row_span_HT, waad_HT, lse_out_HT, scale=scale, window=window)
            span_BH = mean_span(row_span_HT, sequences)
            column_sweep(q, k, lse_out_HT, sequences, fai_HT, scale=scale, horizon=horizon)
    return Outputs(span_BH, waad_HT, fai_HT, lse_out_HT, out_THD)


def sampled_span(q: Tensor, k: Tensor, lse_HT: Tensor, layout: Layout, *, scale: float, count: int) -> Tensor:
    """As rhythm.backends.sampled.sampled_span, without reading the lengths on the host."""
    from rhythm.kernels import Sequences, sampled_span

    if layout.tokens == 0:
        return torch.full((layout.count, q.shape[-2]), torch.nan, device=q.device)
    sequences = Sequences(layout.cu_seqlens, layout.prompt_tensor, layout.tokens, layout.count)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        span_BH: Tensor = sampled_span(q, k, lse_HT.float().contiguous(), sequences, scale=scale, count=count)
        return span_BH
