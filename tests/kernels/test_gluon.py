"""The row sweep in Gluon against the fp64 reference, and when it is chosen.

Without a GPU the kernel's source runs on threads (tests/gluon_threads.py), and the other kernels in the interpreter; on
a Hopper GPU all run compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tensors import normal, random_qkv

pytest.importorskip("triton", reason="needs the extra triton")

import triton

from rhythm import attention_statistics
from rhythm.kernels import Forms, Sequences, Softmax, gluon_choice, row_sweep, tile_tables
from rhythm.kernels import gluon_row as gluon
from rhythm.kernels.launch import forced, launch
from rhythm.kernels.tile_tables import Tile
from rhythm.ops import reference

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HOPPER = GPU and tile_tables.architecture(DEVICE) == "sm_90"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, on rows beyond the end
    pytest.mark.skipif(GPU and not HOPPER, reason="needs a Hopper GPU, or none"),
]
NAMES = ("span", "waad", "fai", "lse")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Chooses the kernel in Gluon. Names of the kernels that its launcher launches."""
    names: list[str] = []

    def recorded(kernel: Any, programs: int, **arguments: Any) -> None:
        names.append(kernel.fn.__name__)
        on_threads = kernel is gluon.gluon_row_kernel and not GPU
        (import_module("gluon_threads").launch if on_threads else launch)(kernel, programs, **arguments)

    monkeypatch.setattr(gluon, "launch", recorded)
    monkeypatch.setenv("RHYTHM_GLUON", "1")
    if not GPU:
        monkeypatch.setattr(gluon_choice, "unavailable", lambda device: None)
        monkeypatch.setattr(gluon, "multiprocessors", lambda device: 3)
    return names


# (lengths, prompt lengths, query heads, key heads, head size)
SHAPES = [
    ([1], [0], 1, 1, 16),
    ([63], [5], 4, 1, 32),
    ([300], [299], 2, 1, 80),
    ([63, 0, 1, 411], [5, 0, 1, 64], 2, 2, 64),
    ([700], [130], 2, 1, 128),
    ([640], [0], 1, 1, 64),
    ([257, 129, 513], [1, 0, 128], 4, 1, 64),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("lengths", "prompts", "heads", "key_heads", "size"), SHAPES)
def test_accuracy(
    dtype, lengths, prompts, heads, key_heads, size, launched: list[str], assert_accurate: Callable[..., None]
) -> None:
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q, k, _ = random_qkv(bounds[-1], heads, key_heads, size, dtype, device=str(DEVICE))
    settings: dict[str, Any] = {"window": 10, "horizon": (10, 50), "prompt_lens": prompts}
    exact, plain = (
        reference.attention_statistics(q.to(kind), k.to(kind), bounds=bounds, scale=size**-0.5, **settings)
        for kind in (torch.float64, torch.float32)
    )
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    actual = attention_statistics(q, k, cu_seqlens=cu_seqlens, backend="triton", **settings)
    assert launched == ["gluon_row_kernel", "row_sweep_kernel"]
    for name, expected, unfused in zip(NAMES, exact, plain, strict=False):
        unit = 10 if name == "waad" else 1e-3
        assert_accurate(name, dtype, getattr(actual, name), expected, unfused, unit)


def test_batched_and_strided(launched: list[str]) -> None:
    """Heads are the outer dimension, as transformers lays them out."""
    q, k = (normal(2, heads, 330, 32, seed=heads, dtype=torch.float16).to(DEVICE).transpose(1, 2) for heads in (4, 2))
    options: dict[str, Any] = {"prompt_lens": [7, 200]}
    expected = attention_statistics(q.double(), k.double(), backend="reference", **options)
    actual = attention_statistics(q, k, backend="triton", **options)
    assert len(launched) == 2
    for name in NAMES:
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name).float(), rtol=1e-4, atol=1e-4, equal_nan=True, msg=name
        )


def computed(q: torch.Tensor, k: torch.Tensor, again: bool = True) -> dict[str, torch.Tensor]:
    """What the launcher writes: of the first of its two launches alone, or of both."""
    heads, tokens = q.shape[1], q.shape[0]
    lse, parts = (torch.full(shape, torch.nan, device=DEVICE) for shape in ((heads, tokens), (heads, tokens, 2)))
    softmax = Softmax(parts, torch.zeros(1, dtype=torch.int32, device=DEVICE))
    started = gluon.launch

    def first_alone(kernel: Any, programs: int, **arguments: Any) -> None:
        if kernel is gluon.gluon_row_kernel:
            started(kernel, programs, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon, "launch", started if again else first_alone)
        sums, _ = row_sweep(q, k, None, Sequences(None, None, tokens, 1), lse, scale=1.0, softmax=softmax)
    return {"sums": sums.sums.flip(0), "lse": lse, "parts": softmax.parts, "steep": softmax.steep}


def lifted(nats: float, tokens: int = 384) -> list[torch.Tensor]:
    """q and k of one head, whose first 8 keys score about `nats` nats above all others for every row (scale 1)."""
    direction = normal(64, seed=3)
    direction /= direction.norm()
    q, k = 0.1 * normal(tokens, 1, 64, seed=1) + direction, 0.1 * normal(tokens, 1, 64, seed=2)
    k[:8] += nats * direction
    return [x.to(DEVICE, torch.bfloat16) for x in (q, k)]


@pytest.mark.parametrize(("nats", "overflows"), [(60, False), (208, True), (2000, True)])
def test_blocks_that_overflow_or_are_steep_are_computed_again(
    nats: float, overflows: bool, launched: list[str]
) -> None:
    """Of 6 blocks of 64 rows those whose diagonal tile has no high key: with 2000 nats the first ones, too."""
    q, k = lifted(nats)
    first, both = computed(q, k, again=False), computed(q, k)
    again = [False, False, *[overflows] * 4] if nats < 1000 else [True] * 6
    assert (~first["sums"].isfinite()).flatten().tolist() == again
    assert both["sums"].isfinite().all()
    assert both["steep"].item() == (nats > 1000)
    kept = torch.tensor(again, device=DEVICE).logical_not().repeat_interleave(64)
    for name in ("lse", "parts"):  # what was right stays as it was
        assert torch.equal(first[name][:, kept], both[name][:, kept])
    score_HTT = torch.einsum("thd,shd->hts", q.double(), k.double()).tril()
    hidden_TT = torch.ones(384, 384, dtype=torch.bool, device=DEVICE).triu(1)
    exact = score_HTT.masked_fill(hidden_TT, -math.inf)
    torch.testing.assert_close(both["lse"].double(), exact.logsumexp(-1), rtol=1e-6, atol=1e-5)
    log2_A = (score_HTT - both["parts"][..., :1]) * math.log2(math.e) - both["parts"][..., 1:]
    weights = log2_A.exp2().masked_fill(hidden_TT, 0.0)
    torch.testing.assert_close(weights, exact.softmax(-1), rtol=2e-3, atol=1e-6)
    place = torch.arange(384, device=DEVICE, dtype=torch.float64)
    spans = (exact.softmax(-1) * (place[:, None] - place)).sum(-1).view(6, 64).sum(-1)
    torch.testing.assert_close(both["sums"].flatten(), spans, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_stays_where_it_touches(poison: float, launched: list[str]) -> None:
    q, k, _ = random_qkv(300, 2, 1, 32, torch.bfloat16, device=str(DEVICE))
    k[170, 0, 3] = poison
    actual, expected = (attention_statistics(q, k, horizon=(2, 20), backend=name) for name in ("triton", "reference"))
    assert launched
    assert actual.lse[:, :170].isfinite().all()
    for name in NAMES:
        assert torch.equal(getattr(actual, name).isnan(), getattr(expected, name).isnan()), name


def test_results_do_not_depend_on_how_many_programs_share_the_blocks(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, _ = random_qkv(700, 2, 1, 64, torch.bfloat16, device=str(DEVICE))
    results = []
    for count in (1, 3, 132, 132):
        monkeypatch.setattr(gluon, "multiprocessors", lambda device, count=count: count)
        results.append(attention_statistics(q, k, prompt_lens=[33], backend="triton"))
    for other in results[1:]:
        for name in NAMES:
            torch.testing.assert_close(getattr(other, name), getattr(results[0], name), rtol=0, atol=0, equal_nan=True)


PLAIN: dict[str, dict[str, Any]] = {
    "values": {"v": normal(40, 1, 16)},
    "a given lse": {"given_lse": normal(1, 40)},
    "a sliding window": {"forms": Forms(sliding_window=9)},
    "a softcap": {"forms": Forms(softcap=3.0)},
    "sinks": {"forms": Forms(sinks=normal(1))},
    "fewer queries": {"q": normal(30, 1, 16, dtype=torch.float16), "sequences": Sequences(None, None, 40, 1, None, 30)},
    "dtype torch.float32": {"q": normal(40, 1, 16)},
    "head size 144": {"q": normal(40, 1, 144, dtype=torch.float16), "k": normal(40, 1, 144, dtype=torch.float16)},
    "scale -0.5": {"scale": -0.5},
    "scale 0.0": {"scale": 0.0},
    "strides": {"k": normal(40, 1, 17, dtype=torch.float16)[..., :16]},
}


@pytest.mark.parametrize("feature", PLAIN)
def test_what_is_left_to_plain_triton(feature: str) -> None:
    x = normal(40, 1, 16, dtype=torch.float16)
    call: dict[str, Any] = {"q": x, "k": x, "v": None, "sequences": Sequences(None, None, 40, 1), "scale": 0.5}
    call |= {"forms": Forms(), "given_lse": None}
    assert gluon_choice.uncovered(**call) is None
    assert gluon_choice.uncovered(**call | {"forms": Forms(sliding_window=40)}) is None  # it hides nothing
    assert str(gluon_choice.uncovered(**call | PLAIN[feature])).startswith(feature)


def test_calls_that_are_not_covered_run_plain_triton(launched: list[str]) -> None:
    q, k, _ = random_qkv(90, 2, 1, 32, torch.bfloat16, device=str(DEVICE))
    actual, expected = (attention_statistics(q, k, softcap=2.0, backend=name) for name in ("triton", "reference"))
    assert launched == []
    torch.testing.assert_close(actual.lse, expected.lse, rtol=1e-3, atol=1e-3)
    with forced(lambda key: [Tile(64, 64, 4, 1)]):  # a tile by hand is one of plain Triton's
        attention_statistics(q, k, backend="triton")
    assert launched == []


def test_when_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    reason: list[str | None] = ["the device is none"]
    monkeypatch.setattr(gluon_choice, "unavailable", lambda device: reason[0])
    monkeypatch.delenv("RHYTHM_GLUON", raising=False)
    monkeypatch.setattr(gluon_choice, "PROVEN", {})
    assert not gluon_choice.chosen(DEVICE)
    monkeypatch.setenv("RHYTHM_GLUON", "1")
    with pytest.raises(RuntimeError, match="RHYTHM_GLUON=1, but the device is none"):
        gluon_choice.chosen(DEVICE)
    reason[0] = None
    assert gluon_choice.chosen(DEVICE)
    monkeypatch.setenv("RHYTHM_GLUON", "yes")
    with pytest.raises(ValueError, match="RHYTHM_GLUON is 'yes'; it must be 0 or 1, or unset"):
        gluon_choice.chosen(DEVICE)
    monkeypatch.delenv("RHYTHM_GLUON")
    assert not gluon_choice.chosen(DEVICE)  # no record
    monkeypatch.setattr(gluon_choice, "PROVEN", {triton.__version__: "some record"})
    assert gluon_choice.chosen(DEVICE)
    reason[0] = "the device is none"
    assert not gluon_choice.chosen(DEVICE)
    reason[0] = None
    monkeypatch.setenv("RHYTHM_GLUON", "0")
    assert not gluon_choice.chosen(DEVICE)


def test_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    unavailable, absent = gluon_choice.unavailable.__wrapped__, gluon_choice.gluon_absent.__wrapped__
    if not GPU:
        assert unavailable(DEVICE) == "the row sweep in Gluon is for sm_90 (Hopper); cpu is interpreter"
    monkeypatch.setattr(gluon_choice, "architecture", lambda device: "sm_90")
    assert unavailable(DEVICE) is None
    monkeypatch.setitem(import_module("sys").modules, "rhythm.kernels.gluon_row", None)
    monkeypatch.delattr("rhythm.kernels.gluon_row")
    assert absent().startswith(f"Triton {triton.__version__} has another Gluon than 3.6 to 3.9")


def test_every_proof_is_a_record_in_which_it_was_right() -> None:
    json, records = import_module("json"), Path(__file__).parents[2] / "benchmarks/records"
    for version, path in gluon_choice.PROVEN.items():
        record = json.loads((records / path).read_text(encoding="utf-8"))
        assert record["software"]["triton"] == version, path
        tests = record["parts"]["gluon"]
        assert tests["exit"] == 0, path
        assert tests["counts"].get("passed", 0) > 20, path
        assert "skipped" not in tests["counts"], path


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("tokens", "size"), [(8192, 128), (4001, 96)])
def test_long_sequences_in_a_graph(
    tokens: int, size: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More blocks than multiprocessors, replayed, against plain Triton."""
    q, k, _ = random_qkv(tokens, 32, 8, size, torch.bfloat16, device="cuda")
    actual = attention_statistics(q, k, prompt_lens=[100], backend="triton")
    assert len(launched) == 2
    graph = torch.cuda.CUDAGraph()
    prompts = torch.tensor([100], device="cuda")
    with torch.cuda.graph(graph):
        captured = attention_statistics(q, k, prompt_lens=prompts, backend="triton")
    for _ in range(20):
        for name in NAMES:
            getattr(captured, name).fill_(7.0)
        graph.replay()
        for name in NAMES:
            torch.testing.assert_close(getattr(captured, name), getattr(actual, name), rtol=0, atol=0, equal_nan=True)
    monkeypatch.setenv("RHYTHM_GLUON", "0")
    plain = attention_statistics(q, k, prompt_lens=prompts, backend="triton")
    for name in NAMES:
        torch.testing.assert_close(
            getattr(actual, name), getattr(plain, name), rtol=1e-4, atol=1e-4, equal_nan=True, msg=name
        )
