"""The Megatron engine on real ranks with other objectives, another family, a rank without rows, and bfloat16.

Differences allowed are as in test_ranks.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_case import (
    LAYOUTS,
    OPTIONS,
    TAP,
    Case,
    assert_near,
    assert_weights,
    make_batches,
    make_rollout,
    run_ranks,
    torch_engine,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rhythm.credit.loss import LossConfig
from rhythm.engines.batches import take_rows
from rhythm.engines.local.train import OptimizerConfig, TorchTrain
from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.tap.observe import observe
from rhythm.tiny.model import build_tokenizer

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]


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
    assert_it_follows_one_machine(model, checkpoint, tmp_path)
    assert (checkpoint / "model.safetensors.index.json").is_file()


def test_a_qwen2_with_biases_of_queries_keys_and_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=100, **sizes, num_key_value_heads=2, initializer_range=0.2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "qwen2")
    assert_it_follows_one_machine(model, tmp_path / "qwen2", tmp_path)


@pytest.mark.parametrize(
    ("norm_topk_prob", "layout"),
    [
        (True, ParallelConfig(pipeline=2, data=2)),
        (False, ParallelConfig(data=2, context=2)),
        (True, ParallelConfig(tensor=2, data=2)),
    ],
)
def test_a_qwen3_with_experts(tmp_path: Path, norm_topk_prob: bool, layout: ParallelConfig) -> None:
    """Two of its four experts to a token, by weights that add up to 1 or don't; each expert on all ranks or split."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 99, "moe_intermediate_size": 24, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": norm_topk_prob}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=100, **sizes, **heads, **experts, initializer_range=0.2))
    model.save_pretrained(tmp_path / "qwen3_moe")
    assert_it_follows_one_machine(model, tmp_path / "qwen3_moe", tmp_path, layout)


@pytest.mark.parametrize(
    "layout", [LAYOUTS["both"], ParallelConfig(context=2, recompute=True)], ids=["both", "context"]
)
def test_a_gemma3(tmp_path: Path, layout: ParallelConfig) -> None:
    """Windows of 8 tokens in rows of up to 40, two ropes, and its signals."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "query_pre_attn_scalar": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
    }
    windows = {"layer_types": kinds, "sliding_window": 8, "rope_parameters": ropes}
    config = Gemma3TextConfig(vocab_size=100, **sizes, **heads, **windows, initializer_range=0.2)
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "gemma3")
    rollout = make_rollout(rows=4)
    tap = TAP.model_copy(update={"layers": (1, 2)})
    prompts = {"attention_mask": rollout.attention_mask, "prompt_lens": rollout.prompt_lens}
    signals = observe(model, rollout.input_ids, **prompts, signals=tap)
    found = assert_it_follows_one_machine(model, tmp_path / "gemma3", tmp_path, layout, tap=tap)["signals"]
    assert torch.equal(found.groups.local, signals.groups.local)
    assert torch.equal(found.groups.global_, signals.groups.global_)
    assert_near(found.waad, signals.waad, atol=1e-4)
    assert_near(found.fai, signals.fai, atol=1e-5)
    (first, *_) = run_ranks(
        tmp_path,
        scenario="saved_at_start",
        parallel=layout,
        checkpoint=tmp_path / "gemma3",
        options=OPTIONS,
        batches=make_batches(rollout, *torch.zeros(2, *rollout.input_ids.shape), count=1),
        save_to=str(tmp_path / "saved"),
    )
    assert not torch.equal(first["weights"]["model.norm.weight"], first["weights_at_start"]["model.norm.weight"])
    assert_weights(first["weights_again"], first["weights"], atol=0.0)


def of_checkpoint(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Its weights as a checkpoint has them, which names each expert's."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_it_follows_one_machine(
    model: Any, checkpoint: Path, tmp_path: Path, layout: ParallelConfig = LAYOUTS["both"], **spec: Any
) -> dict[str, Any]:
    """Two steps, by default on two tensor ranks in each of two stages; the results of the first rank."""
    build_tokenizer().save_pretrained(checkpoint)
    rollout = make_rollout(rows=4)
    engine = torch_engine(model)
    at_start = of_checkpoint(model, tmp_path / "at_start")
    expected = engine.log_probs(rollout)[0]
    batches = make_batches(rollout, expected.logprobs, engine.reference_log_probs(rollout), count=2)
    (first, *_) = run_ranks(
        tmp_path,
        scenario="scores",
        parallel=layout,
        checkpoint=checkpoint,
        options=OPTIONS,
        rollout=rollout,
        batches=batches,
        **spec,
    )
    assert_weights(first["weights_at_start"], at_start, atol=0.0)
    assert_near(first["log_probs"].logprobs, expected.logprobs, atol=1e-5)
    steps = [engine.step(batch) for batch in batches]
    assert first["steps"][0].grad_norm == pytest.approx(steps[0].grad_norm, rel=1e-5)
    assert first["steps"][1].loss == pytest.approx(steps[1].loss, abs=1e-4)
    assert_weights(first["weights"], of_checkpoint(model, tmp_path / "after"), atol=2e-4)
    return first


@pytest.mark.parametrize("layout", ["one", "data"])
def test_what_is_saved_before_the_first_step_is_no_step(case: Case, tmp_path: Path, layout: str) -> None:
    """As by Ctrl-C, with each rank's own optimizer, and with one whose state the ranks share."""
    engine = torch_engine(AutoModelForCausalLM.from_pretrained(case.checkpoint, dtype=torch.float32))
    engine.step(case.batches[0])
    for results in run_ranks(
        tmp_path,
        scenario="saved_at_start",
        parallel=LAYOUTS[layout],
        checkpoint=case.checkpoint,
        options=OPTIONS,
        rollout=case.rollout,
        batches=case.batches[:1],
        save_to=str(tmp_path / "saved"),
    ):
        assert_weights(results["weights_saved"], results["weights_at_start"], atol=0.0)
        assert_weights(results["weights"], engine.weights(), atol=2e-4)
        assert_weights(results["weights_again"], results["weights"], atol=0.0)
    # Of any release of Megatron: what is not a tensor is in a file that is loaded without unpickling objects.
    common = torch.load(tmp_path / "saved" / "megatron" / "common.pt", weights_only=True)
    assert common["gradient_steps"] == 0
    assert "optimizer" in common


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
