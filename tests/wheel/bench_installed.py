"""A benchmark as another project would write it, with only torch and the installed rhythm.

`python bench_installed.py --tokens 4096 --json times.json`, from any directory. The fused ops are first checked against
the reference in fp64; if one of them is wrong no time is reported and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

import rhythm

# Largest error, in units of the largest exact value.
STATISTICS_TOLERANCE = 1e-4
OUTPUT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    q, k, v = inputs(options)
    lse = rhythm.attention_statistics(q, k).lse

    errors = check(q, k, v, lse)
    tolerances = {name: OUTPUT_TOLERANCE[q.dtype] if name == "out" else STATISTICS_TOLERANCE for name in errors}
    wrong = [name for name, error in errors.items() if not error <= options.strictness * tolerances[name]]
    report: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if q.is_cuda else platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("rhythm", "torch")},
        "shape": {
            "tokens": options.tokens,
            "heads": options.heads,
            "key_heads": options.key_heads,
            "size": options.size,
        },
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "correctness": {"errors": errors, "passed": not wrong},
    }
    if not wrong:
        report["milliseconds"] = timed(calls(q, k, v, lse), options.seconds)
    else:
        print(f"wrong, so nothing is timed: {', '.join(f'{name} by {errors[name]:.1e}' for name in wrong)}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if wrong else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument(
        "--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in OUTPUT_TOLERANCE], default="bfloat16"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on each implementation")
    parser.add_argument("--strictness", type=float, default=1.0, help="factor on the tolerances")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, Hq, D], k and v [T, Hkv, D]."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn((options.tokens, heads, options.size), generator=generator)
        for heads in (options.heads, options.key_heads, options.key_heads)
    )
    dtype = getattr(torch, options.dtype)
    return (2 * q).to(options.device, dtype), k.to(options.device, dtype), v.to(options.device, dtype)


def calls(q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> dict[str, Callable[[], object]]:
    q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, D], as SDPA wants them
    return {
        "statistics": lambda: rhythm.attention_statistics(q, k),
        "statistics with the output": lambda: rhythm.attention_with_statistics(q, k, v),
        "bands given lse": lambda: rhythm.attention_statistics(q, k, lse=lse, span=False),
        "eager reference": lambda: rhythm.attention_statistics(q, k, backend="reference"),
        "SDPA forward": lambda: scaled_dot_product_attention(q4, k4, v4, is_causal=True, enable_gqa=True),
    }


def check(q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> dict[str, float]:
    """The error of each result, infinite where it is undefined and should not be, or the other way round."""
    exact_out, exact = rhythm.attention_with_statistics(q.double(), k.double(), v.double(), backend="reference")
    out, with_output = rhythm.attention_with_statistics(q, k, v)
    alone = rhythm.attention_statistics(q, k)
    bands = rhythm.attention_statistics(q, k, lse=lse, span=False)
    errors = {"out": relative_error(out, exact_out)}
    for kind, statistics in (("alone", alone), ("with the output", with_output), ("bands", bands)):
        for name in ("span", "waad", "fai", "lse") if statistics.span is not None else ("waad", "fai", "lse"):
            errors[f"{name}, {kind}"] = relative_error(getattr(statistics, name), getattr(exact, name))
    return errors


def relative_error(actual: Tensor, exact: Tensor) -> float:
    if not torch.equal(actual.isnan(), exact.isnan()):
        return float("inf")
    defined = ~exact.isnan()
    return float((actual.double() - exact)[defined].abs().max() / exact[defined].abs().max())


def timed(implementations: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each; prints them as a table."""
    results = [
        Timer("run()", globals={"run": run}, description=name, num_threads=torch.get_num_threads()).blocked_autorange(
            min_run_time=seconds
        )
        for name, run in implementations.items()
    ]
    times = {name: 1e3 * result.median for name, result in zip(implementations, results, strict=True)}
    print("| op | ms | of SDPA's forward |\n| --- | --- | --- |")
    for name, time in times.items():
        print(f"| {name} | {time:.3f} | {time / times['SDPA forward']:.2f} |")
    return times


if __name__ == "__main__":
    sys.exit(main())
