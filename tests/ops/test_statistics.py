"""The ops: accuracy of every backend and instruction set, invariants, corner cases, compilation."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache

import pytest
import torch
from tensors import assert_same, normal, random_qkv
from torch import Tensor

from rhythm import _C
from rhythm.ops import reference
from rhythm.ops.statistics import AttentionStatistics, attention_statistics, attention_with_statistics

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RHYTHM_CPU_ISA", request.param)
    assert _C.selected_isa() == request.param
    return request.param


@cache
def case(index: int, dtype: torch.dtype) -> tuple:
    """(q, k, v, bounds, fp64 reference, plain torch) of SHAPES[index]."""
    lengths, prompts, heads, key_heads, size, window, horizon = SHAPES[index]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q, k, v = random_qkv(bounds[-1], heads, key_heads, size, dtype)
    return q, k, v, bounds, *exact_and_plain(q, k, v, bounds, prompts, window=window, horizon=horizon)


def exact_and_plain(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], prompts: list[int], **options) -> tuple:
    """(fp64 reference, plain torch: products in the input type, softmax and sums in fp32), each five tensors."""
    scale = q.shape[-1] ** -0.5
    exact = reference.attention_statistics(
        q.double(), k.double(), v_TGD=v.double(), bounds=bounds, prompt_lens=prompts, scale=scale, **options
    )
    plain = [torch.full_like(x, math.nan, dtype=torch.float32) for x in exact]
    group = q.shape[1] // k.shape[1]
    for i, (start, end, prompt) in enumerate(zip(bounds[:-1], bounds[1:], prompts, strict=True)):
        if start == end:
            continue
        rows = slice(start, end)
        keys = k[rows].repeat_interleave(group, dim=1)
        score = (q[rows].transpose(0, 1) @ keys.permute(1, 2, 0) * scale).float()
        score = score.masked_fill(torch.ones(end - start, end - start).triu(1).bool(), -math.inf)
        weights = score.softmax(-1)
        plain[0][i], plain[1][:, rows], plain[2][:, rows] = reference.sequence_statistics(
            weights, prompt_len=prompt, window=options["window"], horizon=options["horizon"]
        )
        plain[3][:, start + prompt : end] = score.logsumexp(-1)[:, prompt:]
        values = v[rows].repeat_interleave(group, dim=1).transpose(0, 1)
        plain[4][rows] = (weights.to(q.dtype) @ values).transpose(0, 1).float()
    return exact, plain


def fields(statistics: AttentionStatistics) -> dict[str, Tensor]:
    return {name: getattr(statistics, name) for name in ("span", "waad", "fai", "lse")}


# (lengths, prompt lengths, query heads, key heads, head size, window, horizon)
SHAPES = [
    ([1], [0], 1, 1, 16, 10, (10, 50)),
    ([63], [0], 4, 1, 32, 10, (0, 0)),
    ([111], [110], 8, 1, 80, 3, (0, 5)),
    ([63, 0, 1, 111], [5, 0, 1, 63], 4, 4, 64, 10, (10, 50)),
    ([300, 7], [40, 6], 8, 2, 96, 40, (1, 20)),
    ([290], [31], 2, 2, 112, 10, (10, None)),
    ([601], [100], 4, 2, 128, 300, (3, 400)),
    ([333, 129], [0, 128], 2, 1, 256, 10, (0, None)),
    ([140], [3], 3, 1, 33, 1, (7, 7)),
    ([1100], [500], 2, 1, 16, 10, (10, 700)),  # more than one column task, more than four key blocks
]


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_accuracy(isa: str, dtype: torch.dtype, index: int, assert_accurate: Callable[..., None]) -> None:
    _, prompts, _, _, _, window, horizon = SHAPES[index]
    q, k, v, bounds, exact, plain = case(index, dtype)
    options = {"window": window, "horizon": horizon, "prompt_lens": prompts, "backend": "cpu"}
    options |= {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    alone = attention_statistics(q, k, **options)
    out, beside = attention_with_statistics(q, k, v, **options)
    bands = attention_statistics(q, k, lse=exact[3].float(), span=False, **options)
    for name, expected, unfused in zip(("span", "waad", "fai", "lse"), exact, plain, strict=False):
        for result in (alone, beside) if name == "span" else (alone, beside, bands):
            unit = window if name == "waad" else 1e-3
            assert_accurate(name, dtype, getattr(result, name), expected, unfused, unit)
    assert bands.span is None
    assert_accurate("out", dtype, out, exact[4], plain[4])


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_extreme_logits(isa: str, dtype: torch.dtype, assert_accurate: Callable[..., None]) -> None:
    """Scores of several hundred: nearly one-hot rows whose maximum comes late."""
    q, k, v = random_qkv(400, 2, 1, 64, dtype, sharp=60.0)
    options = {"window": 10, "horizon": (10, 50)}
    exact, plain = exact_and_plain(q, k, v, [0, 400], [0], **options)
    out, statistics = attention_with_statistics(q, k, v, **options)
    for name, expected, unfused in zip(("span", "waad", "fai", "lse"), exact, plain, strict=False):
        assert_accurate(name, dtype, getattr(statistics, name), expected, unfused)
    assert_accurate("out", dtype, out, exact[4], plain[4])


def test_every_alignment_of_the_horizon(isa: str) -> None:
    """Tiles that lie within the horizon skip the mask: the edges must be right wherever they fall on a tile."""
    q, k, _ = random_qkv(190, 1, 1, 16, torch.float32)
    weights, _ = reference.attention_weights(q.double(), k.double(), 0.25)
    for lo, hi in [(lo, hi) for lo in (0, 1, 13) for hi in range(60, 100)]:
        _, _, expected = reference.sequence_statistics(weights, prompt_len=0, window=10, horizon=(lo, hi))
        actual = attention_statistics(q, k, horizon=(lo, hi)).fai
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-8, equal_nan=True, msg=f"{lo}, {hi}")


def test_keys_of_no_weight(isa: str) -> None:
    """Scores of −inf are weights of 0, also when they fill the first blocks of keys a row meets."""
    q, k, v = random_qkv(700, 2, 1, 32, torch.float32)
    q[..., 0] = 1.0
    k[:600, :, 0] = -math.inf
    out, statistics = attention_with_statistics(q, k, v)
    rest, expected = attention_with_statistics(q[600:], k[600:], v[600:])
    assert statistics.lse[:, :600].isnan().all()
    torch.testing.assert_close(out[600:], rest)
    torch.testing.assert_close(statistics.lse[:, 600:], expected.lse)
    torch.testing.assert_close(statistics.waad[:, 600:], expected.waad)
    torch.testing.assert_close(statistics.fai[:, 600:], expected.fai, equal_nan=True)


def test_batched_equals_packed(isa: str) -> None:
    q, k, v = (x.unflatten(0, (3, 50)) for x in random_qkv(150, 4, 2, 32, torch.float32))
    prompts = torch.tensor([0, 7, 49])
    batched = attention_statistics(q, k, prompt_lens=prompts)
    assert batched.waad.shape == batched.fai.shape == batched.lse.shape == (3, 4, 50)
    for i in range(3):
        packed = attention_statistics(q[i], k[i], prompt_lens=prompts[i : i + 1])
        assert_same(
            AttentionStatistics(batched.span[i : i + 1], batched.waad[i], batched.fai[i], batched.lse[i]),
            packed,
        )
    bands = attention_statistics(q, k, prompt_lens=prompts, lse=batched.lse, span=False)
    torch.testing.assert_close(bands.fai, batched.fai, equal_nan=True)
    out, _ = attention_with_statistics(q, k, v)
    torch.testing.assert_close(out[2], attention_with_statistics(q[2], k[2], v[2])[0], rtol=0, atol=0)


def test_any_strides(isa: str) -> None:
    q, k, v = random_qkv(90, 4, 2, 24, torch.float32)
    expected_out, expected = attention_with_statistics(q, k, v, prompt_lens=[9])

    def scattered(x: Tensor) -> Tensor:
        """The same values with gaps between tokens and elements, heads outermost, in storage full of NaN."""
        tokens, heads, size = x.shape
        storage = torch.full((heads, 2 * tokens, 3 * size), math.nan)
        view = storage[:, 1::2, 2::3].transpose(0, 1)
        view.copy_(x)
        return view

    out, actual = attention_with_statistics(scattered(q), scattered(k), scattered(v), prompt_lens=[9])
    assert_same(actual, expected)
    torch.testing.assert_close(out, expected_out, rtol=0, atol=0)
    one_key = k[:1].expand(90, 2, 24)  # stride 0 along tokens
    assert_same(attention_statistics(q, one_key), attention_statistics(q, one_key.contiguous()))


def test_reruns_threads_and_company_change_no_bit(isa: str) -> None:
    q, k, _ = random_qkv(700, 4, 2, 64, torch.bfloat16)
    cu_seqlens = torch.tensor([0, 200, 201, 700], dtype=torch.int32)
    first = attention_statistics(q, k, cu_seqlens=cu_seqlens, prompt_lens=[20, 0, 100])
    assert_same(first, attention_statistics(q, k, cu_seqlens=cu_seqlens, prompt_lens=[20, 0, 100]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same(first, attention_statistics(q, k, cu_seqlens=cu_seqlens, prompt_lens=[20, 0, 100]))
    finally:
        torch.set_num_threads(threads)
    alone = attention_statistics(q[201:], k[201:], prompt_lens=[100])
    assert torch.equal(alone.span[0], first.span[2])
    for name in ("waad", "fai", "lse"):
        torch.testing.assert_close(fields(alone)[name], fields(first)[name][:, 201:], rtol=0, atol=0, equal_nan=True)


def test_invariants(isa: str) -> None:
    q, k, v = random_qkv(257, 4, 2, 48, torch.float32)
    statistics = attention_statistics(q, k, horizon=(0, None))
    rows_per_key = torch.arange(257, 0, -1)
    # Every row's weights sum to 1, so the column sums add up to the number of rows.
    torch.testing.assert_close((statistics.fai * rows_per_key).sum(-1), torch.full((4,), 257.0))
    # Attention to ones is one: rows of A sum to 1 in the output too.
    out, _ = attention_with_statistics(q, k, torch.ones_like(v))
    torch.testing.assert_close(out, torch.ones_like(out))
    # A constant added to every key moves all scores of a row alike.
    shifted = attention_statistics(q, k + normal(48), horizon=(0, None))
    for name in ("span", "waad", "fai"):
        torch.testing.assert_close(fields(shifted)[name], fields(statistics)[name], rtol=1e-4, atol=1e-5)
    # A window as long as the sequence cuts nothing: the mean of WAAD over the rows is the span.
    wide = attention_statistics(q, k, window=257)
    torch.testing.assert_close(wide.waad.mean(-1), wide.span[0], rtol=1e-5, atol=1e-4)
    # The negative of q under the negative scale.
    negative = attention_statistics(-q, k, scale=-(48**-0.5), horizon=(0, None))
    assert_same(negative, statistics)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_stays_where_it_touches(backend: str, poison: float) -> None:
    """One bad element of k at s = 70 touches rows t ≥ 70 of its group; one of q at t = 40 its own row and head."""
    q, k, _ = random_qkv(120, 4, 2, 32, torch.float32)
    clean = attention_statistics(q, k, horizon=(2, 20), backend=backend)
    bad_k, bad_q = k.clone(), q.clone()
    bad_k[70, 1, 3] = poison
    bad_q[40, 0, 3] = poison
    for bad, heads, touched in (
        (attention_statistics(q, bad_k, horizon=(2, 20), backend=backend), [2, 3], range(70, 120)),
        (attention_statistics(bad_q, k, horizon=(2, 20), backend=backend), [0], [40]),
    ):
        undefined = torch.zeros(4, 120, dtype=torch.bool)
        for head in heads:
            for t in touched:
                score = (bad_q if touched == [40] else q)[t, head] @ (bad_k if touched != [40] else k)[
                    : t + 1, head // 2
                ].T
                undefined[head, t] = bool(score.isnan().any() or (score == math.inf).any())
        assert undefined.any()
        assert torch.equal(bad.lse.isnan(), undefined)
        assert torch.equal(bad.waad.isnan(), undefined)
        assert torch.equal(bad.span[0].isnan(), undefined.any(-1))
        reached = torch.zeros(4, 120, dtype=torch.bool)
        for s in range(118):
            reached[:, s] = undefined[:, s + 2 : s + 21].any(-1)
        reached[:, 118:] = True  # no row within the horizon
        assert torch.equal(bad.fai.isnan(), reached)
        untouched = ~undefined
        untouched[heads] = False
        torch.testing.assert_close(bad.waad[untouched], clean.waad[untouched], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_corner_cases(backend: str) -> None:
    q, k, v = random_qkv(12, 4, 2, 16, torch.float32)
    none = attention_statistics(q[:0], k[:0], backend=backend)
    assert none.waad.shape == (4, 0)
    assert none.span.shape == (1, 4)
    assert none.span.isnan().all()
    out, _ = attention_with_statistics(q[:0], k[:0], v[:0], backend=backend)
    assert out.shape == (0, 4, 16)
    no_sequence = attention_statistics(q[:0], k[:0], cu_seqlens=torch.zeros(1, dtype=torch.int32), backend=backend)
    assert no_sequence.span.shape == (0, 4)

    all_prompt = attention_statistics(q, k, prompt_lens=[12], backend=backend)
    assert all(x.isnan().all() for x in fields(all_prompt).values())
    out, _ = attention_with_statistics(q, k, v, prompt_lens=[12], backend=backend)
    torch.testing.assert_close(out, attention_with_statistics(q, k, v, backend=backend)[0])

    single = attention_statistics(q[:1], k[:1], horizon=(0, 3), backend=backend)
    assert single.waad.eq(0).all()
    assert single.span.eq(0).all()
    torch.testing.assert_close(single.fai, torch.ones(4, 1))
    torch.testing.assert_close(single.lse[:, 0], (q[0] * k[0].repeat_interleave(2, 0)).sum(-1) / 4)

    detached = attention_statistics(q.clone().requires_grad_(), k.clone().requires_grad_(), backend=backend)
    assert not any(x.requires_grad for x in fields(detached).values())


def test_given_lse_is_used() -> None:
    """A lse twice too small in probability doubles every weight of the bands."""
    q, k, _ = random_qkv(80, 2, 1, 16, torch.float32)
    full = attention_statistics(q, k)
    bands = attention_statistics(q, k, lse=full.lse - math.log(2), span=False)
    torch.testing.assert_close(bands.fai, 2 * full.fai, equal_nan=True)
    torch.testing.assert_close(10 - bands.waad, 2 * (10 - full.waad))


def test_lse_of_prompt_rows_is_not_read() -> None:
    q, k, _ = random_qkv(80, 2, 1, 16, torch.float32)
    full = attention_statistics(q, k, prompt_lens=[30])
    assert full.lse[:, :30].isnan().all()
    bands = attention_statistics(q, k, prompt_lens=[30], lse=full.lse, span=False)
    torch.testing.assert_close(bands.fai, full.fai, equal_nan=True)
    torch.testing.assert_close(bands.waad, full.waad, equal_nan=True)


def test_compiles_without_a_graph_break() -> None:
    q, k, v = random_qkv(60, 4, 2, 16, torch.float32)
    cu_seqlens = torch.tensor([0, 25, 60], dtype=torch.int32)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        statistics = attention_statistics(q * 2, k, cu_seqlens=cu_seqlens, prompt_lens=[3, 5])
        out, beside = attention_with_statistics(q * 2, k, v, cu_seqlens=cu_seqlens)
        return statistics.span + 1, statistics.waad * 2, beside.fai, out + 1

    compiled = torch.compile(call, fullgraph=True)
    for actual, expected in zip(compiled(q, k, v), call(q, k, v), strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)

    def batched(q: Tensor, k: Tensor) -> Tensor:
        statistics = attention_statistics(q, k, horizon=(1, None))
        return attention_statistics(q, k, lse=statistics.lse, span=False).waad.nan_to_num() + 1

    q4, k4 = q.unflatten(0, (2, 30)), k.unflatten(0, (2, 30))
    torch.testing.assert_close(torch.compile(batched, fullgraph=True)(q4, k4), batched(q4, k4))


def test_registered_ops_are_sound() -> None:
    q, k, v = random_qkv(20, 4, 2, 16, torch.float32)
    # Without prompts and from distance 0 on nothing is NaN, which the checks would find unlike itself.
    options = (torch.tensor([0, 8, 20], dtype=torch.int32), None, 0.25, 10, 0, 5)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.rhythm.attention_statistics.default, (q, k, *options, None, True, "cpu"), test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.rhythm.attention_with_statistics.default, (q, k, v, *options, "cpu"), test_utils=checks
    )


@pytest.mark.timing
def test_other_python_threads_run_meanwhile() -> None:
    """The GIL is released: a counting thread runs while the op does."""
    q, k, _ = random_qkv(6000, 4, 1, 64, torch.float32)
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        counter.start()
        before = counted[0]
        attention_statistics(q, k)
        during = counted[0] - before
    finally:
        stop.set()
        counter.join()
        torch.set_num_threads(threads)
    assert during > 10_000  # a held GIL would let it count for a switch interval or two, some thousands at most
