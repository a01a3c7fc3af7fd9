"""Rows of a JSONL or Parquet file, or of a data set on the hub, one at a time; every error names file, row and key."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rhythm.system.extras import needs

_LINES = (".jsonl", ".json", ".ndjson")
_PARQUET = (".parquet",)
_BATCH = 1_000  # rows of Parquet decoded at once


@dataclass(frozen=True)
class Source:
    """A file, or a split of what `datasets` loads: a hub name, or a directory; and the keys that give path and split.

    As a string it begins an error message: `test_path is b.jsonl`; `path is DIR, test_split test`.
    """

    path: str
    subset: str | None = None
    split: str = "train"
    path_key: str = "path"
    split_key: str = "split"

    def __str__(self) -> str:
        if is_file(self.path):
            return f"{self.path_key} is {self.path}"
        subset = f", {self.subset}" if self.subset else ""
        return f"{self.path_key} is {self.path}{subset}, {self.split_key} {self.split}"


def read_rows(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of every row.

    `where` is for people: the file and the row's number, from 1 on; of JSONL, the line's. Rows are streamed.

    Raises ValueError, naming the key, for a path or a split that is empty, isn't there, can't be read, or holds
    something else; ModuleNotFoundError where the package that reads it is missing.
    """
    path = Path(source.path)
    suffix = path.suffix.lower()
    if suffix in _LINES:
        return _json_lines(source)
    if suffix in _PARQUET:
        return _parquet(source)
    files = ", ".join((*_LINES, *_PARQUET))
    if not source.path:
        raise ValueError(f"{source.path_key} is '': must be a file of {files}, a directory or a name on the hub")
    if path.is_file():
        raise ValueError(f"{source.path_key} is {path}: must be a file of {files}, or a name on the hub")
    if not source.split:
        raise ValueError(f"{source.split_key} is '': must be the name of a split of {path}")
    return _from_datasets(source)


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


def _json_lines(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    path = Path(source.path)
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
        raise ValueError(f"{source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: is not UTF-8: byte {error.object[error.start]:#04x}") from error


def _parquet(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    path = Path(source.path)
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
        raise ValueError(f"{source}: can't be read as Parquet after row {number}: {first_line}") from error


def _from_datasets(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with needs(f"loading {source.path}"):
        import datasets
    where = f"{source.path}{f', {source.subset}' if source.subset else ''}, split {source.split}"
    logging.getLogger("datasets").setLevel(logging.ERROR)
    number = 0
    try:
        for row in datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True):
            number += 1
            yield f"{where}, row {number}", row
    except GeneratorExit:
        raise
    except Exception as error:  # of datasets, of the hub's client, of the readers of a dozen formats
        after = f" after row {number}" if number else ""
        problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"{source}: can't be read{after}: {problem}") from error
