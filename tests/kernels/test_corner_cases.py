"""Odd windows, scales and given lse through the kernels, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rhythm.kernels.configurations import Tile
from rhythm.kernels.launch import forced
from torch import Tensor

from rhythm import attention_statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, on inf and NaN
TOKENS, PROMPT, ROW = 40, 5, 30


def qk() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(TOKENS, heads, 16, generator=generator) for heads in (2, 1))
    return (1.5 * q).to(DEVICE), k.to(DEVICE)


def packed() -> dict[str, Any]:
    bounds = torch.tensor([0, 22, 22, TOKENS], dtype=torch.int32, device=DEVICE)
    return {"cu_seqlens": bounds, "prompt_lens": [PROMPT, 0, 0], "horizon": (2, 9)}


def assert_as_reference(names: str = "span waad fai lse", **options: Any) -> None:
    q, k = qk()
    expected = attention_statistics(q, k, backend="reference", **options)
    with forced(lambda kind: [Tile(32, 32, 1, 1)]):
        actual = attention_statistics(q, k, backend="triton", **options)
    for name in names.split():
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=2e-5, atol=2e-6, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("window", [22, 10**9, 2**63 - 1])
def test_windows_beyond_the_sequence(window: int) -> None:
    assert_as_reference(window=window, **packed())
    q, k = qk()
    lse = attention_statistics(q, k, backend="reference", **packed()).lse
    assert_as_reference("waad fai lse", window=window, lse=lse, span=False, **packed())


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-50, -1e-50, 1e-42])
def test_without_a_scale_attention_is_uniform(scale: float) -> None:
    assert_as_reference(scale=scale, **packed())
    q, k = qk()
    span = attention_statistics(q, k, scale=scale, backend="triton").span
    torch.testing.assert_close(span, torch.full_like(span, (TOKENS - 1) / 4))


@pytest.mark.parametrize("horizon", [(2, 9), (2, None)], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_given_lse_that_is_not_finite(value: float, horizon: tuple[int, int | None]) -> None:
    """The row and the keys that it reaches are NaN, in that head alone; with spans too, these as well."""
    q, k = qk()
    lse = attention_statistics(q, k, backend="reference").lse
    lse[1, ROW] = value
    options = {"lse": lse, "horizon": horizon}
    assert_as_reference("waad fai lse", span=False, **options)
    assert_as_reference(**options)
    sampled = attention_statistics(q, k, span_rows=64, backend="triton", **options).span
    assert sampled.isnan().tolist() == [[False, True]]
