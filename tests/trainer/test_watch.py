"""The rhythm watched during training, and calibrated head groups that are renewed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rhythm.credit.config import CreditConfig
from rhythm.credit.heads import HeadGroups
from rhythm.credit.signals import RhythmSignals
from rhythm.engines.interfaces import LogProbs, Rollout
from rhythm.tap.signals_config import SignalsConfig
from rhythm.trainer.checkpoint import RunState
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.loop import run
from rhythm.trainer.rollout import ScoredRollout
from rhythm.trainer.step import Engines
from rhythm.trainer.watch import watch_rhythm

pytestmark = pytest.mark.usefixtures("without_curves")

Configure = Callable[..., TrainConfig]
NAN = math.nan
TEXTS = {0: "", 1: "12", 2: " +", 3: "so", 4: "x2", 5: "…)", 6: " "}


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class FakeTokenizer:
    def decode(self, ids: list[int]) -> str:
        return TEXTS[ids[0]]


class FakeTrain:
    """One response of 8 tokens after a prompt of one, whose signals are known."""

    statistics_seconds = 0.0

    def __init__(self, span: list[list[float]]) -> None:
        self.span = torch.tensor(span)

    def log_probs(self, rollout: Rollout, tap: SignalsConfig | None, groups: HeadGroups | None) -> Any:
        assert tap is not None
        entropy = torch.tensor([[NAN, 1, 3, 1, 1, 1, 2, 1, 1.0]])
        waad = torch.tensor([[NAN, 1, 5, 1, 1, 1, 6, 1, 1.0]])  # peaks at the response's tokens 1 and 5
        fai = torch.tensor([[NAN, 0.1, 0.2, 0.9, 0.1, 0.1, 0.1, NAN, NAN]])  # a peak at 2
        none = torch.zeros(1, self.span.shape[1], dtype=torch.bool)
        signals = RhythmSignals(waad=waad, fai=fai, entropy=entropy, span=self.span, groups=HeadGroups(none, none))
        return LogProbs(entropy.clone(), entropy), signals


def scored() -> ScoredRollout:
    ids = torch.tensor([[3, 1, 2, 3, 4, 5, 6, 3, 0]])
    mask = torch.ones_like(ids).bool()
    response = mask.clone()
    response[:, 0] = False
    one = torch.tensor([1])
    rollout = Rollout(ids, mask, response, one, one * 0, torch.zeros(ids.shape), one.bool())
    return ScoredRollout(rollout=rollout, prompts=["so"], responses=["…"], rewards=[])


def watched(span: list[list[float]], before: HeadGroups | None) -> tuple[dict[str, float], HeadGroups]:
    engines = Engines(infer=None, train=FakeTrain(span), attn=None, weight_sync=None)  # type: ignore[arg-type]
    return watch_rhythm(
        engines, FakeTokenizer(), scored(), SignalsConfig(quantile=0.25), CreditConfig(), groups=None, before=before
    )


def test_the_numbers_by_hand() -> None:
    record, groups = watched([[1.0, 9.0, 3.0, 4.0]], None)
    # Entropy at the peaks 1 and 5: 3 + 2. A peak could be at 1 … 6, of mean 9/6, so that chance gives 3.
    assert record["rhythm_entropy_lift"] == pytest.approx(5 / 3 - 1)
    # A peak of FAI could be at 1 … 4, of which 1 and 2 are within a token after a peak of WAAD; that at 2 is.
    assert record["rhythm_follow_lift"] == pytest.approx(1 / 0.5 - 1)
    # ⌈0.4·6⌉ = 3 anchors: tokens 2 ("so"), 1 (" +") and, of equals the first, 0 ("12").
    assert record["rhythm_anchor_digits"] == pytest.approx(1 / 3)
    assert record["rhythm_anchor_punctuation"] == pytest.approx(1 / 3)
    # "12", "+", "so", "x2", "…)", " ", "so", "": two with digits, two of punctuation alone.
    assert record["rhythm_token_digits"] == record["rhythm_token_punctuation"] == 2 / 8
    # ⌈0.4·8⌉ = 4 at random and by entropy, ⌈0.4·7⌉ = 3 by Δ, 3 by FAI; half a unit each.
    assert record["rhythm_mass_random"] == record["rhythm_mass_entropy"] == pytest.approx(0.5 * 4 / 8)
    assert record["rhythm_mass_local_chunk"] == record["rhythm_mass_global_anchor"] == pytest.approx(0.5 * 3 / 8)
    assert 0 < record["rhythm_mass_coupled"] <= 0.5 * 3 / 8
    assert math.isnan(record["rhythm_turnover_local"])
    assert groups.local.tolist() == [[True, False, False, False]]
    assert groups.global_.tolist() == [[False, True, False, False]]


def test_turnover_is_to_the_last_time() -> None:
    _, before = watched([[1.0, 9.0, 3.0, 4.0]], None)
    record, _ = watched([[5.0, 9.0, 3.0, 4.0]], before)
    assert (record["rhythm_turnover_local"], record["rhythm_turnover_global"]) == (1, 0)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_watches_at_its_evaluations_alone_and_trains_the_same(small_config: Configure, tmp_path: Path) -> None:
    options = (f"runs_dir={tmp_path}", "steps=3")
    with_it = rows(run(small_config(*options, "name=with", "evaluation.rhythm_responses=8")).run_dir)
    without = rows(run(small_config(*options, "name=without", "evaluation.rhythm_responses=0")).run_dir)
    for row, other in zip(with_it, without, strict=True):
        logged = {key for key in row if key.startswith("rhythm_")}
        assert bool(logged) == ("accuracy" in row)
        assert row.keys() - other.keys() == logged
        for key in ("reward", "loss", "grad_norm", "gamma_mean", "accuracy"):
            assert row.get(key) == other.get(key), key
    assert with_it[0]["rhythm_turnover_local"] is None
    assert all(0 <= row["rhythm_turnover_local"] <= 1 for row in with_it[2:])


def test_calibrated_groups_are_renewed(small_config: Configure, tmp_path: Path) -> None:
    """Large steps, so that heads do change. Held groups are those of the step that chose them, on resume too."""
    options = (
        f"runs_dir={tmp_path}", "evaluation.every_steps=9", "evaluation.samples=0", "checkpoint.every_steps=1",
        "checkpoint.keep=9", "signals.grouping=calibrated", "optimizer.lr=0.03", "optimizer.warmup_steps=0",
    )  # fmt: skip

    def heads(name: str) -> list[Any]:
        states = [
            RunState.model_validate_json((tmp_path / name / "checkpoints" / f"step_{n:06d}" / "state.json").read_text())
            for n in range(1, 6)
        ]
        return [(state.local_heads, state.global_heads) for state in states]

    run(small_config(*options, "name=held", "steps=5"))
    run(small_config(*options, "name=renewed", "steps=3", "signals.recalibrate_steps=2"))
    run(small_config(*options, "name=renewed", "steps=5", "signals.recalibrate_steps=2"), resume=True)
    held, renewed = heads("held"), heads("renewed")
    assert held == held[:1] * 5
    assert renewed[0] == renewed[1] == held[0]
    assert renewed[2] == renewed[3]
    assert len({str(each) for each in renewed}) > 1
    logged = rows(tmp_path / "renewed")
    assert logged[1]["head_turnover_local"] is None
    for step, (before, now) in {3: (renewed[1], renewed[2]), 5: (renewed[3], renewed[4])}.items():
        for index, name in enumerate(("local", "global")):
            a, b = ({i for i, yes in enumerate(each[index]) if yes} for each in (before, now))
            assert logged[step][f"head_turnover_{name}"] == pytest.approx(1 - len(a & b) / len(a | b))


def test_recalibration_needs_calibration(small_config: Configure) -> None:
    with pytest.raises(ValueError, match="recalibrate_steps is 3, which needs grouping calibrated, not sequence"):
        small_config("signals.recalibrate_steps=3")
