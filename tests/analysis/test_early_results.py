"""Results before the end: responses are saved once they are measured, shown, and completed by their counterfactuals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_analysis import CONFIG, NAMES, PROBLEMS, contents, lacking, small_model

import rhythm.analysis.interim as interim
import rhythm.analysis.stages as stages
from rhythm.analysis import Analysis, analyze, read_analysis
from rhythm.analysis.figures import write_figures
from rhythm.analysis.forward import Observer
from rhythm.analysis.page import render
from rhythm.analysis.results import SoFar, is_complete, response_path
from rhythm.analysis.rows import trials_frame
from rhythm.analysis.table1 import table1
from rhythm.engines.local.infer import GenerateInfer
from rhythm.tiny.model import build_tokenizer

FILES = ("results.json", "tokens.csv", "responses.csv", "table1.csv", "table2.csv", "counterfactuals.csv", "heads.csv")
Invented = Callable[..., Analysis]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return small_model(tokenizer)


@pytest.fixture(scope="module")
def whole(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an analysis that was never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    return analyze(model, tokenizer, PROBLEMS, out=out, config=CONFIG, page=False).directory


def same(out: Path, whole: Path) -> bool:
    return contents(out) == contents(whole) and all(
        (out / name).read_bytes() == (whole / name).read_bytes() for name in FILES
    )


def test_killed_between_measurement_and_counterfactuals(
    model: Any, tokenizer: Any, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest needs no pass of the observer and no generated response."""
    groups: list[int] = []
    compute = stages.counterfactuals

    def until_the_second(*arguments: Any, **options: Any) -> Any:
        groups.append(len(arguments[2]))
        if len(groups) == 2:
            raise KeyboardInterrupt
        return compute(*arguments, **options)

    monkeypatch.setattr(stages, "counterfactuals", until_the_second)
    problems, out = PROBLEMS[:2], tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        analyze(model, tokenizer, problems, out=out, config=CONFIG, page=False)
    assert tuple(name.removesuffix(".json") for name in contents(out)) == NAMES[:4]
    assert lacking(out) == ["00002-0.json", "00002-1.json"]
    assert [is_complete(response_path(out, name)) for name in NAMES[:4]] == [True, True, False, False]

    passes: list[int] = []
    observe = Observer.observe
    monkeypatch.setattr(
        Observer, "observe", lambda self, ids, *rest: passes.append(len(ids)) or observe(self, ids, *rest)
    )
    monkeypatch.setattr(GenerateInfer, "generate", lambda *_: pytest.fail("generated again"))
    groups[:] = [0, 0]
    analyze(model, tokenizer, problems, out=out, config=CONFIG, page=False)
    assert len(passes) == 1, "the probe"
    assert groups == [0, 0, 2]
    assert contents(out) == {name: of for name, of in contents(whole).items() if name < "00003"}


@pytest.mark.parametrize("kept", range(14))
def test_killed_at_any_save(
    model: Any, tokenizer: Any, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """Seven responses are saved twice each."""
    saved: list[str] = []
    write = stages.write_json

    def until(value: Any, path: Path) -> None:
        if len(saved) == kept:
            raise KeyboardInterrupt
        saved.append(path.name)
        write(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "write_json", until)
        with pytest.raises(KeyboardInterrupt):
            analyze(model, tokenizer, PROBLEMS, out=tmp_path, config=CONFIG, page=False)
    assert len(contents(tmp_path)) == len(set(saved))
    analyze(model, tokenizer, PROBLEMS, out=tmp_path, config=CONFIG, page=False)
    assert same(tmp_path, whole)


def test_a_response_is_saved_while_others_are_generated(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given ones before that, and each before the first counterfactual of its batch."""
    config = CONFIG.model_copy(update={"responses_per_problem": 1, "problems_at_once": 9})
    engines: list[GenerateInfer] = []
    seen: list[tuple[str, int, bool]] = []
    generate, write = GenerateInfer.generate, stages.write_json

    def generating(self: GenerateInfer, *arguments: Any) -> Any:
        engines.append(self)
        return generate(self, *arguments)

    def noting(value: Any, path: Path) -> None:
        seen.append((value.source, engines[0].sampled if engines else -1, value.complete))
        write(value, path)

    monkeypatch.setattr(GenerateInfer, "generate", generating)
    monkeypatch.setattr(stages, "write_json", noting)
    problems = [*("1,2,3>6:", "4,5,6>15:", "9,1>9:", "2,2,2,2>8:", "3,7>21:", "5>5:"), PROBLEMS[2]]
    ends = range(0, len(tokenizer), 5)  # most responses end before the limit
    results = analyze(model, tokenizer, problems, out=tmp_path, config=config, page=False, end_ids=ends)
    assert seen[0] == ("given", -1, False)
    assert [complete for _, _, complete in seen] == [False] * 7 + [True] * 7
    lengths = sorted(len(each.tokens.ids) for each in results.responses() if each.source == "generated")
    assert [sampled for _, sampled, _ in seen[1:7]] == lengths
    assert lengths[0] < lengths[-1]


def test_pages_on_the_way(
    model: Any, tokenizer: Any, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has every response that was measured until then, and Table 1 those that have counterfactuals alone."""
    monkeypatch.setattr(interim, "PAUSE", 0.0)
    seen: list[tuple[int, SoFar]] = []
    write = interim.write_page

    def looking(analysis: Analysis) -> Path:
        path = write(analysis)
        assert analysis.so_far is not None
        seen.append((len(analysis.names), analysis.so_far))
        partial = read_analysis(tmp_path, partial=True)
        assert partial.so_far == analysis.so_far
        assert partial.names == analysis.names
        assert not (tmp_path / "results.json").exists()
        trials = [each.trials for each in partial.responses() if each.trials is not None]
        assert len(trials) == analysis.so_far.counterfactuals
        if trials:
            expected = table1(trials, resamples=CONFIG.table2.resamples, seed=CONFIG.seed)
            assert repr(partial.table1) == repr(expected)
            assert len(set(trials_frame(partial).response)) == len(trials)
        else:
            assert partial.table1 is None
            assert trials_frame(partial).empty
        assert sum(row.responses for row in partial.table2) <= 3 * len(partial.names)
        assert 'id="unfinished"' in path.read_text(encoding="utf-8")
        return path

    monkeypatch.setattr(interim, "write_page", looking)
    done = analyze(model, tokenizer, PROBLEMS, out=tmp_path, config=CONFIG)
    of = [(measured, each.counterfactuals) for measured, each in seen]
    assert {each.responses for _, each in seen} == {7}
    assert of == [(1, 0), (2, 0), (3, 0), (4, 0), (4, 2), (4, 4), (5, 4), (6, 4), (7, 4), (7, 6), (7, 7)]
    assert same(tmp_path, whole)
    assert done.so_far is None
    assert "so_far" not in json.loads((tmp_path / "results.json").read_bytes())
    assert not (tmp_path / "partial.json").exists()
    assert 'id="unfinished"' not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_pages_take_a_small_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written, first = [0.0], [], []

    class Summary:
        directory = tmp_path

    def page(_: Any) -> Path:
        now[0] += 2.0
        written.append(now[0])
        return tmp_path / "report.html"

    monkeypatch.setattr(interim, "write_page", page)
    monkeypatch.setattr(interim, "write_json", lambda *_: None)
    pages = interim.InterimPages(lambda names: Summary(), first=first.append, clock=lambda: now[0])  # type: ignore[arg-type,return-value]
    for _ in range(100):
        pages.saved(["00001-0"])
        now[0] += 1.0
    assert written == [2.0, 44.0, 86.0]
    assert first == [tmp_path / "report.html"]


def test_a_page_with_responses_that_lack_counterfactuals(invented: Invented) -> None:
    analysis = invented()
    finished = render(analysis)
    assert "so far" not in finished
    assert "Not finished" not in finished
    first, *others = analysis.responses()
    part = invented([first, *(replace(each, trials=None) for each in others)], so_far=SoFar(12, 1))
    page = render(part)
    assert "3 of 12 responses to gsm8k.jsonl" in page
    assert "Signals, heads and couplings (Table 2) are of 3 of 12 responses." in page
    assert "Counterfactuals (Table 1) are of 1 of 12." in page
    assert page.count("1 of 12 responses so far") == 2, "on the card and in Table 1"
    assert page.count('"no counterfactuals yet"') == 2, "beside the two responses without"
    without = render(replace(part, table1=None, so_far=SoFar(12, 0)))
    assert "There are no counterfactuals (Table 1) yet." in without
    assert 'id="table-1"' not in without
    never = render(replace(part, table1=None, so_far=SoFar(12, None)))
    assert "(Table 1)" not in never
    assert write_figures(part), "which read responses, too"
