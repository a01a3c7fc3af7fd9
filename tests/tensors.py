"""Random tensors for tests, and comparisons of tensors. `import tensors` works from every test (conftest.py).

T tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

# The backend as a parameter of a test that runs without Triton too.
TRITON = pytest.param(
    "triton",
    marks=[
        pytest.mark.triton,
        pytest.mark.skipif(find_spec("triton") is None, reason="needs the extra triton"),
    ],
)
STATISTICS = ("span", "waad", "fai", "lse")
SIGNALS = ("waad", "fai", "span")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Standard normal numbers, drawn in fp32 on the CPU: the same for every type and device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def random_qkv(
    tokens: int,
    heads: int,
    key_heads: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    *,
    sharp: float = 1.5,
    device: str = "cpu",
) -> list[Tensor]:
    """q [T, H, D] times `sharp`, k and v [T, G, D]; the seed follows from the shape."""
    generator = torch.Generator().manual_seed(tokens * 1000 + heads * 10 + size)
    q, k, v = (torch.randn(tokens, h, size, generator=generator) for h in (heads, key_heads, key_heads))
    return [(q * sharp).to(device, dtype), k.to(device, dtype), v.to(device, dtype)]


def assert_same(actual: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0, check_dtype: bool = True) -> None:
    """Bit for bit unless a tolerance is given; NaN equals NaN.

    Takes two tensors, two mappings with the same keys, two AttentionStatistics (their four basic fields), or two
    RhythmSignals (waad, fai and span within the tolerance, head groups exactly).
    """
    if isinstance(expected, Tensor):
        pairs = {"": (actual, expected)}
    elif isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        pairs = {name: (actual[name], expected[name]) for name in expected}
    else:
        names = SIGNALS if hasattr(expected, "groups") else STATISTICS
        pairs = {name: (getattr(actual, name), getattr(expected, name)) for name in names}
    for name, (one, other) in pairs.items():
        torch.testing.assert_close(
            one,
            other,
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            check_dtype=check_dtype,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    if hasattr(expected, "groups"):
        assert actual.groups.local.equal(expected.groups.local)
        assert actual.groups.global_.equal(expected.groups.global_)
