"""Refuses renamed configuration keys and keyword arguments with a message that gives the new name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def renamed_keys(values: object, names: Mapping[str, str]) -> str:
    """A message with the new name of each old key in `values` (dotted, such as credit.q); empty if there is none."""
    return "; ".join(f"{old} is now {new}" for old, new in names.items() if _has(values, old.split(".")))


def refuse_renamed(**names: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorates a function whose keyword arguments `names` (old=new) were renamed.

    Raises:
        ValueError: an old name is given; the message has the new one.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            if said := renamed_keys(kwargs, names):
                raise ValueError(said)
            return function(*args, **kwargs)

        return call

    return decorate


def _has(values: object, path: list[str]) -> bool:
    for name in path:
        if not isinstance(values, Mapping) or name not in values:
            return False
        values = values[name]
    return True
