"""Shared by pages and tables of runs and of analyses: templates, CSV and figure files, number formats, token colors."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import jinja2

from rhythm.system.writing import naming

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUTLIER = 2.5  # the color scale ends at the 95th percentile if the largest value is this many times as far above low
_RUN_BY_SPREADSHEETS = ("=", "+", "-", "@", "\t", "\r")


def template_environment(templates: Path) -> jinja2.Environment:
    """A jinja2 environment for the templates of a directory; output is escaped, and an unknown name is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """The rows as CSV: floats with six digits, text escaped by `not_run`."""
    file = io.StringIO()
    write_csv(file, ([f"{cell:.6g}" if isinstance(cell, float) else not_run(cell) for cell in row] for row in rows))
    return file.getvalue()


def write_csv(file: TextIO, rows: Iterable[Iterable[object]]) -> None:
    """Writes the rows as CSV, each ended by a line feed. The file must be open with newline="".

    Cells with a carriage return are quoted: with another line terminator, Python 3.11 would write them bare.
    """
    csv.writer(_LineFeeds(file), lineterminator="\r\n").writerows(rows)


class _LineFeeds:
    """What csv.writer writes to; it writes one row at a time."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


def not_run(cell: Any) -> Any:
    """A value for a CSV file; text that a spreadsheet would run as a formula gets a leading apostrophe."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_RUN_BY_SPREADSHEETS) else cell


def save_figure(figure: Figure, path: Path, *, dpi: int) -> Path:
    """Writes a figure in the format of the path's suffix, a PDF without its date; returns the path.

    Raises OSError naming the path.
    """
    with naming(path):
        figure.savefig(path, dpi=dpi, metadata={"CreationDate": None} if path.suffix == ".pdf" else {})
    return path


def mean(values: Sequence[float]) -> float:
    """NaN where there is none."""
    return math.fsum(values) / len(values) if values else math.nan


def format_number(value: float) -> str:
    """Format to three significant digits, but never round before the decimal point: 0.0123, 1.50, 12.3, 1,234.

    Integers below a million have no decimal point. From a million on and below 0.001 the form is 1.23e-06. A negative
    number begins with "−". NaN is "–".
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = abs(value)
    rounded = float(f"{size:.2e}")  # 9.996 is 10.0, and not 10.00
    if size == int(size) and size < 1e6:
        text = f"{int(size):,}"
    elif not 1e-3 <= rounded < 1e6:
        text = f"{size:.2e}"
    else:
        text = f"{size:,.{max(0, 2 - math.floor(math.log10(rounded)))}f}"
    return f"−{text}" if value < 0 else text


def format_percent(share: float) -> str:
    """A share as percent with one decimal; "–" when undefined or infinite."""
    return f"{100 * share:.1f}%".replace("-", "−") if math.isfinite(share) else "–"


def format_p_value(p: float, floor: float = 0.0) -> str:
    """ "0.034", "< 0.0001"; "–" when undefined.

    Args:
        floor: the smallest p-value that the test can give. A p at the floor is written "≤ 0.001", since the true one
            may be smaller.
    """
    if math.isnan(p):
        return "–"
    if p <= floor * (1 + 1e-9):
        return f"≤ {floor:.2g}"
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def token_scale(values: Sequence[float], low: float | None = None) -> tuple[float, float] | None:
    """(low, high): values that get the palest and the strongest color; None if all values are NaN.

    `low` is by default the smallest value, high the largest. Where the largest is more than OUTLIER times as far above
    `low` as the 95th percentile, high is that percentile: a few tokens, above all the first of a response, have many
    times the FAI of the others. The percentile is always below the largest value, even for few values.
    """
    defined = sorted(value for value in values if not math.isnan(value))
    if not defined:
        return None
    low, high = (defined[0] if low is None else low), defined[-1]
    usual = defined[max(0, min(math.ceil(0.95 * len(defined)) - 1, len(defined) - 2))]
    if usual > low and high - low > OUTLIER * (usual - low):
        high = usual
    return low, high if high > low else low + 1.0


def token_strengths(values: Sequence[float], low: float | None = None) -> list[float]:
    """Strength of each token's color in [0, 1], by `token_scale`; NaN stays NaN."""
    scale = token_scale(values, low)
    if scale is None:
        return list(values)
    start, end = scale
    return [value if math.isnan(value) else min(max((value - start) / (end - start), 0.0), 1.0) for value in values]
