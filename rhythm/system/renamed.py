"""Finds renamed configuration keys, for errors that give the new name."""

from __future__ import annotations

from collections.abc import Mapping


def renamed_keys(values: object, names: Mapping[str, str]) -> str:
    """A message with the new name of each old key in `values` (dotted, such as credit.q); empty if there is none."""
    return "; ".join(f"{old} is now {new}" for old, new in names.items() if _has(values, old.split(".")))


def _has(values: object, path: list[str]) -> bool:
    for name in path:
        if not isinstance(values, Mapping) or name not in values:
            return False
        values = values[name]
    return True
