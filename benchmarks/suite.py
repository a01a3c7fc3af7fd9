"""The parts of a benchmark run: which ops are compared, and the targets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.measure import TimedCall, Timing, interleaved, peak_extra_bytes, ratio
from benchmarks.registry import Benchmark
from benchmarks.shapes import Shape, make_inputs, score_flops
from benchmarks.verify import CheckedResult, verify, verify_also
from rhythm.ops.answers import ALSO

DTYPES = (torch.float32, torch.bfloat16)


FULL, ODD = Shape(4096), Shape(257, prompt=31)
GEMMA = Shape(8192, query_heads=4, key_heads=1, head_size=256)


@dataclass(frozen=True)
class Settings:
    """Sizes of a run, under the names that they have in the record.

    windowed, sliding_window: a sliding-window layer, as large as those of Gemma 3 1B.
    with_targets: whether these are the sizes for which the targets were set. odd_shape: checked as well as `shape`.
    """

    shape: Shape = FULL
    band_tokens: tuple[int, ...] = (1024, 2048, 4096, 8192)
    memory_tokens: int = 32768
    windowed: Shape = GEMMA
    sliding_window: int = 512
    odd_shape: Shape = ODD
    rounds: int = 5
    least_seconds: float = 0.2
    threads: int = 1
    with_targets: bool = True


QUICK = Settings(
    shape=Shape(192, query_heads=4, key_heads=1, head_size=32),
    band_tokens=(128, 256),
    memory_tokens=1024,
    windowed=Shape(300, query_heads=2, key_heads=1, head_size=32),
    sliding_window=40,
    odd_shape=Shape(111, prompt=7, query_heads=4, key_heads=1, head_size=32),
    rounds=2,
    least_seconds=0.0,
    with_targets=False,
)


@dataclass(frozen=True)
class Measurement:
    """The measurement of one op at one shape: seconds per call; FLOPs and bytes, counted as `counted` says."""

    op: str
    dtype: str
    shape: Shape
    threads: int
    seconds_median: float
    seconds_min: float
    seconds_max: float
    rounds: int
    flops: int
    bytes: int
    counted: str

    @property
    def gflops(self) -> float:
        """10⁹ counted FLOPs per second."""
        return self.flops / self.seconds_median / 1e9


@dataclass(frozen=True)
class Metric:
    """A measured number and its target, at_least or at_most; both are None without a target."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


@dataclass(frozen=True)
class Part:
    name: str
    measurements: tuple[Measurement, ...]
    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class CheckedShape:
    """The results that were checked, and are right, at one shape in one type."""

    shape: Shape
    dtype: str
    results: tuple[CheckedResult, ...]


def check(benchmarks: list[Benchmark], settings: Settings, device: str) -> list[CheckedShape]:
    """Check every result of every op, at an odd shape with a prompt and at the shape that is timed.

    Raises:
        WrongResultError: a result is wrong.
    """
    return [
        CheckedShape(shape, type_name(dtype), tuple(verify(benchmarks, make_inputs(shape, dtype, device))))
        for shape in (settings.odd_shape, settings.shape)
        for dtype in DTYPES
    ]


def comparison_part(benchmarks: list[Benchmark], settings: Settings, device: str, dtype: torch.dtype) -> Part:
    """Compare all ops at one shape, in one type."""
    inputs = make_inputs(settings.shape, dtype, device)
    timings = interleaved(
        {benchmark.name: TimedCall(benchmark.make(inputs), settings.threads) for benchmark in benchmarks},
        rounds=settings.rounds,
        least_seconds=settings.least_seconds,
    )
    measurements = tuple(
        measurement(benchmark, timings[benchmark.name], settings.shape, dtype, settings.threads)
        for benchmark in benchmarks
    )
    eager, sdpa = (16.0, 2.3) if dtype == torch.float32 else (25.0, 3.5)
    rows = [
        ("statistics against eager: times as fast", "eager", "statistics", {"at_least": eager}),
        ("statistics against SDPA's forward: times as fast", "sdpa", "statistics", {"at_least": sdpa}),
        ("with output: time over that of SDPA's forward", "with_output", "sdpa", {"at_most": 1.1}),
    ]
    if blocked := [name for name in timings if name.startswith("blocked")]:
        best = min(blocked, key=lambda name: timings[name].median)
        rows.append((f"statistics against {best}, the best blocked torch: times as fast", best, "statistics", {}))
    metrics = [
        Metric(name, ratio(timings[one], timings[other]), "×", **(target if settings.with_targets else {}))
        for name, one, other, target in rows
        if one in timings and other in timings
    ]
    return Part(f"race_{type_name(dtype)}", measurements, tuple(metrics))


def bands_part(benchmarks: Mapping[str, Benchmark], settings: Settings, device: str) -> Part:
    """Compare only the bands with the full sweep at increasing lengths: their share of its time should fall as 1/T."""
    measurements, shares = [], {}
    for tokens in settings.band_tokens:
        shape = replace(settings.shape, tokens=tokens)
        inputs = make_inputs(shape, torch.float32, device)
        pair = [benchmarks["statistics"], benchmarks["bands"]]
        timings = interleaved(
            {benchmark.name: TimedCall(benchmark.make(inputs), settings.threads) for benchmark in pair},
            rounds=settings.rounds,
            least_seconds=settings.least_seconds,
        )
        for benchmark in pair:
            timing = timings[benchmark.name]
            measurements.append(measurement(benchmark, timing, shape, torch.float32, settings.threads))
        shares[tokens] = ratio(timings["bands"], timings["statistics"])
    metrics = [
        Metric(
            f"bands only at T={tokens}: share of the full sweep",
            100 * share,
            "%",
            at_most=8.0 if settings.with_targets and tokens == settings.shape.tokens else None,
        )
        for tokens, share in shares.items()
    ]
    # Only the last doubling: at short lengths the sweep's cost per token matters too.
    *_, before, last = shares
    falls = Metric(
        f"bands only: share at T={last} over that at T={before} (½ is 1/T)",
        shares[last] / shares[before],
        "",
        at_most=0.6 if settings.with_targets else None,
    )
    return Part("bands", tuple(measurements), (*metrics, falls))


def windows_part(benchmarks: Mapping[str, Benchmark], settings: Settings, device: str) -> Part:
    """Compare a sliding-window layer with the full sweep of the same size: work O(T·w) instead of O(T²).

    Raises:
        WrongResultError: its results are not those of the reference in fp64, at the odd shape that is checked.
    """
    full, windowed = benchmarks["statistics"], replace(benchmarks["statistics"], name="statistics_windowed")
    w, measurements, metrics = settings.sliding_window, [], []
    for dtype in DTYPES:
        verify([windowed], make_inputs(settings.odd_shape, dtype, device, sliding_window=w // 2))
        inputs = make_inputs(settings.windowed, dtype, device)
        pair = ((windowed, replace(inputs, sliding_window=w)), (full, inputs))
        timings = interleaved(
            {one.name: TimedCall(one.make(given), settings.threads) for one, given in pair},
            rounds=settings.rounds,
            least_seconds=settings.least_seconds,
        )
        for one, given in pair:
            timed = measurement(one, timings[one.name], settings.windowed, dtype, settings.threads)
            measurements.append(replace(timed, flops=score_flops(settings.windowed, given.sliding_window)))
        metrics.append(
            Metric(
                f"window {w} at T={settings.windowed.tokens}, {type_name(dtype)}: times as fast as the full sweep",
                ratio(timings[full.name], timings[windowed.name]),
                "×",
                at_least=6.0 if settings.with_targets else None,
            )
        )
    return Part("windows", tuple(measurements), tuple(metrics))


def also_part(benchmark: Benchmark, settings: Settings, device: str) -> Part:
    """Compare the sweep with each answer that `also` asks for, and with all of them, with the sweep without.

    Raises:
        WrongResultError: an answer is not that of the reference in fp64, at the odd shape that is checked.
    """
    asked = {"": (), **{f" and {name}": (name,) for name in ALSO}, " and all of these": ALSO}
    shape = replace(settings.shape, prompt=settings.shape.tokens // 4 + 3)  # its end lies within a tile
    measurements, metrics = [], []
    for dtype in DTYPES:
        verify_also(benchmark, replace(make_inputs(settings.odd_shape, dtype, device), also=ALSO))
        inputs = make_inputs(shape, dtype, device)
        timings = interleaved(
            {
                more: TimedCall(benchmark.make(replace(inputs, also=names)), settings.threads)
                for more, names in asked.items()
            },
            rounds=settings.rounds,
            least_seconds=settings.least_seconds,
        )
        for more in asked:
            timed = measurement(benchmark, timings[more], shape, dtype, settings.threads)
            measurements.append(replace(timed, op=f"{benchmark.name}{more}"))
            if more:
                share = 100 * (ratio(timings[more], timings[""]) - 1)
                limit = 10.0 if settings.with_targets and more != " and all of these" else None
                metrics.append(
                    Metric(f"{benchmark.name}{more}, {type_name(dtype)}: more time", share, "%", at_most=limit)
                )
    return Part("also", tuple(measurements), tuple(metrics))


def threads_part(benchmark: Benchmark, settings: Settings, device: str) -> Part:
    """Compare the full sweep on one thread and on two."""
    inputs = make_inputs(settings.shape, torch.float32, device)
    run = benchmark.make(inputs)
    timings = interleaved(
        {str(threads): TimedCall(run, threads) for threads in (1, 2)},
        rounds=settings.rounds,
        least_seconds=settings.least_seconds,
    )
    measurements = tuple(
        measurement(benchmark, timings[str(threads)], settings.shape, torch.float32, threads) for threads in (1, 2)
    )
    speed_up = Metric(
        f"{benchmark.name}, two threads against one: times as fast",
        ratio(timings["1"], timings["2"]),
        "×",
        at_least=1.8 if settings.with_targets else None,
    )
    return Part("threads", measurements, (speed_up,))


def memory_part(benchmark: Benchmark, settings: Settings) -> Part:
    """Measure the peak memory in addition to the inputs for a long sequence, in a separate process."""
    shape = replace(FULL, tokens=settings.memory_tokens)
    metrics = [
        Metric(
            f"{benchmark.name} at T={shape.tokens}, {type_name(dtype)}: memory beyond its inputs",
            peak_extra_bytes(shape, dtype, benchmark.name, settings.threads) / 1e6,
            "MB",
            at_most=200.0 if settings.with_targets else None,
        )
        for dtype in DTYPES
    ]
    return Part("memory", (), tuple(metrics))


def check_json(checked: CheckedShape) -> dict[str, object]:
    """{shape, dtype, results: {"op result": "error, at most allowed"}}."""
    results = {f"{v.op} {v.result}": f"{v.error:.1e}, at most {v.allowed:.1e}" for v in checked.results}
    return {"shape": asdict(checked.shape), "dtype": checked.dtype, "results": results}


def part_json(part: Part) -> dict[str, object]:
    """The part as JSON, including computed properties."""
    measurements = [asdict(m) | {"gflops_per_second": m.gflops} for m in part.measurements]
    metrics = [asdict(metric) | {"met": metric.met} for metric in part.metrics]
    return {"measurements": measurements, "metrics": metrics}


def measurement(benchmark: Benchmark, timing: Timing, shape: Shape, dtype: torch.dtype, threads: int) -> Measurement:
    """Of an op by its times.

    Raises:
        ValueError: a time is not above 0.
    """
    if not all(math.isfinite(seconds) and seconds > 0 for seconds in timing.seconds):
        raise ValueError(f"{benchmark.name} has times {timing.seconds}; each has to be above 0")
    return Measurement(
        op=benchmark.name,
        dtype=type_name(dtype),
        shape=shape,
        threads=threads,
        seconds_median=timing.median,
        seconds_min=min(timing.seconds),
        seconds_max=max(timing.seconds),
        rounds=len(timing.seconds),
        flops=benchmark.flops(shape),
        bytes=benchmark.bytes(shape, dtype),
        counted=benchmark.counted,
    )


def type_name(dtype: torch.dtype) -> str:
    """torch's name of it, without `torch.`."""
    return str(dtype).removeprefix("torch.")
