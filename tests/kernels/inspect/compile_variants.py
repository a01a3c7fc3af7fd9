"""Compiles every kernel for sm_90 in all ways in which a launch may specialize it; run by test_compile_ahead.py.

Unlike its interpreter, Triton's compiler turns integers that are 1 into constants: what compiles for one batch need not
compile for another. With --batches: prints how many variants of each kernel are compiled for batches that differ in
nothing but numbers of tokens and sequences, windows and horizons; with --windowed for batches with fewer rows and a
sliding window.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rhythm.kernels import (
    BlockSums,
    Forms,
    Sequences,
    Softmax,
    bands,
    column_sums,
    mend_output,
    row_answers,
    row_sweep,
    sampled_span,
    undefined_results,
)
from rhythm.kernels.arguments import PLAIN
from rhythm.kernels.gluon_choice import gluon_module, tile_again
from rhythm.kernels.inspect.compile_ahead import ARCHITECTURES, _active, jit_functions
from rhythm.kernels.launch import compiling, forced
from rhythm.kernels.tile_tables import Tile
from rhythm.ops.answers import ALSO

VARIANTS: dict[str, dict[str, Any]] = {
    "one packed sequence": {"cu_seqlens": 2, "prompt_lens": 1},
    "no lengths": {"tokens": (1001,), "gluon": True},
    "batched": {"tokens": (2, 1001), "prompt_lens": 2, "prompt_dtype": torch.int64, "gluon": True},
    "one head": {"heads": (1, 1), "cu_seqlens": 3},
    "window and horizon of 1": {"cu_seqlens": 3, "prompt_lens": 2, "window": 1, "horizon": (1, 1), "rows": 1},
    "to the end": {"cu_seqlens": 2, "prompt_lens": 1, "horizon": (1, None)},
    "negative scale, fp16, D = 80": {"size": 80, "dtype": torch.float16, "scale": -0.2},
    "strided": {"strided": True, "cu_seqlens": 3},
    "one token": {"tokens": (1,), "cu_seqlens": 2, "prompt_lens": 1},
    "TF32": {"dtype": torch.float32, "precision": "high"},
    "full fp32": {"dtype": torch.float32, "size": 16},
    "a sliding window of 1": {"cu_seqlens": 3, "prompt_lens": 2, "forms": Forms(sliding_window=1)},
    "softcap and sinks, batched": {"tokens": (2, 1001), "forms": Forms(None, 5.0, torch.empty(8, device="meta"))},
    "one row, packed": {"cu_seqlens": 2, "q_rows": 1},
    "fewer rows, batched, all forms": {
        "tokens": (2, 1001), "prompt_lens": 2, "q_rows": 500, "forms": Forms(16, 5.0, torch.empty(8, device="meta")),
    },
}  # fmt: skip


# Each number 1, a multiple of 16, and neither.
BATCHES: list[dict[str, Any]] = [
    {"tokens": (1008,), "cu_seqlens": 2, "prompt_lens": 1, "window": 1, "horizon": (1, 1), "rows": 1},
    {"tokens": (1001,), "cu_seqlens": 17, "prompt_lens": 16, "window": 16, "horizon": (16, 48), "rows": 16},
    {"tokens": (1,), "cu_seqlens": 4, "prompt_lens": 3, "window": 10, "horizon": (0, 50), "rows": 99},
    {"tokens": (131072,), "cu_seqlens": 129, "prompt_lens": 128, "window": 2**40, "horizon": (2**40, 2**62)},
]
BATCHES = [batch | {"gluon": True} for batch in BATCHES]
WINDOWED: list[dict[str, Any]] = [
    batch | {"forms": Forms(sliding_window=window), "q_rows": q_rows, "gluon": False}
    for batch, window, q_rows in zip(BATCHES[:2], (1, 512), (1, 512), strict=True)
]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(
    tokens: tuple[int, ...] = (1008,),
    heads: tuple[int, int] = (8, 2),
    size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    cu_seqlens: int = 0,
    prompt_lens: int = 0,
    prompt_dtype: torch.dtype = torch.int32,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 50),
    scale: float = 0.1,
    strided: bool = False,
    precision: str = "highest",
    rows: int = 256,
    forms: Forms = PLAIN,
    q_rows: int | None = None,
    gluon: bool = False,
) -> list[Callable[[], object]]:
    torch.set_float32_matmul_precision(precision)

    def operand(count: int, n: int = tokens[-1]) -> Tensor:
        if strided:
            return empty(*tokens[:-1], size, count, tokens[-1], dtype=dtype).transpose(-1, -3)
        return empty(*tokens[:-1], n, count, size, dtype=dtype)

    k, v = (operand(heads[1]) for _ in range(2))
    q = operand(heads[0], tokens[-1] if q_rows is None else q_rows)
    total = k.shape[:-2].numel()
    sequences = Sequences(
        empty(cu_seqlens, dtype=torch.int32) if cu_seqlens else None,
        empty(prompt_lens, dtype=prompt_dtype) if prompt_lens else None,
        total,
        cu_seqlens - 1 if cu_seqlens else (tokens[0] if len(tokens) == 2 else 1),
        empty(cu_seqlens, dtype=torch.int32) if cu_seqlens and q_rows is not None else None,
        q.shape[:-2].numel(),
    )
    attention: dict[str, Any] = {"scale": scale, "forms": forms}
    near = attention | {"window": window, "horizon": horizon}
    a, b, c, d = (empty(heads[0], total) for _ in range(4))
    softmax = Softmax.empty(heads[0], total, q.device)
    sums = BlockSums(empty(sequences.blocks(64), heads[0], dtype=torch.float64), 64, from_prompt=True)
    answers, asked = empty(len(ALSO), heads[0], total), attention | {"first": rows}
    spans: dict[str, Any] = {"sums": sums, "span_BH": empty(sequences.count, heads[0])}
    in_gluon = lambda: gluon_module().gluon_row_sweep(  # noqa: E731
        q, k, sequences, a, scale=scale, softmax=softmax, again=tile_again()
    )
    return [
        *([in_gluon] if gluon else []),
        lambda: row_sweep(q, k, None, sequences, a, softmax=softmax, **attention),
        lambda: row_sweep(q, k, v, sequences, a, softmax=softmax, **attention),
        lambda: bands(q, k, a, sequences, b, c, None, softmax=softmax, **spans, **near),
        lambda: bands(q, k, a, sequences, b, c, d, **near),
        lambda: bands(q, k, a, sequences, b, c, d, **spans, **near),
        lambda: mend_output(q, k, v, sequences, empty(total, heads[0], size, dtype=dtype), **attention),
        lambda: sampled_span(q, k, a, sequences, count=rows, **attention),
        lambda: column_sums(q, k, a, sequences, b, reduce="max", horizon=horizon, softmax=softmax, **attention),
        lambda: column_sums(q, k, a, sequences, b, reduce="sum", factors_HT=c, horizon=horizon, **attention),
        lambda: row_answers(q, k, a, sequences, answers, ALSO, prompt_rows=True, softmax=softmax, **asked),
        lambda: row_answers(q, k, a, sequences, answers, ALSO, prompt_rows=False, **asked),
        lambda: undefined_results(sequences.count, heads[0], total, q.device, a),
    ]


def count_variants(batches: list[dict[str, Any]]) -> None:
    for kernel in jit_functions():
        kernel.device_caches.clear()
    with _active(ARCHITECTURES["sm_90"]), compiling(lambda kernel: None), forced(lambda key: [Tile(64, 64, 4, 2)]):
        for options in batches:
            for launch in launches(**options):
                launch()
    for kernel in jit_functions():
        print(f"{kernel.__name__}: {sum(len(caches[0]) for caches in kernel.device_caches.values())}")


def main() -> None:
    if sys.argv[1:]:
        count_variants({"--batches": BATCHES, "--windowed": WINDOWED}[sys.argv[1]])
        return
    for name, options in VARIANTS.items():
        compiled: list[Any] = []
        tile = Tile(32, 32, 4, 1) if options.get("dtype") == torch.float32 else Tile(64, 64, 4, 2)
        with _active(ARCHITECTURES["sm_90"]), compiling(compiled.append), forced(lambda key, tile=tile: [tile]):
            for launch in launches(**options):
                for kernel in jit_functions():
                    kernel.device_caches.clear()
                launch()
        print(f"{name}: {len(compiled)} kernels")


if __name__ == "__main__":
    main()
