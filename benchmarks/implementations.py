"""The implementations that are compared: plain PyTorch without custom kernels, and rhythm's ops.

Each maker takes the inputs and returns a callable that computes everything and returns its results by name: those it
computes of span [Hq], waad, fai, lse [Hq, T] and out [T, Hq, D]. The maker allocates what the call needs on the device
of the inputs, so that a call neither copies from the host nor waits for the device.

Shape suffixes: T tokens, R rows of a block, C columns of its band, S keys so far, G key heads, M query heads of a
group, X = M·R rows of a group, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import HORIZON, WINDOW, Inputs
from rhythm.ops import reference
from rhythm.ops.statistics import attention_statistics, attention_with_statistics

Outputs = dict[str, Tensor]
Maker = Callable[[Inputs], Callable[[], Outputs]]


def eager(inputs: Inputs) -> Callable[[], Outputs]:
    """The reference: the whole T × T map of every head."""
    shape = inputs.shape

    def run() -> Outputs:
        span, waad, fai, lse, _ = reference.attention_statistics(
            inputs.q,
            inputs.k,
            bounds=[0, shape.tokens],
            prompt_lens=[shape.prompt],
            scale=inputs.scale,
            window=WINDOW,
            horizon=HORIZON,
        )
        return {"span": span[0], "waad": waad, "fai": fai, "lse": lse}

    return run


def blocked(block: int) -> Maker:
    """The fastest plain torch version: blocks of rows whose scores fit in cache, one matmul per key head in the input's
    type.

    Softmax and sums are fp32; row sums and Σ_s p·s are one pass each; WAAD and FAI read only the band at the block's
    right edge. Not faster: torch.softmax, [1, s] as one product, the scale in a separate pass.
    """

    def make(inputs: Inputs) -> Callable[[], Outputs]:
        return lambda: _blocked_statistics(inputs, block)

    return make


def _blocked_statistics(inputs: Inputs, block: int) -> Outputs:
    shape, (lo, hi) = inputs.shape, HORIZON
    tokens, group = shape.tokens, shape.query_heads // shape.key_heads
    q_GMTD = inputs.q.view(tokens, shape.key_heads, group, shape.head_size).permute(1, 2, 0, 3)
    k_GDT = inputs.k.permute(1, 2, 0).contiguous()
    position = torch.arange(tokens, dtype=torch.float32, device=inputs.q.device)
    waad, lse, row_span = (position.new_full((shape.key_heads, group, tokens), torch.nan) for _ in range(3))
    received = torch.zeros_like(waad)
    empty = inputs.q.new_empty(())
    for start in range(shape.prompt, tokens, block):
        end = min(start + block, tokens)
        rows = end - start
        q_GXD = q_GMTD[:, :, start:end].reshape(shape.key_heads, group * rows, shape.head_size)
        score = torch.baddbmm(empty, q_GXD, k_GDT[..., :end], beta=0, alpha=inputs.scale).float()
        score_GMRS = score.view(shape.key_heads, group, rows, end)
        above_RR = position[start:end] > position[start:end, None]
        score_GMRS[..., start:end].masked_fill_(above_RR, -torch.inf)
        peak = score_GMRS.amax(dim=-1, keepdim=True)
        weight = score_GMRS.sub_(peak).exp_()
        total = weight.sum(dim=-1)
        lse[..., start:end] = peak[..., 0] + total.log()
        moment = (weight.flatten(0, 2) @ position[:end]).view(total.shape)
        row_span[..., start:end] = position[start:end] - moment / total

        first = max(0, start - max(hi, WINDOW))
        band = weight[..., first:end] / total[..., None]
        distance_RC = position[start:end, None] - position[first:end]
        near_RC = (WINDOW - distance_RC).masked_fill((distance_RC < 0) | (distance_RC >= WINDOW), 0.0)
        waad[..., start:end] = WINDOW - (band * near_RC).sum(dim=-1)
        received[..., first:end] += (band * ((distance_RC >= lo) & (distance_RC <= hi))).sum(dim=-2)
    nearest = torch.clamp(position + lo, min=shape.prompt)
    count = (torch.clamp(position + hi, max=tokens - 1) - nearest + 1).clamp(min=0)
    fai = (received / count).masked_fill(count == 0, torch.nan)
    span = row_span[..., shape.prompt :].mean(dim=-1)
    return {"span": span.flatten(), "waad": waad.flatten(0, 1), "fai": fai.flatten(0, 1), "lse": lse.flatten(0, 1)}


def sdpa(inputs: Inputs) -> Callable[[], Outputs]:
    """torch's flash attention forward: only the output."""
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))

    def run() -> Outputs:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return {"out": out[0].transpose(0, 1)}

    return run


def statistics(inputs: Inputs) -> Callable[[], Outputs]:
    """rhythm.attention_statistics: the full sweep."""
    prompt_lens = inputs.prompt_lens

    def run() -> Outputs:
        result = attention_statistics(
            inputs.q,
            inputs.k,
            prompt_lens=prompt_lens,
            window=WINDOW,
            horizon=HORIZON,
            backend=inputs.backend,
            sliding_window=inputs.sliding_window,
            also=inputs.also,
        )
        assert result.span is not None
        more = {name: getattr(result, name) for name in inputs.also}
        return {"span": result.span[0], "waad": result.waad, "fai": result.fai, "lse": result.lse} | more

    return run


def with_output(inputs: Inputs) -> Callable[[], Outputs]:
    """rhythm.attention_with_statistics: statistics and attention output in one sweep."""
    prompt_lens = inputs.prompt_lens

    def run() -> Outputs:
        out, result = attention_with_statistics(
            inputs.q,
            inputs.k,
            inputs.v,
            prompt_lens=prompt_lens,
            window=WINDOW,
            horizon=HORIZON,
            backend=inputs.backend,
        )
        assert result.span is not None
        return {"out": out, "span": result.span[0], "waad": result.waad, "fai": result.fai, "lse": result.lse}

    return run


def bands(inputs: Inputs) -> Callable[[], Outputs]:
    """rhythm.attention_statistics given lse and without span: only the bands near the diagonal."""
    lse, prompt_lens = inputs.lse, inputs.prompt_lens

    def run() -> Outputs:
        result = attention_statistics(
            inputs.q,
            inputs.k,
            prompt_lens=prompt_lens,
            window=WINDOW,
            horizon=HORIZON,
            lse=lse,
            span=False,
            backend=inputs.backend,
        )
        return {"waad": result.waad, "fai": result.fai}

    return run
