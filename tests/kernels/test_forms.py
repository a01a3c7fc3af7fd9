"""Sliding windows, softcaps, sinks and fewer queries than keys in the Triton kernels, with rows of many tiles."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from forms import assert_form_accurate
from tensors import normal

pytest.importorskip("triton", reason="needs the extra triton")

from triton.runtime.interpreter import InterpreterBuilder

from rhythm import attention_statistics, attention_with_statistics

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, on rows beyond the end
]
SINKS = torch.tensor([-1.0, 0.5, 3.0, -torch.inf], device=DEVICE)

# (key lengths, query lengths, prompts, query heads, key heads, head size, W, horizon, form)
SHAPES: list[Any] = [
    ([290], [290], [31], 4, 2, 33, 10, (10, None), {"sliding_window": 150}),
    ([200, 7, 0, 90], [150, 7, 0, 1], [60, 6, 0, 0], 4, 1, 64, 40, (3, 120),
     {"sliding_window": 90, "softcap": 5.0, "sinks": SINKS}),
    ([180], [170], [0], 2, 2, 80, 10, (2, 30), {"softcap": 2.0}),
    ([170], [170], [9], 4, 4, 16, 60, (0, 20), {"sliding_window": 50, "sinks": SINKS}),
    ([100, 120], [100, 120], [0, 40], 4, 2, 200, 10, (10, 50), {"sinks": SINKS}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_accuracy_of_forms(index: int, dtype: torch.dtype, assert_accurate: Callable[..., None]) -> None:
    assert_form_accurate(SHAPES[index], dtype, "triton", assert_accurate, device=DEVICE)


@pytest.mark.skipif(ON_GPU, reason="counts the interpreter's products")
def test_windowed_sweeps_visit_the_tiles_within_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of products grows with the tokens, not with their square, and does not reach beyond the window."""
    products: list[int] = []
    dot = InterpreterBuilder.create_dot

    def counted(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        products[-1] += a.data.shape[0] * b.data.shape[1]
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)

    def swept(tokens: int, sliding_window: int | None) -> None:
        q, k = normal(tokens, 1, 16), normal(tokens, 1, 16, seed=1)
        products.append(0)
        statistics = attention_statistics(
            q, k, horizon=(0, None), sliding_window=sliding_window, backend="triton", scale=0.1
        )
        assert statistics.lse.isfinite().all()

    for tokens in (640, 1280):
        swept(tokens, 64)
    swept(640, None)
    # A block of 32 rows sees 64 + 31 keys; tiles of 32 begin where its window does, and 32 more lie on the diagonal's.
    for count, tokens in zip(products, (640, 1280), strict=False):
        assert count <= 2 * tokens * (64 + 31 + 32 + 32)  # in the row sweep and in the column sweep
    assert 1.8 < products[1] / products[0] < 2.2
    assert products[2] > 3 * products[0]


def test_rows_alone_are_the_rows_of_the_whole() -> None:
    """The last rows of each sequence, with a window, a cap and sinks, are what they are among all rows."""
    keys, rows = [90, 40], [35, 40]
    q, k, v = (normal(130, h, 32, seed=h).to(DEVICE) for h in (4, 2, 2))
    places = [place for (a, b), n in zip(pairwise([0, 90, 130]), rows, strict=True) for place in range(b - n, b)]
    cu_rows, cu_keys = (torch.tensor([0, *n]).cumsum(0).to(DEVICE, torch.int32) for n in (rows, keys))
    form = {"sliding_window": 33, "softcap": 3.0, "sinks": SINKS, "backend": "triton"}
    whole_out, whole = attention_with_statistics(q, k, v, cu_seqlens=cu_keys, prompt_lens=[55, 0], **form)
    out, alone = attention_with_statistics(q[places], k, v, cu_seqlens=cu_rows, cu_seqlens_k=cu_keys, **form)
    torch.testing.assert_close(out, whole_out[places], rtol=1e-5, atol=1e-6)
    for name in ("span", "waad", "fai", "lse"):
        torch.testing.assert_close(
            getattr(alone, name), getattr(whole, name), rtol=1e-5, atol=1e-6, equal_nan=True, msg=name
        )
