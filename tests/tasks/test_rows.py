"""Rows come one at a time: the first of them before the rest has been read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from rhythm.tasks.rows import Source, read_rows

ROWS = [{"number": n, "text": "x" * 100} for n in range(20_000)]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_lines_are_read_as_they_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(ROWS), encoding="utf-8")
    files: list[Any] = []
    honest = Path.open

    def opened(self: Path, *arguments: Any, **options: Any) -> Any:
        files.append(honest(self, *arguments, **options))
        return files[-1]

    monkeypatch.setattr(Path, "open", opened)
    rows = read_rows(Source(str(path)))
    assert next(rows) == (f"{path}, line 1", ROWS[0])
    (file,) = files
    assert not file.closed
    assert file.buffer.raw.tell() < path.stat().st_size / 10
    assert [row for _, row in rows] == ROWS[1:]


def test_parquet_is_decoded_as_it_is_taken(tmp_path: Path) -> None:
    """The last fifth of the file is damaged: the rows before it come nevertheless."""
    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, path, row_group_size=4_000, compression="zstd", use_dictionary=False)
    column = parquet.ParquetFile(path).metadata.row_group(4).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset  # of the header of its page
    data[start : start + 30] = bytes(30)
    path.write_bytes(bytes(data))
    rows = read_rows(Source(str(path)))
    taken = [next(rows)]
    assert taken == [(f"{path}, row 1", ROWS[0])]
    with pytest.raises(ValueError, match=r"rows\.parquet: can't be read as Parquet after row \d+"):
        taken.extend(rows)
    assert 10_000 <= len(taken) <= 16_000


def test_data_sets_are_streamed(tmp_path: Path) -> None:
    """The second file of the split holds no JSON: the rows of the first one come nevertheless."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.jsonl").write_text(lines(ROWS[:10]), encoding="utf-8")
    (tmp_path / "data" / "train-1.jsonl").write_text("no JSON\n", encoding="utf-8")
    rows = read_rows(Source(str(tmp_path)))
    source = f"{tmp_path}, split train"
    assert [next(rows) for _ in range(10)] == [(f"{source}, row {n + 1}", row) for n, row in enumerate(ROWS[:10])]
    with pytest.raises(ValueError, match=r"split train: "):
        next(rows)
