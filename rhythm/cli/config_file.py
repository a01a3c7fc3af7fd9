"""Reads a configuration from a YAML file and `key=value` overrides; errors name the file or the key."""

from __future__ import annotations

import copy
import difflib
import re
import reprlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from rhythm.cli.config_keys import Key, config_keys, sections
from rhythm.tasks.countdown import CountdownConfig

if TYPE_CHECKING:
    from rhythm.trainer.config import TrainConfig

C = TypeVar("C", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration is invalid; the message names the file or the keys."""


MAX_BYTES = 1 << 18  # size of a configuration file; one with every key needs a fiftieth of it
MAX_DEPTH = 32  # nesting of lists and sections; the deepest key has 4 levels
# Of an error message: lines, unknown keys for which a similar one is suggested, characters per line.
MAX_LINES, MAX_SUGGESTIONS, MAX_LINE = 20, 5, 500
MAX_INTEGER = 2**63 - 1

_OPTIONS = "task.options."
_COUNTDOWNS = {f"{_OPTIONS}{name}" for name in CountdownConfig.model_fields}  # options of the default task

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxlong, _short.maxother = 3, 80, 40, 80


class _Loader(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys, deep nesting and merges (which can grow exponentially), and reads 1:30 as
    text, not as the number 90.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"is nested more than {MAX_DEPTH} deep", mark)
        self.depth += 1
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
        finally:
            self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise self._error("merges (<<) are not supported: write the keys themselves", key_node)
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise self._error(f"a {type(key).__name__} can't be a key", key_node)
            if key in seen:
                raise self._error(f"the key {_short.repr(key)} is there twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    @staticmethod
    def _error(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
        return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(rf"(?!{_SEXAGESIMAL.pattern}$)(?:{pattern.pattern})", pattern.flags))
        if tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        else (tag, pattern)
        for tag, pattern in resolvers
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """As `read_config`, for a training run; the keys of `task.options` are those of the task named in it."""
    return _train_config(_with_overrides(_values(path), overrides))


def load_for_help(path: Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """`load_config` for --help, for which the task's options need not be complete.

    The file's options don't count where the overrides name another task than the file does. Required options without a
    value are `…`, and what only a run needs of them together, such as a test set, is not checked.

    Raises ConfigError for all else that `load_config` refuses.
    """
    from rhythm.tasks import task_class

    of_file = _values(path)
    values = _with_overrides(of_file, overrides)
    if _task_name(values) != _task_name(of_file):
        values = _with_overrides(of_file, [f"{_OPTIONS.removesuffix('.')}={{}}", *overrides])
    task = values.get("task") or {}
    options = (task.get("options") or {}) if isinstance(task, dict) else None
    try:
        kind = task_class(_task_name(values)).config_class
        kind.model_validate(options)
    except ValidationError as error:
        if isinstance(options, dict) and all(
            not fault["loc"] or (fault["type"] == "missing" and len(fault["loc"]) == 1) for fault in error.errors()
        ):
            incomplete = kind.model_construct(**_needed(kind) | _fields(kind, options))
            values["task"] = {**task, "options": incomplete}
    except (ValueError, ImportError, AttributeError, TypeError):  # reported where the values are checked
        pass
    return _train_config(values)


def _train_config(values: dict[str, Any]) -> TrainConfig:
    # Imported here, because rhythm-analyze reads its configuration without the trainer.
    from rhythm.tasks import task_class
    from rhythm.tasks.config import TaskConfig
    from rhythm.trainer.config import TrainConfig

    like, name = TrainConfig(), _task_name(values)
    try:
        kind = task_class(name).config_class
    except (ValueError, ImportError, AttributeError, TypeError):  # reported where the values are checked
        pass
    else:
        # Not checked: options that must be given are missing.
        task_config = TaskConfig.model_construct(name=name, options=kind.model_construct(**_needed(kind)))
        like = like.model_copy(update={"task": task_config})
    return _checked(TrainConfig, values, like)


def read_config(
    kind: type[C],
    path: Path | None,
    overrides: Sequence[str] = (),
    *,
    given: Mapping[str, Any] | None = None,
    wanted: Sequence[str] = (),
    like: C | None = None,
    placeholders: bool = False,
) -> C:
    """The file's configuration with `key=value` overrides (dotted keys, values in YAML), checked as a whole.

    Args:
        kind: the configuration's class.
        path: a YAML file; None: only the overrides.
        given: values of top-level keys, which take precedence over file and overrides.
        wanted: sections that are there, with their defaults, if neither file nor overrides set any of their keys.
        like: has all keys that may be set; None: they are those of `kind`.
        placeholders: give required keys without a value the value `…`, for --help.

    Raises ConfigError: no such file, not YAML, an override without `=`, an unknown key (with the most similar known
    key), a value that is not allowed, a missing required key.
    """
    values = _with_overrides(_values(path), overrides)
    values |= given or {}
    values |= {name: {} for name in wanted if values.get(name) is None}
    return _checked(kind, values, example(kind) if like is None else like, placeholders=placeholders)


def _checked(kind: type[C], values: Mapping[str, Any], like: C, *, placeholders: bool = False) -> C:
    """The values as a configuration; see read_config."""
    keys = list(config_keys(like))
    if wrong := list(_wrong_numbers(values, keys)):
        raise ConfigError("\n".join(wrong))
    try:
        return example(kind, values) if placeholders else kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, keys))) from error


def example(kind: type[C], values: Mapping[str, Any] | None = None) -> C:
    """A configuration with these values, else defaults; required keys without a value are `…`.

    Raises pydantic's ValidationError for values that are not allowed.
    """
    return kind.model_validate(_needed(kind) | dict(values or {}))


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML, from which `read_config` gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _needed(kind: type[BaseModel]) -> dict[str, str]:
    """The required keys, each with the value `…`."""
    return {name: "…" for name, field in kind.model_fields.items() if field.is_required()}


def _fields(kind: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that are allowed one by one, each as its field has it: a tuple for a list, a section for a mapping."""
    types: dict[str, Any] = {name: field.annotation for name, field in kind.model_fields.items()}
    return {name: TypeAdapter(types[name]).validate_python(value) for name, value in values.items() if name in types}


def _task_name(values: Mapping[str, Any]) -> Any:
    task = values.get("task")
    return task.get("name", "countdown") if isinstance(task, Mapping) else "countdown"


def _values(path: Path | None) -> dict[str, Any]:
    """The file's values, not checked."""
    values = {} if path is None else _parse(_read(path), str(path))
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: must hold keys and values, got {type(values).__name__}")
    return values or {}


def _with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the values, replaced and completed by those of the overrides."""
    changed = copy.deepcopy(dict(values))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not (separator and key):
            raise ConfigError(f"{override!r}: an override is written key=value, for example seed=1")
        _put(changed, key, _parse(value, _cut(override)))
    return changed


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:  # possibly a pipe of unknown length, so read no more than the limit
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES >> 10} KiB, too much for a configuration")
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: byte {error.start + 1} is {error.object[error.start]:#04x}; save it as UTF-8"
        ) from error


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (
        yaml.YAMLError,
        ValueError,
    ) as error:  # ValueError: an integer of thousands of digits, or a date such as 2024-01-45
        problem = "a number of thousands of digits" if "int_max_str_digits" in str(error) else error
        raise ConfigError(f"{source}: not valid YAML: {problem}") from error


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for depth, name in enumerate(parents):
        if values.get(name) is None:  # the section is missing or null
            values[name] = {}
        inner = values[name]
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        values = inner
    values[last] = value


def _wrong_numbers(values: Mapping[str, Any], keys: list[Key]) -> Iterator[str]:
    """One message per number that pydantic would convert (true to 1) or that is too large for a tensor."""
    for key in keys:
        value: Any = values
        for part in key.path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        numbers = value if isinstance(value, list) else [value]
        kinds = set(re.findall(r"\w+", key.kind))
        if kinds & {"int", "float"} and "bool" not in kinds and any(isinstance(number, bool) for number in numbers):
            yield f"{key.path} is {_short.repr(value)}: must be {key.kind}"
        elif "int" in kinds and any(isinstance(n, int) and abs(n) > MAX_INTEGER for n in numbers):
            yield f"{key.path} is {_short.repr(value)}: must be at most 2^63 - 1 ({key.kind})"


def _explain(error: ValidationError, keys: list[Key]) -> list[str]:
    """One line per wrong key, at most MAX_LINES; the first MAX_SUGGESTIONS unknown keys come with a suggestion."""
    kinds = {key.path: key.kind for key in keys}
    lines: dict[str, str] = {}
    suggestions = 0
    countdowns: list[str] = []
    for fault in error.errors(include_url=False, include_context=False):
        # An error inside a value ({quantile: 2}, [1, x]) is reported for its key.
        parts = [str(part) for part in fault["loc"]]
        path = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in kinds), None)
        dotted = path or ".".join(parts)
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden" and dotted in _COUNTDOWNS:
            countdowns.append(dotted.removeprefix(_OPTIONS))
            dotted = _OPTIONS
            line = f"task.options: {', '.join(countdowns)} belong{'s' * (len(countdowns) == 1)} to task countdown"
            lines.pop(dotted, None)
        elif fault["type"] == "extra_forbidden" and path is None:
            suggestions += 1
            line = f"{_cut(dotted)}: unknown key{_nearest(dotted, keys) if suggestions <= MAX_SUGGESTIONS else ''}"
        elif path is not None and len(parts) > path.count(".") + 1:
            line = f"{path}: must be {kinds[path]}"
        elif fault["type"] == "missing":
            line = f"{dotted}: is required: {dotted}=… ({kinds.get(dotted, 'a section')})"
        elif path is not None and fault["type"] != "value_error":
            line = f"{path} is {_short.repr(fault['input'])}: {message[0].lower()}{message[1:]} ({kinds[path]})"
        else:
            line = f"{dotted}: {message}" if dotted else message
        lines.setdefault(dotted, _cut(line))
    shown = list(lines.values())
    return shown if len(shown) <= MAX_LINES else [*shown[:MAX_LINES], f"… and {len(shown) - MAX_LINES:,} more keys"]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LINE else f"{text[:MAX_LINE]} …"


def _nearest(dotted: str, keys: list[Key]) -> str:
    """`; did you mean …?` with the key of the same section whose last part is most similar; for a key outside every
    section, also keys of that name in other sections. Empty if none is similar.
    """
    section, _, last = dotted.rpartition(".")
    known = [key.path for key in keys] + sections(keys)
    if len(dotted) > 2 * max(map(len, known)):
        return ""  # difflib would be slow
    by_last = {name: path for path in known for parent, _, name in [path.rpartition(".")] if parent == section}
    near = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    if not near and section not in known:
        by_last = {path.rpartition(".")[2]: path for path in reversed(known)}
        near = difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)
    return f"; did you mean {by_last[near[0]]}?" if near else ""
