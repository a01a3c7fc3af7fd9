"""All variants of a launch: loaders, tile shapes, wide offsets, long sequences and invalid lengths."""

from __future__ import annotations

from functools import partial

import pytest
import tensors
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the extra triton")

from rhythm.kernels.launch import forced
from rhythm.kernels.tile_tables import KernelKey, Tile
from rhythm.ops import reference
from rhythm.ops.arguments import Request
from rhythm.ops.backends.triton import TritonBackend
from rhythm.ops.statistics import attention_statistics, attention_with_statistics
from rhythm.shapes import Sequences

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, on rows beyond the end
]
NAMES = ("span", "waad", "fai", "lse")
normal = partial(tensors.normal, device=DEVICE)
assert_same = partial(tensors.assert_same, rtol=2e-5, atol=2e-6, check_dtype=False)


@pytest.mark.parametrize("horizon", [(10, 50), (3, None)], ids=str)
@pytest.mark.parametrize("tma", [False, True], ids=["threads", "tma"])
@pytest.mark.parametrize("sizes", [(16, 64), (64, 16), (32, 32)], ids=str)
def test_tile_shapes_and_loaders(sizes: tuple[int, int], tma: bool, horizon: tuple[int, int | None]) -> None:
    q, k, v = normal(160, 2, 24), normal(160, 1, 24, seed=1), normal(160, 1, 24, seed=2)
    arguments = {
        "cu_seqlens": torch.tensor([0, 110, 110, 160], dtype=torch.int32, device=DEVICE),
        "prompt_lens": [20, 0, 23],
        "horizon": horizon,
    }
    seen: list[KernelKey] = []

    def choose(key: KernelKey) -> list[Tile]:
        seen.append(key)
        return [Tile(*sizes, 1, 1, tma)]

    expected_out, expected = attention_with_statistics(q, k, v, backend="reference", **arguments)
    with forced(choose):
        out, beside = attention_with_statistics(q, k, v, backend="triton", **arguments)
        alone = attention_statistics(q, k, backend="triton", **arguments)
        bands = attention_statistics(q, k, lse=expected.lse, span=False, backend="triton", **arguments)
    torch.testing.assert_close(out, expected_out, rtol=2e-5, atol=2e-6)
    assert_same(beside, expected)
    assert_same(alone, expected)
    torch.testing.assert_close(bands.waad, expected.waad, rtol=2e-5, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(bands.fai, expected.fai, rtol=2e-5, atol=2e-6, equal_nan=True)
    band = "" if horizon[1] is None else "_band"
    assert [key.kernel for key in seen] == ["row_values", f"column{band}", "row", f"column{band}", f"bands{band}"]


def test_batched_through_descriptors() -> None:
    """Descriptors of [B, T, H, D] in which heads are the outer dimension, as transformers lays them out."""
    q, k, v = (normal(2, heads, 130, 32, seed=heads).transpose(1, 2) for heads in (4, 2, 2))
    expected_out, expected = attention_with_statistics(q, k, v, prompt_lens=[7, 60], backend="reference")
    with forced(lambda key: [Tile(32, 32, 1, 1, True)]):
        out, actual = attention_with_statistics(q, k, v, prompt_lens=[7, 60], backend="triton")
    torch.testing.assert_close(out, expected_out, rtol=2e-5, atol=2e-6)
    assert_same(actual, expected)


def test_many_sequences() -> None:
    """Programs find their sequence by bisection: lengths around the tile's, and empty ones."""
    lengths = [0, 1, 31, 32, 33, 0, 0, 64, 65, 2, 96, 17, 0]
    tokens = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    prompts = torch.tensor([n // 3 for n in lengths], device=DEVICE)
    q, k = normal(tokens, 2, 16), normal(tokens, 1, 16, seed=1)
    arguments = {"cu_seqlens": cu_seqlens, "prompt_lens": prompts, "horizon": (2, 40)}
    expected = attention_statistics(q, k, backend="reference", **arguments)
    assert_same(attention_statistics(q, k, backend="triton", **arguments), expected)


@pytest.mark.parametrize("far", ["tokens", "dims"])
def test_offsets_of_more_than_32_bits(far: str) -> None:
    """Consecutive tokens (or dimensions) lie 2³¹ / 40 elements apart; the memory between them is only reserved."""
    tokens, heads, size, stride = 70, 2, 16, 2**31 // 40
    shape = (tokens, heads, size)
    strides = (stride, size, 1) if far == "tokens" else (heads, 1, 4 * stride)
    length = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    assert length > 2**31
    spread = torch.empty(length, dtype=torch.bfloat16, device=DEVICE).as_strided(shape, strides)
    dense = normal(*shape, dtype=torch.bfloat16)
    spread.copy_(dense)
    expected_out, expected = attention_with_statistics(dense, dense, dense, backend="triton")
    out, actual = attention_with_statistics(spread, spread, spread, backend="triton")
    assert torch.equal(out, expected_out)
    for name in NAMES:
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)


def test_131072_tokens() -> None:
    """The last rows of a long sequence against the definition in fp64; far spans are counted to the token."""
    tokens, rows = 131072, 40
    q, k = normal(tokens, 1, 16), normal(tokens, 1, 16, seed=1)
    with forced(lambda key: [Tile(64, 1024, 1, 1)]):
        actual = attention_statistics(q, k, prompt_lens=[tokens - rows], backend="triton")
    position = torch.arange(tokens, dtype=torch.float64, device=DEVICE)
    score = q[-rows:, 0].double() @ k[:, 0].double().T / 4
    distance = position[-rows:, None] - position
    weight = score.masked_fill(distance < 0, -torch.inf).softmax(-1)
    span = (weight * distance).sum(-1).mean()
    waad = (weight * distance.clamp(max=10)).sum(-1)
    torch.testing.assert_close(actual.span[0, 0].double(), span, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual.waad[0, -rows:].double(), waad, rtol=1e-6, atol=0)
    assert actual.waad[0, :-rows].isnan().all()
    fai = torch.stack([weight[10 + i :, tokens - rows + i].mean() for i in range(rows - 10)])
    torch.testing.assert_close(actual.fai[0, -rows:-10].double(), fai, rtol=2e-5, atol=0)


@pytest.mark.parametrize("given_lse", [False, True], ids=["sweep", "bands"])
@pytest.mark.parametrize(
    ("cu_seqlens", "prompts", "same_as", "same_prompts"),
    [
        ([0, 50, 100000], [0, 3], [0, 50, 90], [0, 3]),
        ([-7, 50, 90], [2, 0], [0, 50, 90], [2, 0]),
        ([0, 2**31 - 1, 90], [0, 0], [0, 90, 90], [0, 0]),
        ([0, 50, 90], [-4, 2**31 - 1], [0, 50, 90], [0, 40]),
        ([60, 60, 90], [0, 0], [60, 60, 90], [0, 0]),
    ],
    ids=["too long", "negative", "huge", "prompts", "starts late"],
)
def test_lengths_beyond_the_tensors_are_cut(
    cu_seqlens: list[int], prompts: list[int], same_as: list[int], same_prompts: list[int], given_lse: bool
) -> None:
    """Without the checks of the op, as on a GPU. NaN around q and k would show in results if it were read."""
    surrounded = torch.full((290, 2, 16), torch.nan, device=DEVICE)
    surrounded[100:190] = normal(90, 2, 16)
    q = k = surrounded[100:190]
    lse = attention_statistics(q, k, backend="reference").lse if given_lse else None

    def run(bounds: list[int], prompt_lens: list[int]) -> tuple[Tensor, ...]:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
        sequences = Sequences(cu_seqlens, torch.tensor(prompt_lens, device=DEVICE), 90, 2)
        options = {"scale": 0.25, "window": 10, "horizon": (2, 30), "lse_HT": lse, "span": not given_lse}
        outputs = TritonBackend().run(Request(q=q, k=k, v=None, sequences=sequences, **options))
        return outputs.span_BH, outputs.waad_HT, outputs.fai_HT, outputs.lse_HT

    defined = 0
    for actual, expected in zip(run(cu_seqlens, prompts), run(same_as, same_prompts), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        defined += int(expected.isfinite().sum())
    assert defined > 100


def test_values_are_not_read_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them would wait for the device."""

    def refuse(self: Sequences) -> None:
        raise AssertionError("read by the host")

    q, k = normal(60, 2, 16), normal(60, 2, 16, seed=1)
    cu_seqlens = torch.tensor([0, 60], dtype=torch.int32, device=DEVICE)
    sequences = Sequences(cu_seqlens, torch.tensor([5], device=DEVICE), 60, 1)
    monkeypatch.setattr(Sequences, "host", property(refuse))
    request = Request(q=q, k=k, v=None, sequences=sequences, scale=0.25, window=10, horizon=(2, 30))
    outputs = TritonBackend().run(request)
    spans, *_ = reference.attention_statistics(
        q.double(), k.double(), bounds=[0, 60], prompt_lens=[5], scale=0.25, window=10, horizon=(2, 30)
    )
    torch.testing.assert_close(outputs.span_BH.double(), spans, rtol=1e-5, atol=0)
