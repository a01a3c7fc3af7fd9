"""The bands of narrow windows and near horizons, which have a kernel of their own, at the edges of its blocks."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import tensors
import torch

pytest.importorskip("triton", reason="needs the extra triton")

from rhythm.kernels.launch import forced, launch
from rhythm.kernels.narrow_bands import FARTHEST, HALO, narrow
from rhythm.kernels.tile_tables import Tile
from rhythm.ops.statistics import attention_statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, on rows beyond the end
]
normal = partial(tensors.normal, device=DEVICE)
WIDEST = HALO.value + 1
SINKS = torch.tensor([0.5, -1.0], device=DEVICE)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the bands' kernels that are launched."""
    names: list[str] = []

    def recorded(kernel: Any, programs: int, **arguments: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, programs, **arguments)

    monkeypatch.setattr(sys.modules["rhythm.kernels.bands"], "launch", recorded)
    return names


def assert_bands(q: torch.Tensor, k: torch.Tensor, keys: int = 32, **options: Any) -> None:
    """WAAD and FAI are those of the reference for its lse, with NaN in the same places."""
    expected = attention_statistics(q.double(), k.double(), backend="reference", **options)
    with forced(lambda key: [Tile(32, keys, 1, 1)]):
        actual = attention_statistics(q, k, lse=expected.lse.float(), span=False, backend="triton", **options)
    for name in ("waad", "fai"):
        torch.testing.assert_close(
            getattr(actual, name).double(), getattr(expected, name), rtol=2e-5, atol=5e-6, equal_nan=True, msg=name
        )


@pytest.mark.parametrize(
    ("window", "horizon", "kernel"),
    [
        (WIDEST, (10, 50), "narrow_bands_kernel"),
        (WIDEST + 1, (10, 50), "bands_kernel"),
        (1, (0, FARTHEST), "narrow_bands_kernel"),
        (1, (0, FARTHEST + 1), "bands_kernel"),
        (WIDEST, (10, None), "bands_kernel"),
    ],
)
def test_which_kernel_runs(window: int, horizon: tuple[int, int | None], kernel: str, kernels: list[str]) -> None:
    """The widest windows that fit, and one more, are right at the edges of blocks of 23 tokens."""
    assert narrow(window, horizon) == (kernel == "narrow_bands_kernel")
    assert_bands(normal(60, 2, 16), normal(60, 1, 16, seed=1), window=window, horizon=horizon)
    assert kernels == [kernel]


@pytest.mark.parametrize("keys", [16, 64])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1, "horizon": (0, 0)},
        {
            "window": 9,
            "horizon": (40, 45),
            "prompt_lens": [30],
        },  # rows far behind the block, and none before the prompt
        {"sliding_window": 4, "horizon": (2, 30)},  # the horizon ends within the window
        {"sliding_window": 4, "horizon": (10, 30)},  # and begins beyond it: no row sees the key
        {"sliding_window": 25, "softcap": 2.0, "sinks": SINKS},
        {"window": 10**12, "horizon": (3, 9), "sliding_window": 12},  # as wide as can be: not this kernel
    ],
    ids=str,
)
def test_forms_and_lengths(options: dict[str, Any], keys: int, kernels: list[str]) -> None:
    assert_bands(normal(75, 2, 16), normal(75, 1, 16, seed=1), keys, **options)
    assert kernels == ["bands_kernel" if options.get("window", 10) > WIDEST else "narrow_bands_kernel"]


def test_fewer_rows_than_keys() -> None:
    """The first tokens of a sequence have no row in q: they count as prompt."""
    q, k = normal(40, 2, 16), normal(90, 1, 16, seed=1)
    bounds, rows = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([0, 50, 90], [0, 33, 40]))
    assert_bands(q, k, cu_seqlens=rows, cu_seqlens_k=bounds, horizon=(2, 20))


def test_other_sequences_are_not_seen() -> None:
    """The keys before a sequence's first, and the rows behind its last, belong to others: NaN there, and here none."""
    q, k = normal(90, 2, 16), normal(90, 1, 16, seed=1)
    q[:30], k[:30], q[70:], k[70:] = (torch.nan,) * 4
    bounds = torch.tensor([0, 30, 70, 90], dtype=torch.int32, device=DEVICE)
    alone = attention_statistics(q[30:70], k[30:70], backend="reference")
    lse = torch.zeros(2, 90, device=DEVICE)
    lse[:, 30:70] = alone.lse
    among = attention_statistics(q, k, cu_seqlens=bounds, lse=lse, span=False, backend="triton")
    for name in ("waad", "fai"):
        expected = getattr(alone, name)
        actual = getattr(among, name)[:, 30:70]
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=5e-6, equal_nan=True, msg=name)


@pytest.mark.parametrize("undefined", [torch.nan, torch.inf])
def test_a_row_without_a_softmax_is_undefined_where_it_counts(undefined: float) -> None:
    """In its own WAAD and lse, and in the FAI of the keys that it reaches."""
    q, k = normal(60, 2, 16), normal(60, 1, 16, seed=1)
    lse = attention_statistics(q, k, backend="reference").lse
    lse[0, 40] = undefined
    bands = attention_statistics(q, k, lse=lse, span=False, horizon=(3, 20), backend="triton")
    places = torch.arange(60, device=DEVICE)
    assert torch.equal(bands.waad.isnan(), torch.stack([places == 40, places < 0]))
    assert torch.equal(bands.lse.isnan(), bands.waad.isnan())
    reached = (places >= 20) & (places <= 37)
    assert torch.equal(bands.fai.isnan(), torch.stack([reached, places < 0]) | (places > 56))
