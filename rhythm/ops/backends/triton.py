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

from rhythm.ops.arguments import Layout
from rhythm.ops.backends.base import Outputs

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
    from rhythm.kernels import Sequences, bands, column_sweep, mean_span, mend_output, row_sweep, undefined_results

    heads, tokens, out_THD = q.shape[-2], layout.tokens, None
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        got = undefined_results(layout.count, heads, tokens, q.device, lse_HT)
        if tokens == 0 or layout.count == 0:
            return Outputs(got.span, got.waad, got.fai, got.lse, None if v is None else torch.zeros_like(q))
        sequences = Sequences(layout.cu_seqlens, layout.prompt_tensor, tokens, layout.count)
        given = got.given_lse
        if span or given is None:
            sums, out_THD = row_sweep(
                q, k, v, sequences, got.waad, got.lse, scale=scale, window=window, given_lse_HT=given,
                softmax=got.softmax,
            )  # fmt: skip
            mean_span(sums, sequences, got.span)
            if v is not None and out_THD is not None:
                mend_output(q, k, v, sequences, out_THD, scale=scale)
        if given is None:
            column_sweep(q, k, got.lse, sequences, got.fai, scale=scale, horizon=horizon, softmax=got.softmax)
        else:  # these go by the lse from outside, and take the place of what the row sweep wrote
            bands(q, k, given, sequences, got.waad, got.fai, got.lse, scale=scale, window=window, horizon=horizon)
    return Outputs(got.span, got.waad, got.fai, got.lse, out_THD)


def sampled_span(q: Tensor, k: Tensor, lse_HT: Tensor, layout: Layout, *, scale: float, count: int) -> Tensor:
    """As rhythm.ops.backends.sampled_span.sampled_span, without reading the lengths on the host."""
    from rhythm.kernels import Sequences, sampled_span

    if layout.tokens == 0 or layout.count == 0:
        return torch.full((layout.count, q.shape[-2]), torch.nan, device=q.device)
    sequences = Sequences(layout.cu_seqlens, layout.prompt_tensor, layout.tokens, layout.count)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        span_BH: Tensor = sampled_span(q, k, lse_HT.float().contiguous(), sequences, scale=scale, count=count)
        return span_BH
