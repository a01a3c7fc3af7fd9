"""The names of the values per row that ops return on request (`also=`), and their checks."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from rhythm.shapes import integer

ALSO = ("max_logit", "top1", "entropy", "first_mass", "prompt_mass")
"""Of each row, defined in `reference.row_answers`; fields of AttentionStatistics."""


def also_names(also: object) -> tuple[str, ...]:
    """The names, each once, in the order of ALSO.

    Raises:
        ValueError: also is no sequence of names, or has one that does not exist; the nearest is suggested.
    """
    if isinstance(also, str) or not isinstance(also, Iterable):
        hint = f"; did you mean ({also!r},)?" if also in ALSO else ""
        raise ValueError(f"also is {also!r}; it must be a sequence of names among {', '.join(ALSO)}{hint}")
    names = list(also)
    for name in names:
        if not isinstance(name, str) or name not in ALSO:
            near = get_close_matches(name, ALSO, n=1, cutoff=0.5) if isinstance(name, str) else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"also has {name!r}; allowed are {', '.join(ALSO)}{hint}")
    return tuple(name for name in ALSO if name in names)


def check_also(also: tuple[str, ...], first: int, prompt_rows: bool) -> None:
    """first at least 1, and prompt_rows only with max_logit, which alone is defined on them."""
    also_names(also)
    integer("first", first, 1)
    if prompt_rows and "max_logit" not in also:
        raise ValueError(f"prompt_rows is True; it goes with 'max_logit' in also, which is {also}")
