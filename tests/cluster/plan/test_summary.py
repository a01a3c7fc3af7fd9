"""The plans of the shipped configurations, against hand-computed numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rhythm.cli.config_file import load_config
from rhythm.cli.train import main
from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.plan.activations import Activations, saved_per_token
from rhythm.cluster.plan.dimensions import KNOWN, Dimensions, Workload
from rhythm.cluster.plan.memory import (
    InferMemory,
    TrainMemory,
    checkpoint_bytes,
    infer_memory,
    train_memory,
)
from rhythm.cluster.plan.summary import push_kind
from rhythm.cluster.plan.timeline import peak
from rhythm.trainer.cluster_engines import plan, workload

CONFIGS = Path(__file__).parents[3] / "configs"

SMALL = Dimensions(
    layers=4,
    hidden_size=8,
    mlp_size=16,
    query_heads=4,
    key_heads=2,
    head_size=4,
    vocabulary=10,
    max_positions=64,
    tied=False,
    qk_norm=False,
)
WORK = Workload(
    prompts_per_batch=4,
    responses_per_prompt=4,
    mini_batch_size=8,
    micro_batch_size=2,
    max_new_tokens=8,
    token_chunk=16,
    value_bytes=2,
    steps=3,
    reference=True,
    separate_attn=True,
)


def test_memory_of_a_small_model_by_hand() -> None:
    # A layer: 4 + 4 heads for Q and O, 2 + 2 for K and V, of 4 × 8 each; three MLP matrices of 8 × 16; two norms of 8.
    assert SMALL.layer_parameters == (2 * 4 + 2 * 2) * 4 * 8 + 3 * 8 * 16 + 2 * 8 == 784
    assert SMALL.parameters == 4 * 784 + 2 * 80 + 8
    cluster = ClusterConfig.model_validate(
        {
            "gpus": 8,
            "placement": "separate",
            "max_length": 32,
            "train": {"tensor": 2, "pipeline": 2, "recompute": True},
            "infer": {"tensor_parallel_size": 2, "kv_cache_gib": 1},
        }
    )
    # Two ranks share two layers and one of the two embeddings: (2 · 784 + 80) / 2.
    assert train_memory(cluster, WORK, SMALL) == TrainMemory(
        weights=824 * 2,
        gradients=824 * 4,
        optimizer=824 * 12,
        reference=824 * 2,
        activations=Activations(
            # Two layers' inputs of 2 · 32 tokens, which two tensor ranks split, of two micro-batches in flight.
            kept=2 * 8 * 32 * 2 * 2,
            gathered=64 * 8 * 2,
            # A layer keeps 4 · 8 values at full width of half the tokens, (18 · 4 + 5 · 16) / 2 of the ranks' parts
            # and 4 · 4 cosines and sines, and in fp32 two scales of half the tokens and two heads' log-sum-exps. Its
            # backward pass takes two gradients of the MLP's width and one of the layer's.
            layer=(2 * (2 * 8 + 8 + 16 + 76 + 16) + 4 * 3) * 64,
            # Logits and their gradients of 16 tokens × 10 entries / 2 ranks; their part of the head's gradient twice in
            # fp32 and once in bfloat16; hidden states and gradients.
            head=(4 + 2) * 16 * 5 + (2 * 4 + 2) * 5 * 8 + 64 * 8 * (3 * 2 + 4),
            head_gradient=0,
            end=5 * 8 * 2,
            scores=64 * 2 * (5 * 8 + 8 + 3 * 4),
            statistics=0,
            update=824 * 4,
            tapped=False,
        ),
    )
    memory = infer_memory(cluster, WORK, SMALL)
    assert memory == InferMemory(weights=3304, kv_cache=2**30, token=2 * 4 * 1 * 4 * 2)
    assert memory.tokens == 2**30 // 64
    # In bfloat16: for transformers 2, Megatron's 2, and the optimizer's three times 4; the torch engine: three times 4.
    assert checkpoint_bytes(cluster, WORK, SMALL) == 3304 * (2 + 2 + 12)
    torch_engine = ClusterConfig.model_validate({"gpus": 8, "train": {"engine": "torch"}})
    assert checkpoint_bytes(torch_engine, WORK, SMALL) == 3304 * 12


def test_gemma3s_norms_keep_their_inputs_in_fp32() -> None:
    plain = replace(SMALL, qk_norm=True)
    gemma = replace(plain, post_norms=True)
    assert gemma.layer_parameters - plain.layer_parameters == 2 * 8
    # At full width four inputs in fp32 and two outputs instead of two of each in bfloat16; four queries and two keys of
    # 4 in fp32 instead of the queries in bfloat16; and two scales more.
    wide, heads, scales = (4 * 4 + 2 * 2 - 4 * 2) * 8, 4 * (4 + 2) * 4 - 2 * 4 * 4, 2 * 4
    assert saved_per_token(gemma, 1, 2) - saved_per_token(plain, 1, 2) == wide + heads + scales
    # Of two ranks, which split the tokens between a layer's matrices.
    halves = saved_per_token(gemma, 2, 2, share=2) - saved_per_token(plain, 2, 2, share=2)
    assert halves == (wide + heads + scales) / 2


def test_context_parallel_ranks_split_tokens_and_optimizer() -> None:
    def memory(**train: int) -> TrainMemory:
        section = {"gpus": 0, "max_length": 32, "train": train, "infer": {"kv_cache_gib": 1}}
        return train_memory(ClusterConfig.model_validate(section), replace(WORK, sampled_layers=3), SMALL)

    one, two = memory(), memory(context=2)
    assert two.weights == one.weights
    assert two.optimizer == memory(data=2).optimizer == one.optimizer // 2
    assert two.activations.update == one.activations.update // 2
    assert two.activations.statistics == one.activations.statistics > 0  # parts of those of all tokens
    # 32 of 64 tokens. Of each a layer keeps 4 · 8 values at full width, 18 heads as one rank does, the output once more
    # (4 heads), and for its own keys (2 heads) five keys and values for two tokens (2 · 5), 5 · 16 values of the MLP,
    # 4 · 4 cosines and sines, and in fp32 two scales and four log-sum-exps.
    assert two.activations.kept == 4 * 32 * (2 * (4 * 8 + (18 + 4 - 2 + 2 * 5) * 4 + 5 * 16 + 4 * 4) + 4 * 6)
    # Gradients of keys and values (2 · 2 heads) of both ranks, twice.
    assert two.activations.layer == 32 * 2 * (2 * 16 + 8 + 2 * 2 * (2 * 2 * 4))


def test_a_budget_of_tokens_sets_the_activations() -> None:
    cluster = ClusterConfig.model_validate({"gpus": 8, "max_length": 32, "train": {"data": 4}})
    by_rows = train_memory(cluster, replace(WORK, micro_batch_size=3), SMALL).activations
    assert train_memory(cluster, replace(WORK, max_tokens=96), SMALL).activations == by_rows
    assert train_memory(cluster, replace(WORK, max_tokens=97), SMALL).activations.gradients > by_rows.gradients


def test_statistics_are_kept_of_a_whole_pass_or_of_a_micro_batch() -> None:
    cluster = ClusterConfig.model_validate({"gpus": 8, "max_length": 32, "train": {"data": 4, "tensor": 2}})
    work = replace(WORK, sampled_layers=3)
    inline = train_memory(cluster, work, SMALL).activations
    # Three layers of four heads, half of them per rank; 16 responses of 32 tokens on four data ranks.
    assert inline.statistics == 8 * 6 * 4 * 32
    assert inline.log_probs == inline.scores + inline.statistics
    tapped = train_memory(cluster, replace(work, tapped=True), SMALL).activations
    assert tapped.statistics == 8 * 6 * 2 * 32
    assert tapped.log_probs == inline.scores
    assert tapped.gradients == inline.gradients + tapped.statistics
    assert train_memory(cluster, replace(work, sampled_layers=9), SMALL).activations.statistics == 8 * 8 * 4 * 32


def test_a_tied_head_keeps_its_gradient_to_the_end() -> None:
    cluster = ClusterConfig.model_validate({"gpus": 8, "max_length": 32, "train": {"data": 8}})
    own = train_memory(cluster, WORK, SMALL).activations
    tied = train_memory(cluster, WORK, replace(SMALL, tied=True)).activations
    assert (own.head_gradient, own.end) == (0, 2 * 80)
    assert (tied.head_gradient, tied.end) == (2 * 80, 3 * 2 * 80)
    assert tied.kept == own.kept


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ([], 5),
        (["signals.layers=3"], 3),
        (["signals.layers=[2, 9]"], 2),
        (["signals.layers=all"], 36),
        (["credit.strategy=entropy"], 0),
        (["signals.source=separate"], 0),
    ],
)
def test_the_plan_knows_which_layers_are_read(changes: list[str], layers: int) -> None:
    config = load_config(CONFIGS / "qwen3_4b_countdown_1k.yaml", changes)
    assert config.cluster is not None
    memory = train_memory(config.cluster, workload(config, KNOWN["qwen3-4b"]), KNOWN["qwen3-4b"])
    assert memory.activations.statistics == layers * 32 * 8 * 64 * 1024


def test_float32_needs_no_copy_in_the_optimizer_and_data_ranks_share_it() -> None:
    both = {"gpus": 8, "train": {"data": 4}}
    shared = ClusterConfig.model_validate(both)
    own = ClusterConfig.model_validate({**both, "train": {"data": 4, "distributed_optimizer": False}})
    model = KNOWN["qwen3-4b"]
    assert train_memory(own, WORK, model).optimizer == 4 * train_memory(shared, WORK, model).optimizer


def test_the_way_of_weights_follows_the_placement() -> None:
    def kind(**section: object) -> str:
        return push_kind(ClusterConfig.model_validate(section))

    assert kind() == "ipc"
    assert kind(placement="separate") == "nccl"
    assert kind(gpus=0, infer={"kv_cache_gib": 1}) == "shared_memory"
    assert kind(infer={"engine": "transformers"}) == "shared_memory"
    others = {"gpus": 16, "nodes": 2, "ray_address": "10.0.0.1:6379", "bind_address": "10.0.0.1"}
    assert kind(infer={"engine": "transformers"}, **others) == "object_store"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "qwen3_4b_countdown_1k",
            [
                "model         4.02 B parameters, 36 layers, 32 query and 8 key heads of 128 (known by name",
                "actor_train   megatron, tensor 1 × pipeline 1 × data 8 = 8 ranks on node 0 GPUs 0–7",
                "actor_infer   vllm, 8 replicas × tensor 1 on node 0 GPUs 0–7",
                "actor_attn    inline",
                "weights 7.5 GiB, gradients 15.0 GiB, optimizer 5.6 GiB, activations ~22.7 GiB",
                "; log-probs ~0.5 GiB, optimizer's step ~1.9 GiB",
                "in turns, at most 68.1 GiB of 80 GiB, during generate",
                "log_probs 28.6 GiB + 0.0 MiB",
                "step 50.8 GiB + 0.0 MiB",
                "start_push 28.1 GiB + 7.5 GiB",
                "512 / 32 = 16 gradient steps, each 8 data ranks × 1 micro-batches × 4 responses",
                "500 steps, 8,000 gradient steps",
                "by ipc: 7.5 GiB in buckets of 1024 MiB",
                "\n  memory        actor_train 50.8 GiB per GPU: weights",
                "\n                actor_infer 40.0 GiB: weights",
                "\n  checkpoint    59.9 GiB on disk each",
            ],
        ),
        (
            "qwen3_8b_math_1k",
            [
                "model         8.19 B parameters",
                "actor_train   megatron, tensor 2 × pipeline 1 × data 8 = 16 ranks on node 0 GPUs 0–7, node 1 GPUs 0–7",
                "actor_infer   vllm, 16 replicas × tensor 1 on node 0 GPUs 0–7, node 1 GPUs 0–7",
                "in turns, at most 68.6 GiB of 80 GiB, during generate",
                "512 / 32 = 16 gradient steps, each 8 data ranks × 1 micro-batches × 4 responses",
                "600 steps, 9,600 gradient steps",
                "by ipc: 15.3 GiB in buckets of 2048 MiB",
            ],
        ),
        (
            "qwen3_4b_math_8k",
            [
                "activations ~6.6 GiB; log-probs ~2.4 GiB, optimizer's step ~1.9 GiB",
                "each 8 data ranks × as few micro-batches as 16,384 tokens in each allow",
                "up to 4,194,304 tokens per step, 500 steps",
            ],
        ),
        (
            "countdown_cluster_cpu",
            [
                "megatron, tensor 2 × pipeline 1 × data 1 = 2 ranks on CPUs",
                "vllm, 1 replica × tensor 1 on CPUs",
                "by shared_memory",
            ],
        ),
    ],
)
def test_the_plans_of_the_shipped_configurations(name: str, lines: list[str]) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.cluster is not None
    shown = plan(config, config.cluster)
    for line in lines:
        assert line in shown, line


PAPER = {
    # model, task, longest prompt and response, GPUs, steps
    "qwen3_4b_countdown_1k": ("Qwen3-4B-Base", "countdown", 1024, 8, 500),
    "qwen3_4b_qa_1k": ("Qwen3-4B-Base", "crossthink_qa", 1024, 8, 500),
    "qwen3_4b_math_1k": ("Qwen3-4B-Base", "dapo_math_17k", 1024, 8, 500),
    "qwen3_4b_math_8k": ("Qwen3-4B-Base", "dapo_math_17k", 8192, 8, 500),
    "qwen3_8b_qa_1k": ("Qwen3-8B-Base", "crossthink_qa", 1024, 16, 600),
    "qwen3_8b_math_1k": ("Qwen3-8B-Base", "dapo_math_17k", 1024, 16, 600),
}


def test_every_large_configuration_is_listed() -> None:
    assert {path.stem for path in CONFIGS.glob("qwen3_*.yaml")} == PAPER.keys()
    guide = (CONFIGS.parent / "docs" / "cluster.md").read_text(encoding="utf-8")
    for name in PAPER:
        assert f"rhythm-train configs/{name}.yaml --dry-run" in guide


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    model, task, length, gpus, steps = PAPER[name]
    assert config.cluster is not None
    assert (str(config.model.path), config.task.name, config.steps) == (model, task, steps)
    assert (config.cluster.max_length, config.cluster.gpus) == (length, gpus)
    assert (config.batch.batch_size, config.batch.mini_batch_size, config.batch.gradient_steps) == (512, 32, 16)
    assert config.optimizer.lr == 1e-6
    assert config.sampling.temperature == 1
    assert (config.loss.kl_coef, config.loss.entropy_coef) == (0, 0)
    assert (config.credit.strategy, config.credit.top_fraction) == ("coupled", 0.4)
    assert (config.signals.window, config.signals.horizon) == (10, (10, 50))
    evaluated = {each.name: each.samples for each in config.evaluation.tasks}
    math = {"aime24": 16, "aime25": 16, "amc23": None, "math500": None, "olympiadbench": None}
    assert evaluated == (math if task == "dapo_math_17k" else {})


@pytest.mark.parametrize("name", PAPER)
def test_a_large_run_is_planned_without_its_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With room for CUDA's contexts, about 2 GiB in each of two processes, and no GPU left idle."""
    monkeypatch.chdir(tmp_path)
    assert main([str(CONFIGS / f"{name}.yaml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "known by name: there is no directory" in shown
    assert "\n#                 generate 28." in shown  # the timeline
    assert " idle " not in shown
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.cluster is not None
    model = KNOWN[PAPER[name][0].lower().removesuffix("-base")]
    most = peak(config.cluster, workload(config, model), model)
    assert most.total < (config.cluster.gpu_memory_gib - 2 * 2) * 2**30


def test_the_dry_run_prints_the_plan_or_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / "qwen3_4b_countdown_1k.yaml")
    assert main([path, "--dry-run"]) == 0
    assert "#   actor_infer   vllm, 8 replicas" in capsys.readouterr().out
    assert main([path, "batch.max_tokens=4096", "signals.source=training", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "actor_attn    inline: statistics tapped in actor_train's gradient steps" in shown
    assert "each 8 data ranks × as few micro-batches as 4,096 tokens in each allow" in shown
    halves = ("cluster.placement=separate", "cluster.infer.replicas=4", "cluster.train.data=4")
    ahead = ("cluster.rollout_ahead=1", "cluster.parity.every_steps=20", "correction.mode=token_truncate")
    assert main([path, *halves, *ahead, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "generated while the step before trains, with weights one version older, but for the first" in shown
    assert main([path, "cluster.train.tensor=3", "--dry-run"]) == 2
    assert "cluster.train.tensor is 3: must divide the model's 32 query heads" in capsys.readouterr().err
    assert main([path, "model.path=elsewhere", "--dry-run"]) == 2
    assert (
        "model.path is elsewhere: no such directory, and its name is not one of qwen3-0.6b" in capsys.readouterr().err
    )
