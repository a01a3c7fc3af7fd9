"""The table of unusual inputs, with the Triton kernels; each case takes about a second in the interpreter.

Comparisons with the reference's lse given stop where fp32 can't hold an answer (Case.bands), as for every backend.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from corner_cases import CASES, FORM_CASES, Case, assert_agrees, by_name

pytest.importorskip("triton", reason="needs the extra triton")

from rhythm import attention_statistics
from rhythm.kernels import Sequences, bands, row_sweep, undefined_results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, on inf and NaN
]


@pytest.mark.parametrize("case", [*CASES, *FORM_CASES], ids=by_name)
def test_the_kernels_agree_with_the_reference(case: Case) -> None:
    assert_agrees(case, "triton", DEVICE)


@pytest.mark.parametrize(("factor", "steep"), [(1.0, 0), (1e3, 1), (1e20, 1)])
def test_steep_scores_are_noted_and_keep_the_attention_of_later_rows(factor: float, steep: int) -> None:
    """Each row has two keys of equal score, which an fp32 lse can't resolve: results are worked out by hand."""
    tokens = 70
    q, k = torch.full((tokens, 1, 16), 1.0), torch.full((tokens, 1, 16), 1.0)
    k[2:] = -1.0
    q, k = q.to(DEVICE), (k * factor).to(DEVICE)
    got = undefined_results(1, 1, tokens, q.device, None)
    assert got.softmax is not None
    sequences = Sequences(None, None, tokens, 1)
    row_sweep(q, k, None, sequences, got.lse, scale=4.0, softmax=got.softmax)
    near: dict[str, Any] = {"scale": 4.0, "window": 10, "horizon": (0, None), "softmax": got.softmax}
    bands(q, k, got.lse, sequences, got.waad, got.fai, None, **near)
    assert got.softmax.steep.tolist() == [steep]
    assert got.softmax.parts[0, 5:, 1].tolist() == pytest.approx([1.0] * (tokens - 5), abs=1e-4)  # log2 of two keys
    expected = torch.tensor([(1 + (tokens - 1) / 2) / tokens, 1 / 2] + [0.0] * (tokens - 2))
    torch.testing.assert_close(got.fai[0].cpu(), expected, rtol=1e-5, atol=1e-7)
    assert got.lse[0, -1].item() == pytest.approx(64 * factor + math.log(2), rel=1e-6)


def test_without_a_scale_spans_are_those_of_uniform_attention() -> None:
    q = torch.randn(40, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    span = attention_statistics(q, q, scale=0.0, backend="triton").span
    torch.testing.assert_close(span, torch.full_like(span, 39 / 4))
