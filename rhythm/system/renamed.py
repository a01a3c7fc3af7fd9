"""Keys of configurations that have another name now: they are refused with the new one."""

from __future__ import annotations

from collections.abc import Mapping


def renamed_keys(values: object, names: Mapping[str, str]) -> str:
    """What to tell a user whose `values` still have old names (dotted, as in `credit.q`); empty if there are none."""
    return "; ".join(f"{old} is now {new}" for old, new in names.items() if _has(values, old.split(".")))


def _has(values: object, path: list[str]) -> bool:
    for name in path:
        if not isinstance(values, Mapping) or name not in values:
            return False
        values = values[name]
    return True
