"""python -m benchmarks.span_error: compares spans from sampled rows with the exact ones, as a markdown table.

The attention is synthetic, with properties of real heads: each head prefers its own scale of distances (from 8 tokens
to the whole sequence, by random Fourier features of the position) and attends to content that drifts from token to
token; some heads also attend to the first token. Real models may be easier or harder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from rhythm import attention_statistics, select_heads

HEADS, FREQUENCIES, CONTENT = 40, 24, 16


def structured(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """q, k [T, 40, 64] fp32; the softmax scale is 1."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(tokens, dtype=torch.float64)
    q, k = (torch.zeros(tokens, HEADS, 2 * FREQUENCIES + CONTENT) for _ in range(2))
    for head in range(HEADS):
        reach = 8 * (tokens / 8) ** (head / (HEADS - 1))
        frequency = torch.randn(FREQUENCIES, generator=generator, dtype=torch.float64) / reach
        angle = position[:, None] * frequency
        wave = torch.cat([angle.cos(), angle.sin()], dim=1) / FREQUENCIES**0.5
        strength = 3 + 5 * torch.rand((), generator=generator).item()
        q[:, head, : 2 * FREQUENCIES], k[:, head, : 2 * FREQUENCIES] = strength * wave, wave
        drift = torch.randn(tokens, CONTENT, generator=generator)
        for t in range(1, tokens):  # correlated over about 20 tokens
            drift[t] = 0.95 * drift[t - 1] + 0.31 * drift[t]
        content = torch.randn(tokens, CONTENT, generator=generator)
        q[:, head, 2 * FREQUENCIES :], k[:, head, 2 * FREQUENCIES :] = drift, 0.4 * content
        if head % 4 == 0:
            k[0, head, : 2 * FREQUENCIES] += q[:, head, : 2 * FREQUENCIES].mean(0) * 2
    return q, k


def row(tokens: int, counts: Sequence[int], seeds: int) -> list[tuple[int, float, float, float]]:
    """(rows, median and largest relative error over the heads, fraction of heads chosen alike) per number of rows."""
    errors: dict[int, list[Tensor]] = {count: [] for count in counts}
    alike: dict[int, list[float]] = {count: [] for count in counts}
    for seed in range(seeds):
        q, k = structured(tokens, seed)
        arguments = {"scale": 1.0, "prompt_lens": [tokens // 8]}
        exact = attention_statistics(q, k, **arguments)
        for count in counts:
            sampled = attention_statistics(q, k, lse=exact.lse, span_rows=count, **arguments)
            errors[count].append((sampled.span - exact.span).abs() / exact.span)
            chosen, right = select_heads(sampled.span), select_heads(exact.span)
            same = (chosen.local & right.local).sum() + (chosen.global_ & right.global_).sum()
            alike[count].append(float(same / (right.local.sum() + right.global_.sum())))
    results = []
    for count in counts:
        error = torch.cat(errors[count])
        results.append((count, float(error.median()), float(error.max()), sum(alike[count]) / seeds))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.span_error", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    print("| T | span_rows | error, median head | error, worst head | local and global heads chosen alike |")
    print("|---|---|---|---|---|")
    for tokens in options.tokens:
        for count, median, worst, alike in row(tokens, options.rows, options.seeds):
            print(f"| {tokens} | {count} | {median:.2%} | {worst:.2%} | {alike:.1%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
