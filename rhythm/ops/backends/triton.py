"""The Triton kernels (kernels/) as a backend: CUDA tensors in fp32, fp16 and bf16.

With TRITON_INTERPRET=1 in the environment they run in Triton's interpreter, on CPU tensors, for tests.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rhythm.ops.arguments import Request
from rhythm.ops.backends.base import Backend, BackendResult
from rhythm.ops.backends.in_blocks import Columns

if TYPE_CHECKING:
    from rhythm.kernels import Forms

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = 8  # the major one: bf16 and asynchronous copies


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; Triton reads the variable when it defines them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def missing() -> str | None:
    """Why the kernels can't run on this machine; None: they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not interpreted():
        return "torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


@cache
def too_old(device: torch.device) -> str | None:
    """Why the kernels can't run on this GPU, and what can."""
    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major >= MIN_CAPABILITY:
        return None
    return (
        f"q is on a {torch.cuda.get_device_name(device)} of compute capability {major}.{minor}; the kernels need "
        f"{MIN_CAPABILITY}.0 or later, and backend 'reference' runs there (backend 'cpu' for tensors on the CPU)"
    )


class TritonBackend(Backend):
    def unavailable(self) -> str | None:
        return missing()

    def refuses(self, request: Request) -> str | None:
        q, wanted = request.q, "cpu" if interpreted() else "cuda"
        if q.device.type != wanted:
            return f"q is on {q.device}; it takes {wanted} tensors{' in the interpreter' if interpreted() else ''}"
        if q.dtype not in DTYPES:
            return f"q has dtype {q.dtype}; it takes {', '.join(map(str, DTYPES))}"
        return None if interpreted() else too_old(q.device)

    def only_by_name(self) -> str | None:
        return "its interpreter is for tests" if interpreted() else None

    def run(self, request: Request) -> BackendResult:
        from rhythm.kernels import bands, mend_output, row_answers, row_sweep, undefined_results

        q, k, v, sequences = request.q, request.k, request.v, request.sequences
        out_SHD = sums = also_AHT = None
        attention: dict[str, Any] = {"scale": request.scale, "forms": _forms(request)}
        near = attention | {"window": request.window, "horizon": request.horizon}
        with _on(q.device):
            got = undefined_results(sequences.count, q.shape[-2], sequences.tokens, q.device, request.lse_HT)
            if request.also:
                also_AHT = torch.full((len(request.also), *got.lse.shape), torch.nan, device=q.device)
            if _nothing_to_do(request):
                out_SHD = None if v is None else torch.zeros_like(q)
                return BackendResult(got.span, got.waad, got.fai, got.lse, out_SHD, also_AHT)
            given = got.given_lse
            if request.span or given is None:
                sums, out_SHD = row_sweep(
                    q, k, v, sequences, got.lse, given_lse_HT=given, softmax=got.softmax, **attention
                )
                if v is not None and out_SHD is not None:
                    mend_output(q, k, v, sequences, out_SHD, **attention)
            near |= {"sums": sums, "span_BH": got.span}
            if given is None:
                bands(q, k, got.lse, sequences, got.waad, got.fai, None, softmax=got.softmax, **near)
            else:  # they go by the lse from outside, which takes the place of what the row sweep wrote
                bands(q, k, given, sequences, got.waad, got.fai, got.lse, **near)
            if also_AHT is not None:
                lse_HT, options = got.lse if given is None else given, {"first": request.first} | attention
                options |= {"prompt_rows": request.prompt_rows, "softmax": got.softmax}
                row_answers(q, k, lse_HT, sequences, also_AHT, request.also, **options)
        return BackendResult(got.span, got.waad, got.fai, got.lse, out_SHD, also_AHT)

    def columns(self, request: Request, wanted: Columns) -> Tensor:
        from rhythm.kernels import column_sums, row_sweep, undefined_results

        q, k, sequences, weights_HT = request.q, request.k, request.sequences, wanted.row_weights_HT
        heads, tokens = q.shape[-2], sequences.tokens
        attention: dict[str, Any] = {"scale": request.scale, "forms": _forms(request)}
        with _on(q.device):
            if _nothing_to_do(request):
                return torch.full((heads, tokens), 0.0 if wanted.reduce == "sum" else -torch.inf, device=q.device)
            got = undefined_results(sequences.count, heads, tokens, q.device, request.lse_HT)
            lse_HT = got.given_lse
            if lse_HT is None:
                lse_HT = got.lse
                row_sweep(q, k, None, sequences, lse_HT, softmax=got.softmax, **attention)
            factors_HT = None if weights_HT is None else weights_HT.float().expand(heads, tokens).contiguous()
            options: dict[str, Any] = attention | {"horizon": request.horizon, "softmax": got.softmax}
            column_sums(q, k, lse_HT, sequences, got.fai, reduce=wanted.reduce, factors_HT=factors_HT, **options)
        return got.fai

    def sampled_span(self, request: Request, lse_HT: Tensor, count: int) -> Tensor:
        """As the base class, without reading the lengths on the host."""
        from rhythm.kernels import sampled_span

        q, sequences = request.q, request.sequences
        if _nothing_to_do(request):
            return torch.full((sequences.count, q.shape[-2]), torch.nan, device=q.device)
        with _on(q.device):
            lse_HT = lse_HT.float().contiguous()
            span_BH: Tensor = sampled_span(
                q, request.k, lse_HT, sequences, scale=request.scale, count=count, forms=_forms(request)
            )
            return span_BH


def _forms(request: Request) -> Forms:
    from rhythm.kernels import Forms

    sinks = None if request.sinks_H is None else request.sinks_H.float().contiguous()
    return Forms(request.sliding_window, request.softcap, sinks)


def _nothing_to_do(request: Request) -> bool:
    """Whether there is no row of q: a kernel can't be launched for that."""
    return request.sequences.count == 0 or request.q.shape[:-2].numel() == 0


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on torch's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
