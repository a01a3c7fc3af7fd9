"""python docs/picture.py [REPORT] [--out FILE]: the picture of README and docs/index.md.

The tokens of one response, colored by WAAD and by FAI, under the curves of both. Of the responses that a run's report
shows, it is the longest right one of the last step that has one.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from math import isnan, nan
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

DOCS = Path(__file__).resolve().parent
SIGNALS = (
    ("WAAD", "#cd6608", "WAAD: how far back each token looks within 10 tokens"),
    ("FAI", "#256cd6", "FAI: how much later tokens look at each token"),
)


@dataclass
class Response:
    """A response as a report shows it; NaN where a signal is undefined."""

    step: str
    right: bool
    prompt: str = ""
    texts: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {"WAAD": [], "FAI": []})


class _Report(HTMLParser):
    """Responses of a run's report.html: tokens are `<i title="token 0 · WAAD 4.27 · FAI undefined · …">`."""

    def __init__(self) -> None:
        super().__init__()
        self.responses: list[Response] = []
        self._step = ""
        self._inside = ""  # the kind of the element whose text comes next

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        kind = given.get("class") or ""
        self._inside = "step" if tag == "summary" else "prompt" if kind == "prompt tokens" else ""
        if kind.startswith("outcome "):
            self.responses.append(Response(self._step, right="right" in kind))
        numbers = given.get("title") or ""
        if tag == "i" and numbers.startswith("token "):
            self._inside = "token"
            for key, values in self.responses[-1].values.items():
                match = re.search(rf"{key} (\S+)", numbers)
                values.append(nan if match is None or match[1] == "undefined" else float(match[1]))

    def handle_data(self, data: str) -> None:
        if self._inside == "step":
            self._step = data.strip()
        elif self._inside == "prompt":
            self.responses[-1].prompt += data.strip()
        elif self._inside == "token":
            self.responses[-1].texts.append("⏎" if data == "<|eos|>" else data)
        self._inside = ""


def chosen(html: str) -> Response:
    """The longest right response of the last step shown.

    Raises:
        ValueError: the page has no right response.
    """
    report = _Report()
    report.feed(html)
    right = [response for response in report.responses if response.right]
    if not right:
        raise ValueError("the report shows no right response")
    last = [response for response in right if response.step == right[-1].step]
    return max(last, key=lambda response: len(response.texts))


def picture(response: Response) -> Figure:
    """One panel per signal: its curve, and below it the tokens, the stronger colored the larger the value."""
    texts = response.texts
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.bottom": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(max(5.0, 0.4 * len(texts) + 0.8), 3.3), layout="constrained")
        figure.suptitle(f"prompt {response.prompt}   response {''.join(texts)}", x=0.012, ha="left", color="#5c636b")
        rows = figure.subplots(4, 1, sharex=True, height_ratios=(3, 1, 3, 1))
        for (key, color, title), curve, strip in zip(SIGNALS, rows[0::2], rows[1::2], strict=True):
            curve.plot(range(len(texts)), response.values[key], color=color, linewidth=1.6, marker="o", markersize=3.5)
            curve.set_title(title, color=color, loc="left", fontsize=10, fontweight="bold")
            curve.tick_params(axis="x", length=0, labelbottom=False)
            curve.margins(y=0.12)
            _draw_tokens(strip, texts, response.values[key], color)
    return figure


def _draw_tokens(axes: Axes, texts: Sequence[str], values: Sequence[float], color: str) -> None:
    axes.set(xlim=(-0.6, len(texts) - 0.4), ylim=(0, 1))
    axes.axis("off")
    defined = [value for value in values if not isnan(value)]
    low, width = min(defined), (max(defined) - min(defined)) or 1.0
    for i, (text, value) in enumerate(zip(texts, values, strict=True)):
        place = ((i - 0.47, 0.05), 0.94, 0.9)
        if isnan(value):
            axes.add_patch(Rectangle(*place, facecolor="none", edgecolor="#d5d8dc", hatch="////", linewidth=0))
        else:
            shade = (*to_rgb(color), 0.06 + 0.6 * (value - low) / width)
            axes.add_patch(Rectangle(*place, facecolor=shade, linewidth=0))
        axes.text(i, 0.48, text, ha="center", va="center", family="DejaVu Sans Mono", fontsize=12, parse_math=False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python docs/picture.py", description=__doc__)
    report, out = DOCS / "reports" / "countdown_tiny.html", DOCS / "images" / "rhythm.png"
    parser.add_argument("report", nargs="?", type=Path, default=report, help="a run's report.html")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help="the picture")
    options = parser.parse_args(arguments)
    response = chosen(options.report.read_text(encoding="utf-8"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture(response).savefig(options.out, dpi=150)
    print(f"{options.out}: {response.step}, {response.prompt}{''.join(response.texts)}")


if __name__ == "__main__":
    main()
