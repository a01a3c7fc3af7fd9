"""The lower bounds: counts against masks and hand-computed numbers, and the document against the command."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import roofline
from benchmarks.roofline import (
    BANDS,
    COLUMNS_TO_END,
    FORWARD,
    GPUS,
    H200,
    KERNELS,
    OPS,
    ROWS,
    ROWS_WITH_OUTPUT,
    Kernel,
    Units,
)
from benchmarks.shapes import Shape

SM_CLOCKS = 132 * 1.83e9  # a second


def needed(kernel: Kernel, tokens: int) -> torch.Tensor:
    """bool [t, s]: the pairs that the kernel computes."""
    position = torch.arange(tokens)
    distance = position[:, None] - position[None, :]
    lo, hi = kernel.distances
    return (distance >= lo) & (distance <= (tokens if hi is None else hi))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("tokens", [1, 9, 63, 300])
def test_pairs_are_those_of_the_mask(kernel: Kernel, tokens: int) -> None:
    assert kernel.pairs(tokens) == needed(kernel, tokens).sum()


@pytest.mark.parametrize("owns_keys", [False, True])
@pytest.mark.parametrize("distances", [(0, None), (3, None), (0, 4), (2, 9)])
@pytest.mark.parametrize("tokens", [1, 7, 24, 61])
def test_tiles_are_those_from_the_first_needed_pair_to_the_last(
    owns_keys: bool, distances: tuple[int, int | None], tokens: int
) -> None:
    kernel = Kernel("", distances, stationary=8, moving=4, slots=1, owns_keys=owns_keys)
    mask = needed(kernel, tokens).T if owns_keys else needed(kernel, tokens)
    tiles = 0
    for block in mask.split(8):
        reached = block.any(dim=0).nonzero()
        if len(reached):
            tiles += -(-(int(reached[-1] - reached[0]) + 1) // 4)
    assert kernel.tile_scores(tokens) == 32 * tiles


def test_tile_counts_worked_by_hand() -> None:
    assert ROWS.tile_scores(256) == 3 * 128 * 128  # one tile for the first block of rows, two for the second
    assert COLUMNS_TO_END.tile_scores(256) == (2 + 2 + 1 + 1) * 64 * 128  # 246, 182, 118 and 54 rows
    # A program owns 55 tokens; they and the 50 after them are 105 rows, 2 tiles of 64. The second program's rows end
    # with the sequence: 73 rows, 2 tiles; the third's are 18, 1 tile.
    assert BANDS.tile_scores(128) == (2 + 2 + 1) * 64 * 64


def test_work_worked_by_hand() -> None:
    """T = 3, 4 query heads, 2 key heads, head size 16: 6 causal pairs per head."""
    shape = Shape(3, query_heads=4, key_heads=2, head_size=16)
    query, key, row = 3 * 4 * 16 * 2, 3 * 2 * 16 * 2, 3 * 4 * 4  # bytes
    assert ROWS.work(shape) == Units(tensor=24 * 32, exp=24, issue=24 * 5.1, memory=query + key + 2 * row)
    assert ROWS_WITH_OUTPUT.work(shape) == Units(24 * 64, 24, 24 * 8.9, 2 * query + 2 * key + 2 * row)
    assert FORWARD.work(shape) == Units(24 * 64, 24, 24 * 5.5, 2 * query + 2 * key + row)
    assert COLUMNS_TO_END.work(shape).exp == 0  # no row is 10 tokens later
    assert BANDS.work(shape) == Units(24 * 32, 24, 24 * 8.5, query + key + 3 * row)
    assert COLUMNS_TO_END.work(replace(shape, tokens=12)).exp == 4 * (1 + 2)


def test_reads_from_l2_worked_by_hand() -> None:
    """T = 256, 2 query heads over 1, head size 16: 32 bytes per row of q or k, 64 of k and v."""
    shape = Shape(256, query_heads=2, key_heads=1, head_size=16)
    # Each head: all of q once; the first 128 rows read one tile of 128 keys, the others two.
    assert ROWS.l2_bytes(shape) == 2 * (256 + 3 * 128) * 32
    assert FORWARD.l2_bytes(shape) == ROWS_WITH_OUTPUT.l2_bytes(shape) == 2 * (256 + 2 * 3 * 128) * 32
    # All of k once; 64 keys are reached by rows to the end: 246, 182, 118 and 54, in tiles of 128.
    assert COLUMNS_TO_END.l2_bytes(shape) == 2 * (256 + (2 + 2 + 1 + 1) * 128) * 32
    # All of k once, and 9 keys before each program's own but the first's; 3 programs of 105 rows, then 91 and 36.
    assert BANDS.l2_bytes(shape) == 2 * (256 + 4 * 9 + 3 * 105 + 91 + 36) * 32


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_score_of_the_row_sweep_costs_the_same_in_two_units(gpu: roofline.Gpu) -> None:
    work = ROWS.work(roofline.shape_of(8192))
    floor = roofline.seconds(work, gpu)
    sixteenth = 32 * (8192 * 8193 // 2) / 16 / SM_CLOCKS
    assert [floor.tensor, floor.exp, floor.issue] == pytest.approx([sixteenth, sixteenth, sixteenth * 5.1 / 8])
    assert floor.limits == "tensor = exp"
    assert floor.memory == pytest.approx((8192 * 40 * 128 * 2 + 2 * 8192 * 32 * 4) / gpu.memory)


def test_rates_are_the_quoted_ones() -> None:
    assert H200.tensor * SM_CLOCKS == pytest.approx(989.4e12, rel=1e-4)
    assert H200.exp * SM_CLOCKS == pytest.approx(3.9e12, rel=0.01)
    assert [gpu.memory for gpu in GPUS] == [3.35e12, 4.8e12]


def test_the_three_numbers_of_a_floor() -> None:
    floor = Units(tensor=2.0, exp=1.0, issue=3.0, memory=1.5)
    assert (floor.overlapped, floor.staged, floor.serial) == (3.0, 5.0, 7.5)
    assert floor.limits == "issue"
    assert replace(floor, memory=9.0).staged == 9.0


def test_conclusions_of_the_document() -> None:
    """Its "What follows": which targets the floors allow at T = 8k on an H200, against a forward at its own floor."""
    shape = roofline.shape_of(8192)
    forward = roofline.seconds(FORWARD.work(shape), H200).overlapped
    statistics, with_output, bands = (roofline.op_floor(op, shape, H200) / forward for op in OPS)
    assert 0.53 < statistics < 0.535
    assert 1.03 < with_output < 1.035
    assert 0.032 < bands < 0.033
    thirteen = roofline.seconds(replace(ROWS, slots=13.0).work(shape), H200).overlapped
    assert thirteen / forward == pytest.approx(13 / 16)
    assert BANDS.l2_bytes(shape) == pytest.approx(206e6, rel=0.005)
    assert BANDS.l2_bytes(shape) / roofline.L2_RATE / forward == pytest.approx(0.074, abs=0.0005)
    of_128 = replace(BANDS, stationary=128)
    assert of_128.l2_bytes(shape) == pytest.approx(167e6, rel=0.005)
    assert of_128.l2_bytes(shape) / roofline.L2_RATE / forward == pytest.approx(0.060, abs=0.0005)
    tiles = roofline.seconds(BANDS.work(shape, in_tiles=True), H200)
    assert max(tiles.tensor, tiles.issue) == pytest.approx(10.7e-6, rel=0.01)
    sweep = roofline.seconds(ROWS.work(shape), H200)
    assert sweep.issue / sweep.tensor == pytest.approx(0.64, abs=0.005)
    assert roofline.op_floor(OPS[1], shape, H200) / (1.05 * forward / 0.75) == pytest.approx(0.74, abs=0.005)
    assert ROWS.l2_bytes(shape) / roofline.L2_RATE == pytest.approx(450e-6, rel=0.005)
    assert FORWARD.l2_bytes(shape) / roofline.L2_RATE == pytest.approx(886e-6, rel=0.005)
    statistics_at_75 = roofline.op_floor(OPS[0], shape, H200) / (0.5 * forward / 0.75)
    assert statistics_at_75 == pytest.approx(0.80, abs=0.005)


def test_the_document_holds_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main([])
    printed = capsys.readouterr().out
    text = roofline.DOC.read_text(encoding="utf-8")
    block = re.search(f"{re.escape(roofline.BEGIN)}(.*?){re.escape(roofline.END)}", text, re.DOTALL)
    assert block is not None
    assert block[1].strip() == printed.strip(), "run python -m benchmarks.roofline --write"


def test_write_renews_the_tables_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doc = tmp_path / "roofline.md"
    doc.write_text(f"before\n{roofline.BEGIN}old\n{roofline.END}after\n", encoding="utf-8")
    roofline.main(["--write", "--doc", str(doc)])
    assert (
        doc.read_text(encoding="utf-8") == f"before\n{roofline.BEGIN}\n{capsys.readouterr().out}{roofline.END}after\n"
    )
    with pytest.raises(ValueError, match="the document must hold"):
        roofline.with_tables("no tables here")
