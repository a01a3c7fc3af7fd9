"""Lists the keys of a configuration with type, default and meaning, taken from its pydantic models."""

from __future__ import annotations

import math
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Key:
    """A key that can be set: `batch.mini_batch_size`, `int`, `32`, "responses per gradient step"."""

    path: str
    kind: str
    default: str
    meaning: str


def config_keys(config: BaseModel, prefix: str = "") -> Iterator[Key]:
    """Every key, section by section; defaults and the sections' classes are taken from `config`."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if (section := _section(field.annotation)) is not None:
            yield from config_keys(section() if value is None else value, f"{prefix}{name}.")
        else:
            meaning = field.description or ""
            yield Key(f"{prefix}{name}", _kind(field), _inline(config, name), meaning)


def sections(keys: list[Key]) -> list[str]:
    """The dotted names that hold keys: `batch`, `task`, `task.options` …"""
    parents = (key.path.rsplit(".", n)[0] for key in keys for n in range(1, key.path.count(".") + 1))
    return list(dict.fromkeys(parents))


def describe(keys: list[Key], width: int = 100) -> str:
    """Two lines per key: `path  kind = default`, and the meaning below. A default longer than `width` is cut off."""
    lines = []
    for key in keys:
        default = key.default if len(key.default) <= width else f"{key.default[:width]} …"
        lines.append(f"  {key.path}  {key.kind} = {default}")
        lines += textwrap.wrap(key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _kind(field: FieldInfo) -> str:
    """The names that are allowed, where the field's JSON schema lists them; else the type."""
    schema = field.json_schema_extra
    names = schema.get("enum") if isinstance(schema, dict) else None
    return " | ".join(map(str, names)) if isinstance(names, list) else kind_of(field.annotation)


def kind_of(annotation: Any) -> str:
    """A type in the form its values have in YAML: `int`, `std | mean`, `[int, int | null]`, `{quantile: float}`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return "null"
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(kind_of, arguments))
    if origin in (tuple, list):
        return f"[{', '.join('…' if a is Ellipsis else kind_of(a) for a in arguments)}]"
    if origin is typing.Annotated:
        return kind_of(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner = (f"{name}: {kind_of(f.annotation)}" for name, f in annotation.model_fields.items())
        return f"{{{', '.join(inner)}}}"
    if annotation is Path:
        return "path"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model if the annotation is a section (possibly optional); None for the type of a plain value."""
    kinds = [kind for kind in typing.get_args(annotation) or (annotation,) if kind is not type(None)]
    only = kinds[0] if len(kinds) == 1 else None
    return only if isinstance(only, type) and issubclass(only, BaseModel) else None


def _inline(config: BaseModel, name: str) -> str:
    value = config.model_dump(mode="json", include={name})[name]
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()
