"""report.html in a real browser: no script errors; tokens, curves and maps show the analysis; all controls work."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_browser import PHONE, attributes, color_scheme, point_at, resize, texts

pytest.importorskip("selenium", reason="needs the extra dev")

from selenium import webdriver
from selenium.webdriver import Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from rhythm.analysis import page_data
from rhythm.analysis.page import LiftBar, examples, format_lift, lift_bars, write_page
from rhythm.analysis.page_data import pixels
from rhythm.analysis.response import ResponseResult
from rhythm.analysis.results import Analysis, Interval
from rhythm.reports.format import format_number

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
SIGNALS = ["waad", "fai", "fai_receiver", "entropy", "gamma"]
Invented = Callable[..., Analysis]


def open_page(browser: webdriver.Chrome, analysis: Analysis) -> Path:
    path = write_page(analysis)
    browser.get(path.as_uri())
    return path


def test_tokens_curves_and_peaks_are_there(browser: webdriver.Chrome, invented: Invented) -> None:
    analysis = invented()
    open_page(browser, analysis)
    response = analysis.response(analysis.names[0])
    assert [text.replace("⏎", "\n") for text in texts(browser, "#tokens i")] == list(response.tokens.texts)
    assert attributes(browser, "svg.curve", "data-signal") == SIGNALS
    for key, peaks in vars(response.peaks).items():
        assert [int(i) for i in attributes(browser, f"svg[data-signal={key}] .peak", "data-i")] == list(peaks)
    assert len(browser.find_elements(By.CSS_SELECTOR, ".boundary")) == len(response.chunks) - 1
    assert texts(browser, ".headlines .value") == ["+49.6%", "+164.5%", "+38.2%", "87.1%"]
    assert "2 yogurts a day" in texts(browser, "#prompt")[0]


def test_curves_lie_under_one_another(browser: webdriver.Chrome, invented: Invented) -> None:
    """Same left edge and width; a peak is in the middle of its token's column, a boundary at its token's left edge."""
    analysis = invented()
    open_page(browser, analysis)
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('svg.curve, #band')].map(x => [x.getBoundingClientRect().left, x.getBoundingClientRect().width])"  # noqa: E501
    )
    assert len(boxes) == len(SIGNALS) + 1
    assert all(box == pytest.approx(boxes[0]) for box in boxes)
    left, step = boxes[0][0], boxes[0][1] / len(analysis.response("00001-0").tokens.texts)
    centers = browser.execute_script(
        "return [...document.querySelectorAll('.peak')].map(x => [Number(x.dataset.i), x.getBoundingClientRect()]).map(([i, x]) => [i, x.left + x.width / 2])"  # noqa: E501
    )
    assert len(centers) > 20
    for i, x in centers:
        assert x == pytest.approx(left + (i + 0.5) * step, abs=0.2)
    boundaries = browser.execute_script(
        "return [...document.querySelectorAll('.boundary')].map(x => x.getBoundingClientRect().left)"
    )
    assert boundaries == pytest.approx([left + t * step for t in range(7, 114, 7)], abs=0.2)


def test_the_switch_colors_the_tokens_by_the_signal(browser: webdriver.Chrome, invented: Invented) -> None:
    analysis = invented()
    open_page(browser, analysis)
    response = analysis.response("00001-0")
    background = "return [...document.querySelectorAll('#tokens i')].map(x => getComputedStyle(x).backgroundColor)"
    seen = []
    for key in SIGNALS:
        browser.find_element(By.CSS_SELECTOR, f"#signal-picks [data-signal={key}]").click()
        assert attributes(browser, "#signal-picks [aria-pressed=true]", "data-signal") == [key]
        strengths = browser.execute_script(
            "return [...document.querySelectorAll('#tokens i')].map(x => x.style.getPropertyValue('--x'))"
        )
        values = getattr(response.tokens, key)
        assert [strength == "" for strength in strengths] == [math.isnan(value) for value in values]
        order = sorted((i for i in range(len(values)) if strengths[i]), key=lambda i: values[i])
        drawn = [float(strengths[i]) for i in order]
        assert drawn == sorted(drawn)
        assert (drawn[0], drawn[-1]) == (0.0, 1.0)
        colors = browser.execute_script(background)
        assert colors[order[0]] != colors[order[-1]]
        seen.append(colors[order[-1]])
    assert len(set(seen)) == len(SIGNALS)
    browser.find_element(By.CSS_SELECTOR, "#signal-picks [data-signal=fai]").click()
    assert browser.execute_script(background)[-1] == "rgba(0, 0, 0, 0)"  # FAI is undefined at the end


def test_pointing_at_a_token_shows_its_numbers_and_who_attends(browser: webdriver.Chrome, invented: Invented) -> None:
    analysis = invented()
    open_page(browser, analysis)
    response = analysis.response("00001-0")
    anchor = response.anchors[1]
    point_at(browser, f"#tokens i[data-i='{anchor.token}']")
    numbers = texts(browser, "#numbers")[0]
    assert f"WAAD {response.tokens.waad[anchor.token]:.3g}" in numbers
    assert f"FAI {response.tokens.fai[anchor.token]:.3g}" in numbers
    assert "γ 1.5" in numbers
    assert "peak of FAI" in numbers
    assert "mean Jaccard 0.400" in numbers
    assert "begins a chunk" not in numbers
    assert texts(browser, "#who")[0].endswith("28 (0.150)")
    assert attributes(browser, "#tokens .attends", "data-i") == [str(attender.token) for attender in anchor.attenders]
    point_at(browser, "#tokens i[data-i='14']")
    assert "begins a chunk" in texts(browser, "#numbers")[0]
    assert texts(browser, "#who") == [""]
    assert not browser.find_elements(By.CSS_SELECTOR, "#tokens .attends")


def test_curves_keys_and_a_click_point_at_tokens_too(browser: webdriver.Chrome, invented: Invented) -> None:
    open_page(browser, invented())
    point_at(browser, "svg[data-signal=fai] .peak[data-i='22']")
    assert attributes(browser, "#tokens .here", "data-i") == ["22"]
    tokens = browser.find_element(By.ID, "tokens")
    tokens.send_keys(Keys.ARROW_RIGHT)
    tokens.send_keys(Keys.ARROW_RIGHT)
    tokens.send_keys(Keys.ARROW_LEFT)
    assert attributes(browser, "#tokens .here", "data-i") == ["23"]
    browser.find_element(By.CSS_SELECTOR, "#tokens i[data-i='3']").click()
    assert "held" in texts(browser, "#numbers")[0]
    point_at(browser, "#tokens i[data-i='9']")
    assert attributes(browser, "#tokens .here", "data-i") == ["3"]


def test_every_response_can_be_chosen(browser: webdriver.Chrome, invented: Invented) -> None:
    analysis = invented()
    open_page(browser, analysis)
    counts = [len(analysis.response(name).tokens.texts) for name in analysis.names]
    previous, following = (browser.find_element(By.ID, name) for name in ("previous", "next"))
    assert not previous.is_enabled()
    following.click()
    assert len(texts(browser, "#tokens i")) == counts[1]
    assert "".join(texts(browser, ".axis text")) == "40␣-␣25␣+␣10␣=␣25␣<answer>"
    following.click()
    assert len(texts(browser, "#tokens i")) == counts[2]
    assert not following.is_enabled()
    assert not browser.find_element(By.ID, "maps").is_displayed()  # this one has none
    Select(browser.find_element(By.ID, "which")).select_by_value("0")
    assert len(texts(browser, "#tokens i")) == counts[0]
    assert browser.find_element(By.ID, "maps").is_displayed()


def test_maps_show_the_diagonal_and_the_anchors(browser: webdriver.Chrome, invented: Invented) -> None:
    analysis = invented()
    open_page(browser, analysis)
    response = analysis.response("00001-0")
    alpha = "const c = document.querySelector(arguments[0]); return Array.from(c.getContext('2d').getImageData(arguments[2] ?? 0, arguments[1], arguments[3] ?? c.width, 1).data).filter((_, i) => i % 4 === 3)"  # noqa: E501
    last = len(response.tokens.texts) - 1
    row = browser.execute_script(alpha, "#map-global canvas", last)
    bright = {i - response.prompt_tokens for i, level in enumerate(row) if level > 60}
    assert bright == {*response.peaks.fai, last, last - 1, last - 2}
    local = browser.execute_script(alpha, "#map-local canvas", 40)
    assert [i for i, level in enumerate(local) if level > 0] == [50, 51, 52]
    top = browser.execute_script(alpha, "#band", 0)  # every token to itself: the largest weight
    assert len(top) == last + 1
    assert set(top) == {254}
    point_at(browser, "#map-local canvas")
    assert "→" in texts(browser, "#caption-local")[0]


def test_heads_show_their_sets_and_numbers(browser: webdriver.Chrome, invented: Invented) -> None:
    analysis = invented()
    open_page(browser, analysis)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#heads-map .head")) == 24
    for name, css in (
        ("local", ".local"),
        ("global", ".global"),
        ("receiver", ".receiver"),
        ("receiver_sentence", ".receiver_sentence"),
    ):
        marked = browser.execute_script(
            "return [...document.querySelectorAll('#heads-map .head')].filter(x => x.querySelector(arguments[0])).map(x => [Number(x.dataset.layer), Number(x.dataset.head)])",  # noqa: E501
            f".set{css}",
        )
        assert sorted(map(tuple, marked)) == sorted(analysis.heads.set(name).heads)
    fill = "return document.querySelector('#heads-map [data-layer=\"2\"][data-head=\"3\"] rect').getAttribute('fill')"
    by_span = browser.execute_script(fill)
    point_at(browser, "#heads-map [data-layer='2'][data-head='3'] rect")
    assert texts(browser, "#caption-heads")[0].startswith(
        "Layer 2, head 3: span 34 tokens · kurtosis 10, of sentences – · attention entropy 4 nats · "
        "30.0% on the first 4 tokens · 50.0% on the prompt"
    )
    # What is undefined everywhere can't be chosen.
    assert attributes(browser, "#head-picks button", "data-quantity") == [
        "span",
        "kurtosis",
        "attention_entropy",
        "sink_mass",
        "prompt_mass",
        "local",
        "global",
        "receiver",
        "receiver_sentence",
    ]
    browser.find_element(By.CSS_SELECTOR, "#head-picks [data-quantity=global]").click()
    assert browser.execute_script(fill) != by_span
    assert browser.execute_script(fill.replace('"2"', '"0"')) == "var(--sunk)"  # outside the pool


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_never_scrolls_sideways(browser: webdriver.Chrome, invented: Invented, scheme: str) -> None:
    resize(browser, PHONE)
    color_scheme(browser, scheme)
    long_word = invented_long_word(invented)
    open_page(browser, long_word)
    for index in range(len(long_word.names)):
        browser.execute_script("showResponse(arguments[0]); inspect(0)", index)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]
    # Nor does a table or a text hide anything to the right; only the curves scroll, in their own box.
    wide = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(x => x.scrollWidth > x.clientWidth + 1 && getComputedStyle(x).overflowX === 'auto').map(x => x.id || x.className)"  # noqa: E501
    )
    assert set(wide) <= {"plots", "signal-picks"}
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(247, 247, 245)", "dark": "rgb(19, 21, 24)"}[scheme]


def invented_long_word(invented: Invented) -> Analysis:
    analysis = invented()
    responses = list(analysis.responses())
    first = responses[0]
    long_texts = ("x" * 300, *first.tokens.texts[1:])
    responses[0] = replace(first, tokens=replace(first.tokens, texts=long_texts), prompt="y" * 400)
    return invented(responses, model="/models/" + "m" * 120, failures=("z" * 200,))


def test_no_text_can_break_the_page(browser: webdriver.Chrome, invented: Invented) -> None:
    response: ResponseResult = next(iter(invented().responses()))
    hostile = (HOSTILE, "<!--<script>", "\u2028", "", *response.tokens.texts[4:])
    response = replace(
        response,
        prompt=HOSTILE,
        answer=HOSTILE,
        tokens=replace(response.tokens, texts=hostile),
        trials=tuple(
            replace(trial, replacement_token=HOSTILE, original_token=HOSTILE, continuation=HOSTILE)
            for trial in response.trials
        ),
    )
    analysis = invented(
        [response], model=HOSTILE, problems=HOSTILE, failures=(HOSTILE,), settings={HOSTILE: HOSTILE, "list": [HOSTILE]}
    )
    open_page(browser, analysis)
    browser.execute_script("inspect(0)")
    assert browser.execute_script("return window.hacked") is None
    assert not browser.find_elements(By.TAG_NAME, "img")
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 2
    assert texts(browser, "#tokens i")[:4] == [HOSTILE, "<!--<script>", "\u2028", "·"]
    assert texts(browser, "#prompt") == [HOSTILE]
    assert texts(browser, "mark")[0] == HOSTILE
    assert texts(browser, ".failures li") == [HOSTILE]


def test_the_page_needs_nothing_but_itself(browser: webdriver.Chrome, invented: Invented) -> None:
    html = open_page(browser, invented()).read_text(encoding="utf-8")
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert html.replace("http://www.w3.org/2000/svg", "").count("://") == 0


def test_tables_hold_the_numbers(browser: webdriver.Chrome, invented: Invented) -> None:
    open_page(browser, invented())
    rows = [" ".join(row.split()) for row in texts(browser, "#table-2 tr")]
    assert rows[1] == (
        "Average entropy of the WAAD peaks812 peaks in 70 responses 0.3610.300 to 0.420 0.239 +52.0%30.0% to 75.0% "
        "0.241 +49.6% ≤ 0.001"
    )
    assert "52.5%49.0% to 56.0% 36.9% +42.5%−10.0% to 60.0% 38.0% +38.2% 0.034" in rows[3]
    table1 = " ".join(texts(browser, "#table-1 tr")[1].split())
    assert "0.5340.500 to 0.570 0.6310.600 to 0.660 87.1%of the problems < 0.0001sign test" in table1
    assert texts(browser, "#table-sets td")[:4] == ["local", "3", "80.0%", "30.0%"]
    assert texts(browser, "#table-overlaps td")[:2] == ["receiver", "66.0%50.0% to 80.0%"]
    settings = texts(browser, "dl.settings dt")
    assert "peaks.prominence" in settings
    assert "counterfactuals.stop_words" in settings


def test_what_was_not_found_is_left_out(browser: webdriver.Chrome, invented: Invented) -> None:
    """No counterfactuals, no defined signal but one, no peaks: the page still works, on the signal there is."""
    response: ResponseResult = next(iter(invented().responses()))
    nan = (math.nan,) * len(response.tokens.ids)
    bare = replace(
        response,
        tokens=replace(response.tokens, waad=nan, fai=nan, fai_receiver=nan, entropy=nan),
        peaks=type(response.peaks)((), (), (), ()),
        chunks=(0,),
        anchors=(),
        maps=None,
        trials=(),
    )
    undefined = Interval(math.nan, math.nan)
    rows = [replace(row, lift=math.nan, lift_interval=undefined, p_value=math.nan) for row in invented().table2]
    open_page(browser, invented([bare], table1=None, table2=tuple(rows)))
    assert attributes(browser, "svg.curve", "data-signal") == ["gamma"]
    assert attributes(browser, "#signal-picks [aria-pressed=true]", "data-signal") == ["gamma"]
    assert not browser.find_elements(By.ID, "counterfactuals")
    assert not browser.find_elements(By.CSS_SELECTOR, ".lift")
    assert "–" in texts(browser, "#table-2 td")
    open_page(browser, invented([]))
    assert "No response was analyzed" in texts(browser, "body")[0]
    assert len(browser.find_elements(By.CSS_SELECTOR, "#heads-map .head")) == 24


def test_a_page_stays_small(browser: webdriver.Chrome, invented: Invented, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_data, "MAX_TOKENS", 20)
    analysis = invented()
    path = write_page(analysis, analysis.directory / "other.html", max_responses=2)
    browser.get(path.as_uri())
    assert len(texts(browser, "#which option")) == 2
    assert "The first 2 of 3" in texts(browser, "body")[0]
    assert len(texts(browser, "#tokens i")) == 20
    assert texts(browser, "#hidden-tokens") == ["and 95 more tokens, which tokens.csv holds"]
    browser.execute_script("inspect(15)")  # an anchor whose attenders lie beyond what is shown
    assert "An anchor" in texts(browser, "#who")[0]


def test_examples_are_the_trials_closest_to_the_mean(invented: Invented) -> None:
    analysis = invented()
    responses = list(analysis.responses())[:2]
    first = responses[0]
    trials = tuple(
        replace(
            first.trials[0],
            jaccard=jaccard,
            candidate=i + 1,
            replacement_token=f"<{i}>",
            continuation=" it has 4 bananas",
        )
        for i, jaccard in enumerate((0.1, 0.55, math.nan, 0.9))
    )
    shown = examples(analysis, [replace(first, trials=trials), responses[1]])
    top = shown[0]
    assert top.sides[1].token == "<1>"
    assert top.title == f"High FAI, {format_number(first.trials[0].fai)}: Jaccard 0.550"
    assert [text for text, new in top.sides[1].pieces if new] == ["bananas"]  # "4" is in both, the rest stop words
    assert "".join(text for text, _ in top.sides[1].pieces) == " it has 4 bananas"
    assert "".join(text for text, _ in top.sides[0].pieces) == first.after(first.trials[0].position)
    # The token that ends a response is no part of what was compared.
    ended = replace(first, response=first.response[: -len("}.")])
    pieces = examples(analysis, [ended])[0].sides[0].pieces
    assert "".join(text for text, _ in pieces) == first.after(first.trials[0].position)[: -len("}.")]
    assert [example.title.split(" FAI")[0] for example in shown] == ["High", "High", "Low"]
    assert examples(replace(analysis, table1=None), responses) == []


def test_lift_bars_share_an_axis(invented: Invented) -> None:
    """From −0.1, the least of the edges, at 4 % to 2.0 at 96 %."""
    bars = lift_bars(invented().table2)
    assert bars[2] is not None
    assert bars[2].low == 4
    assert bars[1] is not None
    assert bars[1].high == 96
    assert bars[0] == LiftBar(
        zero=8.38,
        low=pytest.approx(4 + 92 * 0.4 / 2.1, abs=0.01),
        high=pytest.approx(4 + 92 * 0.85 / 2.1, abs=0.01),
        value=pytest.approx(4 + 92 * 0.6197 / 2.1, abs=0.01),
    )


def test_pixels_are_roots_and_keep_what_is_undefined() -> None:
    import base64

    image: dict[str, Any] = pixels([[0.0, 0.25], [1.0, math.nan]])
    assert (image["rows"], image["columns"], image["peak"]) == (2, 2, 1.0)
    assert list(base64.b64decode(image["data"])) == [0, 127, 254, 255]
    assert list(base64.b64decode(pixels([[0.0, 0.0]])["data"])) == [0, 0]


def test_lifts() -> None:
    assert [format_lift(x) for x in (0.5, 0.0, -0.031, math.nan, math.inf)] == ["+50.0%", "+0.0%", "−3.1%", "–", "–"]
