"""γ by other settings: which settings, what is compared, and that the statistics of heads are kept."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rhythm.analysis import Analysis, AnalysisConfig, analyze
from rhythm.analysis.extend import extend_analysis
from rhythm.analysis.forward import Observer
from rhythm.analysis.grid import KEYS, SensitivityConfig
from rhythm.analysis.kept_heads import HeadKeeper, KeptHeads
from rhythm.analysis.sensitivity import SettingResult, compare, measure_sensitivity
from rhythm.analysis.sensitivity_output import pairs, read_sensitivity, sensitivity_markdown
from rhythm.credit.config import CreditConfig
from rhythm.tap.observe import observe
from rhythm.tap.signals_config import SignalsConfig
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer

NOTHING: dict[str, Any] = {key: () for key in KEYS}
CONFIG = AnalysisConfig.model_validate(
    {
        "sampling": {"max_new_tokens": 14},
        "signals": {"window": 4, "horizon": [2, 6]},
        "counterfactuals": None,
        "table2": {"permutations": 9, "resamples": 9},
        "maps": 0,
    }
)
GRID = SensitivityConfig.model_validate(
    {
        **NOTHING,
        "changes": 2,
        "top_fraction": (0.2, 0.4),
        "alpha": (0.0,),
        "layers": ("all",),
        "window": (2, 7),
        "horizon": ((1, None),),
        "grouping": ("batch",),
    }
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    shape = TinyModelConfig(layers=4, hidden_size=32, mlp_size=32, query_heads=4, key_heads=2, head_size=8)
    return build_model(shape, tokenizer)


@pytest.fixture
def analysis(model: Any, tokenizer: Any, tmp_path: Path) -> Analysis:
    problems: list[Any] = ["1,2,3>6:", {"prompt": "7,8,9>24:", "response": "7+8=15,15+9=24"}, "4,5,6>15:"]
    return analyze(model, tokenizer, problems, out=tmp_path / "out", config=CONFIG, page=False)


def test_the_settings_are_ours_with_up_to_so_many_changes() -> None:
    settings = list(GRID.settings(CONFIG.credit, CONFIG.signals))
    # 0.4 is our own top_fraction: of six keys one value each, but for window with two.
    assert [len(setting.changed) for setting in settings] == [0] + 7 * [1] + (6 * 5 // 2 + 5) * [2]
    assert (settings[0].credit, settings[0].signals) == (CONFIG.credit, CONFIG.signals)
    assert settings[4].changed == {"window": "2"}
    assert settings[4].signals == CONFIG.signals.model_copy(update={"window": 2})
    last = settings[-1]
    assert last.changed == {"horizon": "[1, none]", "grouping": "batch"}
    assert (last.signals.horizon, last.signals.grouping, last.signals.window) == ((1, None), "batch", 4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"top_fraction": [0.2, 1.5]}, "top_fraction holds 1.5"),
        ({"window": [0]}, "window holds 0"),
        ({"horizon": [[9, 3]]}, "horizon holds"),
        ({"layers": [[3, 1]]}, "layers holds"),
    ],
)
def test_values_are_those_of_credit_and_signals(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SensitivityConfig.model_validate(values)


def one_head_each(fai: list[float], spans: tuple[float, float] = (1.0, 5.0)) -> KeptHeads:
    """Two heads: by default the first is local, and the second global, with this FAI; the first has it backwards."""
    value = torch.tensor(fai)
    waad = torch.ones(2, len(fai))
    fai_of_heads = torch.stack([value.flip(0), value])
    return KeptHeads(torch.tensor([0, 1]), torch.tensor(spans), {10: waad}, {(10, 50): fai_of_heads})


def compared(kept: list[KeptHeads], own: dict[str, Any], **values: Any) -> list[SettingResult]:
    grid = SensitivityConfig.model_validate({**NOTHING, "changes": 1, **values})
    credit = CreditConfig.model_validate({"strategy": "global_anchor", **own})
    signals = SignalsConfig(layers="all", quantile=0.5)
    return compare(kept, list(grid.settings(credit, signals)), lambda _: [0, 1])


def test_measures_of_known_anchors() -> None:
    """FAI falls over ten tokens, so the first 4 are chosen by our settings; NaN at the end is never chosen."""
    kept = [one_head_each([10.0 - i for i in range(10)])]
    own, fewer, stronger = compared(kept, {}, top_fraction=(0.2,), gamma_amp=(3.0,))
    values = vars(own)
    assert values.pop("changed") == {}
    thirds = {"first": 0.75, "middle": 0.25, "last": 0}
    assert values == pytest.approx({"jaccard": 1, "chosen": 0.4, "mass": 0.2, "moved": 0, "position": 0.2, **thirds})
    assert (fewer.jaccard, fewer.chosen, fewer.moved) == pytest.approx((0.5, 0.2, 0.5))
    assert (fewer.mass, fewer.position, fewer.first) == pytest.approx((0.1, 0.1, 1))
    assert (stronger.jaccard, stronger.moved, stronger.mass) == pytest.approx((1, 0, 0.8))


def test_mass_is_that_before_matching() -> None:
    kept = [one_head_each([5.0, 4.0, 3.0, 2.0, 1.0, *[math.nan] * 5])]
    _, fewer = compared(kept, {"mass": "matched"}, top_fraction=(0.2,))
    assert fewer.mass == pytest.approx(0.5 * 1 / 10)


def test_a_batch_shares_its_heads() -> None:
    """In the second response the heads' spans are the other way round, but the means are those of the first."""
    falling = [10.0 - i for i in range(10)]
    kept = [one_head_each(falling, (1.0, 9.0)), one_head_each(falling, (5.0, 4.0))]
    own, shared = compared(kept, {}, grouping=("batch",))
    assert own.position == pytest.approx((0.2 + 0.8) / 2)
    assert (shared.position, shared.jaccard) == pytest.approx((0.2, (1 + 0) / 2))


def test_responses_of_any_length_count_alike_and_undefined_ones_not() -> None:
    short, long = [3.0, 2.0, 1.0, 0.0, math.nan], [40.0 - i for i in range(40)]
    alone = [compared([one_head_each(fai)], {}, top_fraction=(0.1,)) for fai in (short, long)]
    undefined = one_head_each([math.nan] * 7)
    together = compared([one_head_each(long), undefined, one_head_each(short)], {}, top_fraction=(0.1,))
    for a, b, both in zip(*alone, together, strict=True):
        for name in ("jaccard", "moved", "position"):
            assert getattr(both, name) == pytest.approx((getattr(a, name) + getattr(b, name)) / 2)
        assert both.mass == pytest.approx((a.mass + b.mass + 0) / 3)


def test_our_own_gamma_is_that_of_the_analysis(model: Any, tokenizer: Any, analysis: Analysis) -> None:
    own, *others = measure_sensitivity(model, tokenizer, analysis, GRID).settings
    gammas = [response.tokens.gamma for response in analysis.responses()]
    chosen = [sum(x > 1 for x in gamma) / len(gamma) for gamma in gammas]
    assert own.mass == pytest.approx(sum(sum(gamma) / len(gamma) - 1 for gamma in gammas) / len(gammas), abs=1e-6)
    assert own.chosen == pytest.approx(sum(chosen) / len(chosen))
    assert own.jaccard == 1
    changed = [setting.jaccard for setting in others if setting.changed.keys() & {"top_fraction", "horizon"}]
    assert all(jaccard < 1 for jaccard in changed)


def test_heads_are_those_of_a_pass_with_their_window_and_horizon(
    model: Any, tokenizer: Any, analysis: Analysis
) -> None:
    options: dict[str, Any] = {"layers": [3, 1], "windows": [4, 9, 2], "horizons": [(2, 6), (1, None)]}
    keeper = HeadKeeper(model, tokenizer, analysis, **options)
    for response in analysis.responses():
        kept = keeper.heads(response)
        read_again = keeper.heads(response)
        ids = torch.tensor([[*tokenizer(response.prompt).input_ids, *response.tokens.ids]])
        assert kept.layers.tolist() == read_again.layers.tolist() == [1] * 4 + [3] * 4
        for window, horizon in [(4, (2, 6)), (9, (1, None)), (2, (2, 6))]:
            config = SignalsConfig(layers=(1, 3), window=window, horizon=horizon, quantile=0.5)
            seen = observe(model, ids, prompt_lens=[response.prompt_tokens], signals=config)
            for mine in (kept, read_again):
                torch.testing.assert_close(mine.span, seen.span[0])
                for group, values, expected in (
                    (seen.groups.local, mine.waad[window], seen.waad),
                    (seen.groups.global_, mine.fai[horizon], seen.fai),
                ):
                    mean: Tensor = values[group[0]].mean(dim=0)
                    torch.testing.assert_close(mean, expected[0, response.prompt_tokens :], equal_nan=True)


def test_the_model_runs_once_per_response(
    model: Any, tokenizer: Any, analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    observe_one = Observer.observe

    def counted(self: Observer, ids: Any, *arguments: Any) -> Any:
        passes.append(len(ids))
        return observe_one(self, ids, *arguments)

    monkeypatch.setattr(Observer, "observe", counted)
    first = measure_sensitivity(model, tokenizer, analysis, GRID)
    assert len(passes) == len(analysis.names)
    fewer = GRID.model_copy(update={"window": (7,), "changes": 1})
    assert measure_sensitivity(model, tokenizer, analysis, GRID) == first
    measure_sensitivity(model, tokenizer, analysis, fewer)
    assert len(passes) == len(analysis.names)
    (analysis.directory / "heads" / f"{analysis.names[0]}.npz").write_bytes(b"PK damaged")
    assert measure_sensitivity(model, tokenizer, analysis, GRID) == first
    assert len(passes) == len(analysis.names) + 1
    (analysis.directory / "heads" / f"{analysis.names[0]}.npz").unlink()
    measure_sensitivity(model, tokenizer, analysis, fewer.model_copy(update={"layers": ()}))  # one without, two with
    measure_sensitivity(model, tokenizer, analysis, GRID.model_copy(update={"window": (8,)}))
    assert len(passes) == 2 * len(analysis.names) + 2


def test_what_reads_no_attention_is_refused(model: Any, tokenizer: Any, analysis: Analysis) -> None:
    settings = CONFIG.model_copy(update={"credit": CreditConfig(strategy="random")}).model_dump(mode="json")
    with pytest.raises(ValueError, match=r"credit\.strategy is 'random'"):
        measure_sensitivity(model, tokenizer, replace(analysis, settings=settings), GRID)


def test_another_tokenizer_is_refused(model: Any, tokenizer: Any, analysis: Analysis) -> None:
    class Halved:
        def __call__(self, text: str, **options: Any) -> Any:
            return tokenizer(text[::2], **options)

    with pytest.raises(ValueError, match="tokenizer: gives the prompt of response 00001-0"):
        measure_sensitivity(model, Halved(), analysis, GRID)


def test_files_and_page(model: Any, tokenizer: Any, analysis: Analysis) -> None:
    extend_analysis(model, tokenizer, analysis, sensitivity=GRID)
    sensitivity = read_sensitivity(analysis)
    assert sensitivity is not None
    with (analysis.directory / "sensitivity.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(sensitivity.settings) == 28
    assert rows[0]["changes"] == "0"
    assert rows[0]["horizon"] == "[2, 6]"
    assert rows[-1] | {"changes": "2", "horizon": "[1, none]", "grouping": "batch", "window": "4"} == rows[-1]
    assert float(rows[5]["jaccard"]) == pytest.approx(sensitivity.settings[5].jaccard)
    table = sensitivity_markdown(sensitivity)
    assert table == (analysis.directory / "sensitivity.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 1 + 7
    assert "| `window` 7 | " in table
    assert "27 settings with up to 2 changes, 3 responses" in table

    changes, shared = pairs(sensitivity)
    assert [key for key, _ in changes] == ["top_fraction", "alpha", "layers", "window", "window", "horizon", "grouping"]
    assert math.isnan(shared[3][4])  # two windows at a time
    assert shared[0][0] == sensitivity.settings[1].jaccard
    both = next(s for s in sensitivity.settings if s.changed == {"top_fraction": "0.2", "window": "7"})
    assert shared[0][4] == shared[4][0] == both.jaccard

    page = (analysis.directory / "report.html").read_text(encoding="utf-8")
    assert 'href="#sensitivity"' in page
    assert page.count(' title="top_fraction 0.2 and ') == 6
    assert (analysis.directory / "figures" / "sensitivity.pdf").read_bytes().startswith(b"%PDF")

    assert read_sensitivity(replace(analysis, names=analysis.names[:-1])) is None  # of other responses
