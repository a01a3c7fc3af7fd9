"""Checks the ops on the GPU with all forms of attention, against the fp64 reference, and what they give on request.

Shape suffixes: H query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import Clock, one_line
from benchmarks.gpu.report import GpuPart
from benchmarks.gpu.suite import GpuSettings
from benchmarks.implementations import Outputs
from benchmarks.shapes import HORIZON, WINDOW, Inputs, make_inputs
from benchmarks.verify import ALLOWED, FLOOR, relative_error
from rhythm import attention_statistics, attention_with_statistics, column_scores
from rhythm.ops.answers import ALSO

OUT_FLOOR = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: FLOOR}
"""Allowed for outputs, of their largest value: weights are rounded to v's type before the product, the result after."""

Run = Callable[[], Outputs]


def forms(inputs: Inputs) -> dict[str, tuple[dict[str, Any], int]]:
    """(options of the ops, rows that q has) by name. The window cuts most rows short and ends within tiles."""
    tokens, heads = inputs.shape.tokens, inputs.shape.query_heads
    window = {"sliding_window": tokens // 3 + 1}
    softcap = {"softcap": 2.0}
    sinks = {"sinks": torch.linspace(-2, 8, heads, device=inputs.q.device)}
    return {
        "plain": ({}, tokens),
        "window": (window, tokens),
        "softcap": (softcap, tokens),
        "window, sinks": (window | sinks, tokens),
        "half of the rows": ({}, tokens // 2),
        "all forms, half of the rows": (window | softcap | sinks, tokens // 2),
    }


def forms_part(suite: GpuSettings, clock: Clock) -> GpuPart:
    """Replays of CUDA graphs whose results were overwritten before, at the longest of the checked shapes."""
    rows: list[dict[str, Any]] = []
    wrong = []
    shape = max(suite.checked_shapes, key=lambda shape: shape.tokens)
    for dtype in suite.checked_dtypes:
        inputs = make_inputs(shape, dtype, clock.device, clock.backend)
        for name, (form, count) in forms(inputs).items():
            q, options = inputs.q[-count:], {"prompt_lens": inputs.prompt_lens, "horizon": HORIZON} | form
            exact = _all(q.double(), inputs.k.double(), inputs.v.double(), shape.prompt, options)
            plain = _all(q, inputs.k, inputs.v, shape.prompt, options)
            for op, run in _ops(q, inputs, exact["lse"].float(), clock.backend, options).items():
                case = {"op": op, "form": name, "shape": str(shape), "dtype": str(dtype).removeprefix("torch.")}
                try:
                    results = _checked(clock.poisoned_replay(run), exact, plain, dtype)
                except Exception as error:  # a graph that could not be captured, a kernel that does not compile
                    wrong.append(f"{' '.join(case.values())}: {one_line(error)}")
                    continue
                rows += [case | result for result in results]
                for result in results:
                    if not result["error"] <= result["allowed"]:
                        errors = f"{result['error']:.1e}, allowed is {result['allowed']:.1e}"
                        wrong.append(f"{' '.join(case.values())}: {result['result']} has error {errors}")
    table = tuple({key: f"{x:.1e}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)
    return GpuPart("forms", tuple(rows), (), (), tuple(wrong), bool(wrong), table, {"wrong": wrong})


def _ops(q: Tensor, inputs: Inputs, lse_HT: Tensor, backend: str, options: dict[str, Any]) -> dict[str, Run]:
    given: dict[str, Any] = options | {"window": WINDOW, "backend": backend}
    of_lse = {"": None, ", lse given": lse_HT}
    return {
        "statistics": lambda: _named(attention_statistics(q, inputs.k, **given)),
        "with_output": lambda: _with_output(q, inputs.k, inputs.v, backend, options),
        "bands": lambda: _named(attention_statistics(q, inputs.k, lse=lse_HT, span=False, **given)),
        "answers": lambda: _answers(q, inputs.k, None, given),
        "answers, lse given": lambda: _answers(q, inputs.k, lse_HT, given),
        **{
            f"columns{way}": _columns(q, inputs.k, backend, inputs.shape.prompt, options, lse)
            for way, lse in of_lse.items()
        },
    }


def _all(q: Tensor, k: Tensor, v: Tensor, prompt: int, options: dict[str, Any]) -> Outputs:
    """The reference's results of all ops."""
    answers = _answers(q, k, None, options | {"backend": "reference"})
    return _with_output(q, k, v, "reference", options) | answers | _columns(q, k, "reference", prompt, options)()


def _answers(q: Tensor, k: Tensor, lse_HT: Tensor | None, given: dict[str, Any]) -> Outputs:
    """first_mass of half of the keys: a window hides fewer from all rows."""
    more: dict[str, Any] = {"also": ALSO, "prompt_rows": True, "first": k.shape[0] // 2}
    statistics = attention_statistics(q, k, lse=lse_HT, **given, **more)
    return {name: getattr(statistics, name) for name in ALSO}


def _columns(
    q: Tensor, k: Tensor, backend: str, prompt: int, options: dict[str, Any], lse_HT: Tensor | None = None
) -> Run:
    """Column scores of other kinds than FAI: the largest weight, and weighted rows of both signs, every third 0."""
    given: dict[str, Any] = {name: x for name, x in options.items() if name != "prompt_lens"}
    given |= {"rows": (prompt, None), "backend": backend, "lse": lse_HT}
    weights_T = torch.linspace(-1, 1, k.shape[0], device=q.device)
    weights_T[::3] = 0.0
    return lambda: {
        "largest": column_scores(q, k, reduce="max", **given),
        "weighted": column_scores(q, k, row_weights=weights_T, **given),
        "largest, weighted": column_scores(q, k, reduce="max", row_weights=weights_T, **given),
    }


def _with_output(q: Tensor, k: Tensor, v: Tensor, backend: str, options: dict[str, Any]) -> Outputs:
    out, statistics = attention_with_statistics(q, k, v, window=WINDOW, backend=backend, **options)
    return {"out": out} | _named(statistics)


def _named(statistics: Any) -> Outputs:
    return {name: value for name in ("span", "waad", "fai", "lse") if (value := getattr(statistics, name)) is not None}


def _checked(results: Outputs, exact: Outputs, plain: Outputs, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Each result's error relative to its largest value, and what is allowed (benchmarks/verify.py)."""
    rows = []
    for name, value in results.items():
        floor = OUT_FLOOR[dtype] if name == "out" else FLOOR
        allowed = max(ALLOWED * relative_error(plain[name], exact[name]), floor)
        rows.append({"result": name, "error": relative_error(value, exact[name]), "allowed": allowed})
    return rows
