"""The options of the signals, spelled once for Python, YAML, TRL, the analysis and Megatron."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from operator import index
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

from rhythm.credit.heads import sampled_layers
from rhythm.ops import backends

HORIZONS: dict[str, tuple[int, int | None]] = {"paper": (10, 50), "revised": (10, 100)}
"""Horizons of FAI by name: the paper's, and its revised version's."""

MAX_TOKENS = 2**31 - 1
"""Of a window or a horizon: longer than any sequence."""


class _Choices:
    """What the options mean for a given model."""

    if TYPE_CHECKING:
        layers: int | tuple[int, ...] | Literal["all"] | None
        grouping: Literal["sequence", "batch", "calibrated"]

    def layers_of(self, depth: int, readable: Sequence[int] | None = None) -> list[int]:
        """The layers to read of a model with `depth` layers, rising. "all" means those of `readable`, None: every one.

        Raises:
            ValueError: an index that the model doesn't have.
        """
        if self.layers == "all":
            return list(range(depth) if readable is None else readable)
        if self.layers is None:
            return sampled_layers(depth)
        if isinstance(self.layers, int):
            return sampled_layers(depth, self.layers)
        if self.layers[-1] >= depth:
            raise ValueError(f"layers is {list(self.layers)}; the model has layers 0 to {depth - 1}")
        return list(self.layers)

    @property
    def per(self) -> Literal["sequence", "batch"]:
        """What `select_heads` sorts the spans of. Calibrated groups are those of the first batch."""
        return "sequence" if self.grouping == "sequence" else "batch"


def _integers(values: Sequence[Any]) -> tuple[int, ...] | None:
    """None if one is no integer."""
    numbers = [value for value in values if isinstance(value, SupportsIndex) and not isinstance(value, bool)]
    return tuple(index(number) for number in numbers) if len(numbers) == len(values) else None


def _is_checked() -> bool:
    """Whether pydantic is there to check the options."""
    try:
        return find_spec("pydantic") is not None
    except ModuleNotFoundError:
        return False


if TYPE_CHECKING or _is_checked():
    from pydantic import BaseModel, Field, field_validator

    class SignalsConfig(BaseModel, _Choices, extra="forbid", frozen=True):
        """How attention statistics become WAAD and FAI."""

        layers: int | tuple[int, ...] | Literal["all"] | None = Field(
            default=None,
            description="layers whose query heads form the pool: how many to sample from the middle third (null: 5), "
            "their indices in rising order, or all",
        )
        window: int = Field(default=10, ge=1, le=MAX_TOKENS, description="W of WAAD (eq. 9), in tokens")
        horizon: tuple[int, int | None] = Field(
            default=(10, 50),
            description="[low, high] of FAI (eq. 10) in tokens, high null: to the end; or paper, or revised",
        )
        quantile: float = Field(
            default=0.3, gt=0, le=0.5, description="share of the pool that is local, and that is global"
        )
        grouping: Literal["sequence", "batch", "calibrated"] = Field(
            default="sequence",
            description="who shares head groups: none, a batch, or all batches (fixed on the first)",
        )
        backend: str = Field(
            default="auto",
            description="backend of the statistics; auto takes the fastest there is",
            json_schema_extra={"enum": list(backends.NAMES)},
        )

        def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
            """Only what differs from the defaults."""
            fields = type(self).model_fields
            return ((name, getattr(self, name)) for name in fields if getattr(self, name) != fields[name].default)

        @field_validator("backend")
        @classmethod
        def _known(cls, value: str) -> str:
            if value not in backends.NAMES:
                near = get_close_matches(value, backends.NAMES, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"must be one of {', '.join(backends.NAMES)}, got {value!r}{hint}")
            return value

        @field_validator("layers", mode="before")
        @classmethod
        def _count_or_indices(cls, value: object) -> object:
            if value is None or (isinstance(value, str) and value == "all"):
                return value
            if (count := _integers([value])) and count[0] >= 1:
                return count[0]
            indices = _integers(value) if isinstance(value, Sequence) else None
            if indices and indices[0] >= 0 and indices == tuple(sorted(set(indices))):
                return indices
            raise ValueError(
                f"layers is {value!r}; it must be how many to sample (at least 1), indices in rising order, "
                "'all' or null"
            )

        @field_validator("window", "horizon", mode="before")
        @classmethod
        def _no_booleans(cls, value: object) -> object:
            if any(isinstance(part, bool) for part in (value if isinstance(value, list | tuple) else [value])):
                raise ValueError(f"must hold whole numbers, got {value!r}")
            return value

        @field_validator("horizon", mode="before")
        @classmethod
        def _named(cls, value: object) -> object:
            if isinstance(value, str):
                if value not in HORIZONS:
                    raise ValueError(f"must be [low, high] or one of {sorted(HORIZONS)}, got {value!r}")
                return HORIZONS[value]
            return value

        @field_validator("horizon")
        @classmethod
        def _upright(cls, value: tuple[int, int | None]) -> tuple[int, int | None]:
            low, high = value
            if low < 0 or (high is not None and high < low) or max(low, high or 0) > MAX_TOKENS:
                raise ValueError(f"must be [low, high] with 0 <= low <= high <= {MAX_TOKENS}, got {list(value)}")
            return value

else:  # on a bare machine, where observe is only measured: not checked before the ops check them

    @dataclass(frozen=True)
    class SignalsConfig(_Choices):
        """How attention statistics become WAAD and FAI."""

        layers: int | tuple[int, ...] | Literal["all"] | None = None
        window: int = 10
        horizon: tuple[int, int | None] = (10, 50)
        quantile: float = 0.3
        grouping: Literal["sequence", "batch", "calibrated"] = "sequence"
        backend: str = "auto"
