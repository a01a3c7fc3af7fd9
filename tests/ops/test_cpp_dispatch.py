"""The registered ops as other code calls them: C++ through the dispatcher, and torch.compile with lengths that change.

Shape suffixes: T tokens of all sequences on one axis, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import tensors
import torch
from tensors import assert_same
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import cpp_extension

import rhythm

SOURCE = Path(__file__).with_name("cpp_dispatch.cpp")
LENGTHS = (24, 37, 64, 1000)


def random_qkv(tokens: int) -> list[Tensor]:
    return tensors.random_qkv(tokens, 4, 2, 16, sharp=2.0)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """Shapes that one test marked dynamic must not help the next."""
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> torch._ops._OpNamespace:
    """The C++ caller, built and loaded: what tests/cpp_dispatch.cpp registers."""
    library = tmp_path_factory.mktemp("cpp") / "cpp_dispatch.so"
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-O0", "-Wall", "-Werror", "-shared", "-fPIC"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    headers = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    torch_libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, *flags, *headers, SOURCE, "-o", library, *torch_libraries], check=True)
    torch.ops.load_library(library)
    return torch.ops.rhythm_cpp_caller


@pytest.mark.parametrize("hi", [50, None])
def test_cpp_gets_what_python_gets(caller: torch._ops._OpNamespace, hi: int | None) -> None:
    q, k, _ = random_qkv(100)
    cu_seqlens, prompt_lens = torch.tensor([0, 30, 100], dtype=torch.int32), torch.tensor([3, 20])
    expected = rhythm.attention_statistics(
        q, k, cu_seqlens=cu_seqlens, prompt_lens=prompt_lens, scale=0.3, window=7, horizon=(5, hi)
    )
    results = caller.statistics(q, k, cu_seqlens, prompt_lens, 0.3, 7, 5, hi)
    assert expected.span is not None
    for actual, wanted in zip(results, (expected.span, expected.waad, expected.fai, expected.lse), strict=True):
        assert not wanted.isnan().all()
        assert_same(actual, wanted)


def test_cpp_gets_the_errors_that_python_gets(caller: torch._ops._OpNamespace) -> None:
    q, k, _ = random_qkv(10)
    cu_seqlens = torch.tensor([0, 11], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens runs from 0 to 11; it must cover 0 to T = 10"):
        caller.statistics(q, k, cu_seqlens, torch.tensor([0]), 0.25, 10, 10, 50)
    with pytest.raises(RuntimeError, match="rhythm::attention_statistics needs the argument k"):
        caller.incomplete(q)


def test_cpp_gets_the_checks_of_options(caller: torch._ops._OpNamespace) -> None:
    q, k, _ = random_qkv(10)
    with pytest.raises(ValueError, match="window is 0"):
        caller.statistics(q, k, torch.tensor([0, 10], dtype=torch.int32), torch.tensor([0]), 0.25, 0, 10, 50)


def statistics(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prompt_lens: Tensor) -> tuple[Tensor, ...]:
    """Everything the public ops give, with arithmetic around it that a compiler fuses."""
    options = {"cu_seqlens": cu_seqlens, "prompt_lens": prompt_lens, "horizon": (2, 9)}
    out, fused = rhythm.attention_with_statistics(q * 2, k, v, **options)
    bands = rhythm.attention_statistics(q * 2, k, lse=fused.lse, span=False, **options)
    return out + 1, fused.span, fused.waad, fused.fai, fused.lse, bands.waad - fused.waad, bands.fai


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_compilation_serves_every_length(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(statistics, fullgraph=True, backend=counter)
    for tokens in LENGTHS:
        q, k, v = random_qkv(tokens)
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 0)
        cu_seqlens, prompt_lens = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32), torch.tensor([0, 5])
        expected = statistics(q, k, v, cu_seqlens, prompt_lens)
        for actual, wanted in zip(compiled(q, k, v, cu_seqlens, prompt_lens), expected, strict=True):
            assert actual.shape == wanted.shape
            assert_same(actual, wanted)
    assert counter.frame_count == 1


def test_one_compilation_serves_every_batch() -> None:
    """[B, T, H, D], with B and T both changing."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k: rhythm.attention_statistics(q, k, horizon=(0, None)).waad * 2, fullgraph=True, backend=counter
    )
    for batch, tokens in ((2, 24), (3, 37), (5, 11)):
        q, k, _ = random_qkv(batch * tokens)
        q, k = q.unflatten(0, (batch, tokens)), k.unflatten(0, (batch, tokens))
        for x in (q, k):
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
        actual = compiled(q, k)
        assert actual.shape == (batch, 4, tokens)
        assert_same(actual, rhythm.attention_statistics(q, k, horizon=(0, None)).waad * 2)
    assert counter.frame_count == 1


OPS = (
    "attention_statistics", "attention_statistics_also", "attention_with_statistics", "attention_with_statistics_also",
    "attention_bands", "column_scores",
)  # fmt: skip


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("packed", [True, False])
def test_opcheck(op: str, packed: bool) -> None:
    """torch's own checks of a registration; arguments by name, so that added ones keep their defaults."""
    q, k, v = random_qkv(20)
    if not packed:
        q, k, v = (x.unflatten(0, (2, 10)) for x in (q, k, v))
    # Without prompts and from distance 0 on nothing is NaN, which the checks would find unlike itself.
    values = {
        "q": q, "k": k, "v": v, "cu_seqlens": torch.tensor([0, 8, 20], dtype=torch.int32) if packed else None,
        "prompt_lens": None, "scale": 0.25, "window": 10, "horizon_lo": 0, "horizon_hi": 5, "lse": None, "span": True,
        "also": "max_logit,entropy", "first": 2, "prompt_rows": True, "windows": [3, 10], "horizons_lo": [0],
        "horizons_hi": [5], "backend": "cpu", "reduce": "sum", "per": "group", "rows_begin": 2, "rows_end": -1,
        "rows": None,
    }  # fmt: skip
    registered = getattr(torch.ops.rhythm, op).default
    names = [argument.name for argument in registered._schema.arguments]
    columns = {"reduce", "per", "rows_begin", "rows_end", "rows"}
    more, bands = {"also", "first", "prompt_rows"}, {"windows", "horizons_lo", "horizons_hi"}
    one = {"window", "horizon_lo", "horizon_hi"}
    missing = {
        "attention_statistics": columns | bands | more | {"v"},
        "attention_statistics_also": columns | bands | {"v"},
        "attention_with_statistics": columns | bands | more | {"lse", "span"},
        "attention_with_statistics_also": columns | bands | {"lse", "span"},
        "attention_bands": columns | more | one | {"v", "span"},
        "column_scores": bands | more | {"v", "prompt_lens", "window", "span"},
    }
    if op == "attention_bands":
        values["lse"] = rhythm.attention_statistics(q, k, cu_seqlens=values["cu_seqlens"], scale=0.25).lse
    assert set(names) >= values.keys() - missing[op]
    torch.library.opcheck(registered, (), {name: values[name] for name in names if name in values})
