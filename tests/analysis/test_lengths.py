"""Other lengths of the context: what the model reads, what is measured, and that it is measured once."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rhythm.analysis import Analysis, AnalysisConfig, analyze
from rhythm.analysis.extend import extend_analysis
from rhythm.analysis.forward import Observer
from rhythm.analysis.lengths import AtLength, LengthsConfig, Transcript, length_row, measure_lengths, sequence_of
from rhythm.analysis.lengths_output import lengths_markdown, read_lengths
from rhythm.analysis.response import Anchor, Head, Peaks, ResponseHeads, Tokens
from rhythm.analysis.results import read_json
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer

CONFIG = AnalysisConfig.model_validate(
    {
        "sampling": {"max_new_tokens": 20},
        "signals": {"window": 4, "horizon": [2, 6]},
        "counterfactuals": None,
        "table2": {"permutations": 9, "resamples": 9},
        "maps": 0,
    }
)
LENGTHS = LengthsConfig(tokens=(24, 40, 60, 200), responses=2, least=8)
PROBLEMS: list[Any] = [
    {"prompt": "7,8,9>24:", "response": "7+8=15,15+9=24"},
    {"prompt": "1,2,3>6:", "response": "1+2=3,3+3=6"},
    {"prompt": "4,5,6>15:", "response": "4+5=9,9+6=15,so it is 15"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    shape = TinyModelConfig(layers=4, hidden_size=32, mlp_size=32, query_heads=4, key_heads=2, head_size=8)
    return build_model(shape.model_copy(update={"max_positions": 64}), tokenizer)


@pytest.fixture
def analysis(model: Any, tokenizer: Any, tmp_path: Path) -> Analysis:
    return analyze(model, tokenizer, PROBLEMS, out=tmp_path / "out", config=CONFIG, page=False)


def transcript(name: str, prompt: int, response: int, start: int) -> Transcript:
    ids = range(start, start + prompt + response)
    return Transcript(name, 1, tuple(ids[:prompt]), tuple(ids[prompt:]))


def test_what_is_before_a_response_fills_the_length() -> None:
    a, b, c = transcript("a", 3, 5, 100), transcript("b", 2, 4, 200), transcript("c", 2, 6, 300)
    all_of = [a, b, c]
    same = sequence_of(b, all_of, 0, 4)
    assert same is not None
    assert (same.prompt, same.response, same.others) == (b.prompt, b.response, ())
    # Eight of c, and of a as many as are left: from its beginning, before what is whole.
    longer = sequence_of(b, all_of, 6 + 8 + 3, 4)
    assert longer is not None
    assert longer.prompt == (100, 101, 102, *range(300, 308), 200, 201)
    assert (longer.response, longer.own, longer.others) == (b.response, 2, ("a", "c"))
    exact = sequence_of(b, all_of, 6, 4)
    assert exact is not None
    assert exact.prompt + exact.response == b.prompt + b.response
    shorter = sequence_of(c, all_of, 6, 4)
    assert shorter is not None
    assert (shorter.prompt, shorter.response, shorter.others) == (c.prompt, c.response[:4], ())
    assert sequence_of(c, all_of, 5, 4) is None  # three tokens would be left of it
    assert sequence_of(b, all_of, 6 + 8 + 8, 4) is not None
    assert sequence_of(b, all_of, 6 + 8 + 9, 4) is None  # nothing is there twice


@pytest.mark.parametrize("tokens", [(), (512, 256), (256, 256), (1, 4)])
def test_lengths_ascend(tokens: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="must be ascending"):
        LengthsConfig(tokens=tokens)


def test_signals_are_of_the_response_in_its_context(model: Any, tokenizer: Any, analysis: Analysis) -> None:
    lengths = measure_lengths(model, tokenizer, analysis, LENGTHS)
    assert [row.length for row in lengths.rows] == [0, 24, 40, 60]  # 200 is more than the model's context
    first, second, third = analysis.responses()

    def at(name: str, length: int) -> AtLength:
        return read_json(AtLength, analysis.directory / "lengths" / f"{name}-{length}.json")

    assert at(first.name, 0).tokens == first.tokens
    assert at(first.name, 0).anchors == first.anchors
    ids_of = {each.name: [*tokenizer(each.prompt).input_ids, *each.tokens.ids] for each in (first, second, third)}
    extended, own = at(first.name, 60), ids_of[first.name]
    room = 60 - len(own) - len(ids_of[second.name])
    assert (extended.length, extended.before, extended.prompt) == (60, 60 - len(own), first.prompt_tokens)
    before = [*ids_of[third.name][:room], *ids_of[second.name]]
    n = len(first.tokens.ids)
    seen = Observer(model, CONFIG.signals).observe([*before, *own], 60 - n, [0] * n)
    torch.testing.assert_close(torch.tensor(extended.tokens.entropy), seen.entropy, rtol=1e-5, atol=1e-6)
    assert extended.heads.span != first.heads.span
    row = lengths.rows[-1]
    assert row.responses == 2
    assert row.before == pytest.approx(sum(60 - len(ids_of[x.name]) for x in (first, second)) / 2)


def test_a_cut_response_has_the_signals_it_had(model: Any, tokenizer: Any, analysis: Analysis) -> None:
    measure_lengths(model, tokenizer, analysis, LENGTHS.model_copy(update={"tokens": (20,), "responses": 3}))
    last = list(analysis.responses())[-1]
    cut = read_json(AtLength, analysis.directory / "lengths" / f"{last.name}-20.json")
    n = 20 - last.prompt_tokens
    assert (cut.length, cut.before, cut.others) == (20, 0, ())
    assert cut.tokens.ids == last.tokens.ids[:n]
    assert cut.tokens.entropy == pytest.approx(last.tokens.entropy[:n], rel=1e-5)


def test_reach_is_the_mean_distance_of_attention(model: Any, tokenizer: Any, analysis: Analysis) -> None:
    """From eager maps of the global heads."""
    response = max(analysis.responses(), key=lambda each: len(each.anchors))
    assert response.anchors
    prompt = tokenizer(response.prompt).input_ids
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = model(torch.tensor([[*prompt, *response.tokens.ids]]), output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    mean = torch.stack([maps[layer][0, head] for layer, head in response.heads.global_]).mean(dim=0)[len(prompt) :]
    for anchor in response.anchors:
        received = mean[anchor.token + 1 :, len(prompt) + anchor.token]
        distance = torch.arange(1, len(received) + 1)
        assert anchor.reach == pytest.approx(float((received * distance).sum() / received.sum()), rel=1e-4)


def planted(name: str, row: int, local: Head, global_: Head, reach: float, fai: tuple[float, ...]) -> AtLength:
    tokens = Tokens(
        ids=(1, 2, 3, 4, 5),
        texts=("a",) * 5,
        waad=(1.0, 2.0, 1.0, 3.0, 1.0),
        fai=fai,
        fai_receiver=fai,
        entropy=(1.0,) * 5,
        logprob=(-1.0,) * 5,
        gamma=(1.0,) * 5,
    )
    span = ((1.0, 2.0), (3.0, 4.0))
    heads = ResponseHeads(span, span, span, (local,), (global_,), (global_,), (), sentences=1)
    anchors = (Anchor(1, (), reach), Anchor(3, (), math.nan))
    peaks = Peaks(waad=(1, 3), fai=(1, 3), fai_receiver=(1,), entropy=())
    return AtLength(name, row, 40, 3, 32, (), tokens, peaks, anchors, heads)


def test_a_row_compares_with_what_was_generated() -> None:
    fai = (0.1, 0.5, 0.2, 0.7, math.nan)
    generated = [planted("a", 1, (0, 0), (1, 1), 5.0, fai), planted("b", 2, (0, 0), (1, 1), 7.0, fai)]
    measured = [planted("a", 1, (0, 1), (1, 1), 10.0, fai), planted("b", 2, (0, 0), (1, 0), 20.0, fai)]
    row = length_row(40, measured, generated, CONFIG, (0, 1))
    assert (row.length, row.responses, row.tokens, row.before) == (40, 2, 5, 32)
    assert (row.local_kept, row.global_kept) == (0.5, 0.5)
    assert (row.local, row.global_, row.random) == (0, 0, 0.25)
    assert row.reach == pytest.approx(15)
    assert 10 <= row.reach_interval.low <= row.reach_interval.high <= 20
    assert (row.fai_anchors, row.fai) == pytest.approx((0.6, 0.375))
    assert [coupling.key for coupling in row.table2] == ["entropy", "cooccurrence", "follows"]
    assert row.table2[2].observed == 1  # both peaks of FAI are at peaks of WAAD
    same = length_row(0, generated, generated, CONFIG, (0, 1))
    assert (same.local_kept, same.global_kept, same.local) == (1, 1, 1)


def test_nothing_is_measured_twice(
    model: Any, tokenizer: Any, analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    observe_one = Observer.observe

    def counted(self: Observer, ids: Any, *arguments: Any) -> Any:
        passes.append(len(ids))
        return observe_one(self, ids, *arguments)

    monkeypatch.setattr(Observer, "observe", counted)
    first = measure_lengths(model, tokenizer, analysis, LENGTHS)
    assert passes[-2:] == [60, 60]
    passes.clear()
    assert measure_lengths(model, tokenizer, analysis, LENGTHS) == first
    assert not passes
    # A file of another sequence, and a damaged one.
    directory = analysis.directory / "lengths"
    (directory / "00001-0-40.json").write_bytes((directory / "00002-0-40.json").read_bytes())
    (directory / "00001-0-60.json").write_text("{", encoding="utf-8")
    assert measure_lengths(model, tokenizer, analysis, LENGTHS) == first
    assert passes == [40, 60]


def test_files_and_page(model: Any, tokenizer: Any, analysis: Analysis) -> None:
    extend_analysis(model, tokenizer, analysis, lengths=LENGTHS)
    lengths = read_lengths(analysis)
    assert lengths is not None
    with (analysis.directory / "lengths.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["length"] for row in rows] == ["0", "24", "40", "60"]
    assert float(rows[3]["global_kept"]) == pytest.approx(lengths.rows[3].global_kept)
    assert float(rows[3]["entropy_lift"]) == pytest.approx(lengths.rows[3].table2[0].permuted_lift)
    table = lengths_markdown(lengths, analysis.p_floor)
    assert "\n| as generated | 2 | " in table
    assert (analysis.directory / "lengths.md").read_text(encoding="utf-8") == table
    page = (analysis.directory / "report.html").read_text(encoding="utf-8")
    assert 'href="#lengths"' in page
    section = page[page.index('id="lengths"') : page.index('id="table-lengths"')]
    assert "var(--muted)" in section
    assert "#010101" not in section
    assert (analysis.directory / "figures" / "lengths.pdf").read_bytes().startswith(b"%PDF")
    assert read_lengths(replace(analysis, names=analysis.names[:-1])) is None
