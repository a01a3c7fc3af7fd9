"""Analysis directories: resuming, refusing, and leaving out failed problems."""

from __future__ import annotations

import csv
import gc
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from small_analysis import CONFIG, NAMES, PROBLEMS, contents, lacking, small_model

import rhythm.analysis.run as run_module
import rhythm.analysis.stages as stages_module
from rhythm.analysis import ResponseResult, RowError, analyze, read_analysis
from rhythm.analysis.forward import Observer
from rhythm.analysis.progress import AnalysisProgress
from rhythm.analysis.results import read_json, response_path, write_json
from rhythm.analysis.rows import table1_frame, table2_frame, tokens_frame
from rhythm.engines.local.infer import GenerateInfer
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return small_model(tokenizer)


def test_interrupted_and_resumed_it_comes_out_the_same(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = analyze(model, tokenizer, PROBLEMS, out=tmp_path / "whole", config=CONFIG, page=False)
    assert whole.names == NAMES
    assert [response.source for response in whole.responses()] == ["generated"] * 4 + ["given"] + ["generated"] * 2
    assert [response.maps is not None for response in whole.responses()] == [True] + [False] * 6

    out = tmp_path / "parts"
    passes = _counted(monkeypatch, fail_at=4)  # the first is the probe
    with pytest.raises(KeyboardInterrupt):
        analyze(model, tokenizer, PROBLEMS, out=out, config=CONFIG, page=False)
    assert set(contents(out)) == {"00001-0.json", "00001-1.json"}
    monkeypatch.undo()
    passes = _counted(monkeypatch)
    resumed = analyze(model, tokenizer, PROBLEMS, out=out, config=CONFIG, page=False)
    assert len(passes) == 1 + 5
    assert contents(out) == contents(whole.directory)
    assert resumed.names == NAMES
    for name in ("results.json", "tokens.csv", "table2.csv"):
        assert (out / name).read_bytes() == (whole.directory / name).read_bytes()

    passes.clear()
    again = analyze(model, tokenizer, PROBLEMS, out=out, config=CONFIG, page=False)
    assert len(passes) == 1
    assert table2_frame(again).equals(table2_frame(whole))
    assert read_analysis(out).names == NAMES


def test_progress_within_generation_and_counterfactuals(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sign of life would say, at every token sampled and before every counterfactual."""
    opened: list[AnalysisProgress] = []
    seen: list[str] = []

    class Noted(AnalysisProgress):
        def __enter__(self) -> Self:
            opened.append(self)
            return super().__enter__()

    def noting(function: Any) -> Any:
        def noted(*arguments: Any, **options: Any) -> Any:
            if opened:  # not yet at the probe
                seen.append(opened[0].status())
            return function(*arguments, **options)

        return noted

    monkeypatch.setattr(run_module, "AnalysisProgress", Noted)
    monkeypatch.setattr(stages_module, "counterfactuals", noting(stages_module.counterfactuals))
    monkeypatch.setattr(Observer, "observe", noting(Observer.observe))
    monkeypatch.setattr(GenerateInfer, "_progress", noting(GenerateInfer._progress))
    analyze(model, tokenizer, PROBLEMS, out=tmp_path / "out", config=CONFIG, page=False)
    assert seen[0].startswith(
        "0/4 problems; generating responses (0 of at most 14 tokens each) for 0 s; none is finished"
    )
    assert seen[3].startswith("0/4 problems; generating responses (3 of at most 14 tokens each) for ")
    observing, trying = (
        [line.partition(" problems")[0] for line in seen if phase in line]
        for phase in ("observing response", "counterfactuals of")
    )
    assert observing == ["0/4", "0.25/4", "0.5/4", "0.75/4", "2/4", "2.33/4", "2.67/4"]
    assert trying == ["1/4", "1.5/4", "3/4", "3.67/4"]
    assert "left; counterfactuals of 00004-1 for" in seen[-1]
    assert seen[-1].endswith("; 7 of 7 responses measured")


def test_a_copy_in_another_dtype_generates_and_the_model_observes(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, set[torch.dtype]] = {"responses": set(), "counterfactuals": set(), "observed": set()}
    generate, try_, observe = GenerateInfer.generate, stages_module.counterfactuals, Observer.observe

    def generating(self: Any, *arguments: Any, **options: Any) -> Any:
        used["responses"].add(self._model.dtype)
        return generate(self, *arguments, **options)

    def trying(writer: Any, *arguments: Any, **options: Any) -> Any:
        used["counterfactuals"].add(writer.dtype)
        return try_(writer, *arguments, **options)

    def observing(self: Any, *arguments: Any) -> Any:
        seen = observe(self, *arguments)
        used["observed"].add(seen.layers[1].attention.query.dtype)
        return seen

    monkeypatch.setattr(GenerateInfer, "generate", generating)
    monkeypatch.setattr(stages_module, "counterfactuals", trying)
    monkeypatch.setattr(Observer, "observe", observing)
    options = {"config": CONFIG, "page": False}
    analyze(model, tokenizer, PROBLEMS, out=tmp_path / "out", generation_dtype=torch.bfloat16, **options)
    assert used["responses"] == used["counterfactuals"] == {torch.bfloat16}
    assert used["observed"] == {model.dtype} == {torch.float32}
    with pytest.raises(ValueError, match="holds an analysis with another generation_dtype"):
        analyze(model, tokenizer, PROBLEMS, out=tmp_path / "out", **options)


def _counted(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[int]:
    """Lengths of the sequences observed from now on; the pass after `fail_at` of them is Ctrl-C."""
    lengths: list[int] = []
    observe = Observer.observe

    def counted(self: Observer, ids: Any, *arguments: Any) -> Any:
        if len(lengths) == fail_at:
            raise KeyboardInterrupt
        lengths.append(len(ids))
        return observe(self, ids, *arguments)

    if fail_at is not None:
        fail_at -= 1
    monkeypatch.setattr(Observer, "observe", counted)
    return lengths


def test_the_csv_files_hold_what_the_json_does(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    results = analyze(model, tokenizer, PROBLEMS, out=tmp_path / "out", config=CONFIG, page=False)
    with (results.directory / "tokens.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    responses = list(results.responses())
    assert len(rows) == sum(len(response.tokens.ids) for response in responses)
    first = responses[0].tokens
    for i, row in enumerate(rows[: len(first.ids)]):
        assert (int(row["id"]), row["text"]) == (first.ids[i], as_text(first.texts[i]))
        for name in ("waad", "fai", "entropy"):
            value = getattr(first, name)[i]
            assert row[name] == "" if math.isnan(value) else float(row[name]) == value
    assert any(row["fai"] == "" for row in rows)
    with (results.directory / "counterfactuals.csv").open(newline="", encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == 2 * len(NAMES)
    for trial in trials:
        response = results.response(trial["response"])
        assert trial["original"] == as_text("".join(response.tokens.texts[int(trial["position"]) + 1 :]))


def as_text(cell: str) -> str:
    """As a CSV file holds it: with an apostrophe before what a spreadsheet would run."""
    return f"'{cell}" if cell[:1] in set("=+-@\t\r") else cell


def test_a_spreadsheet_runs_nothing_of_the_csv_files(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = run_module.summarize

    def with_hostile_texts(directory: Path, **options: Any) -> Any:
        path = response_path(directory, "00003-0")
        result = read_json(ResponseResult, path)
        trials = tuple(replace(trial, continuation="@SUM(1)", replacement_token="\t=1") for trial in result.trials)
        write_json(replace(result, trials=trials), path)
        return original(directory, **options)

    monkeypatch.setattr(run_module, "summarize", with_hostile_texts)
    problem = {"prompt": "7,8,9>24:", "response": "=1+2-3"}
    results = analyze(model, tokenizer, [*PROBLEMS[:2], problem], out=tmp_path / "out", config=CONFIG, page=False)
    with (results.directory / "tokens.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["response"] == "00003-0"]
    assert [row["text"] for row in rows][:6] == ["'=", "1", "'+", "2", "'-", "3"]
    assert all(float(row["logprob"]) < 0 for row in rows)  # negative numbers stay numbers
    with (results.directory / "counterfactuals.csv").open(newline="", encoding="utf-8") as file:
        trials = [row for row in csv.DictReader(file) if row["response"] == "00003-0"]
    assert {(row["continuation"], row["replacement_token"]) for row in trials} == {("'@SUM(1)", "'\t=1")}
    assert tokens_frame(results).query("response == '00003-0'").text.tolist()[:3] == ["=", "1", "+"]


def test_what_is_given_is_observed_as_it_stands(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    results = analyze(model, tokenizer, PROBLEMS, out=tmp_path / "out", config=CONFIG, page=False)
    given = results.response("00003-0")
    assert given.response == "7+8=15,15+9=24"
    assert given.finished is None
    assert "".join(given.tokens.texts) == given.response
    assert given.prompt_tokens == len("7,8,9>24:") + 1  # <|bos|>


def test_another_analysis_is_not_mixed_in(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    analyze(model, tokenizer, PROBLEMS[:1], out=out, config=CONFIG, page=False)
    other = CONFIG.model_copy(update={"seed": 1})
    with pytest.raises(ValueError, match=r"holds an analysis with another seed; use another directory"):
        analyze(model, tokenizer, PROBLEMS[:1], out=out, config=other, page=False)
    with pytest.raises(RowError, match=r"row 1: is not the row from which .*00001-0\.json was made"):
        analyze(model, tokenizer, ["9,9,9>27:"], out=out, config=CONFIG, page=False)
    trained = build_model(TinyModelConfig(layers=3, hidden_size=32, mlp_size=32, head_size=8, seed=5), tokenizer)
    with pytest.raises(ValueError, match="with another weights"):
        analyze(trained, tokenizer, PROBLEMS[:1], out=out, config=CONFIG, page=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="which is not empty and holds no analysis"):
        analyze(model, tokenizer, PROBLEMS[:1], out=tmp_path / "full", config=CONFIG, page=False)


def test_more_problems_may_follow(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    analyze(model, tokenizer, PROBLEMS[:2], out=out, config=CONFIG, page=False)
    before = contents(out)
    more = analyze(model, tokenizer, PROBLEMS, out=out, config=CONFIG, page=False)
    assert more.names == NAMES
    assert contents(out).items() >= before.items()


TOO_LONG = {"prompt": "1,2,3>6:", "response": "1+2=3," * 10}


def test_a_response_longer_than_the_context(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    problems = [*PROBLEMS[:2], TOO_LONG, *PROBLEMS[3:]]
    message = "row 3: the prompt and response 1 have 69 tokens together; the model's context is 64"
    with pytest.raises(RowError, match=message):
        analyze(model, tokenizer, problems, out=tmp_path / "out", config=CONFIG, page=False)
    assert len(contents(tmp_path / "out")) == 6  # what was finished stays
    assert lacking(tmp_path / "out") == ["00004-0.json", "00004-1.json"], "which come after row 3"
    results = analyze(model, tokenizer, problems, out=tmp_path / "out", config=CONFIG, page=False, keep_going=True)
    assert results.names == tuple(name for name in NAMES if not name.startswith("00003"))
    assert results.failures == (message,)


def test_a_prompt_longer_than_the_context(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"row 2: the prompt has 64 tokens; the model's context of 64 leaves no room"):
        analyze(model, tokenizer, [PROBLEMS[0], "1" * 63], out=tmp_path / "out", config=CONFIG, page=False)
    # A response gets what room there is.
    results = analyze(model, tokenizer, ["1" * 60], out=tmp_path / "short", config=CONFIG, page=False)
    assert max(len(response.tokens.ids) for response in results.responses()) <= 3


def test_rows_are_looked_at_before_the_work_begins(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"prompt": "1,2,3>6:"}) + "\n" + json.dumps({"solution": "a"}) + "\n")
    with pytest.raises(RowError, match="row 2: has no text"):
        analyze(model, tokenizer, file, out=tmp_path / "out", config=CONFIG, page=False)
    assert not (tmp_path / "out").exists()
    results = analyze(model, tokenizer, file, out=tmp_path / "out", config=CONFIG, page=False, keep_going=True)
    assert results.names == ("00001-0", "00001-1")
    assert results.failures == ("row 2: has no text: neither prompt nor question, only 'solution'",)


def test_nothing_left(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no response is left to analyze\nrow 1: prompt is empty"):
        analyze(model, tokenizer, [""], out=tmp_path / "out", config=CONFIG, page=False, keep_going=True)


def test_damaged_responses_are_named(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    results = analyze(model, tokenizer, PROBLEMS[:1], out=tmp_path / "out", config=CONFIG, page=False)
    path = response_path(results.directory, results.names[0])
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"00001-0\.json is not a ResponseResult of this version"):
        read_json(ResponseResult, path)


def test_without_counterfactuals(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"counterfactuals": None})
    results = analyze(model, tokenizer, PROBLEMS[:1], out=tmp_path / "out", config=config, page=False)
    assert results.table1 is None
    assert table1_frame(results).empty
    assert not (results.directory / "table1.csv").exists()


def test_chat_needs_a_template(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"chat": True})
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        analyze(model, tokenizer, PROBLEMS[:1], out=tmp_path / "out", config=config, page=False)
    templated = build_tokenizer()
    templated.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    results = analyze(model, templated, ["1,2>3:"], out=tmp_path / "out", config=config, page=False)
    response = results.response(results.names[0])
    assert (response.prompt, response.prompt_tokens) == ("[1,2>3:]", 8)


def test_memory_does_not_grow_with_the_responses(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no time are more responses alive than a pass over them holds."""
    config = CONFIG.model_copy(update={"counterfactuals": None, "responses_per_problem": 1})
    most = 0
    write = stages_module.write_json

    def counting(*arguments: Any) -> None:
        nonlocal most
        gc.collect()
        alive = [response for response in gc.get_objects() if type(response) is ResponseResult]
        most = max(most, len(alive))
        write(*arguments)

    monkeypatch.setattr(stages_module, "write_json", counting)
    analyze(model, tokenizer, ["1,2,3>6:"] * 9, out=tmp_path / "out", config=config, page=False)
    assert 1 <= most <= 2


def test_seeds_of_torch_are_left_alone(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    analyze(model, tokenizer, PROBLEMS[:1], out=tmp_path / "out", config=CONFIG, page=False)
    assert torch.rand(1).equal(expected)
