"""The parts of a GPU record, the most important first, and the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import actor_attn
from benchmarks.gpu.actor_attn import ModelShape
from benchmarks.gpu.clock import Budget, Clock, Run, one_line
from benchmarks.gpu.comparison import OURS, Comparison
from benchmarks.gpu.implementations import GPU, INTERPRETER, Implementation
from benchmarks.gpu.report import GpuPart, Planned
from benchmarks.measure import Timing, ratio
from benchmarks.shapes import HORIZON, WINDOW, Inputs, Shape, make_inputs, score_flops
from benchmarks.suite import Metric
from benchmarks.verify import CheckedResult, WrongResultError, verify
from rhythm import attention_statistics, attention_with_statistics

QWEN3_4B, QWEN3_4B_MODEL = Shape(8192, query_heads=32, key_heads=8, head_size=128), ModelShape()


@dataclass(frozen=True)
class GpuSettings:
    """Sizes of a run; the targets were set for the defaults."""

    implementations: tuple[Implementation, ...] = GPU
    shape: Shape = QWEN3_4B
    checked_shapes: tuple[Shape, ...] = (
        Shape(257, prompt=31, query_heads=8, key_heads=2, head_size=128),
        Shape(2048, prompt=100, query_heads=4, key_heads=1, head_size=96),
    )
    checked_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    lengths: tuple[int, ...] = (16384, 32768, 131072, 65536, 4096, 2048, 1024)
    packed: tuple[int, ...] = (16384, 65536)
    mean_length: int = 1024
    model: ModelShape = QWEN3_4B_MODEL
    longest: int = 131072
    rounds: int = 9
    late_lengths: tuple[int, ...] = (8192, 4096)


FULL = GpuSettings()
INTERPRETED = GpuSettings(
    implementations=INTERPRETER,
    shape=Shape(96, query_heads=4, key_heads=2, head_size=16),
    checked_shapes=(Shape(70, prompt=9, query_heads=4, key_heads=2, head_size=16),),
    checked_dtypes=(torch.bfloat16, torch.float32),
    lengths=(64,),
    packed=(120,),
    mean_length=30,
    model=ModelShape(6, 32, 64, 4, 2, 8, 50),
    longest=80,
    rounds=2,
    late_lengths=(96,),
)


def parts(settings: GpuSettings, clock: Clock, refused: Mapping[str, str], budget: Budget) -> list[Planned]:
    """The parts to run, the most important first, those that take long to compile last. refused: see `refusals`."""
    planned = [
        Planned("race", 60.0, lambda: comparison_part(settings, clock, settings.shape, refused)),
        Planned("actor_attn", 40.0, lambda: actor_part(settings, clock)),
    ]
    for tokens in settings.packed:
        planned.append(Planned(f"packed_{tokens}", 15.0, partial(packed_part, settings, clock, tokens)))
    for tokens in settings.lengths:
        shape = replace(settings.shape, tokens=tokens)
        needed = 15.0 + tokens / 4096
        planned.append(Planned(f"race_{tokens}", needed, partial(comparison_part, settings, clock, shape, refused)))
    if any(one.late for one in settings.implementations):
        for tokens in settings.late_lengths:
            shape = replace(settings.shape, tokens=tokens)
            planned.append(Planned(f"rivals_{tokens}", 30.0, partial(late_part, settings, clock, shape, budget)))
    return planned


def check(settings: GpuSettings, clock: Clock) -> list[tuple[Shape, str, list[CheckedResult]]]:
    """Check rhythm's ops on the device against the fp64 reference. Raises WrongResultError."""
    ours = [one for one in settings.implementations if one.name in OURS]
    return [
        (shape, _name(dtype), verify(ours, make_inputs(shape, dtype, clock.device, clock.backend)))
        for shape in settings.checked_shapes
        for dtype in settings.checked_dtypes
    ]


def refusals(settings: GpuSettings, clock: Clock, late: bool = False) -> dict[str, str]:
    """Which other implementations give wrong results or can't be checked, and why. They are not timed."""
    refused = {}
    for one in settings.implementations:
        if one.name in OURS or one.late != late or one.absent() is not None:
            continue
        try:
            verify([one], make_inputs(settings.checked_shapes[0], torch.bfloat16, clock.device, clock.backend))
        except WrongResultError as error:
            refused[one.name] = str(error).splitlines()[-1].removeprefix(f"{one.name}: ")
        except Exception as error:  # not for this machine or these tensors
            refused[one.name] = one_line(error)
    return refused


def comparison_part(settings: GpuSettings, clock: Clock, shape: Shape, refused: Mapping[str, str]) -> GpuPart:
    """Time all implementations that are installed and take this length; metrics only at the settings' own shape."""
    able = [one for one in settings.implementations if not one.late]
    return _compared(f"race_{shape.tokens}", able, settings, clock, shape, refused)


def late_part(settings: GpuSettings, clock: Clock, shape: Shape, budget: Budget) -> GpuPart:
    """Check, then time the implementations that take long to compile, with the plain forwards and rhythm's sweep."""
    late = replace(settings, implementations=tuple(one for one in settings.implementations if one.late))
    refused: dict[str, str] = {}
    for one in late.implementations:
        if budget.left < 20.0:
            refused[one.name] = "budget"
        else:
            refused |= refusals(replace(late, implementations=(one,)), clock, late=True)
    able = [one for one in settings.implementations if one.late or one.plain or one.name == "statistics"]
    return _compared(f"rivals_{shape.tokens}", able, settings, clock, shape, refused)


def _compared(
    name: str,
    able: list[Implementation],
    settings: GpuSettings,
    clock: Clock,
    shape: Shape,
    refused: Mapping[str, str],
) -> GpuPart:
    inputs = make_inputs(shape, torch.bfloat16, clock.device, clock.backend)
    comparison = Comparison()
    for one in able:
        reason = one.absent()
        if reason is None and shape.tokens > one.max_tokens:
            reason = f"only to T = {one.max_tokens}"
        if reason is not None:
            comparison.absent.append(f"{one.name}: {reason}")
        elif one.name in refused:
            comparison.failed[one.name] = refused[one.name]
        else:
            comparison.enter(one.name, partial(one.make, inputs), clock)
    comparison.measure(clock, settings.rounds if shape.tokens <= 16384 else 3)
    best = comparison.best([one.name for one in able if one.plain])
    rows = comparison.rows(shape.tokens, {one.name: one.flops(shape) for one in able}, best)
    metrics: list[Metric] = []
    if name == f"race_{settings.shape.tokens}":
        metrics = _metrics(
            {**comparison.replayed, "bands": comparison.eager.get("bands")}, best, shape, comparison.eager
        )
        metrics += _bands_metric(comparison.replayed, best)
    return GpuPart(
        name,
        tuple(row.json() for row in rows),
        tuple(metrics),
        tuple(comparison.absent),
        comparison.not_measured(),
        comparison.ours_failed(),
        tuple(row.cells() for row in rows),
    )


def _metrics(
    timings: Mapping[str, Timing | None], best: str | None, shape: Shape, eager: Mapping[str, Timing] | None = None
) -> list[Metric]:
    """Ratios to the best plain forward, by replays; bands have no target, and are eager if that was measured."""
    targets = {"statistics": 0.5, "with_output": 1.05, "bands": None}
    metrics = []
    for name, target in targets.items():
        eagerly = eager is not None and name == "bands"
        over = (eager if eager is not None and eagerly else timings).get(best or "")
        if (timing := timings.get(name)) is not None and over is not None:
            how = ", both eager" if eagerly else "" if eager is None else ", both replayed"
            what = f"{name} at T={shape.tokens}: time over that of {best}{how}"
            metrics.append(Metric(what, ratio(timing, over), "×", at_most=target))
    return metrics


def _bands_metric(replayed: Mapping[str, Timing], best: str | None) -> list[Metric]:
    if best not in replayed or "bands" not in replayed:
        return []
    share = ratio(replayed["bands"], replayed[best])
    return [Metric(f"bands given lse: time over that of {best}, both replayed", share, "×", at_most=0.05)]


def lengths_of(tokens: int, mean: int) -> list[int]:
    """Log-normal lengths (σ = 0.8) from a fixed seed that add up to `tokens`, each at least 8."""
    generator, lengths = torch.Generator().manual_seed(0), []
    while (left := tokens - sum(lengths)) > 0:
        drawn = int(mean * 0.73 * torch.randn((), generator=generator).mul(0.8).exp())
        lengths.append(left if left < 16 else min(max(drawn, 8), left - 8 if left - drawn < 8 and left > 16 else left))
    return lengths


def packed_part(settings: GpuSettings, clock: Clock, tokens: int) -> GpuPart:
    """Time rhythm's ops on a packed batch of log-normal lengths with prompts of 15%, and the varlen forwards."""
    lengths = lengths_of(tokens, settings.mean_length)
    shape = replace(settings.shape, tokens=tokens)
    inputs = make_inputs(shape, torch.bfloat16, clock.device, clock.backend)
    cu_seqlens = torch.tensor([0, *lengths], device=clock.device).cumsum(0).to(torch.int32)
    prompt_lens = torch.tensor([length * 15 // 100 for length in lengths], device=clock.device)
    comparison = Comparison()
    for name, make in packed_ops(inputs, cu_seqlens, prompt_lens).items():
        comparison.enter(name, make, clock)
    forwards = ("flash_attn", "sdpa_flash")
    for name in forwards:
        if (reason := _varlen_absent(name, inputs, cu_seqlens)) is not None:
            comparison.absent.append(f"{name}: {reason}")
        else:
            comparison.enter(name, partial(_varlen, name, inputs, cu_seqlens), clock)
    comparison.measure(clock, settings.rounds)
    sequences = [replace(shape, tokens=n, prompt=n * 15 // 100) for n in lengths]
    flops = sum(score_flops(sequence) for sequence in sequences)
    whole = sum(score_flops(replace(sequence, prompt=0)) for sequence in sequences)
    counted = {"statistics": flops, "bands": 0} | dict.fromkeys(("with_output", *forwards), 2 * whole)
    rows = comparison.rows(tokens, counted, comparison.best(list(forwards)))
    return GpuPart(
        f"packed_{tokens}",
        tuple(row.json() for row in rows),
        (),
        (*comparison.absent, f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens"),
        comparison.not_measured(),
        comparison.ours_failed(),
        tuple(row.cells() for row in rows),
    )


def packed_ops(inputs: Inputs, cu_seqlens: Tensor, prompt_lens: Tensor) -> dict[str, Callable[[], Run]]:
    """Makers of rhythm's ops on a packed batch."""
    q, k, v = inputs.q, inputs.k, inputs.v
    arguments: dict[str, Any] = {"cu_seqlens": cu_seqlens, "prompt_lens": prompt_lens, "window": WINDOW}
    arguments |= {"horizon": HORIZON, "backend": inputs.backend}

    def bands() -> Run:
        lse = attention_statistics(q, k, **arguments).lse
        return lambda: attention_statistics(q, k, lse=lse, span=False, **arguments)

    return {
        "statistics": lambda: lambda: attention_statistics(q, k, **arguments),
        "with_output": lambda: lambda: attention_with_statistics(q, k, v, **arguments),
        "bands": bands,
    }


def _varlen_absent(name: str, inputs: Inputs, cu_seqlens: Tensor) -> str | None:
    from rhythm.ops import attention

    implementation = attention.IMPLEMENTATIONS[name]
    return implementation.unavailable() or implementation.refuses(_request(inputs, cu_seqlens))


def _varlen(name: str, inputs: Inputs, cu_seqlens: Tensor) -> Run:
    from rhythm.ops import attention

    request = _request(inputs, cu_seqlens)
    return lambda: attention.IMPLEMENTATIONS[name].run(request)


def _request(inputs: Inputs, cu_seqlens: Tensor) -> Any:
    from rhythm.ops.arguments import checked

    return checked(inputs.q, inputs.k, inputs.v, cu_seqlens, None, inputs.scale, WINDOW, *HORIZON)


def actor_part(settings: GpuSettings, clock: Clock) -> GpuPart:
    """Time rhythm.observe of a whole model against its plain forward; then one pass over the longest sequence."""
    model = actor_attn.build(settings.model, clock.device, torch.bfloat16, settings.longest)
    ids = actor_attn.token_ids(settings.model, clock.device, settings.shape.tokens)
    timings = actor_attn.timings(model, ids, clock, 3)
    share = ratio(timings["observe"], timings["plain"])
    facts = {f"{name}_seconds": list(timing.seconds) for name, timing in timings.items()}
    name = f"actor_attn at T={ids.shape[1]}: time over the plain forward's, both eager"
    metrics = [Metric(name, share, "×", at_most=0.7)]
    longest = actor_attn.token_ids(settings.model, clock.device, settings.longest)
    failed = []
    try:
        signals = actor_attn.observer(model, longest, clock)()
        done = float(signals.waad[:, settings.longest // 4 :].isfinite().all())
    except Exception as error:  # out of memory, say: the ratio above is kept
        failed.append(f"{settings.longest} tokens: {one_line(error)}")
        done = 0.0
    metrics.append(Metric(f"actor_attn of {settings.longest} tokens in memory (1: yes)", done, "", at_least=1.0))
    return GpuPart("actor_attn", (), tuple(metrics), (), tuple(failed), facts=facts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
