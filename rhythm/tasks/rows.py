"""Rows of a JSONL or Parquet file, or of a data set on the hub, one at a time; every error names file and row."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rhythm.system.extras import needs

_LINES = (".jsonl", ".json", ".ndjson")
_PARQUET = (".parquet",)
_BATCH = 1_000  # rows of Parquet decoded at once


def read_rows(path: str, subset: str | None, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of every row of a file, or of a split of what `datasets` loads: a hub name, or a directory.

    `where` is for people: the file and the row's number, from 1 on; of JSONL, the line's. Rows are streamed.

    Raises ValueError for a file that isn't there, can't be read, or holds something else; ModuleNotFoundError where the
    package that reads it is missing.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _LINES:
        return _json_lines(Path(path))
    if suffix in _PARQUET:
        return _parquet(Path(path))
    if Path(path).is_file():
        raise ValueError(f"path is {path}: must be a file of {', '.join((*_LINES, *_PARQUET))}, or a name on the hub")
    return _from_datasets(path, subset, split)


def is_file(path: str) -> bool:
    """Whether `path` means a file, by its name: one set of rows, without splits."""
    return Path(path).suffix.lower() in (*_LINES, *_PARQUET)


def column(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column; `a.b` is entry b of column a, where no column has the whole name. Raises KeyError."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(name)
        value = value[part]
    return value


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ValueError(f"{where}: is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: must be an object, got {type(row).__name__}")
                yield where, row
    except OSError as error:
        raise ValueError(f"path is {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"path is {path}: is not UTF-8: byte {error.object[error.start]:#04x}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with needs(f"reading {path}"):
        import pyarrow
        from pyarrow import parquet
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"path is {path}: can't be read as Parquet after row {number}: {first_line}") from error


def _from_datasets(path: str, subset: str | None, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with needs(f"loading {path}"):
        import datasets
    source = f"{path}{f', {subset}' if subset else ''}, split {split}"
    logging.getLogger("datasets").setLevel(logging.ERROR)
    number = 0
    try:
        for row in datasets.load_dataset(path, subset, split=split, streaming=True):
            number += 1
            yield f"{source}, row {number}", row
    except GeneratorExit:
        raise
    except Exception as error:  # of datasets, of the hub's client, of the readers of a dozen formats
        raise ValueError(f"path is {source}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
