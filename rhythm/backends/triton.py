"""The Triton kernels (kernels/) as a backend: CUDA tensors in fp32, fp16 and bf16.

With TRITON_INTERPRET=1 in the environment they run in Triton's interpreter, on CPU tensors, for tests.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from rhythm.arguments import Layout
from rhythm.backends.outputs import Outputs, mean_span

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


def refuses(device: str, dtype: torch.dtype) -> str | None:
    wanted = "cpu" if interpreted() else "cuda"
    if device != wanted:
        return f"it is on {device}; the triton backend takes {wanted} tensors" + (
            " in the interpreter" if interpreted() else ""
        )
    if dtype not in DTYPES:
        return f"it has dtype {dtype}; the triton backend takes {', '.join(map(str, DTYPES))}"
    return None


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
    from rhythm.kernels import Sequences, column_sweep, row_sweep, window_band

    sequences = Sequences(
        torch.tensor(layout.bounds, dtype=torch.int32, device=q.device),
        torch.tensor(layout.prompt_lens, dtype=torch.int32, device=q.device),
        layout.bounds[-1],
    )
    if lse_HT is not None and not span:
        lse_HT = lse_HT.float().contiguous()
        waad_HT = window_band(q, k, lse_HT, sequences, scale=scale, window=window)
        fai_HT = column_sweep(q, k, lse_HT, sequences, scale=scale, horizon=horizon)
        span_BH = q.new_full((sequences.count, q.shape[-2]), torch.nan, dtype=torch.float32)
        return Outputs(span_BH, waad_HT, fai_HT, torch.where(waad_HT.isnan(), torch.nan, lse_HT), None)
    row_span_HT, waad_HT, lse_out_HT, out_THD = row_sweep(q, k, v, sequences, scale=scale, window=window)
    fai_HT = column_sweep(q, k, lse_out_HT, sequences, scale=scale, horizon=horizon)
    return Outputs(mean_span(row_span_HT, layout), waad_HT, fai_HT, lse_out_HT, out_THD)
