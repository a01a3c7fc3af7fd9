"""Prototypes of GPU kernels against fp64, and what they compile to for sm_90.

Without a GPU, plain Triton runs in the interpreter and Gluon on threads (gluon_threads.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from benchmarks.gpu.prototypes import Prototype, prototypes
from benchmarks.shapes import Inputs, Shape, make_inputs
from rhythm.ops import reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ROOT = Path(__file__).parents[2]
PROTOTYPES = {prototype.name: prototype for prototype in prototypes()}
RUNNABLE = [prototype for prototype in prototypes() if not GPU or prototype.absent() is None]
# numpy's: rows that overflow on purpose, and what lies beyond the last row
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=not GPU)
def _gluon_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gluon_row", "gluon_values"):
        monkeypatch.setattr(f"benchmarks.gpu.prototypes.{module}.launch", import_module("gluon_threads").launch)


def lifted(nats: float, tokens: int = 384) -> Inputs:
    """Inputs whose first 8 keys score about `nats` nats above all others, for every row."""
    shape = Shape(tokens, query_heads=2, key_heads=1, head_size=64)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, 64, generator=generator) for heads in (2, 1, 1))
    direction = torch.randn(64, generator=generator)
    direction /= direction.norm()
    q, k = 0.1 * q + 8 * direction, 0.1 * k
    k[:8] += nats * direction  # 8 · nats · D^−½ = nats
    return Inputs(shape, *(x.to(DEVICE, torch.bfloat16) for x in (q, k, v)), "triton")


def ordinary(tokens: int, group: int, sharpness: float = 1.0, heads: int = 4) -> Inputs:
    shape = Shape(tokens, query_heads=heads, key_heads=heads // group, head_size=64)
    inputs = make_inputs(shape, torch.bfloat16, DEVICE, "triton")
    return Inputs(shape, sharpness * inputs.q, inputs.k, inputs.v, "triton")


def expected(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    span, _, _, lse, out = reference.attention_statistics(
        inputs.q.to(dtype),
        inputs.k.to(dtype),
        bounds=[0, inputs.shape.tokens],
        prompt_lens=[0],
        scale=inputs.scale,
        v_TGD=inputs.v.to(dtype),
    )
    assert out is not None
    return {"span": span, "lse": lse, "out": out}


def assert_right(prototype: Prototype, inputs: Inputs, assert_accurate: Callable[..., None]) -> None:
    exact, plain = (expected(inputs, dtype) for dtype in (torch.float64, torch.float32))
    computed = prototype.make(inputs)()
    assert list(computed) == (["span", "lse", "out"] if prototype.values else ["span", "lse"])
    assert computed["span"].dtype == computed["lse"].dtype == torch.float32
    for name, actual in computed.items():
        rounded = plain[name].to(torch.bfloat16) if name == "out" else plain[name]
        assert_accurate(name, torch.bfloat16, actual, exact[name], rounded)


CASES = {
    "257 tokens, 4 heads per key head": lambda: ordinary(257, 4),
    "257 tokens, 1 head per key head": lambda: ordinary(257, 1, heads=2),
    "one token": lambda: ordinary(1, 4),
    "peaked": lambda: ordinary(257, 1, sharpness=4, heads=1),
    "far keys 60 nats above": lambda: lifted(60, tokens=257),
    "far keys 208 nats above": lambda: lifted(208, tokens=257),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prototype", RUNNABLE, ids=lambda prototype: prototype.name)
def test_accuracy(prototype: Prototype, case: str, assert_accurate: Callable[..., None]) -> None:
    assert_right(prototype, CASES[case](), assert_accurate)


def test_more_tiles_than_slots(assert_accurate: Callable[..., None]) -> None:
    """Barriers pass through both phases several times."""
    for prototype in RUNNABLE:
        if not prototype.interprets:
            assert_right(prototype, ordinary(1100, 1, heads=1), assert_accurate)


FLAGGING = {
    "triton_lanes": ("lanes", {}, 128),
    "triton_fixed_values": ("fixed_values", {}, 128),
    "gluon_4x64_ss": ("gluon_row", {"keys": 128, "q_in_registers": False}, 64),
    "gluon_4x64_rs": ("gluon_row", {"keys": 64, "q_in_registers": True}, 64),
    "gluon_values": ("gluon_values", {}, 64),
}


@pytest.mark.parametrize("name", [p.name for p in RUNNABLE if p.name in FLAGGING])
def test_blocks_that_overflow_raise_their_flag(name: str) -> None:
    """Exactly the blocks with rows 128 bits above their reference are flagged, and recomputed."""
    module, settings, rows = FLAGGING[name]
    sweep = import_module(f"benchmarks.gpu.prototypes.{module}").sweep
    for inputs, wrong in ((lifted(60), False), (lifted(208), True)):
        computed = sweep(inputs, **settings)
        blocks = inputs.shape.tokens // rows
        flags = computed.flags.view(inputs.shape.query_heads, blocks).bool().cpu()
        # The first tile of 128 keys holds the high keys: for its rows they are the reference.
        high = torch.arange(blocks) * rows >= settings.get("keys", 128)
        assert torch.equal(flags, (high & wrong).expand(inputs.shape.query_heads, -1))
        bad = ~computed.row_span_HT.isfinite().cpu()
        assert torch.equal(bad.unflatten(1, (blocks, rows)).any(-1), flags)


@pytest.mark.parametrize("prototype", [p for p in RUNNABLE if p.values], ids=lambda prototype: prototype.name)
def test_outputs_that_overflow_where_sums_do_not(prototype: Prototype, assert_accurate: Callable[..., None]) -> None:
    """With keys 79 nats above, Σ p and Σ p·distance don't overflow, but Σ p·v does for values of 10⁴."""
    inputs = lifted(79, tokens=257)
    inputs.v.mul_(1e4)
    assert_right(prototype, inputs, assert_accurate)
    module, settings, _ = FLAGGING[prototype.name]
    computed = import_module(f"benchmarks.gpu.prototypes.{module}").sweep(inputs, **settings)
    assert computed.row_span_HT.isfinite().all()
    assert computed.flags.any()


@pytest.mark.parametrize("prototype", RUNNABLE, ids=lambda prototype: prototype.name)
def test_an_undefined_key_affects_only_the_rows_that_see_it(prototype: Prototype) -> None:
    inputs = ordinary(200, 2, heads=2)
    inputs.k[150, 0, 3] = torch.nan
    computed = prototype.make(inputs)()
    exact = expected(inputs, torch.float64)
    assert torch.equal(computed["lse"].isnan(), exact["lse"].isnan())
    assert computed["lse"][:, :150].isfinite().all()
    torch.testing.assert_close(computed["lse"][:, :150].double(), exact["lse"][:, :150], rtol=1e-5, atol=1e-5)
    assert computed["span"].isnan().all()


@pytest.mark.parametrize("prototype", RUNNABLE, ids=lambda prototype: prototype.name)
def test_a_call_computes_anew_and_repeats_bit_for_bit(prototype: Prototype) -> None:
    run = prototype.make(ordinary(150, 2, heads=2))
    first, second = run(), run()
    for name, result in first.items():
        assert torch.equal(result, second[name])
        assert result.data_ptr() != second[name].data_ptr()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (make_inputs(Shape(8, head_size=64), torch.float32), "torch.float32; prototypes take torch.bfloat16"),
        (make_inputs(Shape(8, head_size=96), torch.bfloat16), "head_size is 96; prototypes take 64 or 128"),
        (make_inputs(Shape(8, prompt=3, head_size=64), torch.bfloat16), "prompt is 3; .* without a prompt"),
    ],
    ids=["type", "head size", "prompt"],
)
def test_what_prototypes_do_not_take(inputs: Inputs, message: str) -> None:
    for prototype in RUNNABLE:
        with pytest.raises(ValueError, match=message):
            prototype.make(inputs)


def test_who_can_run_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for prototype in prototypes():
        assert prototype.absent() == (None if prototype.interprets else "Triton's interpreter does not run Gluon")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert {prototype.absent() for prototype in prototypes()} == {"torch sees no CUDA device"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    assert {p.absent() for p in prototypes()} == {"needs compute capability 9 (Hopper), this is 8.0"}
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    assert {prototype.absent() for prototype in prototypes()} == {None}
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.prototypes.gluon_shim", None)
    for prototype in prototypes():
        reason = prototype.absent()
        assert reason is None if prototype.interprets else str(reason).startswith(f"Triton {triton.__version__} has")


def test_importing_the_package_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; from benchmarks.gpu.prototypes import prototypes; "
        "print(len(prototypes()))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout == f"{len(PROTOTYPES)}\n", run.stderr


# Instructions of the steady loop a score; for another Triton the larger of both holds.
PER_SCORE = {
    "3.6.0": {
        "triton_online": 6.72, "triton_fixed": 5.27, "triton_lanes": 5.03, "gluon_4x64_ss": 4.63,
        "gluon_4x64_rs": 5.25, "triton_fixed_values": 6.55, "gluon_values": 5.75,
    },
    "3.9.0": {
        "triton_online": 7.16, "triton_fixed": 5.78, "triton_lanes": 5.46, "gluon_4x64_ss": 4.69,
        "gluon_4x64_rs": 6.22, "triton_fixed_values": 7.05, "gluon_values": 5.93,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("ahead") / "prototypes.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.prototypes.compile_ahead", "--json", str(file)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    reports: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return reports


@pytest.mark.slow
def test_what_they_compile_to(compiled: list[dict[str, Any]]) -> None:
    first = {report["prototype"]: report for report in reversed(compiled)}
    assert list(reversed(first)) == list(PROTOTYPES)
    limits = PER_SCORE.get(triton.__version__)
    for name, report in first.items():
        limit = limits[name] if limits else max(table[name] for table in PER_SCORE.values())
        assert report["per_score"]["all"] <= 1.005 * limit, name
        assert report["per_score"]["exp2"] == 1 or name == "triton_online", name
        assert report["per_score"]["max"] == 0 or name == "triton_online", name
        # Nothing moves between threads where sums stay with them.
        assert report["per_score"]["shuffle"] == 0 or name.startswith(("triton_online", "triton_fixed")), name
        if triton.__version__ == "3.6.0" and name in ("triton_online", "triton_fixed", "triton_lanes"):
            assert report["registers"] <= 128, name  # two programs share a multiprocessor
    for report in compiled:
        assert report["loop_spills"] == 0, report
        # Triton 3.9's warpgroups save some of their arguments before and after the loop.
        saved = 47 if report["kernel"] == "gluon_row_kernel" and report["prototype"] == "gluon_4x64_rs" else 0
        assert report["spills"] <= (saved if triton.__version__ != "3.6.0" else 0), report


@pytest.mark.slow
def test_overflowed_blocks_are_done_again_by_a_second_launch(compiled: list[dict[str, Any]]) -> None:
    kernels = {name: [r["kernel"] for r in compiled if r["prototype"] == name] for name in PROTOTYPES}
    for name in FLAGGING:
        first, second = kernels[name]
        assert first != second == "online_kernel", name
    assert kernels["triton_online"] == ["online_kernel"]
    assert kernels["triton_fixed"] == ["fixed_kernel"]
