"""The Megatron engine on real ranks against the one-machine engine: weights, log-probs, signals, γ, steps, checkpoints.

Every layout is run once, in processes of its own, and looked at by many tests. Differences allowed are those of sums
in another order: log-probs 1e-5 nats, a gradient's norm 1e-5 of itself, and weights 2e-4, a fifth of a step of lr 1e-3:
Adam's first steps divide a gradient by its own size, so where it is nearly 0 the last bit decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_case import (
    LAYOUTS,
    OPTIONS,
    Case,
    assert_near,
    assert_weights,
    run_ranks,
)
from transformers import AutoModelForCausalLM

from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights

# A test that is the first to ask for "both" runs five layouts.
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]

# Whose checkpoints a layout loads, saved with the same kind of optimizer.
LOADS = {
    "one": (),
    "tensor": (),
    "pipeline": ("tensor",),
    "data": ("pipeline",),
    "context": ("data",),
    "both": ("context", "pipeline"),
}
CHUNK = OPTIONS["optimizer"].token_chunk


class Layouts:
    """Runs a layout when it is first asked for, and those before it whose checkpoints it loads."""

    def __init__(self, case: Case, directory: Path) -> None:
        self._case = case
        self._directory = directory
        self._results: dict[str, list[dict[str, Any]]] = {}
        self._begun: set[str] = set()

    def saved(self, name: str) -> Path:
        """Where a layout leaves its checkpoint."""
        return self._directory / "saved" / name

    def results(self, name: str) -> list[dict[str, Any]]:
        """The results of each rank of a layout."""
        if name not in self._results:
            assert name not in self._begun, f"layout {name} failed when another test asked for it"
            self._begun.add(name)
            for other in LOADS[name]:
                self.results(other)
            scratch = self._directory / name
            scratch.mkdir()
            self.saved(name).parent.mkdir(exist_ok=True)
            self._results[name] = run_ranks(
                scratch,
                scenario="everything",
                parallel=LAYOUTS[name],
                checkpoint=self._case.checkpoint,
                options=OPTIONS,
                rollout=self._case.rollout,
                batches=self._case.batches,
                save_to=str(self.saved(name)),
                load_from=[str(self.saved(other)) for other in LOADS[name]],
            )
        return self._results[name]


@pytest.fixture(scope="module")
def layouts(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    return Layouts(case, tmp_path_factory.mktemp("layouts"))


@pytest.fixture(params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, layouts: Layouts) -> Any:
    """(name of the layout, results of each of its ranks)."""
    return request.param, layouts.results(request.param)


def test_weights_go_in_and_out_bit_for_bit(ranks: Any, case: Case) -> None:
    for results in ranks[1]:
        assert_weights(results["weights_at_start"], case.results["weights_at_start"], atol=0.0)


def test_log_probs_and_entropies(ranks: Any, case: Case) -> None:
    for results in ranks[1]:
        assert_near(results["log_probs"].logprobs, case.results["log_probs"].logprobs, atol=1e-5)
        assert_near(results["log_probs"].entropy, case.results["log_probs"].entropy, atol=1e-5)
        assert_near(results["reference"], case.results["reference"], atol=1e-5)
        # Fewer rows than data ranks: some have nothing to do.
        assert_near(results["one_row"].logprobs, case.results["log_probs"].logprobs[:1], atol=1e-5)


@pytest.mark.parametrize("kind", ["signals", "batch_signals", "fixed_signals"])
def test_signals_are_those_of_the_whole_model(ranks: Any, case: Case, kind: str) -> None:
    expected = case.results[kind]
    for signals in (rank[kind] for rank in ranks[1]):
        assert torch.equal(signals.groups.local, expected.groups.local)
        assert torch.equal(signals.groups.global_, expected.groups.global_)
        # With fixed groups one machine computes the spans of some rows alone; they don't depend on the groups.
        assert_near(signals.span, case.results["signals"].span, atol=1e-4)
        assert_near(signals.waad, expected.waad, atol=1e-4)
        assert_near(signals.fai, expected.fai, atol=1e-5)


@pytest.mark.parametrize("strategy", ["local_chunk", "global_anchor", "coupled"])
def test_gamma_is_that_of_one_machine(ranks: Any, case: Case, strategy: Any) -> None:
    config = CreditConfig(strategy=strategy)
    expected = batch_credit_weights(case.results["signals"], case.rollout.response_mask, config)
    assert expected[case.rollout.response_mask].unique().numel() > 1
    for results in ranks[1]:
        assert torch.equal(batch_credit_weights(results["signals"], case.rollout.response_mask, config), expected)


def test_steps_follow_one_machine(ranks: Any, case: Case) -> None:
    for results in ranks[1]:
        for step, expected in zip(results["steps"], case.results["steps"], strict=True):
            assert step.loss == pytest.approx(expected.loss, abs=1e-4)
            assert step.kl == pytest.approx(expected.kl, abs=1e-4)
            assert step.clip_share == pytest.approx(expected.clip_share, abs=0.01)
        first, expected = results["steps"][0], case.results["steps"][0]
        assert first.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert_weights(results["weights"], case.results["weights"], atol=2e-4)


def test_gradients_are_freed_until_the_next_step(ranks: Any) -> None:
    """Offloaded with the optimizer's states before the second step, saving and loading, which other tests compare."""
    for results in ranks[1]:
        there, away, back = results["gradient_bytes"]
        assert there == back > 0
        assert away == 0
        assert_near(results["log_probs_away"].logprobs, results["log_probs_there"].logprobs, atol=0.0)


def test_infinity_stops_every_rank_and_changes_no_weight(ranks: Any) -> None:
    for results in ranks[1]:
        assert results["refused"] == ("loss", True)
        assert_weights(results["weights_after_refusal"], results["weights"], atol=0.0)


def test_a_saved_run_continues_bit_for_bit(ranks: Any, case: Case) -> None:
    """No process that saving started is left: it would outlive a rank that is killed."""
    for results in ranks[1]:
        assert results["left_by_saving"] == []
        assert_weights(results["last_weights_again"], results["last_weights"], atol=0.0)
        assert_weights(results["last_weights"], case.results["last_weights"], atol=3e-4)


@pytest.mark.parametrize("name", ["one", "pipeline"])  # without and with the distributed optimizer
def test_a_new_process_continues_bit_for_bit(name: str, layouts: Layouts, case: Case, tmp_path: Path) -> None:
    results = layouts.results(name)
    again = run_ranks(
        tmp_path,
        scenario="resumed",
        parallel=LAYOUTS[name],
        checkpoint=case.checkpoint,
        options=OPTIONS,
        batches=case.batches,
        load_from=str(layouts.saved(name)),
    )
    assert_weights(again[0]["last_weights"], results[0]["last_weights"], atol=0.0)


@pytest.mark.parametrize(("name", "other"), [(name, other) for name in LOADS for other in LOADS[name]])
def test_a_checkpoint_loads_under_another_layout(name: str, other: str, layouts: Layouts, case: Case) -> None:
    for results in layouts.results(name):
        # The optimizer's state came along: without it the step would be another.
        assert_weights(results[f"loaded {layouts.saved(other)}"], case.results["last_weights"], atol=3e-4)


def test_saving_gathers_the_optimizer_on_one_data_rank(layouts: Layouts, case: Case) -> None:
    first, second = layouts.results("data")
    parameters = sum(x.numel() for name, x in case.results["last_weights"].items() if name != "lm_head.weight")
    (gathered,) = first["gathered_by_saving"]
    assert 3 * parameters <= gathered < 3.1 * parameters  # weights and both moments, with padding
    assert second["gathered_by_saving"] == [0]


def test_the_saved_weights_are_an_ordinary_checkpoint(ranks: Any, layouts: Layouts) -> None:
    name, ranks_found = ranks
    model = AutoModelForCausalLM.from_pretrained(layouts.saved(name), local_files_only=True)
    assert_weights(ranks_found[0]["weights"], model.state_dict(), atol=0.0)
    assert (layouts.saved(name) / "tokenizer.json").is_file()


def test_logits_exist_a_chunk_at_a_time_and_time_is_kept(ranks: Any) -> None:
    assert all(results["widest_logits"] == CHUNK for results in ranks[1] if results["widest_logits"])
    assert any(results["widest_logits"] for results in ranks[1])
    assert all(results["statistics_seconds"] > 0 for results in ranks[1])
    assert [results["statistics_seconds_without_tap"] for results in ranks[1]] == [0.0] * len(ranks[1])
