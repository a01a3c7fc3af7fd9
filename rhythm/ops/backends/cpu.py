"""The C++ kernels (csrc/) as a backend: CPU tensors in fp32, fp16 and bf16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from rhythm.ops.arguments import Request
from rhythm.ops.backends.base import Backend, BackendResult, mean_span
from rhythm.ops.backends.in_blocks import Columns

_C: ModuleType | None
try:
    _C = import_module("rhythm._C")
    _IMPORT_ERROR = ""
except ImportError as error:
    _C, _IMPORT_ERROR = None, str(error)

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

LEAST_WORK = 2**24
"""Multiply-adds of the scores for each thread, about half a millisecond. With less, waiting for other threads to start
costs more than they save: while OpenMP's threads spin after an operation of torch's, one may wait for milliseconds.
"""


class CpuBackend(Backend):
    def unavailable(self) -> str | None:
        if _C is not None:
            return None
        return (
            f"the extension rhythm._C does not import ({_IMPORT_ERROR}); pip install . in a clone of rhythm builds it"
        )

    def refuses(self, request: Request) -> str | None:
        q = request.q
        if q.device.type != "cpu":
            return f"q is on {q.device}; it takes CPU tensors"
        if q.dtype not in DTYPE_NAMES:
            return f"q has dtype {q.dtype}; it takes {', '.join(map(str, DTYPE_NAMES))}"
        return None

    def run(self, request: Request) -> BackendResult:
        v, host = request.v, request.sequences.host
        if not request.span and request.lse_HT is not None and request.also:
            # The given lse is for the bands; a sweep, where one is needed, goes by it too.
            bands = self.run(replace(request, also=()))
            return (
                replace(bands, also_AHT=self.run(replace(request, span=True)).also_AHT)
                if request.also_sweeps
                else bands
            )
        out_SHD = None if v is None else torch.empty((host.cu_rows[-1], *request.q.shape[-2:]), dtype=request.q.dtype)
        also_AHT = _undefined(request, len(request.also)) if request.also else None
        bands_alone = request.lse_HT is not None and not request.span  # they give all but span
        row_span_HT, waad_HT, fai_HT, lse_HT = (_undefined(request) for _ in range(4))
        _call(
            request,
            [request.window],
            [request.horizon],
            row_span_HT=None if bands_alone else row_span_HT,
            waad_HT=waad_HT,
            fai_HT=fai_HT,
            lse_HT=lse_HT,
            also_AHT=also_AHT,
            out_SHD=out_SHD,
        )
        return BackendResult(mean_span(row_span_HT, request.sequences), waad_HT, fai_HT, lse_HT, out_SHD, also_AHT)

    def columns(self, request: Request, wanted: Columns) -> Tensor:
        sums_HT, weights_HT = _undefined(request), wanted.row_weights_HT
        _call(
            request,
            [request.window] if request.lse_HT is None else [],
            [request.horizon],
            row_span_HT=_undefined(request) if request.lse_HT is None else None,
            waad_HT=_undefined(request),
            fai_HT=sums_HT,
            lse_HT=_undefined(request),
            reduce=wanted.reduce,
            row_weights_HT=None if weights_HT is None else weights_HT.float().contiguous(),
        )
        return sums_HT

    def bands(
        self, request: Request, windows: Sequence[int], horizons: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        waad_WHT, fai_FHT = _undefined(request, len(windows)), _undefined(request, len(horizons))
        _call(
            request, windows, horizons, row_span_HT=None, waad_HT=waad_WHT, fai_HT=fai_FHT, lse_HT=_undefined(request)
        )
        return waad_WHT, fai_FHT


def _undefined(request: Request, *before: int) -> Tensor:
    """fp32 [*before, H, T], all NaN."""
    return torch.full((*before, request.q.shape[-2], request.sequences.host.cu_seqlens[-1]), torch.nan)


def _call(
    request: Request,
    windows: Sequence[int],
    horizons: Sequence[tuple[int, int | None]],
    *,
    row_span_HT: Tensor | None,
    waad_HT: Tensor,
    fai_HT: Tensor,
    lse_HT: Tensor,
    reduce: str = "mean",
    row_weights_HT: Tensor | None = None,
    also_AHT: Tensor | None = None,
    out_SHD: Tensor | None = None,
) -> None:
    """Calls the kernels, which fill what is given. Without row_span they visit only the bands, by the given lse."""
    assert _C is not None  # unavailable() is asked first
    q, k, v, host = request.q, request.k, request.v, request.sequences.host
    tokens = host.cu_seqlens[-1]
    sinks_H = None if request.sinks_H is None else request.sinks_H.float().contiguous()
    given_lse_HT = None if request.lse_HT is None else request.lse_HT.float().contiguous()
    shared = row_weights_HT is not None and row_weights_HT.shape[0] == 1
    _C.attention_statistics(
        dtype=DTYPE_NAMES[q.dtype],
        heads=(q.shape[-2], k.shape[-2], q.shape[-1]),
        bounds=host.cu_seqlens,
        prompt_lens=host.prompt_lens,
        row_bounds=host.cu_rows,
        q=_view(q, host.cu_rows, host.missing),
        k=_view(k, host.cu_seqlens),
        v=None if v is None else _view(v, host.cu_seqlens),
        scale=request.scale,
        softcap=request.softcap or 0.0,
        sliding_window=tokens if request.sliding_window is None else request.sliding_window,
        sinks=_address(sinks_H),
        windows=list(windows),
        horizons=[(lo, _C.to_the_end if hi is None else hi) for lo, hi in horizons],
        reduce=reduce,
        row_weights=(_address(row_weights_HT), 0 if shared else tokens),
        given_lse=_address(given_lse_HT),
        row_span=_address(row_span_HT),
        waad=_address(waad_HT),
        fai=_address(fai_HT),
        lse=_address(lse_HT),
        also={} if also_AHT is None else {n: _address(x) for n, x in zip(request.also, also_AHT, strict=True)},
        first=request.first,
        prompt_rows=request.prompt_rows,
        out=_address(out_SHD),
        threads=_threads(request),
    )


def _threads(request: Request) -> int:
    """torch's number, or fewer if each would get less than LEAST_WORK."""
    heads, size = request.q.shape[-2:]
    window = request.sliding_window or request.sequences.tokens
    lens = [end - start for start, end in pairwise(request.sequences.host.cu_seqlens)]
    work = sum(length * min(length, window) for length in lens) // 2 * heads * size
    return max(1, min(torch.get_num_threads(), work // LEAST_WORK))


def _view(
    x: Tensor, bounds: list[int], missing: list[int] | None = None
) -> tuple[int, list[int], tuple[int, int, int]]:
    """(address, element of token 0 of each sequence, strides of token, head and dim): nothing is copied.

    missing: first tokens of each sequence that x does not hold; element 0 is then where it would be.
    """
    token = x.stride(-3)
    starts = [i * x.stride(0) for i in range(x.shape[0])] if x.ndim == 4 else [b * token for b in bounds[:-1]]
    if missing is not None:
        starts = [start - count * token for start, count in zip(starts, missing, strict=True)]
    return x.data_ptr(), starts, (token, x.stride(-2), x.stride(-1))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
