"""The picture of README: which response it shows, and that its colors are the values."""

from __future__ import annotations

import importlib.util
import sys
from math import nan
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_picture", DOCS / "picture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def response(outcome: str, *tokens: tuple[str, str, str]) -> str:
    spans = "".join(
        f'<i title="token {i} · WAAD {waad} · FAI {fai} · γ 1">{text}</i>' for i, (text, waad, fai) in enumerate(tokens)
    )
    head = f'<div class="outcome {outcome}">…</div><div class="prompt tokens">1,2&gt;3:</div>'
    return f'{head}<div class="tokens">{spans}</div>'


def test_the_longest_right_response_of_the_last_step_with_one_is_chosen(script: ModuleType) -> None:
    one, two = ("1", "2.5", "0.1"), ("&lt;|eos|&gt;", "4", "undefined")
    page = "<summary>Step 0</summary>" + response("right", one, one, one)
    page += "<summary>Step 20</summary>" + response("right", one) + response("right", one, two)
    page += response("wrong", one, one, one) + "<summary>Step 40</summary>" + response("wrong", one, one)
    chosen = script.chosen(page)
    assert (chosen.step, chosen.prompt, chosen.texts) == ("Step 20", "1,2>3:", ["1", "⏎"])
    assert chosen.values["WAAD"] == [2.5, 4.0]
    assert chosen.values["FAI"] == pytest.approx([0.1, nan], nan_ok=True)
    with pytest.raises(ValueError, match="no right response"):
        script.chosen(response("wrong", one))


def test_tokens_are_colored_by_their_values_and_hatched_without_one(script: ModuleType) -> None:
    shown = script.Response("Step 1", True, "p", ["a", "b", "c"], {"WAAD": [1.0, 3.0, 2.0], "FAI": [0.2, 0.1, nan]})
    _, waad, _, fai = script.picture(shown).axes
    shades = [[patch.get_facecolor() for patch in axes.patches if isinstance(patch, Rectangle)] for axes in (waad, fai)]
    assert [shade[3] for shade in shades[0]] == pytest.approx([0.06, 0.66, 0.36])
    assert [shade[3] for shade in shades[1]] == pytest.approx([0.66, 0.06, 0.0])
    assert shades[0][0][:3] == pytest.approx(to_rgb("#cd6608"))
    assert [patch.get_hatch() for patch in fai.patches] == [None, None, "////"]
    assert [text.get_text() for text in fai.texts] == ["a", "b", "c"]


def test_the_picture_is_that_of_the_recorded_run_and_small(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["--out", str(tmp_path / "images" / "rhythm.png")])
    assert "Step 240, 6,10,5>21:10+5=15,15+6=21⏎" in capsys.readouterr().out
    size = (tmp_path / "images" / "rhythm.png").stat().st_size
    assert abs(size - (DOCS / "images" / "rhythm.png").stat().st_size) < 20_000  # fonts differ between machines
    assert size < 200_000
