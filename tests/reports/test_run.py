"""The report of a run: what it shows, what it leaves out, and that it is self-contained."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rhythm.reports.run import MAX_TOKENS_PER_SAMPLE, headlines, write_report

SAMPLE_SIGNALS = ("waad", "fai", "gamma", "entropy")
HOSTILE = "<script>alert('x')</script>"


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""

    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()


@dataclass
class Page(HTMLParser):
    """Every element in order, each with the text directly in it."""

    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.elements.append(element)
        if tag not in ("meta", "input", "br"):
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1].text += data

    def all(self, tag: str, css_class: str | None = None) -> list[Element]:
        elements = [element for element in self.elements if element.tag == tag]
        return [element for element in elements if css_class is None or css_class in element.classes()]

    def ids(self) -> list[str]:
        return [element.attributes["id"] or "" for element in self.elements if "id" in element.attributes]


METRICS: list[dict[str, Any]] = [
    {"step": 0, "accuracy": 0.25, "seconds_total": 10.0},
    {"step": 1, "reward": 0.3, "loss": 0.01, "clip_share": 0.02, "entropy": 1.5, "response_length": 40.0,
     "gamma_share": 0.4, "waad_mean": 3.0, "seconds_rollout": 60.0, "seconds_attention": 5.0,
     "seconds_training": 20.0, "seconds_total": 90.0},
    {"step": 2, "reward": 0.5, "accuracy": 0.5, "loss": math.nan, "clip_share": None, "entropy": 1.25,
     "response_length": 44.0, "gamma_share": 0.42, "waad_mean": 3.1, "seconds_rollout": 70.0,
     "seconds_attention": 5.0, "seconds_training": 20.0, "seconds_total": 100.0},
]  # fmt: skip
SAMPLE: dict[str, Any] = {
    "step": 2, "prompt": "1 2 <3", "response": "…", "reward": 1.0, "correct": True,
    "tokens": ["1", HOSTILE, "\n", "4"], "waad": [1.0, 2.0, 3.0, 5.0], "fai": [0.5, 0.25, None, None],
    "gamma": [1.0, 1.5, 1.25, 1.0], "entropy": [None, None, None, None],
}  # fmt: skip


def write_run(
    folder: Path, metrics: list[dict[str, Any]] = METRICS, samples: list[dict[str, Any]] | None = None
) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "config.yaml").write_text("credit:\n  strategy: coupled # <b>\n")
    for row in [SAMPLE] if samples is None else samples:
        with (folder / "samples" / f"step_{row['step']:06d}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    return folder


def drawn_lines(html: str) -> list[list[float]]:
    """The y of every point of every unbroken line in the color of a series, in SVG units, downwards."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*fill: none; stroke: var\(--series\)', html)
    pieces = [piece for path in paths for piece in path.split("M") if piece.strip()]
    return [[float(y) for _, y in re.findall(r"([-\d.]+) ([-\d.]+)", piece)] for piece in pieces]


def read_page(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert not page.open, "an element is left open"
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return read_page(write_report(write_run(tmp_path_factory.mktemp("page") / "first")))


def test_headlines_are_those_of_the_metrics() -> None:
    values = {headline.label: headline.value for headline in headlines(METRICS)}
    assert values == {
        "Accuracy at the start": "25.0%",
        "Final accuracy": "50.0%",
        "Lift": "+25.0",
        "Steps": "2",
        "Wall time": "3 min 20 s",
        "Attention": "5.0%",  # (5 + 5) of 200 seconds
    }


def test_labels_speak_of_no_warm_start(page: Page) -> None:
    """A run that begins with a given checkpoint has none."""
    text = " ".join(element.text for element in page.elements)
    assert "points over the start" in text
    assert "warm" not in text.lower()


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_the_accuracys_axis_stays_within_0_and_100_percent(accuracy: float, tmp_path: Path) -> None:
    metrics = [{"step": step, "accuracy": accuracy} for step in range(3)]
    html = write_report(write_run(tmp_path / "run", metrics, [])).read_text()
    ticks = [float(text.replace("−", "-")) for text in re.findall(r">([−\d.]+)%</text>", html)]
    assert len(ticks) >= 2
    assert all(0 <= tick <= 100 for tick in ticks)


def test_accuracies_have_intervals_where_their_instances_are_known() -> None:
    """Wilson's for 25 and 50 of 100, and Newcombe's for the lift; runs of older versions don't say how many."""
    metrics: list[dict[str, Any]] = [
        {"step": 0, "accuracy": 0.25, "accuracy_instances": 100.0},
        {"step": 1, "accuracy": 0.6, "accuracy_instances": 100.0},
        {"step": 2, "accuracy": 0.5, "accuracy_instances": 100.0},
    ]
    notes = {headline.label: headline.note for headline in headlines(metrics)}
    assert notes["Accuracy at the start"] == "held out, step 0; 95% interval 17.5% to 34.3% of 100 instances"
    assert notes["Final accuracy"] == "best 60.0% at step 1; 95% interval 40.4% to 59.6% of 100 instances"
    assert notes["Lift"] == "points over the start; 95% interval +11.6 to +37.2"
    without = {headline.label: headline.note for headline in headlines(METRICS)}
    assert without["Accuracy at the start"] == "held out, step 0"
    assert without["Lift"] == "points over the start"


def test_letters_of_curves_are_the_pages(page: Page) -> None:
    styles = [element.attributes["style"] or "" for element in page.all("text")]
    assert len(styles) > 20
    assert all("DejaVu" not in style and "system-ui" in style for style in styles)


def test_the_measured_line_is_bold_and_its_running_peak_thin(tmp_path: Path) -> None:
    metrics = [
        {"step": step, "accuracy": value, "accuracy_instances": 50.0} for step, value in enumerate([0.2, 0.8, 0.1])
    ]
    path = write_report(write_run(tmp_path / "run", metrics, []))
    html = path.read_text()
    lines = drawn_lines(html)
    widths = [float(x) for x in re.findall(r"stroke: var\(--series\)[^\"]*?stroke-width: ([\d.]+)", html)]
    assert lines[0][2] > lines[0][0] > lines[0][1]  # the measured values come first, and fall; y points down
    assert lines[1][0] > lines[1][1] >= lines[1][2]
    assert widths[0] == 2
    assert widths[1] < 1
    legend = [element for element in read_page(path).all("span") if element.classes() in (["values"], ["peak"])]
    assert [(element.classes()[0], element.text) for element in legend] == [
        ("values", "each evaluation"),
        ("peak", "running peak"),
    ]


def test_the_accuracys_band_is_its_interval(tmp_path: Path) -> None:
    """Read back from the SVG, on the scale that the line gives: 0.2 and 0.8 of 50 instances."""
    metrics = [{"step": step, "accuracy": value, "accuracy_instances": 50.0} for step, value in enumerate([0.2, 0.8])]
    html = write_report(write_run(tmp_path / "run", metrics, [])).read_text()
    line = drawn_lines(html)[0]
    ((name, offset),) = re.findall(r'href="#(\w+)" x="0" y="([\d.]+)" style="fill: var\(--series\); fill-opacity', html)
    (band,) = re.findall(rf'<path id="{name}" d="([^"]*)"', html)
    ys = [float(offset) + float(y) for _, y in re.findall(r"([-\d.]+) ([-\d.]+)", band)]
    shares = sorted({round(0.2 + 0.6 * (line[0] - y) / (line[0] - line[1]), 3) for y in ys})
    assert shares == pytest.approx([0.1124, 0.3304, 0.6696, 0.8876], abs=2e-3)


def test_headlines_without_an_evaluation_are_dashes() -> None:
    values = {headline.label: headline.value for headline in headlines([{"step": 1, "reward": 0.5}])}
    assert values["Accuracy at the start"] == values["Final accuracy"] == values["Lift"] == "–"
    assert values["Wall time"] == values["Attention"] == "–"


def test_page_shows_the_headlines(page: Page) -> None:
    assert [element.text for element in page.all("dd", "value")] == [
        "25.0%", "50.0%", "+25.0", "2", "3 min 20 s", "5.0%",
    ]  # fmt: skip


def test_every_recorded_metric_has_a_curve_and_no_other(page: Page) -> None:
    figures = [element.attributes.get("id") for element in page.all("figure")]
    main_curves = ["accuracy", "reward", "loss", "clip_share", "entropy", "response_length", "gamma_share"]
    assert figures == [f"curve-{key}" for key in [*main_curves, "seconds", "waad_mean"]]
    assert len(page.all("svg")) == len(figures)
    assert all(element.attributes.get("viewbox") for element in page.all("svg"))
    # A last value that is undefined is not passed off as one: the last defined one stands there.
    last = dict(zip(figures, [element.text for element in page.all("span", "last")], strict=True))
    assert last["curve-accuracy"] == "50.0%"
    assert last["curve-clip_share"] == "2.0%"
    assert last["curve-seconds"] == "100 s"


def test_curves_draw_the_values(tmp_path: Path) -> None:
    """The reward's line and its running peak, read back from the SVG."""
    rewards = [0.0, 1.0, 0.5, 0.5]
    metrics = [{"step": step, "reward": reward} for step, reward in enumerate(rewards)]
    values, peak = drawn_lines(write_report(write_run(tmp_path / "run", metrics, [])).read_text())
    height = values[0] - values[1]  # of one unit of reward; y points down
    assert [(values[0] - y) / height for y in values] == pytest.approx(rewards, abs=1e-3)
    # α = 0.3: 0, then 0.3·1, then 0.3·0.5 + 0.7·0.3, then 0.3·0.5 + 0.7·0.36
    assert [(values[0] - y) / height for y in peak] == pytest.approx([0.0, 0.3, 0.36, 0.402], abs=1e-3)


def test_accuracy_joins_the_evaluated_steps(tmp_path: Path) -> None:
    """Steps that were not evaluated do not break the accuracy's line; an undefined loss breaks its own."""
    values = [0.0, 0.1, None, 0.3, 0.4]
    metrics = [{"step": step, "accuracy": value} for step, value in enumerate(values)]
    lines = drawn_lines(write_report(write_run(tmp_path / "accuracy", metrics, [])).read_text())
    assert [len(line) for line in lines] == [4, 4]  # the values and their running peak
    metrics = [{"step": step, "loss": value} for step, value in enumerate(values)]
    lines = drawn_lines(write_report(write_run(tmp_path / "loss", metrics, [])).read_text())
    assert [len(line) for line in lines] == [2, 2]


def test_tokens_carry_their_signals(page: Page) -> None:
    tokens = page.all("i")
    assert [token.text for token in tokens] == ["1", HOSTILE, "⏎", "4"]
    # WAAD and FAI from the smallest value to the 95th percentile, γ from 1 to the largest; no entropy.
    assert [token.attributes["style"] for token in tokens] == [
        "--w:0.00;--f:1.00;--g:0.00",
        "--w:0.25;--f:0.00;--g:1.00",
        "--w:0.50;--g:0.50",
        "--w:1.00;--g:0.00",
    ]
    assert tokens[1].attributes["title"] == "token 1 · WAAD 2 · FAI 0.250 · γ 1.50 · entropy undefined"
    assert tokens[3].attributes["title"] == "token 3 · WAAD 5 · FAI undefined · γ 1 · entropy undefined"
    picks = page.all("input", "pick")
    assert [pick.attributes["id"] for pick in picks] == [f"pick-{key}" for key in SAMPLE_SIGNALS]
    assert ["checked" in pick.attributes for pick in picks] == [True, False, False, False]


def test_one_outlier_does_not_bleach_a_response(tmp_path: Path) -> None:
    """Of 40 values the scale ends at the 38th, the 95th percentile; one above nothing but zeros counts."""
    row = {"step": 1, "tokens": ["a"] * 40, "waad": [*range(39), 1000], "fai": [0.0] * 39 + [0.1]}
    page = read_page(write_report(write_run(tmp_path / "run", METRICS, [row])))
    styles = [token.attributes["style"] for token in page.all("i")]
    assert styles[0] == "--w:0.00;--f:0.00"
    assert styles[37] == "--w:1.00;--f:0.00"
    assert styles[39] == "--w:1.00;--f:1.00"


def test_text_of_the_run_is_escaped(page: Page, tmp_path: Path) -> None:
    assert len(page.all("script")) == 1, "only the page's own script"
    assert "alert" not in page.all("script")[0].text
    assert [element.text for element in page.all("div", "prompt")] == ["1 2 <3"]
    assert "# <b>" in page.all("pre")[0].text
    assert not page.all("b") or all(element.text for element in page.all("b"))
    # A name of a directory is text as well.
    hostile = read_page(write_report(write_run(tmp_path / "<b>run")))
    assert "<b>run" in hostile.all("h1")[0].text


def test_a_line_separator_inside_a_token_is_no_line_of_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", METRICS, [])
    row = {"step": 1, "tokens": ["a\u2028b", "\x85"]}
    (run / "samples" / "step_000001.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert [token.text for token in read_page(write_report(run)).all("i")] == ["a\u2028b", "\x85"]


def test_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "run"))
    html, page = path.read_text(), read_page(path)
    assert "http" not in html
    assert "xlink" not in html
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    ids = page.ids()
    for element in page.elements:
        assert element.tag not in ("link", "iframe", "img", "object")
        assert "src" not in element.attributes
        reference = element.attributes.get("href")
        assert reference is None or reference[1:] in ids
    assert "prefers-color-scheme: dark" in html


def test_a_metric_that_is_never_defined_has_no_curve(tmp_path: Path) -> None:
    metrics = [{"step": 1, "loss": math.nan, "reward": math.inf, "entropy": 1.0}, {"step": 2, "loss": None}]
    page = read_page(write_report(write_run(tmp_path / "run", metrics, [])))
    assert [figure.attributes.get("id") for figure in page.all("figure")] == ["curve-entropy"]
    assert "nan" not in "".join(element.attributes.get("d") or "" for element in page.all("path"))
    assert any("recorded no samples" in element.text for element in page.all("p"))


def test_the_later_line_of_a_step_counts(tmp_path: Path) -> None:
    metrics = [{"step": 1, "entropy": 9.0}, {"step": 2, "entropy": 8.0}, {"step": 2, "entropy": 3.0}]
    page = read_page(write_report(write_run(tmp_path / "run", metrics, [])))
    assert [element.text for element in page.all("span", "last")] == ["3"]


def test_a_line_cut_short_is_left_out_only_at_the_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", METRICS[:2], [])
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 7, "rew')
    assert [element.text for element in read_page(write_report(run)).all("dd", "value")][3] == "1"
    metrics.write_text('{"step": 7, "rew\n' + whole.rstrip("\n"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1, is not JSON"):
        write_report(run)


def test_long_runs_and_long_responses_are_thinned(tmp_path: Path) -> None:
    length = MAX_TOKENS_PER_SAMPLE + 5
    samples = [{"step": step, "tokens": ["a"]} for step in range(0, 100, 5)]
    samples[-1]["tokens"] = ["a"] * length
    page = read_page(write_report(write_run(tmp_path / "run", METRICS, samples)))
    shown = [element.text for element in page.all("summary") if element.text.startswith("Step ")]
    assert shown[0] == "Step 0"
    assert shown[-1] == "Step 95"
    assert len(shown) == 6
    assert len(page.all("i")) == 5 + MAX_TOKENS_PER_SAMPLE
    assert any(element.text == "and 5 more tokens" for element in page.all("div", "outcome"))


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "no metrics.jsonl"),
        ("", "is empty"),
        ("\n", "is empty"),
        ('{"reward": 1}\n', "object with a step"),
        ("[1]\n", "object with a step"),
    ],
)
def test_a_directory_without_a_run_is_named(tmp_path: Path, metrics: str | None, message: str) -> None:
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_signals_have_to_cover_the_tokens(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", METRICS, [{"step": 1, "tokens": ["a", "b"], "waad": [1.0]}])
    with pytest.raises(ValueError, match="2 tokens but 1 values of waad"):
        write_report(run)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    names = sorted(path.name for path in run.iterdir())
    assert names == ["config.yaml", "metrics.jsonl", "report.html", "samples"]


def test_further_tasks_have_curves_of_their_own(tmp_path: Path) -> None:
    metrics = [
        {"step": 0, "accuracy": 0.1, "aime/avg@16": 0.2, "aime/pass@16": 0.5, "qa/avg@1": 0.3, "qa/pass@1": 0.3},
        {"step": 1, "reward": 0.2},
        {"step": 2, "accuracy": 0.2, "aime/avg@16": 0.25, "aime/pass@16": 0.5, "qa/avg@1": 0.4, "qa/pass@1": 0.4},
    ]
    page = read_page(write_report(write_run(tmp_path / "run", metrics)))
    assert [name for name in page.ids() if name.startswith("curve-")] == [
        "curve-accuracy", "curve-aime/avg@16", "curve-qa/pass@1", "curve-reward",
    ]  # fmt: skip
    assert [element.text for element in page.all("span", "last")][:3] == ["20.0%", "25.0%", "40.0%"]
