"""python -m benchmarks.roofline: lower bounds on the time of each GPU kernel, from the rates in NVIDIA's data sheets.

Nothing is measured. The work of a kernel is counted per unit of the GPU; at full rate, the slowest unit gives the lower
bound. `--write` writes the tables into docs/roofline.md, which explains them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.shapes import HORIZON, WINDOW, Shape, operand_bytes

DOC = ROOT / "docs" / "roofline.md"
BEGIN, END = "<!-- begin: python -m benchmarks.roofline --write -->\n", "<!-- end -->\n"
LENGTHS = tuple(1024 << i for i in range(8))
TARGET_LENGTH = 8192
L2_RATE = 5e12
"""Bytes per second from L2 to all SMs: an assumption, not yet measured. docs/roofline.md gives its source."""
TIE = 0.01  # units within 1% of the slowest are named too


@dataclass(frozen=True)
class Gpu:
    """Peak rates: per SM and clock, and of the memory in bytes per second. docs/roofline.md gives the sources."""

    name: str
    memory: float
    sms: int = 132
    clock: float = 1.83e9
    tensor: int = 4096  # dense bf16 FLOPs
    exp: int = 16  # exp2
    issue: int = 128  # instructions × lanes: four schedulers with one warp each


@dataclass(frozen=True)
class Units:
    """One number per unit: the work of a kernel (FLOPs, exp2, issue slots, bytes), or the seconds that it takes."""

    tensor: float
    exp: float
    issue: float
    memory: float

    @property
    def overlapped(self) -> float:
        """All units work in parallel: the time of the slowest."""
        return max(self.tensor, self.exp, self.issue, self.memory)

    @property
    def staged(self) -> float:
        """The matrix products of a tile, then the arithmetic on its scores; memory is hidden behind both."""
        return max(self.tensor + max(self.exp, self.issue), self.memory)

    @property
    def serial(self) -> float:
        """One unit works at a time."""
        return self.tensor + self.exp + self.issue + self.memory

    @property
    def limits(self) -> str:
        """The slowest unit, and those within TIE of it."""
        return " = ".join(f.name for f in fields(self) if getattr(self, f.name) >= (1 - TIE) * self.overlapped)


@dataclass(frozen=True)
class Kernel:
    """The work of a kernel.

    Attributes:
        distances: (lo, hi) of the pairs (t, s) that it computes, inclusive; hi None: all from lo on.
        stationary, moving: tokens of a tile on the side that a program keeps, and on the side that it iterates over.
        owns_keys: whether a program keeps keys and iterates over rows; else it keeps rows and iterates over keys.
        halo: of the stationary tokens, those that another program owns.
        masked: loads of the moving side end with the last token that is needed; else whole tiles are read.
        products: matrix products, with 2·D FLOPs per score each.
        slots: issue slots per score, including exp2.
        query_arrays, key_arrays: bf16 arrays of T·Hq·D and of T·Hkv·D moved between memory and chip once.
        row_arrays: fp32 arrays of Hq·T moved once.
    """

    name: str
    distances: tuple[int, int | None]
    stationary: int
    moving: int
    slots: float
    owns_keys: bool = False
    halo: int = 0
    masked: bool = False
    products: int = 1
    query_arrays: int = 1
    key_arrays: int = 1
    row_arrays: int = 2

    def work(self, shape: Shape, *, in_tiles: bool = False) -> Units:
        """The work for one sequence without a prompt; in_tiles: count all scores of every tile that is computed."""
        pairs = self.tile_scores(shape.tokens) if in_tiles else self.pairs(shape.tokens)
        scores = pairs * shape.query_heads
        heads = self.query_arrays * shape.query_heads + self.key_arrays * shape.key_heads
        rows = self.row_arrays * shape.query_heads * shape.tokens
        return Units(
            tensor=scores * self.products * 2 * shape.head_size,
            exp=scores,
            issue=scores * self.slots,
            memory=operand_bytes(shape, torch.bfloat16, heads) + rows * torch.float32.itemsize,
        )

    def pairs(self, tokens: int) -> int:
        """Number of pairs (t, s) of one head within `distances`."""
        lo, hi = self._reach(tokens)
        return sum(tokens - distance for distance in range(lo, hi + 1))

    def tile_scores(self, tokens: int) -> int:
        """Number of scores of one head in all tiles that contain such a pair."""
        return sum(self._tiles(n) for n in self._walked(tokens)) * self.stationary * self.moving

    def l2_bytes(self, shape: Shape) -> int:
        """Bytes read from L2 by all programs of one sequence without a prompt: each reads its own block once, and all
        tiles that it iterates over. Query heads that share keys each read them.
        """
        walks = self._walked(shape.tokens)
        walked = sum(n if self.masked else self._tiles(n) * self.moving for n in walks)
        walked *= 1 if self.owns_keys else self.key_arrays
        kept = shape.tokens + self.halo * (len(walks) - 1)  # none before the first
        return (kept + walked) * shape.query_heads * shape.head_size * torch.bfloat16.itemsize

    def _tiles(self, walked: int) -> int:
        return -(-walked // self.moving)

    def _walked(self, tokens: int) -> list[int]:
        """For each program the number of tokens from the first to the last that it needs of the moving side."""
        lo, hi = self._reach(tokens)
        walked = []
        for first in range(0, tokens, self.stationary - self.halo):
            last = min(first + self.stationary - self.halo, tokens) - 1
            if self.owns_keys:
                begin, end = first + lo, min(last + hi, tokens - 1) + 1
            else:
                begin, end = max(first - hi, 0), last - lo + 1
            walked.append(max(end - begin, 0))
        return walked

    def _reach(self, tokens: int) -> tuple[int, int]:
        lo, hi = self.distances
        return lo, tokens - 1 if hi is None else min(hi, tokens - 1)


GPUS = (Gpu("H100 SXM", memory=3.35e12), Gpu("H200", memory=4.8e12))
H200 = GPUS[1]

# The row sweeps' slots are what their steady loops compile to under Triton 3.6 (benchmarks/records/compile_ahead).
ROWS = Kernel("row sweep, statistics alone", (0, None), 128, 128, 5.1)
ROWS_WITH_OUTPUT = Kernel(
    "row sweep with the output", (0, None), 128, 128, 8.9,
    products=2, query_arrays=2, key_arrays=2,
)  # fmt: skip
# Scale and lse (fma), exp2, the sum. The bands add a mask (distance, comparison, selection), and for rows of the
# program's own tokens, every second tile, another with a weight and a sum.
COLUMNS_TO_END = Kernel("column sweep to the end", (HORIZON[0], None), 64, 128, 3.0, owns_keys=True)
BANDS = Kernel(
    "bands", (0, HORIZON[1]), 64, 64, 6 + 5 / 2, owns_keys=True, halo=WINDOW - 1, masked=True, row_arrays=3
)  # fmt: skip
# Maximum, fma, exp2, sum. The output adds the weight's conversion to bf16, two per instruction, and the rescaling of a
# row's D sums once per tile of keys: D / keys per score.
FORWARD = Kernel(
    "plain flash forward", (0, None), 128, 128, 4 + 0.5 + 128 / 128,
    products=2, query_arrays=2, key_arrays=2, row_arrays=1,
)  # fmt: skip
KERNELS = (ROWS, ROWS_WITH_OUTPUT, COLUMNS_TO_END, BANDS, FORWARD)


@dataclass(frozen=True)
class Op:
    """An op: consecutive launches."""

    name: str
    launches: tuple[Kernel, ...]
    target: float  # times the plain forward's time


OPS = (
    Op("statistics", (ROWS, BANDS), 0.5),
    Op("with the output", (ROWS_WITH_OUTPUT, BANDS), 1.05),
    Op("bands given lse", (BANDS,), 0.05),
)


def shape_of(tokens: int) -> Shape:
    """One sequence in Qwen3-4B's shape."""
    return Shape(tokens, query_heads=32, key_heads=8, head_size=128)


def seconds(work: Units, gpu: Gpu) -> Units:
    """Seconds that each unit needs for its work at its peak rate."""
    clocks = gpu.sms * gpu.clock
    return Units(
        work.tensor / (gpu.tensor * clocks),
        work.exp / (gpu.exp * clocks),
        work.issue / (gpu.issue * clocks),
        work.memory / gpu.memory,
    )


def op_floor(op: Op, shape: Shape, gpu: Gpu, *, in_tiles: bool = False) -> float:
    """Lower bound in seconds: the sum of the overlapped lower bounds of its launches."""
    return sum(seconds(kernel.work(shape, in_tiles=in_tiles), gpu).overlapped for kernel in op.launches)


def report() -> str:
    """All tables, as markdown."""
    parts = [_rates(), _counts(), *(_floors(kernel) for kernel in KERNELS), *(_ratios(gpu) for gpu in GPUS), _needed()]
    return "\n".join(parts)


def _rates() -> str:
    def row(unit: str, per_clock: int, unit_name: str) -> tuple[str, ...]:
        totals = (per_clock * gpu.sms * gpu.clock / 1e12 for gpu in GPUS)
        return (unit, f"{per_clock} {unit_name}", *(f"{total:,.2f} T{unit_name}/s" for total in totals))

    rows = [
        row("tensor", H200.tensor, "FLOP"),
        row("exp", H200.exp, "exp2"),
        row("issue", H200.issue, "slot"),
        ("memory", "", *(f"{gpu.memory / 1e12:.2f} TB/s" for gpu in GPUS)),
    ]
    return _table("Rates", ("unit", "per SM and clock", *(gpu.name for gpu in GPUS)), rows)


def _counts() -> str:
    shape = shape_of(TARGET_LENGTH)
    rows = []
    for kernel in KERNELS:
        lo, hi = kernel.distances
        side = "keys × rows" if kernel.owns_keys else "rows × keys"
        work = kernel.work(shape)
        rows.append(
            (
                kernel.name,
                f"{lo} … {'T − 1' if hi is None else hi}",
                f"{kernel.stationary} × {kernel.moving} {side}",
                f"{kernel.products * 2 * shape.head_size}",
                "1",
                f"{kernel.slots:g}",
                f"{work.memory / shape.tokens:,.0f}",
            )
        )
    header = ("kernel", "distances", "tile", "FLOPs per score", "exp2 per score", "slots per score", "bytes per token")
    return _table("Work", header, rows)


def _floors(kernel: Kernel) -> str:
    header = ["T", "MB", "GFLOP", "10⁹ exp2", "10⁹ slots"]
    header += [cell for gpu in GPUS for cell in (f"{gpu.name} µs", "limit")]
    header += ["H200 serial µs", "H200 in tiles µs", "L2 → SM GB", f"at {L2_RATE / 1e12:g} TB/s µs"]
    rows = []
    for tokens in LENGTHS:
        work = kernel.work(shape_of(tokens))
        floors = [seconds(work, gpu) for gpu in GPUS]
        tiles = seconds(kernel.work(shape_of(tokens), in_tiles=True), H200)
        counts = (work.memory / 1e6, work.tensor / 1e9, work.exp / 1e9, work.issue / 1e9)
        cells = [cell for floor in floors for cell in (_micro(floor.overlapped), floor.limits)]
        moved = kernel.l2_bytes(shape_of(tokens))
        cells += [_micro(floors[1].serial), _micro(tiles.overlapped), _three(moved / 1e9), _micro(moved / L2_RATE)]
        rows.append((_thousands(tokens), *map(_three, counts), *cells))
    return _table(f"Floors: {kernel.name}", header, rows)


def _ratios(gpu: Gpu) -> str:
    columns: list[tuple[str, Callable[[Units], float], bool]] = [
        ("overlapped", lambda floor: floor.overlapped, False),
        ("staged", lambda floor: floor.staged, False),
        ("serial", lambda floor: floor.serial, False),
        ("in tiles", lambda floor: floor.overlapped, True),
    ]
    header = (
        "T",
        *(f"row sweep, {name}" for name, _, _ in columns),
        *(f"{op.name} (target {op.target:g})" for op in OPS),
    )
    rows = []
    for tokens in LENGTHS:
        shape = shape_of(tokens)
        sweep = [
            of(seconds(ROWS.work(shape, in_tiles=tiles), gpu)) / of(seconds(FORWARD.work(shape, in_tiles=tiles), gpu))
            for _, of, tiles in columns
        ]
        forward = seconds(FORWARD.work(shape), gpu).overlapped
        ops = [op_floor(op, shape, gpu) / forward for op in OPS]
        rows.append((_thousands(tokens), *(f"{ratio:.3f}" for ratio in (*sweep, *ops))))
    return _table(f"Ratios to the plain forward's floor, {gpu.name}", header, rows)


def _needed() -> str:
    """How close to its own lower bound an op must come to reach its target."""
    shape = shape_of(TARGET_LENGTH)
    forward = seconds(FORWARD.work(shape, in_tiles=True), H200).overlapped
    reached = (1.0, 0.75, 0.65, 0.55)
    rows = []
    for op in OPS:
        floor = op_floor(op, shape, H200, in_tiles=True)
        shares = (floor / (op.target * forward / share) for share in reached)
        rows.append((op.name, f"{op.target:g}", _micro(floor), *(_share(share) for share in shares)))
    header = ("op", "target", "floor µs", *(f"forward at {share:.0%}" for share in reached))
    return _table(f"Needed at T = {_thousands(TARGET_LENGTH)}, H200, in tiles", header, rows)


def _share(share: float) -> str:
    return f"{share:.0%}" if share <= 1 else f"impossible ({share:.0%})"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"**{title}**", "", _row(header), _row(["---"] * len(header)), *map(_row, rows), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}k"


def _micro(time: float) -> str:
    return _three(1e6 * time)


def _three(number: float) -> str:
    """Three significant digits, or all digits of a larger integer, without an exponent."""
    return f"{number:,.{max(0, 2 - math.floor(math.log10(number)))}f}"


def with_tables(text: str) -> str:
    """The document with its block of tables replaced.

    Raises:
        ValueError: the document has no such block.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document must hold {BEGIN!r} and after it {END!r}")
    return f"{before}{BEGIN}\n{report()}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--write", action="store_true", help="also write the tables into docs/roofline.md")
    parser.add_argument("--doc", type=Path, default=DOC, metavar="FILE", help="the document to write into")
    options = parser.parse_args(arguments)
    print(report())
    if options.write:
        options.doc.write_text(with_tables(options.doc.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
