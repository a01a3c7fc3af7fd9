"""docs/signatures.md matches the code and the script that writes it."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import rhythm

ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "docs" / "signatures.md"


@pytest.fixture(scope="module")
def signatures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_signatures", ROOT / "docs" / "signatures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_is_up_to_date(signatures: ModuleType) -> None:
    text = DOC.read_text(encoding="utf-8")
    assert text == signatures.with_listing(text), "a public signature changed: docs/signatures.md says what that needs"


def test_the_document_lists_every_public_name_and_op() -> None:
    text = DOC.read_text(encoding="utf-8")
    listed = re.findall(r"^(?:class )?rhythm\.(\w+)\b(?!\.)", text, re.MULTILINE)
    assert sorted(listed) == sorted(rhythm.__all__)
    names = ("attention_statistics", "attention_with_statistics")
    for op in ("attention_bands", "column_scores", *names, *(f"{name}_also" for name in names)):
        schema = str(getattr(torch.ops.rhythm, op).default._schema)
        written = " ".join(text.split()).replace("( ", "(").replace(", )", ")")
        assert schema in written


def example(a: Tensor, b: int | None = None, *rest: float, c: str = "x", **others: bool) -> list[Tensor]:
    """Something of every kind of parameter."""
    return [a]


@dataclass(frozen=True)
class ResultError(ValueError):
    """A result."""

    x: Tensor
    y: int

    def total(self, weight: float = 1.0) -> float:
        return self.y * weight

    def _hidden(self) -> None: ...


def test_signatures_are_written_as_in_the_source(signatures: ModuleType) -> None:
    assert signatures.signature("f", example) == (
        "f(a: Tensor, b: int | None = None, *rest: float, c: str = 'x', **others: bool) -> list[Tensor]"
    )
    assert signatures.entry("m.ResultError", ResultError) == (
        "class m.ResultError(ValueError)\n    x: Tensor\n    y: int\n    total(weight: float = 1.0) -> float"
    )


def test_long_signatures_are_wrapped_at_the_outer_commas(signatures: ModuleType) -> None:
    name = "f" * signatures.WIDTH
    assert signatures.wrapped(f"{name}(a: tuple[int, int] = (1, 2), *, b: int) -> (Tensor, Tensor)") == (
        f"{name}(\n    a: tuple[int, int] = (1, 2),\n    *,\n    b: int,\n) -> (Tensor, Tensor)"
    )


def test_write_renews_the_listing_and_nothing_else(signatures: ModuleType, tmp_path: Path) -> None:
    doc = tmp_path / "signatures.md"
    doc.write_text(f"before\n{signatures.BEGIN}old\n{signatures.END}after\n", encoding="utf-8")
    signatures.main(["--write", "--doc", str(doc)])
    assert doc.read_text(encoding="utf-8") == f"before\n{signatures.BEGIN}{signatures.listing()}{signatures.END}after\n"
    with pytest.raises(ValueError, match="the document must hold"):
        signatures.with_listing("no listing here")
