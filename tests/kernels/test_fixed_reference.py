"""Rows whose far keys outgrow the reference that the row sweep takes from the diagonal: they are computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import assert_same, normal

pytest.importorskip("triton", reason="needs the extra triton")

from rhythm import attention_statistics
from rhythm.ops.statistics import AttentionStatistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, on rows beyond the end
]
TOKENS = 130
SINKS = torch.tensor([-20.0, 0.5], device=DEVICE)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompt, sinks": {"prompt_lens": [9], "sinks": SINKS},
    "window": {"sliding_window": 90},
    "prompt, window, sinks": {"prompt_lens": [9], "sliding_window": 77, "sinks": SINKS},
}


def sloping(slope: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """q and k whose scores (scale 1) are noise plus `slope` per key; in the second head the noise alone."""
    q, k = (0.5 * normal(TOKENS, 2, 16, seed=seed) for seed in (1, 2))
    q[:, :, 0] = torch.tensor([1.0, 0.0])
    k[:, :, 0] = slope * torch.arange(TOKENS)[:, None]
    return [x.to(DEVICE, dtype) for x in (q, k)]


def exact(q: torch.Tensor, k: torch.Tensor, **options: Any) -> AttentionStatistics:
    return attention_statistics(q.double(), k.double(), backend="reference", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_scores_that_grow_by_hundreds_toward_the_first_keys(form: str, dtype: torch.dtype) -> None:
    """By 260 nats along a row: weights relative to the diagonal would be e^260. Exponents stay below STEEP."""
    q, k = sloping(-2.0, dtype)
    options = {"scale": 1.0, "horizon": (3, None)} | FORMS[form]
    actual = attention_statistics(q, k, backend="triton", **options)
    assert_same(actual, exact(q, k, **options), rtol=2e-4, atol=2e-5, check_dtype=False)


def test_scores_that_grow_toward_the_last_keys() -> None:
    """The interpreter rounds exponents of 370 twice where a GPU's multiply-add rounds once; WAAD is W less a sum."""
    q, k = sloping(2.0, torch.float32)
    options: dict[str, Any] = {"scale": 1.0, "prompt_lens": [9]}
    actual = attention_statistics(q, k, backend="triton", **options)
    assert_same(actual, exact(q, k, **options), rtol=2e-4, atol=4e-4, check_dtype=False)


def test_rows_without_a_finite_score_near_the_diagonal() -> None:
    """Keys from 40 on have no weight; those before have scores of -300, which underflow if the reference is 0."""
    q, k = sloping(0.0, torch.float32)
    q[:, :, 0] = 1.0
    k[:40, :, 0], k[40:, :, 0] = -300.0, -torch.inf
    options: dict[str, Any] = {"scale": 1.0, "prompt_lens": [3]}
    actual = attention_statistics(q, k, backend="triton", **options)
    assert actual.span.isfinite().all()
    assert_same(actual, exact(q, k, **options), rtol=2e-4, atol=2e-5, check_dtype=False)
