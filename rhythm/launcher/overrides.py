"""A configuration file and `key=value` overrides → a checked TrainConfig, or an error that names the key."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rhythm.launcher.keys import Key, config_keys, sections
from rhythm.trainer.config import TaskConfig, TrainConfig


class ConfigError(ValueError):
    """What is wrong with a configuration; the message names the file or the keys."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, of which YAML's would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The file's configuration with `key=value` overrides (dotted keys, values in YAML), checked as a whole.

    Raises ConfigError: no such file, not YAML, an override without `=`, an unknown key (the nearest known one
    is named), a value that is not allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    values = _parse(text, str(path))
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: must hold keys and values, got {type(values).__name__}")
    values = values or {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not (separator and key):
            raise ConfigError(f"{override!r}: an override is written key=value, for example optimizer.lr=1e-5")
        _put(values, key, _parse(value, override))
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, _known_keys(values)))) from error


def dump_config(config: TrainConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for depth, name in enumerate(parents):
        if values.get(name) is None:  # a section that is left out, or written as null
            values[name] = {}
        inner = values[name]
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        values = inner
    values[last] = value


def _known_keys(values: Mapping[str, Any]) -> list[Key]:
    """All keys; the options are those of the task that `values` names, if there is such a task."""
    task = values.get("task")
    name = task.get("name", "countdown") if isinstance(task, Mapping) else "countdown"
    try:
        return list(config_keys(TrainConfig(task=TaskConfig(name=name))))
    except ValidationError:
        return list(config_keys())


def _explain(error: ValidationError, keys: list[Key]) -> list[str]:
    """A line for each key at fault."""
    kinds = {key.path: key.kind for key in keys}
    lines: dict[str, str] = {}
    for fault in error.errors():
        # A fault inside a value ({quantile: 2}, [1, x]) is a fault of its key.
        parts = [str(part) for part in fault["loc"]]
        path = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in kinds), None)
        dotted = path or ".".join(parts)
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden" and path is None:
            line = f"{dotted}: unknown key{_nearest(dotted, keys)}"
        elif path is not None and len(parts) > path.count(".") + 1:
            line = f"{path}: must be {kinds[path]}"
        elif path is not None and fault["type"] != "value_error":
            line = f"{path} is {fault['input']!r}: {message[0].lower()}{message[1:]} ({kinds[path]})"
        else:
            line = f"{dotted}: {message}" if dotted else message
        lines.setdefault(dotted, line)
    return list(lines.values())


def _nearest(dotted: str, keys: list[Key]) -> str:
    """`; did you mean …?`: by the whole name, or by its last part in some other section."""
    known = [key.path for key in keys] + sections(keys)
    near = difflib.get_close_matches(dotted, known, n=1, cutoff=0.7)
    if not near:
        by_last = {path.rsplit(".", 1)[-1]: path for path in reversed(known)}
        last = difflib.get_close_matches(dotted.rsplit(".", 1)[-1], by_last, n=1, cutoff=0.7)
        near = [by_last[name] for name in last]
    return f"; did you mean {near[0]}?" if near else ""
