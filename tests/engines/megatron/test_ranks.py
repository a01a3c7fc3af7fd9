"""The Megatron engine on real ranks against the one-machine engine: weights, log-probs, signals, γ, steps, checkpoints.

Every layout is run once, in processes of its own, and looked at by many tests. Differences allowed are those of sums
in another order: log-probs 1e-5 nats, a gradient's norm 1e-5 of itself, and weights 2e-4, a fifth of a step of lr 1e-3:
Adam's first steps divide a gradient by its own size, so where it is nearly 0 the last bit decides.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rhythm.credit.config import CreditConfig, SignalsConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.credit.heads import HeadGroups
from rhythm.credit.loss import LossConfig
from rhythm.engines.batches import take_rows
from rhythm.engines.interfaces import Rollout, TrainBatch
from rhythm.engines.local.train import OptimizerConfig, TorchTrain
from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint

# A test that is the first to ask for "both" runs four layouts.
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]

LAYOUTS = {
    "one": ParallelConfig(distributed_optimizer=False),
    "tensor": ParallelConfig(tensor=2),
    "pipeline": ParallelConfig(pipeline=2, recompute=True),
    "data": ParallelConfig(data=2),
    "both": ParallelConfig(tensor=2, pipeline=2),
}
# Whose checkpoints a layout loads, saved with the same kind of optimizer.
LOADS = {"one": (), "tensor": (), "pipeline": ("tensor",), "data": ("pipeline",), "both": ("data", "pipeline")}
OPTIONS: dict[str, Any] = {
    "optimizer": OptimizerConfig(lr=1e-3, weight_decay=0.1, max_grad_norm=0.5, token_chunk=16),
    "loss": LossConfig(kl_coef=0.1, entropy_coef=0.01),
    "temperature": 0.9,
}
CHUNK = OPTIONS["optimizer"].token_chunk
TAP = SignalsConfig(backend="reference", layers=3)


@dataclass(frozen=True)
class Case:
    """What the one-machine engine makes of the same data."""

    checkpoint: Path
    rollout: Rollout
    batches: list[TrainBatch]
    results: dict[str, Any]


def make_rollout(rows: int = 7, positions: int = 40) -> Rollout:
    random = torch.Generator().manual_seed(5)
    lens = torch.randint(12, positions + 1, (rows, 1), generator=random)
    prompt_lens = torch.randint(1, 8, (rows,), generator=random)
    t = torch.arange(positions)
    mask = t < lens
    ids = torch.randint(4, 100, (rows, positions), generator=random)
    return Rollout(
        input_ids=torch.where(mask, ids, 0),
        attention_mask=mask,
        response_mask=mask & (t >= prompt_lens[:, None]),
        prompt_lens=prompt_lens,
        group=torch.arange(rows) // 2,
        logprobs=torch.zeros(rows, positions),
        finished=torch.ones(rows, dtype=torch.bool),
    )


def make_batches(rollout: Rollout, old: torch.Tensor, reference: torch.Tensor | None, count: int) -> list[TrainBatch]:
    random = torch.Generator().manual_seed(6)
    return [TrainBatch(rollout, old, torch.randn(old.shape, generator=random), reference) for _ in range(count)]


def torch_engine(model: Any) -> TorchTrain:
    return TorchTrain(model, build_tokenizer(), micro_batch_size=2, reference=copy.deepcopy(model), **OPTIONS)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A Qwen3 of six layers, so that both stages have sampled ones, with 8 query and 4 key heads."""
    checkpoint = tmp_path_factory.mktemp("qwen3")
    shape = TinyModelConfig(layers=6, hidden_size=48, mlp_size=80, query_heads=8, key_heads=4, head_size=16)
    torch.manual_seed(0)
    model = build_model(shape, build_tokenizer())
    with torch.no_grad():  # a fresh model is nearly uniform: sharper weights tell right from wrong
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    save_checkpoint(model, build_tokenizer(), checkpoint)
    rollout = make_rollout()
    engine = torch_engine(model)
    results: dict[str, Any] = {"weights_at_start": copy.deepcopy(engine.weights())}
    results["log_probs"], results["signals"] = engine.log_probs(rollout, TAP)
    results["batch_signals"] = engine.log_probs(rollout, TAP.model_copy(update={"grouping": "batch"}))[1]
    groups = results["signals"].groups
    fixed = HeadGroups(groups.local[:1].roll(1, dims=1), groups.global_[:1].roll(1, dims=1))
    results["fixed_signals"] = engine.log_probs(rollout, TAP, fixed)[1]
    results["reference"] = engine.reference_log_probs(rollout)
    batches = make_batches(rollout, results["log_probs"].logprobs, results["reference"], count=4)
    results["steps"] = [engine.step(batch) for batch in batches[:-1]]
    results["weights"] = copy.deepcopy(engine.weights())
    engine.step(batches[-1])
    results["last_weights"] = copy.deepcopy(engine.weights())
    return Case(checkpoint, rollout, batches, results)


def run_ranks(scratch: Path, timeout: float = 400, **spec: Any) -> list[dict[str, Any]]:
    """Run a scenario of ranks.py; returns each rank's results."""
    torch.save(spec, scratch / "spec.pt")
    script = Path(__file__).with_name("ranks.py")
    command = [sys.executable, "-W", "ignore", str(script), str(scratch / "spec.pt"), str(scratch / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(scratch / f"out.{rank}", weights_only=False) for rank in range(spec["parallel"].ranks)]


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


def assert_near(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)


def assert_weights(actual: dict[str, Any], expected: dict[str, Any], atol: float) -> None:
    tied = {"lm_head.weight"} if "lm_head.weight" not in actual else set()
    assert actual.keys() == expected.keys() - tied
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")  # noqa: B023


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
        assert_near(signals.span, expected.span, atol=1e-4)
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


@pytest.mark.parametrize("loss", [LossConfig(dual_clip=1.25), LossConfig(objective="cispo", clip_low=1, clip_high=3)])
def test_other_objectives_follow_one_machine(case: Case, tmp_path: Path, loss: LossConfig) -> None:
    """Off-policy, on two data ranks; the longest three rows are masked as overlong, a whole micro-batch among them."""
    masked = torch.isin(torch.arange(7), case.rollout.lens.argsort(descending=True)[:3])
    rollout = replace(case.rollout, response_mask=case.rollout.response_mask & ~masked[:, None])
    noise = torch.randn(case.rollout.input_ids.shape, generator=torch.Generator().manual_seed(8))
    batches = make_batches(rollout, case.results["log_probs"].logprobs + 0.5 * noise, None, count=1)
    options = OPTIONS | {"loss": loss}
    model = AutoModelForCausalLM.from_pretrained(case.checkpoint, dtype=torch.float32)
    engine = TorchTrain(model, build_tokenizer(), micro_batch_size=2, **options)
    expected = engine.step(batches[0])
    assert (expected.dual_clip_share > 0.01) == (loss.dual_clip is not None)
    assert expected.clip_share > 0.01 or loss.dual_clip is None
    for results in run_ranks(
        tmp_path,
        scenario="scores",
        parallel=LAYOUTS["data"],
        checkpoint=case.checkpoint,
        options=options,
        rollout=rollout,
        batches=batches,
    ):
        (step,) = results["steps"]
        assert step.loss == pytest.approx(expected.loss, abs=1e-4)
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert step.clip_share == pytest.approx(expected.clip_share, abs=0.01)
        assert step.dual_clip_share == pytest.approx(expected.dual_clip_share, abs=0.01)
        assert_weights(results["weights"], engine.weights(), atol=2e-4)


def test_infinity_stops_every_rank_and_changes_no_weight(ranks: Any) -> None:
    for results in ranks[1]:
        assert results["refused"] == ("loss", True)
        assert_weights(results["weights_after_refusal"], results["weights"], atol=0.0)


def test_a_saved_run_continues_bit_for_bit(ranks: Any, case: Case) -> None:
    for results in ranks[1]:
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


def test_an_untied_llama_with_scaled_rope(tmp_path: Path) -> None:
    checkpoint = tmp_path / "llama"
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16_384,
            rope_parameters=rope,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(checkpoint, max_shard_size="20KB")
    build_tokenizer().save_pretrained(checkpoint)
    assert (checkpoint / "model.safetensors.index.json").is_file()
    rollout = make_rollout(rows=4)
    engine = torch_engine(model)
    at_start = copy.deepcopy(engine.weights())
    expected = engine.log_probs(rollout)[0]
    batches = make_batches(rollout, expected.logprobs, engine.reference_log_probs(rollout), count=2)
    (first, *_) = run_ranks(
        tmp_path,
        scenario="scores",
        parallel=LAYOUTS["both"],
        checkpoint=checkpoint,
        options=OPTIONS,
        rollout=rollout,
        batches=batches,
    )
    assert_weights(first["weights_at_start"], at_start, atol=0.0)
    assert_near(first["log_probs"].logprobs, expected.logprobs, atol=1e-5)
    steps = [engine.step(batch) for batch in batches]
    assert first["steps"][1].loss == pytest.approx(steps[1].loss, abs=1e-4)
    assert_weights(first["weights"], engine.weights(), atol=2e-4)


def test_a_data_rank_without_rows_joins_the_step(case: Case, tmp_path: Path) -> None:
    batch = take_rows(case.batches[0], torch.tensor([2]))
    model = AutoModelForCausalLM.from_pretrained(case.checkpoint, local_files_only=True)
    engine = torch_engine(model)
    expected = engine.step(batch)
    for results in run_ranks(
        tmp_path,
        scenario="scores",
        parallel=LAYOUTS["data"],
        checkpoint=case.checkpoint,
        options=OPTIONS,
        rollout=batch.rollout,
        batches=[batch],
    ):
        assert results["steps"][0].loss == pytest.approx(expected.loss, abs=1e-5)
        assert_weights(results["weights"], engine.weights(), atol=2e-4)


@pytest.mark.parametrize("layout", ["one", "tensor"])
def test_bfloat16_log_probs_are_of_an_fp32_product(layout: str, case: Case, tmp_path: Path) -> None:
    for results in run_ranks(
        tmp_path,
        scenario="hidden",
        parallel=LAYOUTS[layout],
        checkpoint=case.checkpoint,
        options={**OPTIONS, "precision": torch.bfloat16},
        rollout=case.rollout,
    ):
        assert sum(len(token) for _, token, _, _ in results["seen"]) == int(case.rollout.response_mask.sum())
        for hidden, token, logprobs, entropies in results["seen"]:
            assert hidden.dtype == results["head"].dtype == torch.bfloat16
            log_p = (hidden.double() @ results["head"].double().T / OPTIONS["temperature"]).log_softmax(dim=-1)
            assert_near(logprobs.double(), log_p.gather(1, token[:, None])[:, 0], atol=1e-5)
            assert_near(entropies.double(), -(log_p.exp() * log_p).sum(dim=-1), atol=1e-5)


def test_bfloat16_keeps_weights_in_float32(case: Case, tmp_path: Path) -> None:
    options = {**OPTIONS, "precision": torch.bfloat16, "optimizer": OptimizerConfig(lr=1e-3, token_chunk=16)}
    (results,) = run_ranks(
        tmp_path,
        scenario="scores",
        parallel=ParallelConfig(),
        checkpoint=case.checkpoint,
        options=options,
        rollout=case.rollout,
        batches=[replace(batch) for batch in case.batches * 10],
    )
    gap = (results["log_probs"].logprobs - case.results["log_probs"].logprobs).abs()
    assert 1e-4 < gap.nanmean() < 0.1
    # 40 steps of at most 1e-3 add up in the float32 copy; each alone is lost in bfloat16's eight bits near 1.
    name = "model.norm.weight"
    start, end = results["weights_at_start"][name], results["weights"][name]
    assert start.dtype == end.dtype == torch.bfloat16
    assert torch.equal(start + 1e-3, start)
    assert not torch.equal(start, end)
