"""The correctness check: compares every op's results with the fp64 reference before any number is reported.

The rule is flash attention's: the error may be at most twice that of a plain torch computation in the same type.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.implementations import Outputs
from benchmarks.registry import Benchmark
from benchmarks.shapes import HORIZON, WINDOW, Inputs
from rhythm.ops import reference
from rhythm.ops.statistics import AttentionStatistics, attention_statistics

ALLOWED = 2.0  # factor on the plain computation's error
FLOOR = 4e-6  # allowed where the plain computation happens to be exact: 32 roundings of fp32


class WrongResultError(AssertionError):
    """An op's results are wrong, so no number of the run is reported."""


@dataclass(frozen=True)
class CheckedResult:
    """One result of one op: its largest error relative to the largest value, and the allowed error."""

    op: str
    result: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def verify(benchmarks: list[Benchmark], inputs: Inputs) -> list[CheckedResult]:
    """Run each op once on the inputs and check its results.

    Raises:
        WrongResultError: a result is wrong, or is NaN at other places than the reference.
    """
    expected = _exact(inputs)
    plain = {name: relative_error(value, expected[name]) for name, value in _plain(inputs).items()}
    results = []
    for benchmark in benchmarks:
        for name, value in benchmark.make(inputs)().items():
            error = relative_error(value, expected[name])
            results.append(CheckedResult(benchmark.name, name, error, max(ALLOWED * plain[name], FLOOR)))
    if failed := [result for result in results if not result.passed]:
        lines = [f"{v.op}: {v.result} has error {v.error:.1e}, allowed is {v.allowed:.1e}" for v in failed]
        raise WrongResultError(f"at {inputs.shape}, {inputs.q.dtype}:\n" + "\n".join(lines))
    return results


def verify_also(benchmark: Benchmark, inputs: Inputs) -> None:
    """Check the answers that the inputs' `also` names, by the same rule; plain is the reference in fp32.

    Raises:
        WrongResultError: one is wrong.
    """
    actual = benchmark.make(inputs)()

    def of_reference(q: Tensor, k: Tensor) -> AttentionStatistics:
        return attention_statistics(q, k, prompt_lens=inputs.prompt_lens, also=inputs.also, backend="reference")

    exact, plain = of_reference(inputs.q.double(), inputs.k.double()), of_reference(inputs.q, inputs.k)
    for name in inputs.also:
        _check(benchmark, inputs, name, actual[name], getattr(exact, name), getattr(plain, name))


def verify_by_reference(benchmark: Benchmark, inputs: Inputs) -> None:
    """Check all results of an op that takes its backend from the inputs, by the same rule, with its own by the
    reference: exact in fp64, plain in fp32.

    Raises:
        WrongResultError: one is wrong.
    """
    of_reference = replace(inputs, backend="reference")
    exact = benchmark.make(replace(of_reference, q=inputs.q.double(), k=inputs.k.double()))()
    plain = benchmark.make(of_reference)()
    for name, value in benchmark.make(inputs)().items():
        _check(benchmark, inputs, name, value, exact[name], plain[name])


def _check(benchmark: Benchmark, inputs: Inputs, name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    error, allowed = relative_error(actual, exact), max(ALLOWED * relative_error(plain, exact), FLOOR)
    if error > allowed:
        raise WrongResultError(
            f"at {inputs.shape}, {inputs.q.dtype}:\n{benchmark.name}: {name} has error {error:.1e}, allowed is "
            f"{allowed:.1e}"
        )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|; infinite unless both are NaN at the same places."""
    if actual.shape != expected.shape:
        raise WrongResultError(f"a result has shape {tuple(actual.shape)}, the reference's is {tuple(expected.shape)}")
    if not torch.equal(actual.isnan(), expected.isnan()):
        return float("inf")
    defined = ~expected.isnan()
    if not defined.any():
        return 0.0
    error = (actual.double() - expected)[defined].abs().max() / expected[defined].abs().max()
    return float(error)


def _exact(inputs: Inputs) -> Outputs:
    """The reference in fp64, one query head at a time, so that only one map is in memory."""
    shape = inputs.shape
    group = shape.query_heads // shape.key_heads
    columns: dict[str, list[Tensor]] = {"span": [], "waad": [], "fai": [], "lse": [], "out": []}
    for head in range(shape.query_heads):
        key_head = slice(head // group, head // group + 1)
        results = reference.attention_statistics(
            inputs.q[:, head : head + 1].double(),
            inputs.k[:, key_head].double(),
            bounds=[0, shape.tokens],
            prompt_lens=[shape.prompt],
            scale=inputs.scale,
            window=WINDOW,
            horizon=HORIZON,
            v_TGD=inputs.v[:, key_head].double(),
            sliding_window=inputs.sliding_window,
        )
        for column, result in zip(columns.values(), results, strict=True):
            assert result is not None
            column.append(result)
    out = torch.cat(columns.pop("out"), dim=1)
    span = torch.cat(columns.pop("span"), dim=1)[0]
    return {"span": span, "out": out} | {name: torch.cat(column) for name, column in columns.items()}


def _plain(inputs: Inputs) -> Outputs:
    """Plain torch, one query head at a time: matmuls in the input's type, softmax and sums in fp32."""
    shape = inputs.shape
    group = shape.query_heads // shape.key_heads
    position = torch.arange(shape.tokens, device=inputs.q.device)
    visible = reference.visible_keys(position, position, inputs.sliding_window)
    spans, waads, fais, lses, outs = [], [], [], [], []
    for head in range(shape.query_heads):
        q_TD, k_TD, v_TD = inputs.q[:, head], inputs.k[:, head // group], inputs.v[:, head // group]
        score = ((q_TD @ k_TD.T).float() * inputs.scale).masked_fill(~visible, -torch.inf)
        weights = score.softmax(dim=-1)
        span, waad, fai = reference.sequence_statistics(
            weights[None], prompt_len=shape.prompt, window=WINDOW, horizon=HORIZON
        )
        lse = score.logsumexp(dim=-1)
        lse[: shape.prompt] = torch.nan
        spans.append(span)
        waads.append(waad)
        fais.append(fai)
        lses.append(lse)
        outs.append(weights.to(v_TD.dtype) @ v_TD)
    return {
        "span": torch.cat(spans),
        "waad": torch.cat(waads),
        "fai": torch.cat(fais),
        "lse": torch.stack(lses),
        "out": torch.stack(outs, dim=1),
    }
