"""Scores of a tile and what divides a row's weights, whatever the form of attention (arguments.py).

What a call doesn't have is None and takes no instruction: plain attention compiles as if there were no other.

Shape suffixes: M rows and N keys of a tile, D head size (padded to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from rhythm.kernels.tiles import INTERPRETED, LN_2, LOG2_E, dot


@triton.jit
def tanh(x):
    """x·P(x²) / Q(x²), fitted to |x| ≤ 9, beyond which tanh is 1 in fp32: relative error 2.5e-7. NaN stays NaN."""
    x = tl.clamp(x, -9.0, 9.0, propagate_nan=tl.PropagateNan.ALL)
    y = x * x
    p = -1.22462708e-11 * y + 3.0642564e-08
    p = p * y + 2.80313252e-05
    p = p * y + 0.00386950863
    p = p * y + 0.136808574
    p = p * y + 1.0
    q = 1.28903616e-06 * y + 0.000394071481
    q = q * y + 0.0272501595
    q = q * y + 0.470141888
    q = q * y + 1.0
    if INTERPRETED:  # it has no library functions
        return x * p / q
    else:
        return libdevice.fast_dividef(x * p, q)  # q is 1 to 700: no care for denominators out of its range


@triton.jit
def capped_products(q_MD, k_ND, cap_scale, form: tl.constexpr):
    """[M, N] products of q and k; with a softcap tanh(product · cap_scale). Both times a scale are scores."""
    return capped(dot(q_MD, k_ND, form), cap_scale)


@triton.jit
def capped(product_MN, cap_scale):
    """Products, or with a softcap their tanh, as capped_products."""
    if cap_scale is not None:
        product_MN = tanh(product_MN * cap_scale)
    return product_MN


@triton.jit
def first_visible(row, sliding_window):
    """The first key that a row sees."""
    if sliding_window is not None:
        return tl.maximum(row - sliding_window + 1, 0)
    else:
        return row * 0


@triton.jit
def has_sink_alone(largest_M, sum_M, sink):
    """Whether no key of a row has any weight, but its sink has."""
    return (largest_M == float("-inf")) & (sum_M == 0.0) & (sink > float("-inf"))


@triton.jit
def denominator(largest_M, sum_M, natural_scale, sinks, head):
    """(Σ p with the sink, the largest score, whether the row is defined) of finished rows.

    p is relative to the largest score; Σ p is infinite where a sink outweighs all keys. Where a sink is alone the
    largest score is its logit. Undefined is a row with a score or a sink of NaN or +inf, or without any weight.
    """
    logit_M = largest_M * natural_scale
    if sinks is None:
        return sum_M, logit_M, (sum_M > 0) & (tl.abs(logit_M) < float("inf"))
    else:
        sink_M = tl.load(sinks + head) + tl.zeros_like(logit_M)
        alone_M = has_sink_alone(largest_M, sum_M, sink_M)
        logit_M = tl.where(alone_M, sink_M, logit_M)
        defined_M = ((sum_M > 0) | alone_M) & (tl.abs(logit_M) < float("inf")) & (sink_M < float("inf"))
        return sum_M + tl.exp2((sink_M - logit_M) * LOG2_E), logit_M, defined_M


@triton.jit
def log_denominator(largest_M, sum_M, logit_M, defined_M, sinks, head):
    """(largest product, log2 of Σ p with the sink, lse) of finished rows, A = 2^((product − largest)·scale − log2).

    logit_M and defined_M are from `denominator`. Where a sink is alone the product is 0 and the logarithm the sink's.
    """
    if sinks is None:
        log2_total_M = tl.where(defined_M, tl.log2(sum_M), float("nan"))
        return largest_M, log2_total_M, logit_M + log2_total_M * LN_2
    else:
        sink_M = tl.load(sinks + head) + tl.zeros_like(logit_M)
        alone_M = has_sink_alone(largest_M, sum_M, sink_M)
        above_M = tl.minimum((sink_M - logit_M) * LOG2_E, 3e38)
        most_M = tl.maximum(above_M, 0.0)
        log2_rest_M = tl.where(defined_M, tl.log2(sum_M * tl.exp2(-most_M) + tl.exp2(above_M - most_M)), float("nan"))
        log2_total_M = most_M + log2_rest_M
        log2_total_M = tl.where(alone_M & defined_M, sink_M * LOG2_E, log2_total_M)
        lse_M = tl.maximum(logit_M, sink_M) + log2_rest_M * LN_2
        return tl.where(alone_M, 0.0, largest_M), log2_total_M, lse_M
