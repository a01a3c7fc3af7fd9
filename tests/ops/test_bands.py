"""attention_bands: each window and horizon is what attention_statistics gives for it alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from forms import FORMS, HEADS, KEYS, PROMPTS, converted, maps, packed
from tensors import TRITON, assert_same, normal, random_qkv
from torch import Tensor

from rhythm import _C, attention_bands, attention_statistics
from rhythm.ops import backends

WINDOWS, HORIZONS = [1, 5, 12, 2**62], [(2, 12), (0, 0), (30, 40), (5, None), (60, 90)]


def one_by_one(q: Tensor, k: Tensor, lse: Tensor, windows: Any, horizons: Any, **options: Any) -> tuple[Tensor, Tensor]:
    waad = [attention_statistics(q, k, lse=lse, span=False, window=w, **options).waad for w in windows]
    fai = [attention_statistics(q, k, lse=lse, span=False, horizon=h, **options).fai for h in horizons]
    return torch.stack(waad), torch.stack(fai)


@pytest.mark.parametrize("fewer", [False, True], ids=["as many rows", "fewer rows"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form(form: dict[str, Any], fewer: bool) -> None:
    case = packed(fewer)
    (q, k, _), options = converted(case, form, torch.float32)
    lse = maps(case, form)[1].float()
    here = {"prompt_lens": PROMPTS} | options
    waad, fai = attention_bands(q, k, lse, windows=WINDOWS, horizons=HORIZONS, backend="cpu", **here)
    assert waad.shape == (4, HEADS, sum(KEYS))
    for backend, tolerance in (("cpu", 0.0), ("reference", 2e-5)):
        wanted = one_by_one(q, k, lse, WINDOWS, HORIZONS, backend=backend, **here)
        assert_same(waad, wanted[0], rtol=tolerance, atol=tolerance)
        assert_same(fai, wanted[1], rtol=tolerance, atol=tolerance)
    assert waad.isfinite().any(-1).all()


@pytest.mark.parametrize("isa", _C.available_isas())
def test_many_tiles(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Horizons with gaps between them, and more of them than one sweep has in common: no bit differs."""
    monkeypatch.setenv("RHYTHM_CPU_ISA", isa)
    q, k, _ = random_qkv(1300, 2, 1, 32)
    lse = attention_statistics(q, k, prompt_lens=[70]).lse
    windows, horizons = [3, 300], [(0, 10), (700, 720), (100, 600), (1290, None), (2000, 3000)]
    waad, fai = attention_bands(q, k, lse, windows=windows, horizons=horizons, prompt_lens=[70])
    wanted_waad, wanted_fai = one_by_one(q, k, lse, windows, horizons, prompt_lens=[70])
    assert_same(waad, wanted_waad)
    assert_same(fai, wanted_fai)
    assert fai[-1].isnan().all()


@pytest.mark.parametrize("backend", ["cpu", "reference", TRITON])
@pytest.mark.parametrize(("windows", "horizons"), [([4, 9], []), ([], [(1, 3), (2, None)]), ([7], [(0, 5), (2, 2)])])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_batched_and_unlike_numbers(backend: str, windows: list[int], horizons: list[Any]) -> None:
    q, k = normal(2, 30, 4, 16), normal(2, 30, 2, 16, seed=1)
    lse = attention_statistics(q, k, prompt_lens=[0, 8]).lse
    waad, fai = attention_bands(q, k, lse, windows=windows, horizons=horizons, prompt_lens=[0, 8], backend=backend)
    assert (waad.shape, fai.shape) == ((len(windows), 2, 4, 30), (len(horizons), 2, 4, 30))
    for i, window in enumerate(windows):
        wanted = attention_statistics(q, k, lse=lse, span=False, window=window, prompt_lens=[0, 8]).waad
        assert_same(waad[i], wanted, rtol=1e-5, atol=1e-5)
    for i, horizon in enumerate(horizons):
        wanted = attention_statistics(q, k, lse=lse, span=False, horizon=horizon, prompt_lens=[0, 8]).fai
        assert_same(fai[i], wanted, rtol=1e-5, atol=1e-6)


def test_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ kernels are called once for all windows and horizons."""
    calls: list[Any] = []
    real = _C.attention_statistics
    monkeypatch.setattr(_C, "attention_statistics", lambda **given: (calls.append(given), real(**given))[1])
    q, k, _ = random_qkv(50, 2, 1, 16)
    lse = attention_statistics(q, k).lse
    calls.clear()
    attention_bands(q, k, lse, windows=[2, 3, 4], horizons=[(0, 4), (5, None)])
    assert [(given["windows"], len(given["horizons"]), given["row_span"]) for given in calls] == [([2, 3, 4], 2, 0)]


def test_backends_without_their_own_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(type(backends.BACKENDS["reference"])):  # type: ignore[misc]
        runs = 0

        def run(self, request: Any) -> Any:
            self.runs += 1
            return super().run(request)

    counting = Counting()
    monkeypatch.setitem(backends.BACKENDS, "counting", counting)
    q, k, _ = random_qkv(20, 2, 1, 16)
    lse = attention_statistics(q, k).lse
    waad, fai = attention_bands(q, k, lse, windows=[3, 6], horizons=[(0, 2), (1, 3), (2, 4)], backend="counting")
    assert counting.runs == 3
    wanted = one_by_one(q, k, lse, [3, 6], [(0, 2), (1, 3), (2, 4)])
    assert_same(waad, wanted[0], rtol=1e-5, atol=1e-5)
    assert_same(fai, wanted[1], rtol=1e-5, atol=1e-5)


def test_an_undefined_lse_stays_in_its_row() -> None:
    q, k, _ = random_qkv(60, 2, 1, 16)
    lse = attention_statistics(q, k).lse
    lse[1, 30] = math.nan
    waad, fai = attention_bands(q, k, lse, windows=[4, 20], horizons=[(1, 2), (10, 12)])
    for i, (lo, hi) in enumerate(((1, 2), (10, 12))):
        touched = torch.zeros(2, 60, dtype=torch.bool)
        touched[1, 30 - hi : 31 - lo] = True
        touched[:, 60 - lo :] = True
        assert torch.equal(fai[i].isnan(), touched)
    for of_window in waad:
        assert of_window.isnan().nonzero().tolist() == [[1, 30]]


def test_compiled_without_a_graph_break() -> None:
    q, k, _ = random_qkv(40, 4, 2, 16)
    lse = attention_statistics(q, k).lse

    def call(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        waad, fai = attention_bands(q * 2, k, lse, windows=(2, 5), horizons=((0, 3), (1, None)))
        return waad + 1, fai.nan_to_num()

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k)
    for actual, wanted in zip(compiled, call(q, k), strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": [3, 0]}, r"windows\[1\] is 0; it must be an integer of at least 1"),
        ({"windows": 10}, "windows is 10; it must be a sequence"),
        ({"windows": [2.5]}, r"windows\[0\] is 2.5; it must be an integer"),
        ({"horizons": (10, 50)}, r"horizons\[0\] is 10; it must be a pair \(lo, hi\)"),
        ({"horizons": [(0, 3), (5, 2)]}, r"horizons\[1\] is \(5, 2\); it must be \(lo, hi\) with 0 <= lo <= hi"),
        ({"horizons": [(-1, None)]}, r"horizons\[0\] is \(-1, .*; it must be \(lo, hi\) with 0 <= lo"),
        ({"horizons": [(0.5, 3)]}, r"horizons\[0\] is \(0.5, 3\); it must be \(lo, hi\), integers"),
        ({"lse": torch.zeros(4, 9)}, r"lse has shape \(4, 9\); it must be \(4, 10\)"),
        ({"lse": None}, "lse is of type NoneType; it must be a torch.Tensor"),
        ({"backend": "gpu"}, "backend is 'gpu'; allowed are auto"),
        ({"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    given = {"lse": torch.zeros(4, 10), "windows": [3], "horizons": [(0, 3)]} | change
    with pytest.raises(ValueError, match=message):
        attention_bands(normal(10, 4, 8), normal(10, 2, 8), given.pop("lse"), **given)
