"""The implementations that are timed on a GPU: other attention forwards, other ways to the statistics, rhythm's ops.

Each maker takes the inputs and returns a callable that computes everything anew and returns its results by name, as in
benchmarks/implementations.py. Results that the reference doesn't have are not returned, so not compared.

Shape suffixes: T tokens, H query heads, G key heads, D head size; S keys of a swapped call, which are rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import implementations
from benchmarks.implementations import Maker, Outputs
from benchmarks.shapes import HORIZON, Inputs, Shape, band_flops, score_flops


@dataclass(frozen=True)
class Implementation:
    """One op on the GPU.

    Attributes:
        flops: the FLOPs counted for a shape, whatever the op executes.
        plain: whether it is a plain attention forward; rhythm's ops are compared with the fastest of them.
        max_tokens: the longest sequence that it is timed on.
        late: whether it is timed in a separate part at the end of a run, since it may take long to compile.
        absent: why it can't run here; None: it can.
    """

    name: str
    make: Maker
    flops: Callable[[Shape], int]
    plain: bool = False
    max_tokens: int = 1 << 17
    late: bool = False
    absent: Callable[[], str | None] = lambda: None


def sdpa(backend: SDPBackend, expanded: bool = False) -> Maker:
    """torch's SDPA forward by this backend only; expanded: one key head per query head, expanded beforehand."""

    def make(inputs: Inputs) -> Callable[[], Outputs]:
        q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
        if expanded:
            group = inputs.shape.query_heads // inputs.shape.key_heads
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))

        def run() -> Outputs:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not expanded)
            return {"out": out[0].transpose(0, 1)}

        return run

    return make


def flash_attn(inputs: Inputs) -> Callable[[], Outputs]:
    """The package flash_attn, or flash_attn_interface (version 3)."""
    function = import_module(_flash_attn()).flash_attn_func
    q, k, v = (x[None] for x in (inputs.q, inputs.k, inputs.v))

    def run() -> Outputs:
        out = function(q, k, v, causal=True)
        return {"out": (out[0] if isinstance(out, tuple) else out)[0]}

    return run


def flash_colreduce(inputs: Inputs) -> Callable[[], Outputs]:
    """The package flash-colreduce: column sums over all rows. No op of rhythm computes them, so it is only timed."""
    function = import_module("flash_colreduce").flash_colreduce
    group = inputs.shape.query_heads // inputs.shape.key_heads
    q = inputs.q.transpose(0, 1)[None].contiguous()
    k = inputs.k.transpose(0, 1)[None].repeat_interleave(group, dim=1)

    def run() -> Outputs:
        function(q, k, reduction="sum", is_causal=True)
        return {}

    return run


def flex(compiled: bool) -> Maker:
    """FlexAttention: lse of a causal call, then FAI from a call with q and k swapped.

    There the "queries" are keys s and the "keys" are rows t: with score − lse[t] as scores and the horizon as the
    mask, the swapped call's own lse at s is log Σ_t A[t, s].
    """

    def make(inputs: Inputs) -> Callable[[], Outputs]:
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

        wanted = AuxRequest(lse=True)
        attention = _compiled_flex() if compiled else flex_attention
        shape, (lo, hi) = inputs.shape, HORIZON
        tokens, device = shape.tokens, inputs.q.device
        q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
        k_per_head = k.repeat_interleave(shape.query_heads // shape.key_heads, dim=1)

        def causal(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return t >= s

        def reached(b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return (t - s >= lo) & (t - s <= hi) & (t >= shape.prompt)

        causal_mask, reached_mask = (
            create_block_mask(mask, None, None, tokens, tokens, device=device) for mask in (causal, reached)
        )
        position = torch.arange(tokens, device=device)
        nearest = (position + lo).clamp(min=shape.prompt)
        count = ((position + hi).clamp(max=tokens - 1) - nearest + 1).clamp(min=0)

        def run() -> Outputs:
            _, aux = attention(q, k, v, block_mask=causal_mask, enable_gqa=True, return_aux=wanted)
            lse_HT = aux.lse[0].float()

            def weight(score: Tensor, b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
                return score - lse_HT[h, t]

            _, aux = attention(k_per_head, q, q, score_mod=weight, block_mask=reached_mask, return_aux=wanted)
            fai = torch.where(count > 0, aux.lse[0].float().exp() / count, torch.nan)
            return {"lse": lse_HT.masked_fill(position < shape.prompt, torch.nan), "fai": fai}

        return run

    return make


def compiled_blocked(block: int) -> Maker:
    """The blocked version, compiled by torch.compile."""

    def make(inputs: Inputs) -> Callable[[], Outputs]:
        function = torch.compile(implementations._blocked_statistics)
        return lambda: function(inputs, block)

    return make


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flash_attn() -> str:
    return next((name for name in ("flash_attn_interface", "flash_attn") if find_spec(name)), "")


def _missing(package: str, installed: bool) -> str | None:
    return None if installed else f"the package {package} is not installed"


def _forward_flops(shape: Shape) -> int:
    return 2 * score_flops(shape)


# flex makes its block masks from dense T × T maps, which fit into memory up to 16k tokens.
GPU: tuple[Implementation, ...] = (
    Implementation("sdpa_flash", sdpa(SDPBackend.FLASH_ATTENTION), _forward_flops, plain=True),
    Implementation("sdpa_cudnn", sdpa(SDPBackend.CUDNN_ATTENTION), _forward_flops, plain=True),
    # A library may be slower if heads share keys; the best plain forward must not be slow for that reason.
    Implementation("sdpa_flash_expanded", sdpa(SDPBackend.FLASH_ATTENTION, expanded=True), _forward_flops, plain=True),
    Implementation("sdpa_cudnn_expanded", sdpa(SDPBackend.CUDNN_ATTENTION, expanded=True), _forward_flops, plain=True),
    Implementation(
        "flash_attn",
        flash_attn,
        _forward_flops,
        plain=True,
        absent=lambda: _missing("flash_attn", bool(_flash_attn())),
    ),
    Implementation("statistics", implementations.statistics, score_flops),
    Implementation("with_output", implementations.with_output, _forward_flops),
    Implementation("bands", implementations.bands, band_flops),
    Implementation(
        "flash_colreduce",
        flash_colreduce,
        score_flops,
        late=True,
        absent=lambda: _missing("flash-colreduce", find_spec("flash_colreduce") is not None),
    ),
    Implementation("blocked_1024", implementations.blocked(1024), score_flops, max_tokens=1 << 14, late=True),
    Implementation("eager", implementations.eager, score_flops, max_tokens=1 << 12, late=True),
    Implementation("flex", flex(compiled=True), score_flops, max_tokens=1 << 14, late=True),
    Implementation("compiled_blocked_1024", compiled_blocked(1024), score_flops, max_tokens=1 << 13, late=True),
)

# On the CPU: SDPA has no cuDNN, and nothing is compiled.
INTERPRETER: tuple[Implementation, ...] = (
    Implementation("sdpa_flash", sdpa(SDPBackend.FLASH_ATTENTION), _forward_flops, plain=True),
    Implementation(
        "sdpa_cudnn", GPU[1].make, _forward_flops, plain=True, absent=lambda: "cuDNN takes tensors on a GPU"
    ),
    *(
        implementation
        for implementation in GPU
        if implementation.name in ("flash_attn", "statistics", "with_output", "bands")
    ),
    Implementation("flex", flex(compiled=False), score_flops),
    Implementation("eager", implementations.eager, score_flops),
)
