"""The answers asked for by name (also=): the definitions, the kernels' accuracy, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from forms import BACKENDS, FORMS, HEADS, KEYS, PROMPTS, SINKS, Packed, converted, maps, packed, responses
from tensors import assert_same, normal, random_qkv
from torch import Tensor

from rhythm import _C, attention_statistics, attention_with_statistics
from rhythm.ops import backends
from rhythm.ops.answers import ALSO
from rhythm.ops.backends import in_blocks

FIRST = 3


def expected_answers(case: Packed, form: dict[str, Any]) -> dict[str, Tensor]:
    """Each of ALSO [H, T], and max_logit of all rows under "of all rows"."""
    weights, lse = maps(case, form)
    names = (*ALSO, "of all rows")
    wanted = {name: torch.full((HEADS, sum(KEYS)), math.nan, dtype=torch.float64) for name in names}
    start = 0
    for a, rows, prompt, response in zip(weights, case.rows, PROMPTS, responses(case, PROMPTS), strict=True):
        n = a.shape[-1]
        prompt = max(prompt, n - rows)
        for h in range(HEADS):
            for t in range(n - rows, n):
                row, at = a[h, t].tolist(), (h, start + t)
                wanted["of all rows"][at] = math.log(max(row)) + float(lse[at])
                if t not in response:
                    continue
                wanted["max_logit"][at] = wanted["of all rows"][at]
                wanted["top1"][at] = max(row)
                wanted["entropy"][at] = -sum(x * math.log(x) for x in row if x > 0)
                wanted["first_mass"][at] = sum(row[:FIRST])
                wanted["prompt_mass"][at] = sum(row[:prompt])
        start += n
    return wanted


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
@pytest.mark.parametrize("fewer", [False, True], ids=["as many rows", "fewer rows"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_answer_is_the_definition(form: dict[str, Any], fewer: bool, backend: str, dtype: torch.dtype) -> None:
    case = packed(fewer)
    (q, k, v), options = converted(case, form, dtype)
    here = {"prompt_lens": PROMPTS, "backend": backend} | options
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    expected = expected_answers(case, form)
    lse = maps(case, form)[1].to(torch.promote_types(dtype, torch.float32))
    results = {
        "alone": attention_statistics(q, k, also=ALSO, first=FIRST, **here),
        "beside": attention_with_statistics(q, k, v, also=ALSO, first=FIRST, **here)[1],
        "lse given": attention_statistics(q, k, lse=lse, also=ALSO, first=FIRST, **here),
        "bands": attention_statistics(q, k, lse=lse, span=False, also=ALSO, first=FIRST, **here),
        "masses of bands": attention_statistics(
            q, k, lse=lse, span=False, also=("first_mass", "prompt_mass"), first=FIRST, **here
        ),
    }
    rows = attention_statistics(q, k, also=["max_logit"], prompt_rows=True, **here)
    assert rows.top1 is None
    checks = [("max_logit of all rows", rows.max_logit, expected["of all rows"])]
    checks += [(f"{way}: {name}", getattr(got, name), expected[name]) for way, got in results.items() for name in ALSO]
    assert results["masses of bands"].entropy is None
    for name, actual, wanted in checks:
        if actual is not None:
            torch.testing.assert_close(
                actual.double(), wanted, rtol=tolerance, atol=tolerance, equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip


# (key lengths, query lengths, prompts, query heads, key heads, head size, first, form): prompts that end anywhere in a
# block of keys, first keys beyond one block, many tiles
SHAPES: list[Any] = [
    ([700], [700], [431], 4, 2, 64, 4, {}),
    ([300, 7, 0, 601], [100, 7, 0, 500], [40, 6, 0, 256], 4, 1, 33, 257,
     {"sliding_window": 37, "softcap": 5.0, "sinks": SINKS.float()}),
    ([1100], [900], [0], 4, 4, 16, 600, {"sliding_window": 257, "sinks": SINKS.float()}),
    ([520, 530], [520, 530], [512, 17], 2, 2, 128, 1, {"softcap": 2.0}),
]  # fmt: skip


def shaped(index: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    keys, rows, prompts, heads, key_heads, size, first, form = SHAPES[index]
    q, k, v = (
        normal(sum(n), h, size, seed=seed, dtype=dtype)
        for seed, (n, h) in enumerate(((rows, heads), (keys, key_heads), (keys, key_heads)))
    )
    cu_rows, cu_keys = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (rows, keys))
    bounds = {"cu_seqlens": cu_rows, "cu_seqlens_k": cu_keys, "prompt_lens": prompts}
    return [2.0 * q, k, v], bounds | {"first": first, "also": ALSO} | form


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index", range(len(SHAPES)))
@pytest.mark.parametrize("isa", _C.available_isas())
def test_accuracy(
    isa: str, index: int, dtype: torch.dtype, assert_accurate: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RHYTHM_CPU_ISA", isa)
    (q, k, v), options = shaped(index, dtype)
    exact = attention_statistics(q.double(), k.double(), backend="reference", **options)
    plain = attention_statistics(q, k, backend="reference", **options)
    for result in (
        attention_statistics(q, k, backend="cpu", **options),
        attention_with_statistics(q, k, v, backend="cpu", **options)[1],
    ):
        for name in ALSO:
            assert_accurate(name, dtype, getattr(result, name), getattr(exact, name), getattr(plain, name))


@pytest.mark.parametrize("index", range(len(SHAPES)))
@pytest.mark.parametrize("name", ALSO)
def test_asking_changes_nothing_else(name: str, index: int) -> None:
    (q, k, v), options = shaped(index, torch.float32)
    options |= {"prompt_rows": name == "max_logit"}
    before = {key: value for key, value in options.items() if key not in ("also", "first", "prompt_rows")}
    out, beside = attention_with_statistics(q, k, v, **before)
    out_too, beside_too = attention_with_statistics(q, k, v, **options | {"also": (name,)})
    assert_same(beside_too, beside)
    assert_same(out_too, out)
    assert_same(attention_statistics(q, k, **options | {"also": (name,)}), attention_statistics(q, k, **before))
    # Bands go by the given lse, though a sweep is made for the answer.
    lse = beside.lse + 0.3
    bands = attention_statistics(q, k, lse=lse, span=False, **before)
    bands_too = attention_statistics(q, k, lse=lse, span=False, **options | {"also": (name,)})
    for field in ("waad", "fai", "lse"):
        assert_same(getattr(bands_too, field), getattr(bands, field))
    assert bands_too.span is None


@pytest.mark.parametrize("isa", _C.available_isas())
def test_a_given_lse_scales_the_weights(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHYTHM_CPU_ISA", isa)
    q, k, _ = random_qkv(300, 2, 1, 16)
    own = attention_statistics(q, k, prompt_lens=[30], also=ALSO)
    half = attention_statistics(q, k, prompt_lens=[30], lse=own.lse + math.log(2), also=ALSO)
    assert_same(half.max_logit, own.max_logit)
    for name in ("top1", "first_mass", "prompt_mass"):
        torch.testing.assert_close(getattr(half, name), getattr(own, name) / 2, equal_nan=True)
    torch.testing.assert_close(half.entropy, (own.entropy + math.log(2)) / 2, equal_nan=True)


def test_even_attention_by_hand() -> None:
    """With q = 0 row t spreads evenly over t + 1 keys."""
    got = attention_statistics(torch.zeros(6, 2, 8), normal(6, 1, 8), prompt_lens=[2], first=3, also=ALSO)
    nan, rows = [math.nan] * 2, torch.tensor([3.0, 4.0, 5.0, 6.0])
    for name, wanted in (
        ("max_logit", torch.zeros(4)),
        ("top1", 1 / rows),
        ("entropy", rows.log()),
        ("first_mass", 3 / rows),
        ("prompt_mass", 2 / rows),
    ):
        row = torch.cat([torch.tensor(nan), wanted])
        torch.testing.assert_close(getattr(got, name), row.expand(2, 6), equal_nan=True, msg=name)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_undefined_stays_where_it_touches(backend: str) -> None:
    q, k, _ = random_qkv(300, 4, 2, 16)
    k[100, 0, 3] = math.nan
    got = attention_statistics(q, k, prompt_lens=[20], also=ALSO, prompt_rows=True, backend=backend)
    undefined = torch.zeros(4, 300, dtype=torch.bool)
    undefined[:2, 100:] = True
    assert torch.equal(got.max_logit.isnan(), undefined)
    undefined[:, :20] = True
    for name in ALSO[1:]:
        assert torch.equal(getattr(got, name).isnan(), undefined), name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_without_any_weight_have_a_sink_alone(backend: str) -> None:
    q, k = torch.ones(5, 2, 4), torch.full((5, 2, 4), -math.inf)
    got = attention_statistics(q, k, sinks=torch.tensor([1.0, 50.0]), also=ALSO, prompt_lens=[2], backend=backend)
    assert (got.max_logit[:, 2:] == -math.inf).all()
    for name in ALSO[1:]:
        assert (getattr(got, name)[:, 2:] == 0).all(), name
    alone = attention_statistics(q, k, also=ALSO, backend=backend)
    assert all(getattr(alone, name).isnan().all() for name in ALSO)


def test_one_hot_rows_have_no_entropy() -> None:
    """Scores of many hundreds, whose largest comes late: log p of what is left has no room in fp32."""
    q, k = torch.ones(700, 1, 16), 0.01 * normal(700, 1, 16)
    k[:, 0, 0] += torch.arange(700.0) * 40
    got = attention_statistics(q, k, also=ALSO, backend="cpu")
    assert got.entropy.isfinite().all()
    assert (got.entropy.abs() < 1e-3).all()
    torch.testing.assert_close(got.top1, torch.ones(1, 700), rtol=1e-4, atol=0)


def test_batches_are_their_sequences() -> None:
    q, k, v = (x.unflatten(0, (3, 50)) for x in random_qkv(150, 4, 2, 32))
    prompts = [0, 7, 49]
    batched = attention_statistics(q, k, prompt_lens=prompts, also=ALSO)
    _, beside = attention_with_statistics(q, k, v, prompt_lens=prompts, also=ALSO)
    for i in range(3):
        one = attention_statistics(q[i], k[i], prompt_lens=prompts[i : i + 1], also=ALSO)
        for name in ALSO:
            assert_same(getattr(batched, name)[i], getattr(one, name))
            assert_same(getattr(beside, name)[i], getattr(one, name))


@pytest.mark.parametrize("index", [0, 1])
def test_backends_without_these_take_plain_torch_in_blocks(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(type(backends.BACKENDS["reference"])):  # type: ignore[misc]
        pass

    monkeypatch.setitem(backends.BACKENDS, "bare", Bare())
    (q, k, _), options = shaped(index, torch.float32)
    options |= {"prompt_rows": True}
    whole = attention_statistics(q, k, backend="bare", **options)
    monkeypatch.setattr(in_blocks, "SCORES_AT_ONCE", 20_000)  # a few rows at a time
    in_parts = attention_statistics(q, k, backend="bare", **options)
    kernels = attention_statistics(q, k, backend="cpu", **options)
    for name in ALSO:
        torch.testing.assert_close(getattr(in_parts, name), getattr(whole, name), rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(getattr(kernels, name), getattr(whole, name), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_compiled_without_a_graph_break() -> None:
    q, k, v = random_qkv(60, 4, 2, 16)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        alone = attention_statistics(q * 2, k, also=("entropy", "top1"))
        out, beside = attention_with_statistics(q * 2, k, v, also=["max_logit"], first=2)
        return alone.entropy + 1, alone.top1, out, beside.max_logit, beside.waad

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    for actual, wanted in zip(compiled, call(q, k, v), strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"also": ("entropi",)}, r"also has 'entropi'; allowed are max_logit, .*; did you mean 'entropy'\?"),
        ({"also": ("max_logits",)}, r"also has 'max_logits'; .*; did you mean 'max_logit'\?"),
        ({"also": ("sink",)}, r"also has 'sink'; allowed are max_logit, top1, entropy, first_mass, prompt_mass$"),
        ({"also": (3,)}, "also has 3; allowed are"),
        ({"also": "entropy"}, r"also is 'entropy'; it must be a sequence of names.*; did you mean \('entropy',\)\?"),
        ({"also": None}, "also is None; it must be a sequence of names"),
        ({"also": ("first_mass",), "first": 0}, "first is 0; it must be an integer of at least 1"),
        ({"also": ("first_mass",), "first": 2.5}, "first is 2.5; it must be an integer"),
        ({"first": -1}, "first is -1; it must be an integer"),
        ({"also": ("entropy",), "prompt_rows": True}, r"prompt_rows is True; it goes with 'max_logit' in also"),
        ({"prompt_rows": True}, r"prompt_rows is True; it goes with 'max_logit' in also, which is \(\)"),
    ],
)
@pytest.mark.parametrize("with_output", [False, True])
def test_bad_input_is_named(change: dict[str, Any], message: str, with_output: bool) -> None:
    q, k, v = random_qkv(6, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention_with_statistics(q, k, v, **change) if with_output else attention_statistics(q, k, **change)


def test_the_registered_op_refuses_what_does_not_exist() -> None:
    q, k, _ = random_qkv(6, 4, 2, 8)
    op = torch.ops.rhythm.attention_statistics_also
    given = (q, k, None, None, 0.5, 10, 10, 50, None, True, "cpu")
    *_, answers = op(*given, also="entropy,top1")
    wanted = attention_statistics(q, k, scale=0.5, also=("top1", "entropy"))
    assert_same(answers, torch.stack([wanted.top1, wanted.entropy]))
    assert op(*given)[4].shape == (0, 4, 6)
    with pytest.raises(ValueError, match=r"also has 'entropie'; .* did you mean 'entropy'"):
        op(*given, also="entropie")
    with pytest.raises(ValueError, match="first is 0"):
        op(*given, also="entropy", first=0)
