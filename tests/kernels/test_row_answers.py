"""The answers of `also=` in the Triton kernels, against the fp64 reference."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tensors
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the extra triton")

from rhythm import attention_statistics, attention_with_statistics
from rhythm.kernels.launch import forced, launch
from rhythm.kernels.tile_tables import Tile
from rhythm.ops.answers import ALSO
from rhythm.ops.backends import in_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, on rows beyond the end
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]
normal = partial(tensors.normal, device=DEVICE)
random_qkv = partial(tensors.random_qkv, device=DEVICE)
SINKS = torch.tensor([-1.0, 0.5, 3.0, -torch.inf], device=DEVICE)
BASIC = ("span", "waad", "fai", "lse")

# (key lengths, query lengths, prompts, query heads, key heads, head size, first, form)
SHAPES: list[Any] = [
    ([130], [130], [70], 2, 1, 33, 4, {}),
    ([100, 7, 0, 70], [60, 7, 0, 70], [50, 6, 0, 33], 4, 2, 16, 40, {"sliding_window": 37}),
    ([120], [120], [45], 4, 4, 16, 90, {"sliding_window": 50, "softcap": 3.0, "sinks": SINKS}),
    ([110], [90], [0], 4, 1, 80, 1, {"sinks": SINKS}),
    ([33, 65], [33, 40], [1, 64], 4, 2, 16, 200, {"softcap": 2.0}),
]  # fmt: skip


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The launches of row_answers_kernel; plain torch in blocks of rows is refused."""
    launches: list[dict[str, Any]] = []

    def recorded(kernel: Any, programs: int, **arguments: Any) -> None:
        assert kernel.fn.__name__ == "row_answers_kernel"
        launches.append(arguments)
        launch(kernel, programs, **arguments)

    def refuse(*arguments: object) -> None:
        raise AssertionError("plain torch computes the answers")

    monkeypatch.setattr(sys.modules["rhythm.kernels.row_answers"], "launch", recorded)
    monkeypatch.setattr(in_blocks, "answers", refuse)
    return launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_accuracy(index: int, dtype: torch.dtype, assert_accurate: Callable[..., None]) -> None:
    keys, rows, prompts, heads, key_heads, size, first, form = SHAPES[index]
    q, k, v = (
        normal(sum(n), h, size, seed=seed, dtype=dtype)
        for seed, (n, h) in enumerate(((rows, heads), (keys, key_heads), (keys, key_heads)))
    )
    q = 2 * q
    cu_rows, cu_keys = (torch.tensor([0, *n]).cumsum(0).to(DEVICE, torch.int32) for n in (rows, keys))
    options = {"cu_seqlens": cu_rows, "cu_seqlens_k": cu_keys, "prompt_lens": prompts, "first": first, "also": ALSO}
    options |= form | {"prompt_rows": True}
    exact = attention_statistics(q.double(), k.double(), backend="reference", **options)
    plain = attention_statistics(q, k, backend="reference", **options)
    options |= {"backend": "triton"}
    given = options | {"lse": exact.lse.float()}
    for way, result in {
        "alone": attention_statistics(q, k, **options),
        "beside": attention_with_statistics(q, k, v, **options)[1],
        "lse given": attention_statistics(q, k, span=False, **given),
    }.items():
        for name in ALSO:
            actual = getattr(result, name)
            assert_accurate(name, dtype, actual, getattr(exact, name), getattr(plain, name))
            assert actual.isfinite().any(), (way, name)


def test_what_is_computed(kernels: list[dict[str, Any]]) -> None:
    """Each answer alone is what it is among all, in one launch; nothing else changes by it."""
    q, k, v = random_qkv(70, 2, 1, 16)
    options: dict[str, Any] = {"prompt_lens": [9], "backend": "triton"}
    before, all_of_them = (attention_statistics(q, k, also=also, **options) for also in ((), ALSO))
    assert len(kernels) == 1
    tensors.assert_same(all_of_them, before)
    for name in ALSO:
        kernels.clear()
        alone = attention_statistics(q, k, also=[name], **options)
        beside = attention_with_statistics(q, k, v, also=[name], **options)[1]
        assert len(kernels) == 2
        assert {place for x in kernels for place in x["also"]} == {-1, 0}
        tensors.assert_same(alone, before)
        tensors.assert_same(getattr(alone, name), getattr(all_of_them, name))
        tensors.assert_same(getattr(beside, name), getattr(all_of_them, name), rtol=1e-5, atol=1e-6)
        assert all(getattr(alone, other) is None for other in ALSO if other != name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's products")
def test_masses_visit_their_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    products: list[int] = []
    dot = InterpreterBuilder.create_dot

    def counted(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        products[-1] += a.data.shape[0] * b.data.shape[1]
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    q, k = normal(320, 1, 16), normal(320, 1, 16, seed=1)
    lse = torch.full((1, 320), 5.0)
    options: dict[str, Any] = {"prompt_lens": [96], "lse": lse, "span": False, "backend": "triton"}
    for also in ((), ("first_mass",), ("prompt_mass",), ("top1",)):
        products.append(0)
        attention_statistics(q, k, also=also, **options)
    bands, first, prompt, top1 = products
    assert first - bands == 224 * 32  # rows, one tile of keys
    assert prompt - bands == 224 * 96
    assert top1 - bands == sum(32 * (block + 1) * 32 for block in range(3, 10))


def test_a_given_lse_scales_the_weights() -> None:
    q, k, _ = random_qkv(100, 2, 1, 16)
    options: dict[str, Any] = {"prompt_lens": [30], "also": ALSO, "backend": "triton"}
    own = attention_statistics(q, k, **options)
    half = attention_statistics(q, k, lse=own.lse + math.log(2), **options)
    tensors.assert_same(half.max_logit, own.max_logit)
    for name in ("top1", "first_mass", "prompt_mass"):
        tensors.assert_same(getattr(half, name), getattr(own, name) / 2, rtol=1e-5, atol=1e-7)
    tensors.assert_same(half.entropy, (own.entropy + math.log(2)) / 2, rtol=1e-5, atol=1e-6)


def test_undefined_stays_where_it_touches() -> None:
    """Of a key with NaN, and of a given lse that is not finite."""
    q, k, _ = random_qkv(110, 4, 2, 16)
    lse = attention_statistics(q, k, backend="reference").lse
    bad = k.clone()
    bad[60, 0, 3] = math.nan
    options: dict[str, Any] = {"prompt_lens": [20], "also": ALSO, "prompt_rows": True, "first": 61, "backend": "triton"}
    undefined = torch.zeros(4, 110, dtype=torch.bool, device=DEVICE)
    undefined[:2, 60:] = True
    got = attention_statistics(q, bad, **options)
    assert torch.equal(got.max_logit.isnan(), undefined)
    undefined[:, :20] = True
    for name in ALSO[1:]:
        assert torch.equal(getattr(got, name).isnan(), undefined), name

    # With a lse the weights of other keys are what they are.
    got = attention_statistics(q, bad, lse=lse, **options | {"first": 60})
    prompt = torch.zeros_like(undefined)
    prompt[:, :20] = True
    for name in ("first_mass", "prompt_mass"):
        assert torch.equal(getattr(got, name).isnan(), prompt), name
    for name in ("top1", "entropy"):
        assert torch.equal(getattr(got, name).isnan(), undefined), name
    lse[0, 70] = math.inf
    got = attention_statistics(q, k, lse=lse, **options)
    for name in ALSO:
        assert getattr(got, name)[:, 20:].isnan().nonzero().tolist() == [[0, 50]], name


def test_rows_without_any_weight_have_a_sink_alone() -> None:
    q, k = torch.ones(45, 2, 16, device=DEVICE), torch.full((45, 2, 16), -math.inf, device=DEVICE)
    options: dict[str, Any] = {"also": ALSO, "prompt_lens": [2], "prompt_rows": True, "backend": "triton"}
    got = attention_statistics(q, k, sinks=torch.tensor([1.0, 50.0], device=DEVICE), **options)
    assert (got.max_logit == -math.inf).all()
    for name in ALSO[1:]:
        assert (getattr(got, name)[:, 2:] == 0).all(), name
    alone = attention_statistics(q, k, **options)
    assert all(getattr(alone, name).isnan().all() for name in ALSO)


def test_a_far_key_without_weight_has_no_entropy() -> None:
    """p·log p of a score of −inf is 0, also in the loop without masks."""
    q, k, _ = random_qkv(100, 1, 1, 16)
    q = q.abs()
    k[10] = -math.inf
    got, exact = (
        attention_statistics(q, k, also=("entropy",), prompt_lens=[20], backend=backend)
        for backend in ("triton", "reference")
    )
    assert exact.entropy[:, 20:].isfinite().all()
    tensors.assert_same(got.entropy, exact.entropy, rtol=1e-5, atol=1e-6)


def test_scores_of_thousands() -> None:
    """Exponents whose fp32 has no room for the digits of a weight: they go by the row sweep's two parts."""
    q, k = normal(100, 2, 16).round(), (2 * normal(100, 1, 16, seed=1)).round()  # products are exact
    q[..., 0] = k[..., 0] = 128
    options: dict[str, Any] = {"also": ALSO, "prompt_lens": [40], "first": 70}
    exact = attention_statistics(q.double(), k.double(), backend="reference", **options)
    got = attention_statistics(q, k, backend="triton", **options)
    for name in ALSO:
        tensors.assert_same(
            getattr(got, name), getattr(exact, name), rtol=1e-6 if name == "max_logit" else 2e-5, atol=1e-6,
            check_dtype=False,
        )  # fmt: skip


def test_batched_strided_and_negative_scale() -> None:
    q, k, _ = (x.unflatten(0, (2, 45)) for x in random_qkv(90, 4, 2, 24))
    options: dict[str, Any] = {"scale": -0.3, "prompt_lens": [0, 9], "also": ALSO}
    expected = attention_statistics(q, k, backend="reference", **options)
    q, k = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k))
    got = attention_statistics(q, k, backend="triton", **options)
    for name in ALSO:
        tensors.assert_same(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_other_tiles_and_reruns() -> None:
    q, k, _ = random_qkv(150, 2, 1, 16, torch.bfloat16)
    options: dict[str, Any] = {"also": ALSO, "sliding_window": 70, "prompt_lens": [41], "backend": "triton"}
    first, again = (attention_statistics(q, k, **options) for _ in range(2))
    with forced(lambda key: [Tile(16, 64, 1, 1)]):
        other = attention_statistics(q, k, **options)
    for name in ALSO:
        tensors.assert_same(getattr(again, name), getattr(first, name))
        tensors.assert_same(getattr(other, name), getattr(first, name), rtol=1e-5, atol=1e-6)


def test_nothing_to_do() -> None:
    q, k, v = random_qkv(12, 4, 2, 16)
    none = attention_statistics(q[:0], k[:0], also=ALSO, backend="triton")
    assert none.entropy.shape == (4, 0)
    out, all_prompt = attention_with_statistics(q, k, v, prompt_lens=[12], also=ALSO, backend="triton")
    assert all(getattr(all_prompt, name).isnan().all() for name in ALSO)
    assert out.isfinite().all()
    rows = attention_statistics(q, k, prompt_lens=[12], also=["max_logit"], prompt_rows=True, backend="triton")
    wanted: Tensor = attention_statistics(q, k, also=["max_logit"], backend="reference").max_logit
    tensors.assert_same(rows.max_logit, wanted, rtol=1e-5, atol=1e-6)
