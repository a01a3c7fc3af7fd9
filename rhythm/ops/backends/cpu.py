"""The C++ kernels (csrc/) as a backend: CPU tensors in fp32, fp16 and bf16."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from rhythm.ops.arguments import Layout
from rhythm.ops.backends.base import Outputs, mean_span
from rhythm.ops.backends.sampled_span import sampled_span as sampled_span

_C: ModuleType | None
try:
    _C = import_module("rhythm._C")
    _IMPORT_ERROR = ""
except ImportError as error:
    _C, _IMPORT_ERROR = None, str(error)

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def unavailable() -> str | None:
    if _C is not None:
        return None
    return f"the extension rhythm._C does not import ({_IMPORT_ERROR}); pip install . in a clone of rhythm builds it"


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it is on {device}; the cpu backend takes CPU tensors"
    if dtype not in DTYPE_NAMES:
        return f"it has dtype {dtype}; the cpu backend takes {', '.join(map(str, DTYPE_NAMES))}"
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
    assert _C is not None  # unavailable() is asked first
    heads, size = q.shape[-2:]
    tokens = layout.bounds[-1]
    row_span_HT, waad_HT, fai_HT, out_lse_HT = (torch.full((heads, tokens), torch.nan) for _ in range(4))
    out_THD = None if v is None else torch.empty((tokens, heads, size), dtype=q.dtype)
    given_lse_HT = None if lse_HT is None else lse_HT.float().contiguous()
    bands_alone = lse_HT is not None and not span  # they give all but span
    _C.attention_statistics(
        dtype=DTYPE_NAMES[q.dtype],
        heads=(heads, k.shape[-2], size),
        bounds=layout.bounds,
        prompt_lens=layout.prompt_lens,
        q=_view(q, layout),
        k=_view(k, layout),
        v=None if v is None else _view(v, layout),
        scale=scale,
        window=window,
        horizon_lo=horizon[0],
        horizon_hi=_C.to_the_end if horizon[1] is None else horizon[1],
        given_lse=_address(given_lse_HT),
        row_span=_address(None if bands_alone else row_span_HT),
        waad=_address(waad_HT),
        fai=_address(fai_HT),
        lse=_address(out_lse_HT),
        out=_address(out_THD),
        threads=torch.get_num_threads(),
    )
    return Outputs(mean_span(row_span_HT, layout), waad_HT, fai_HT, out_lse_HT, out_THD)


def _view(x: Tensor, layout: Layout) -> tuple[int, list[int], tuple[int, int, int]]:
    """(address, first element of each sequence, strides of token, head and dim): nothing is copied."""
    token = x.stride(-3)
    starts = [i * x.stride(0) for i in range(x.shape[0])] if x.ndim == 4 else [b * token for b in layout.bounds[:-1]]
    return x.data_ptr(), starts, (token, x.stride(-2), x.stride(-1))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
