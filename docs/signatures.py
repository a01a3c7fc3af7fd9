"""python docs/signatures.py [--write]: prints the public signatures, or puts them into docs/signatures.md.

They are read off the code: the names in rhythm.__all__, and the schemas registered under torch.ops.rhythm.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

import rhythm
import rhythm.credit

DOC = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- begin: python docs/signatures.py --write -->\n", "<!-- end -->\n"
WIDTH = 100


def listing() -> str:
    """All signatures, as markdown."""
    things = {f"rhythm.{name}": getattr(rhythm, name) for name in sorted(rhythm.__all__)}
    things |= {f"rhythm.credit.{name}": getattr(rhythm.credit, name) for name in sorted(rhythm.credit.__all__)}
    public = "\n\n".join(entry(name, thing) for name, thing in things.items())
    schemas = "\n\n".join(wrapped(schema) for schema in op_schemas())
    return f"\n```python\n{public}\n```\n\n```\n{schemas}\n```\n\n"


def entry(name: str, thing: Any) -> str:
    """A function's signature; a class's bases (other than object), its fields or __init__, its public methods."""
    if not inspect.isclass(thing):
        return signature(name, thing)
    bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
    head = f"class {name}({bases})" if bases else f"class {name}"
    return "\n    ".join([head, *(line for member in _members(thing) for line in member.splitlines())])


def _members(cls: type) -> list[str]:
    if issubclass(cls, BaseModel):
        fields = cls.model_fields.items()
        return [f"{name}: {written(field.annotation)} = {field.default!r}" for name, field in fields]
    own = [name for name, value in vars(cls).items() if callable(value) and not name.startswith("_")]
    methods = [name for name in ("__call__", "__enter__") if name in vars(cls)] + own
    if dataclasses.is_dataclass(cls):
        first = [f"{field.name}: {field.type}" for field in dataclasses.fields(cls)]
    else:
        first = [signature("__init__", cls.__init__, method=True)] if "__init__" in vars(cls) else []
    return first + [signature(name, getattr(cls, name), method=True) for name in methods]


def signature(name: str, function: Callable[..., Any], *, method: bool = False) -> str:
    """name(parameters) -> result, annotations as they are written in the source; without `self` for a method."""
    shape = inspect.signature(function)
    parameters = list(shape.parameters.values())[1 if method else 0 :]
    result = shape.return_annotation
    arrow = "" if result is inspect.Signature.empty or name == "__init__" else f" -> {written(result)}"
    return wrapped(f"{name}({', '.join(_parameters(parameters))}){arrow}")


def wrapped(line: str) -> str:
    """The same with a parameter a line, where it is longer than WIDTH."""
    if len(line) <= WIDTH:
        return line
    opening = line.index("(") + 1
    depth, start, parts = 0, opening, []
    for i, letter in enumerate(line[opening:], opening):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 0) or depth < 0:
            parts.append(line[start:i].strip())
            start = i + 1
        if depth < 0:
            break
    return "\n    ".join([line[:opening], *(f"{part}," for part in parts)]) + f"\n){line[start:]}"


def written(annotation: Any) -> str:
    """As in the source; an annotation that was evaluated loses its module names."""
    if isinstance(annotation, str):
        return annotation
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", inspect.formatannotation(annotation))


def _parameters(parameters: Iterable[inspect.Parameter]) -> list[str]:
    words, starred = [], False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            words.append("*")
        starred |= parameter.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL)
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        word = f"{stars}{parameter.name}"
        if parameter.annotation is not inspect.Parameter.empty:
            word += f": {written(parameter.annotation)}"
        if parameter.default is not inspect.Parameter.empty:
            word += " = …" if inspect.isfunction(parameter.default) else f" = {parameter.default!r}"
        words.append(word)
    return words


def op_schemas() -> list[str]:
    """Every op registered under torch.ops.rhythm, as the dispatcher knows it."""
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    ops = sorted(op for namespace, _, op in names if namespace == "rhythm")
    return [str(getattr(torch.ops.rhythm, op).default._schema) for op in ops]


def with_listing(text: str) -> str:
    """The document with its block of signatures made anew.

    Raises:
        ValueError: the document has no such block.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document must hold {BEGIN!r} and after it {END!r}")
    return f"{before}{BEGIN}{listing()}{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python docs/signatures.py", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into docs/signatures.md instead of printing")
    parser.add_argument("--doc", type=Path, default=DOC, metavar="FILE", help="that document")
    options = parser.parse_args(arguments)
    if options.write:
        options.doc.write_text(with_listing(options.doc.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(listing())


if __name__ == "__main__":
    main()
