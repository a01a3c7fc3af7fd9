"""Python code that a checkpoint brings along: run only where a setting says so, else refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def refusal_names(setting: str, checkpoint: Path, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Around transformers' loading with trust_remote_code=False: for a checkpoint that needs code of its own,
    raises `kind` with one line that says which `setting` would allow it. Other errors pass.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise kind(
            f"{checkpoint} needs Python code that it brings along, which is not run: {setting} if you trust it"
        ) from error
