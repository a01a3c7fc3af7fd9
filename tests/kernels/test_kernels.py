"""The Triton kernels in Triton's interpreter, against the fp64 reference; on a GPU the same tests run compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import tensors
import torch

pytest.importorskip("triton", reason="needs the extra triton")

from rhythm.ops import reference
from rhythm.ops.statistics import AttentionStatistics, attention_statistics, attention_with_statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, on rows beyond the end
]
NAMES = ("span", "waad", "fai", "lse")
random_qkv = partial(tensors.random_qkv, device=DEVICE)

# (lengths, prompt lengths, query heads, key heads, head size, window, horizon)
SHAPES = [
    ([1], [0], 1, 1, 16, 10, (10, 50)),
    ([63], [5], 4, 1, 32, 10, (0, 0)),
    ([111], [110], 8, 1, 80, 3, (0, 5)),
    ([63, 0, 1, 111], [5, 0, 1, 63], 2, 2, 64, 10, (10, 50)),
    ([290], [31], 2, 1, 33, 40, (10, None)),
    ([200, 7], [40, 6], 4, 2, 96, 150, (3, 120)),
    ([70], [9], 2, 1, 200, 10, (2, 30)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("lengths", "prompts", "heads", "key_heads", "size", "window", "horizon"), SHAPES)
def test_accuracy(
    dtype, lengths, prompts, heads, key_heads, size, window, horizon, assert_accurate: Callable[..., None]
) -> None:
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q, k, v = random_qkv(bounds[-1], heads, key_heads, size, dtype)
    settings = {"window": window, "horizon": horizon, "prompt_lens": prompts}
    exact, plain = (
        reference.attention_statistics(
            q.to(kind), k.to(kind), v_TGD=v.to(kind), bounds=bounds, scale=size**-0.5, **settings
        )
        for kind in (torch.float64, torch.float32)
    )
    settings |= {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=DEVICE), "backend": "triton"}
    alone = attention_statistics(q, k, **settings)
    out, beside = attention_with_statistics(q, k, v, **settings)
    bands = attention_statistics(q, k, lse=exact[3].float(), span=False, **settings)
    for name, expected, unfused in zip(NAMES, exact, plain, strict=False):
        for result in (alone, beside) if name == "span" else (alone, beside, bands):
            unit = window if name == "waad" else 1e-3
            assert_accurate(name, dtype, getattr(result, name), expected, unfused, unit)
    assert_accurate("out", dtype, out, exact[4], plain[4].to(dtype))  # rounded once, as any output is


def test_batched_strided_and_negative_scale() -> None:
    q, k, v = (x.unflatten(0, (2, 45)) for x in random_qkv(90, 4, 2, 24, torch.float32))
    expected_out, expected = attention_with_statistics(q, k, v, scale=-0.3, prompt_lens=[0, 9], backend="reference")
    scattered = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    out, actual = attention_with_statistics(*scattered, scale=-0.3, prompt_lens=[0, 9], backend="triton")
    torch.testing.assert_close(out, expected_out)
    for name in NAMES:
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=1e-4, atol=1e-5, equal_nan=True, msg=name
        )


def test_reruns_are_bit_equal() -> None:
    q, k, _ = random_qkv(150, 4, 2, 32, torch.bfloat16)
    first, second = (attention_statistics(q, k, backend="triton") for _ in range(2))
    for name in NAMES:
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_stays_where_it_touches(poison: float) -> None:
    q, k, _ = random_qkv(120, 4, 2, 32, torch.float32)
    bad = k.clone()
    bad[70, 1, 3] = poison
    expected = attention_statistics(q, bad, horizon=(2, 20), backend="reference")
    actual = attention_statistics(q, bad, horizon=(2, 20), backend="triton")
    assert actual.lse[:2].isfinite().all()
    for name in NAMES:
        assert torch.equal(getattr(actual, name).isnan(), getattr(expected, name).isnan()), name


def test_nothing_to_do() -> None:
    q, k, v = random_qkv(12, 4, 2, 16, torch.float32)
    none: AttentionStatistics = attention_statistics(q[:0], k[:0], backend="triton")
    assert none.waad.shape == (4, 0)
    assert none.span.isnan().all()
    all_prompt = attention_statistics(q, k, prompt_lens=[12], backend="triton")
    assert all(getattr(all_prompt, name).isnan().all() for name in NAMES)
    out, _ = attention_with_statistics(q, k, v, prompt_lens=[12], backend="triton")
    torch.testing.assert_close(out, attention_with_statistics(q, k, v, backend="reference")[0])


def test_tf32_where_torch_allows_it() -> None:
    """With ten bits of mantissa results are near those of full fp32, in the interpreter as on a GPU."""
    from rhythm.kernels.tiles import dot_precision

    q, k, _ = random_qkv(90, 4, 2, 32, torch.float32)
    before = torch.get_float32_matmul_precision()
    full = attention_statistics(q, k, backend="triton")
    assert dot_precision() == "ieee"
    try:
        torch.set_float32_matmul_precision("high")
        assert dot_precision() == "tf32"
        rounded = attention_statistics(q, k, backend="triton")
    finally:
        torch.set_float32_matmul_precision(before)
    for name in NAMES:
        torch.testing.assert_close(getattr(rounded, name), getattr(full, name), rtol=3e-2, atol=3e-3, equal_nan=True)
