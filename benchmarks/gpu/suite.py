"""The parts of a run on a GPU, the most important first, and the aims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import actor_attn
from benchmarks.gpu.actor_attn import Dimensions
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.contestants import GPU, INTERPRETER, Contestant
from benchmarks.measure import Timing, ratio
from benchmarks.shapes import HORIZON, WINDOW, Shape, make_inputs, score_flops
from benchmarks.suite import Claim
from benchmarks.verify import Verdict, verify
from rhythm import attention_statistics, attention_with_statistics

QWEN3_4B, QWEN3_4B_MODEL = Shape(8192, query_heads=32, key_heads=8, head_size=128), Dimensions()
OURS = ("statistics", "with_output", "bands")


@dataclass(frozen=True)
class Settings:
    """Sizes of a run; the defaults are the ones that the aims were set for."""

    contestants: tuple[Contestant, ...] = GPU
    shape: Shape = QWEN3_4B
    gates: tuple[Shape, ...] = (
        Shape(257, prompt=31, query_heads=8, key_heads=2, head_size=128),
        Shape(2048, prompt=100, query_heads=4, key_heads=1, head_size=96),
    )
    gate_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    lengths: tuple[int, ...] = (1024, 2048, 4096, 16384, 32768, 65536, 131072)
    packed: tuple[int, ...] = (16384, 65536)
    mean_length: int = 1024
    model: Dimensions = QWEN3_4B_MODEL
    longest: int = 131072
    rounds: int = 9


INTERPRETED = Settings(
    contestants=INTERPRETER,
    shape=Shape(96, query_heads=4, key_heads=2, head_size=16),
    gates=(Shape(70, prompt=9, query_heads=4, key_heads=2, head_size=16),),
    gate_dtypes=(torch.bfloat16, torch.float32),
    lengths=(64,),
    packed=(120,),
    mean_length=30,
    model=Dimensions(6, 32, 64, 4, 2, 8, 50),
    longest=80,
    rounds=2,
)


@dataclass(frozen=True)
class Row:
    """One op at one shape: median, fastest and slowest seconds; FLOPs as counted; bytes beyond the inputs."""

    op: str
    tokens: int
    seconds: float
    seconds_min: float
    seconds_max: float
    flops: int
    peak_bytes: int
    to_best_forward: float | None

    @property
    def tflops(self) -> float:
        return self.flops / self.seconds / 1e12


@dataclass(frozen=True)
class Part:
    name: str
    rows: tuple[Row, ...] = ()
    claims: tuple[Claim, ...] = ()
    absent: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        rows = [asdict(row) | {"tflops": row.tflops} for row in self.rows]
        claims = [asdict(claim) | {"met": claim.met} for claim in self.claims]
        return {"rows": rows, "claims": claims, "absent": list(self.absent)}


def parts(settings: Settings, clock: Clock) -> list[tuple[str, float, Callable[[], Part]]]:
    """(name, seconds it needs at least, the part yet to be run), the most important first."""
    planned: list[tuple[str, float, Callable[[], Part]]] = [
        ("race", 60.0, lambda: race_part(settings, clock, settings.shape)),
        ("actor_attn", 40.0, lambda: actor_part(settings, clock)),
    ]
    for tokens in settings.packed:
        planned.append((f"packed_{tokens}", 15.0, lambda tokens=tokens: packed_part(settings, clock, tokens)))
    for tokens in settings.lengths:
        shape = replace(settings.shape, tokens=tokens)
        planned.append((f"race_{tokens}", 25.0, lambda shape=shape: race_part(settings, clock, shape)))
    return planned


def check(settings: Settings, clock: Clock) -> list[tuple[Shape, str, list[Verdict]]]:
    """Results against the fp64 reference, on the device. Raises GateError."""
    passed = []
    for shape in settings.gates:
        for dtype in settings.gate_dtypes:
            inputs = make_inputs(shape, dtype, clock.device, clock.backend)
            # What takes seconds to compile is checked once.
            every = shape == settings.gates[0] and dtype == torch.bfloat16
            able = [one for one in settings.contestants if one.name in OURS or (every and not one.plain)]
            able = [one for one in able if one.absent() is None]
            passed.append((shape, str(dtype).removeprefix("torch."), verify(able, inputs)))
    return passed


def race_part(settings: Settings, clock: Clock, shape: Shape) -> Part:
    """All contestants that are there and can take the length; claims at the settings' own shape."""
    inputs = make_inputs(shape, torch.bfloat16, clock.device, clock.backend)
    runs, absent = {}, []
    for one in settings.contestants:
        reason = one.absent()
        if reason is None and shape.tokens > one.max_tokens:
            reason = f"only to T = {one.max_tokens}"
        if reason is None:
            run = one.make(inputs)
            try:
                run()
            except (RuntimeError, torch.OutOfMemoryError) as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            else:
                runs[one.name] = run
        if reason is not None:
            absent.append(f"{one.name}: {reason}")
    timings = clock.race(runs, settings.rounds if shape.tokens <= 16384 else 3)
    chosen = {one.name: one for one in settings.contestants if one.name in runs}
    plain = [name for name, one in chosen.items() if one.plain]
    best = min(plain, key=lambda name: timings[name].median) if plain else None
    rows = tuple(
        _row(name, shape, timings[name], one.flops(shape), clock.peak_bytes(runs[name]), timings.get(best or ""))
        for name, one in chosen.items()
    )
    claims = _claims(timings, best, shape) if shape == settings.shape else []
    if shape == settings.shape and best is not None and "bands" in runs:
        share = clock.graph_seconds(runs["bands"]) / clock.graph_seconds(runs[best])
        claims.append(Claim(f"bands given lse: time over that of {best}, both in graphs", share, "×", at_most=0.05))
    return Part(f"race_{shape.tokens}", rows, tuple(claims), tuple(absent))


def _claims(timings: dict[str, Timing], best: str | None, shape: Shape) -> list[Claim]:
    if best is None:
        return []
    aims = {"statistics": 0.5, "with_output": 1.05, "bands": None}
    return [
        Claim(
            f"{name} at T={shape.tokens}: time over that of {best}",
            ratio(timings[name], timings[best]),
            "×",
            at_most=aim,
        )
        for name, aim in aims.items()
        if name in timings
    ]


def _row(op: str, shape: Shape, timing: Timing, flops: int, peak: int, best: Timing | None) -> Row:
    to_best = None if best is None else ratio(timing, best)
    return Row(op, shape.tokens, timing.median, min(timing.seconds), max(timing.seconds), flops, peak, to_best)


def lengths_of(tokens: int, mean: int) -> list[int]:
    """Log-normal lengths (σ = 0.8) from a fixed seed that add up to `tokens`, each at least 8."""
    generator, lengths = torch.Generator().manual_seed(0), []
    while (left := tokens - sum(lengths)) > 0:
        drawn = int(mean * 0.73 * torch.randn((), generator=generator).mul(0.8).exp())
        lengths.append(left if left < 16 else min(max(drawn, 8), left - 8 if left - drawn < 8 and left > 16 else left))
    return lengths


def packed_part(settings: Settings, clock: Clock, tokens: int) -> Part:
    """A packed batch with a realistic spread of lengths, prompts of 15 %: ours, and a varlen forward where there is."""
    lengths = lengths_of(tokens, settings.mean_length)
    shape = replace(settings.shape, tokens=tokens)
    inputs = make_inputs(shape, torch.bfloat16, clock.device, clock.backend)
    cu_seqlens = torch.tensor([0, *lengths], device=clock.device).cumsum(0).to(torch.int32)
    prompt_lens = torch.tensor([length * 15 // 100 for length in lengths], device=clock.device)
    arguments: dict[str, Any] = {"cu_seqlens": cu_seqlens, "prompt_lens": prompt_lens, "window": WINDOW}
    arguments |= {"horizon": HORIZON, "backend": clock.backend}
    q, k, v = inputs.q, inputs.k, inputs.v
    lse: Tensor = attention_statistics(q, k, **arguments).lse
    runs: dict[str, Callable[[], Any]] = {
        "statistics": lambda: attention_statistics(q, k, **arguments),
        "with_output": lambda: attention_with_statistics(q, k, v, **arguments),
        "bands": lambda: attention_statistics(q, k, lse=lse, span=False, **arguments),
    }
    absent, forwards = [], {}
    for name in ("flash_attn", "sdpa_flash"):
        forwards[name] = _varlen(name, inputs.q, inputs.k, inputs.v, cu_seqlens, inputs.scale)
        try:
            forwards[name]()
        except (RuntimeError, ValueError) as error:
            absent.append(f"{name}: {str(error).splitlines()[0]}")
            del forwards[name]
    timings = clock.race(runs | forwards, settings.rounds)
    best = min(forwards, key=lambda name: timings[name].median) if forwards else None
    sequences = [replace(shape, tokens=n, prompt=n * 15 // 100) for n in lengths]
    flops = sum(score_flops(sequence) for sequence in sequences)
    whole = sum(score_flops(replace(sequence, prompt=0)) for sequence in sequences)
    counted = {"statistics": flops, "bands": 0} | dict.fromkeys(("with_output", *forwards), 2 * whole)
    rows = tuple(
        _row(name, shape, timings[name], counted[name], clock.peak_bytes(run), timings.get(best or ""))
        for name, run in (runs | forwards).items()
    )
    return Part(
        f"packed_{tokens}", rows, (), (*absent, f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens")
    )


def _varlen(name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Callable[[], Any]:
    from rhythm import forwards
    from rhythm.arguments import Layout

    layout = Layout(q.shape[0], cu_seqlens.shape[0] - 1, cu_seqlens, None)

    def run() -> Any:
        forward = forwards.choose(name, q, k, layout)
        assert forward is not None
        return forward.run(q, k, v, layout, scale)

    return run


def actor_part(settings: Settings, clock: Clock) -> Part:
    """rhythm.observe of a whole model, its share of the plain forward, and a pass over the longest sequence."""
    dtype = torch.bfloat16
    model = actor_attn.build(settings.model, clock.device, dtype, settings.longest)
    ids = actor_attn.token_ids(settings.model, clock.device, settings.shape.tokens)
    plain, observed = actor_attn.race(model, ids, clock, 3)
    claims = [
        Claim(f"actor_attn at T={ids.shape[1]}: time over the plain forward's", observed / plain, "×", at_most=0.7)
    ]
    longest = actor_attn.token_ids(settings.model, clock.device, settings.longest)
    try:
        signals = actor_attn.observe(model, longest, clock)
        done = float(signals.waad[:, settings.longest // 4 :].isfinite().all())
    except torch.OutOfMemoryError:
        done = 0.0
    claims.append(Claim(f"actor_attn of {settings.longest} tokens in memory (1: yes)", done, "", at_least=1.0))
    return Part("actor_attn", (), tuple(claims))
