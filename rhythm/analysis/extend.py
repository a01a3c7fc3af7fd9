"""Adds to a finished analysis what needs its model again: γ by other settings, and other lengths of context."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from rich.console import Console

from rhythm.analysis.grid import SensitivityConfig
from rhythm.analysis.lengths import LengthsConfig, measure_lengths
from rhythm.analysis.lengths_output import write_lengths
from rhythm.analysis.page import write_page
from rhythm.analysis.progress import working
from rhythm.analysis.results import Analysis
from rhythm.analysis.sensitivity import measure_sensitivity
from rhythm.analysis.sensitivity_output import write_sensitivity
from rhythm.system.directory_lock import lock_directory


def extend_analysis(
    model: Any,
    tokenizer: Any,
    analysis: Analysis,
    *,
    sensitivity: SensitivityConfig | None = None,
    lengths: LengthsConfig | None = None,
    console: Console | None = None,
) -> None:
    """Measure what is not None, write it into the directory of the analysis, and write its page again.

    Args:
        model, tokenizer: those of the analysis. sensitivity: see `measure_sensitivity`. lengths: see `measure_lengths`.
        console: shows the progress.

    Raises:
        DirectoryLockedError (a ValueError): another process is using the directory.
        ValueError: the model or the responses don't allow it. OSError: a file can't be written; it names the file.
    """
    if sensitivity is None and lengths is None:
        return
    with ExitStack() as stack:
        stack.enter_context(lock_directory(analysis.directory))
        progress = stack.enter_context(working(console))
        if sensitivity is not None:
            write_sensitivity(analysis, measure_sensitivity(model, tokenizer, analysis, sensitivity, progress))
        if lengths is not None:
            write_lengths(analysis, measure_lengths(model, tokenizer, analysis, lengths, progress))
        write_page(analysis)
