"""More of each row, for `also=`: its largest score, its entropy and what it gives to the first keys and to the prompt.

One more sweep over the keys for a block of rows, after the softmax of the rows is known: from the row sweep, or from a
lse that came from outside. So the row sweep costs nothing more, and all its forms have the same answers. The sweep
computes what is wanted only: the largest score takes no exponential, and sums over the first keys no others.

Shape suffixes: M rows and N keys of a tile, C the eight columns of row_sweep.py, D head size (padded to a power of
two).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rhythm.kernels.arguments import PLAIN, Forms, common_arguments, scales
from rhythm.kernels.column_sweep import larger, largest
from rhythm.kernels.launch import kernel_key, launch, options, run_with_tile
from rhythm.kernels.online import masked
from rhythm.kernels.row_sweep import halves
from rhythm.kernels.scores import capped_products, first_visible
from rhythm.kernels.sequences import Sequences, locate
from rhythm.kernels.softmax import Softmax
from rhythm.kernels.tile_tables import Tile
from rhythm.kernels.tiles import (
    LN_2,
    LOG2_E,
    head_base,
    load_q,
    load_rows,
    load_tma,
    query_base,
    tma_compatible,
    tma_descriptor,
)
from rhythm.kernels.tuning import Sample

NO_WEIGHT = tl.constexpr(-1000.0)
"""2 to this power is 0 in fp32. Exponents of −inf become it, so that p·log p is 0 and not NaN."""


class Wanted(NamedTuple):
    """Places of the answers among the results, −1 where one is not wanted; the kernel takes it as a constant."""

    max_logit: int = -1
    top1: int = -1
    entropy: int = -1
    first_mass: int = -1
    prompt_mass: int = -1


@triton.jit
def fold_largest(x_MN):
    """[M, 8]: the largest of the columns 8i + c, NaN where one is."""
    left_MN, right_MN = halves(x_MN)
    if x_MN.shape[1] == 16:
        return larger(left_MN, right_MN)
    else:
        return larger(fold_largest(left_MN), fold_largest(right_MN))


@triton.jit
def fold_sum(x_MN):
    """[M, 8]: the sums of the columns 8i + c. One thread holds all i, so nothing moves between threads."""
    return tl.sum(tl.reshape(x_MN, [x_MN.shape[0], x_MN.shape[1] // 8, 8]), 1)


@triton.jit
def row_exponents(score_MN, softmax, scale, EXACT: tl.constexpr):
    """log2 of the weights. softmax: (lse · log2 e, and the row sweep's parts, which are None without it) of the rows.

    With parts the exponents are exact, however large scores are, where EXACT; else they follow lse.
    """
    log2_lse_M, largest_M, log2_sum_M = softmax
    if EXACT and largest_M is not None:
        return (score_MN - largest_M[:, None]) * scale - log2_sum_M[:, None]
    else:
        return score_MN * scale - log2_lse_M[:, None]


@triton.jit
def add_scores(state, score_MN, softmax, scale, EXACT: tl.constexpr, LARGEST: tl.constexpr, SUM: tl.constexpr):
    """state: (the largest products, sums), [M, 8] each, with a tile's. SUM: "entropy", −Σ p·log2 p; "mass", Σ p; or
    "none".
    """
    largest_MC, sum_MC = state
    if LARGEST:
        largest_MC = larger(largest_MC, fold_largest(score_MN))
    if SUM != "none":
        exponent_MN = row_exponents(score_MN, softmax, scale, EXACT)
        if SUM == "entropy":
            sum_MC -= fold_sum(tl.exp2(exponent_MN) * tl.maximum(exponent_MN, NO_WEIGHT))
        else:
            sum_MC += fold_sum(tl.exp2(exponent_MN))
    return largest_MC, sum_MC


@triton.jit
def swept(
    begin, whole, stop, q_MD, k, k_tiles, softmax, place, q_base, strides, scale, sliding_window, cap_scale, steep,
    LARGEST: tl.constexpr, SUM: tl.constexpr, form: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """`state` of the keys from `begin` to `stop`. Each row of the block sees those from `whole` on that come before its
    first row; the others are masked. place: (sequence, its start, first row, length, key head).
    """
    ROWS: tl.constexpr = tile.rows
    KEYS: tl.constexpr = tile.keys
    FEW: tl.constexpr = KEYS if KEYS < 32 else 32
    # Full fp32 keeps both operands in registers: without reloading q would stay there from tile to tile.
    RELOAD: tl.constexpr = form.precision == "ieee" and q_MD.dtype == tl.float32
    sequence, start, first, length, key_head = place
    state = (tl.zeros([ROWS, 8], tl.float32) - float("inf"), tl.zeros([ROWS, 8], tl.float32))
    near = whole + tl.maximum(tl.minimum(first, stop) - whole, 0) // KEYS * KEYS
    if steep is not None:  # the loop without masks takes no keys
        near = tl.where(tl.load(steep) != 0, whole, near)
    for key in tl.range(whole, near, KEYS, num_stages=tile.stages, disable_licm=RELOAD):
        if RELOAD:
            q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
        if tile.tma:
            k_ND = load_tma(k_tiles, sequence, start, key, key_head, KEYS, form)
        else:
            k_ND = load_rows(k, strides.k, key, length, KEYS, False, form)
        score_MN = capped_products(q_MD, k_ND, cap_scale, form)
        state = add_scores(state, score_MN, softmax, scale, False, LARGEST, SUM)
    # The keys before `whole` and those from `near` on, in one loop.
    edge = tl.minimum(whole, stop)
    before = tl.cdiv(tl.maximum(edge - begin, 0), FEW) * FEW
    for at in tl.range(0, before + tl.maximum(stop - near, 0), FEW, num_stages=1, disable_licm=RELOAD):
        key = tl.where(at < before, begin + at, near + at - before)
        beyond = tl.where(at < before, edge, stop)
        if RELOAD:
            q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
        k_ND = load_rows(k, strides.k, key, length, FEW, True, form)
        score_MN = masked(capped_products(q_MD, k_ND, cap_scale, form), key, first, sliding_window, True)
        score_MN = tl.where((key + tl.arange(0, FEW) < beyond)[None, :], score_MN, float("-inf"))
        state = add_scores(state, score_MN, softmax, scale, True, LARGEST, SUM)
    return state


@triton.jit(do_not_specialize=["sequences", "tokens", "rows", "sliding_window", "first_keys"])
def row_answers_kernel(
    q, k, k_tiles, lengths, lse, parts, steep, answers, strides, sequences, tokens, heads, scale, natural_scale, rows,
    sliding_window, cap_scale, sinks, first_keys, form: tl.constexpr, tile: tl.constexpr, also: tl.constexpr,
    PROMPT_ROWS: tl.constexpr,
):  # fmt: skip
    """The answers `also` (Wanted) of one block of rows of one head, [H, T] each.

    parts and steep (softmax.py) may be None, and rows … sinks (arguments.py). PROMPT_ROWS: max_logit of rows of the
    prompt, too, for which lse is not defined.
    """
    ROWS: tl.constexpr = tile.rows
    program, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence, first, start, length, prompt, first_row, missing = locate(
        program, tl.num_programs(0) // heads, lengths, sequences, tokens, rows, "row" if PROMPT_ROWS else "response",
        ROWS,
    )  # fmt: skip
    if first >= length:
        return
    key_head = head // form.group
    q_base = query_base(q, strides.q, sequence, first_row, missing, head, rows, form)
    k_base = head_base(k, strides.k, sequence, start, key_head, form)
    q_MD = load_q(q_base, strides.q, first, length, ROWS, form)
    row_M = first + tl.arange(0, ROWS)
    within_M = row_M < length
    at_M = head.to(tl.int64) * tokens + start + row_M
    lse_M = tl.load(lse + at_M, mask=within_M, other=float("inf"))
    defined_M = lse_M == lse_M  # also where no key is summed
    if parts is None:
        softmax = (lse_M * LOG2_E, None, None)
    else:
        largest_M = tl.load(parts + 2 * at_M, mask=within_M, other=0.0)
        softmax = (lse_M * LOG2_E, largest_M, tl.load(parts + 2 * at_M + 1, mask=within_M, other=0.0))

    begin, whole = 0, 0
    if sliding_window is not None:
        begin = first_visible(first, sliding_window)
        whole = tl.minimum(first_visible(first + ROWS - 1, sliding_window), first)
    end = tl.minimum(first + ROWS, length)
    place = (sequence, start, first, length, key_head)
    response_M = within_M & (row_M >= prompt)
    stride = tl.cast(heads, tl.int64) * tokens

    if also.max_logit >= 0 or also.top1 >= 0 or also.entropy >= 0:
        largest_MC, spread_MC = swept(
            begin, whole, end, q_MD, k_base, k_tiles, softmax, place, q_base, strides, scale, sliding_window,
            cap_scale, steep, also.max_logit >= 0 or also.top1 >= 0, "entropy" if also.entropy >= 0 else "none", form,
            tile,
        )  # fmt: skip
        top_M = largest(largest_MC, 1)
        if also.max_logit >= 0:
            logit_M = top_M * natural_scale
            has_logit_M = defined_M
            if PROMPT_ROWS:
                weight_M = logit_M > float("-inf")  # whether there is one
                if sinks is not None:
                    sink_M = tl.load(sinks + head) + tl.zeros_like(logit_M)
                    weight_M = (weight_M | (sink_M > float("-inf"))) & (sink_M < float("inf"))
                has_logit_M = tl.where(row_M < prompt, weight_M & (logit_M < float("inf")), defined_M)
            logit_M = tl.where(has_logit_M, logit_M, float("nan"))
            tl.store(answers + also.max_logit * stride + at_M, logit_M, mask=within_M if PROMPT_ROWS else response_M)
        if also.top1 >= 0:
            top1_M = tl.exp2(row_exponents(top_M[:, None], softmax, scale, True))
            tl.store(answers + also.top1 * stride + at_M[:, None], top1_M, mask=response_M[:, None])
        if also.entropy >= 0:
            tl.store(answers + also.entropy * stride + at_M, tl.sum(spread_MC, 1) * LN_2, mask=response_M)
    if also.first_mass >= 0:
        _, mass_MC = swept(
            begin, whole, tl.minimum(end, first_keys), q_MD, k_base, k_tiles, softmax, place, q_base, strides, scale,
            sliding_window, cap_scale, steep, False, "mass", form, tile,
        )  # fmt: skip
        mass_M = tl.where(defined_M, tl.sum(mass_MC, 1), float("nan"))
        tl.store(answers + also.first_mass * stride + at_M, mass_M, mask=response_M)
    if also.prompt_mass >= 0:
        _, mass_MC = swept(
            begin, whole, tl.minimum(end, prompt), q_MD, k_base, k_tiles, softmax, place, q_base, strides, scale,
            sliding_window, cap_scale, steep, False, "mass", form, tile,
        )  # fmt: skip
        mass_M = tl.where(defined_M, tl.sum(mass_MC, 1), float("nan"))
        tl.store(answers + also.prompt_mass * stride + at_M, mass_M, mask=response_M)


def row_answers(
    q: Tensor,
    k: Tensor,
    lse_HT: Tensor,
    sequences: Sequences,
    answers_AHT: Tensor,
    names: Sequence[str],
    *,
    scale: float,
    first: int,
    prompt_rows: bool,
    forms: Forms = PLAIN,
    softmax: Softmax | None = None,
) -> None:
    """Fills answers_AHT, fp32, with what `names` (fields of Wanted) names, in that order, at the response rows.

    lse_HT: fp32 [Hq, T], finite or NaN. softmax: the row sweep's, if lse_HT is the row sweep's own. first: how many
    keys are those of first_mass. prompt_rows: max_logit on rows of the prompt, too.
    """
    arguments = common_arguments(q, k, sequences, scale, forms) | {
        "lse": lse_HT,
        "parts": None if softmax is None else softmax.parts,
        "steep": None if softmax is None else softmax.steep,
        "answers": answers_AHT,
        "natural_scale": scales(scale, forms.softcap).natural,
        "sinks": forms.sinks,
        "first_keys": min(first, sequences.tokens),
        "also": Wanted(**{name: place for place, name in enumerate(names)}),
        "PROMPT_ROWS": prompt_rows,
    }

    def run(tile: Tile) -> None:
        launch(
            row_answers_kernel,
            q.shape[-2] * sequences.blocks(tile.rows),
            k_tiles=tma_descriptor(k, tile.keys) if tile.tma else None,
            tile=tile,
            **arguments,
            **options(tile, arguments),
        )

    def on_sample(sample: Sample) -> None:
        row_answers(
            sample.q,
            sample.k,
            sample.lse,
            sample.sequences,
            sample.lse.new_empty((len(names), *sample.lse.shape)),
            names,
            scale=scale,
            first=first,
            prompt_rows=prompt_rows,
            softmax=None if softmax is None else sample.softmax,
        )

    key = kernel_key("row_answers", q, arguments)
    run_with_tile(key, q, k, tma_compatible(k), run, on_sample)
