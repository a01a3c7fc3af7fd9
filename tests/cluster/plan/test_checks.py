"""Dimensions of models, and plans that are refused before anything starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_workload import WORK
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.plan.checks import check, check_weights
from rhythm.cluster.plan.dimensions import KNOWN, read_dimensions


def cluster(**section: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"infer": {"gpu_memory_utilization": 0.5, "replicas": 8}, **section})


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "max_position_embeddings": 77,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("config", "model"),
    [
        (Qwen3Config, Qwen3ForCausalLM),
        (Qwen3MoeConfig, Qwen3MoeForCausalLM),
        (Qwen2Config, Qwen2ForCausalLM),
        (LlamaConfig, LlamaForCausalLM),
        (Gemma3TextConfig, Gemma3ForCausalLM),
    ],
)
def test_parameters_are_those_that_transformers_makes(config: Any, model: Any, tied: bool, tmp_path: Path) -> None:
    made = config(**SIZES, tie_word_embeddings=tied)
    made.save_pretrained(tmp_path)
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in model(made).parameters())
    dimensions = read_dimensions(tmp_path)
    assert dimensions.parameters == expected
    assert (dimensions.layers, dimensions.query_heads, dimensions.key_heads, dimensions.head_size) == (3, 4, 2, 16)
    assert (dimensions.max_positions, dimensions.tied) == (77, tied)
    assert dimensions.kv_values(1) == 2 * 3 * 2 * 16
    assert dimensions.kv_values(2) == 2 * 3 * 1 * 16
    assert dimensions.kv_values(4) == 2 * 3 * 1 * 16  # key heads are copied, not split further


def test_known_models_have_the_parameters_of_their_model_cards() -> None:
    billions = {name: round(model.parameters / 1e9, 1) for name, model in KNOWN.items()}
    assert billions == {
        "qwen3-0.6b": 0.6,
        "qwen3-1.7b": 1.7,
        "qwen3-4b": 4.0,
        "qwen3-8b": 8.2,
        "qwen3-14b": 14.8,
        "qwen3-32b": 32.8,
    }


def test_what_no_engine_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        read_dimensions(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_dimensions(tmp_path)
    path.write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type is 'gpt2': the cluster's engines support qwen3, qwen3_moe, qwen2"):
        read_dimensions(tmp_path)
    path.write_text(json.dumps({"model_type": "qwen3", "num_attention_heads": 4}))
    with pytest.raises(ValueError, match="lacks num_hidden_layers"):
        read_dimensions(tmp_path)


@pytest.mark.parametrize(
    ("section", "work", "message"),
    [
        (
            {"train": {"tensor": 2, "data": 4, "sequence_parallel": False}},
            {},
            r"cluster\.train\.sequence_parallel is false: must be true for a model with experts",
        ),
        (
            {"train": {"engine": "torch"}, "gpus": 1},
            {},
            r"cluster\.train\.engine is torch: must be megatron for a model",
        ),
        (
            {"infer": {"engine": "transformers"}},
            {},
            r"cluster\.infer\.engine is transformers: must be vllm for a model",
        ),
        ({}, {"separate_attn": True}, r"signals\.source is separate: must be inline or training for a model"),
    ],
)
def test_what_no_engine_does_with_experts_is_refused(
    section: dict[str, Any], work: dict[str, Any], message: str
) -> None:
    model = replace(KNOWN["qwen3-0.6b"], experts=4, experts_per_token=2)
    with pytest.raises(ValueError, match=message):
        check(cluster(**section), replace(WORK, **work), model)


def test_gemma3_has_layers_of_one_kind() -> None:
    model = replace(KNOWN["qwen3-0.6b"], post_norms=True)
    check(cluster(train={"data": 8}), WORK, model)
    with pytest.raises(ValueError, match=r"cluster\.train\.layer_spec is transformer_engine: must be local"):
        check(cluster(train={"data": 8, "layer_spec": "transformer_engine"}), WORK, model)


def test_the_papers_run_passes() -> None:
    check(cluster(train={"data": 8}), WORK, KNOWN["qwen3-4b"])


@pytest.mark.parametrize(
    ("section", "work", "message"),
    [
        ({"train": {"tensor": 8, "pipeline": 1}}, {}, None),
        (
            {"train": {"tensor": 16}, "gpus": 16},
            {},
            r"cluster\.train\.tensor is 16: must divide the model's 8 key heads",
        ),
        ({"train": {"pipeline": 8}}, {}, r"cluster\.train\.pipeline is 8: must divide the model's 36 layers"),
        (
            {"train": {"data": 8}, "infer": {"tensor_parallel_size": 3, "gpu_memory_utilization": 0.5}},
            {},
            r"cluster\.infer\.tensor_parallel_size is 3: must divide the model's 32 query heads",
        ),
        (
            {"train": {"data": 8}},
            {"micro_batch_size": 8},
            r"batch\.mini_batch_size is 32: must be a multiple of .* = 8 × 8 = 64",
        ),
        (
            {"train": {"data": 8}},
            {"prompts_per_batch": 60},
            r"batch\.prompts_per_batch is 60: must be a multiple of cluster\.infer\.replicas = 8",
        ),
        ({"train": {"data": 8}}, {"micro_batch_size": 8, "max_tokens": 8192}, None),  # no rows that must divide
        (
            {"train": {"data": 8}},
            {"max_tokens": 896},
            r"batch\.max_tokens is 896: must be at least 897, the shortest prompt and the longest response",
        ),
        ({"train": {"data": 8}}, {"max_tokens": 897}, None),
        (
            {"train": {"data": 8}},
            {"max_tokens": 1 << 20},
            r"actor_train needs .* or lower batch\.max_tokens$",
        ),
        ({"max_length": 40_000, "train": {"data": 8}}, {}, r"cluster\.max_length is 40000: .* is 32768"),
        (
            {"train": {"data": 8}},
            {"max_new_tokens": 1024},
            r"sampling\.max_new_tokens is 1024: must leave room for a prompt in cluster\.max_length = 1024",
        ),
        ({"gpus": 4, "train": {"data": 8}}, {}, r"cluster\.gpus is 4: too few"),
        (
            {"gpus": 0, "infer": {"kv_cache_gib": 1}, "train": {"layer_spec": "transformer_engine"}},
            {},
            r"cluster\.train\.layer_spec is transformer_engine: it needs GPUs",
        ),
        (
            {"gpus": 0, "infer": {"kv_cache_gib": 1, "tensor_parallel_size": 2}},
            {},
            r"cluster\.infer\.tensor_parallel_size is more than 1: it needs GPUs",
        ),
        ({"train": {"data": 8}, "gpu_memory_gib": 24}, {}, r"cluster\.gpu_memory_gib is 24: actor_train needs"),
        (
            {"train": {"data": 8}, "infer": {"gpu_memory_utilization": 0.9}},
            {},
            r"gpu_memory_utilization is 0\.9: during generate actor_train keeps .* actor_infer 72\.0 GiB, tog",
        ),
        ({"train": {"data": 8, "offload": True}, "infer": {"gpu_memory_utilization": 0.9}}, {}, None),
        (
            {"train": {"data": 8}, "infer": {"gpu_memory_utilization": 0.09}},
            {},
            r"cluster\.infer\.gpu_memory_utilization is 0\.09: 0\.0 MiB are left for the KV cache, 0 tokens",
        ),
    ],
)
def test_bad_layouts_name_their_keys(section: dict[str, Any], work: dict[str, Any], message: str | None) -> None:
    config, asked = cluster(**section), replace(WORK, **work)
    if message is None:
        check(config, asked, KNOWN["qwen3-4b"])
        return
    with pytest.raises(ValueError, match=message):
        check(config, asked, KNOWN["qwen3-4b"])


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="pipeline") as caught:
        check(cluster(train={"pipeline": 8}, max_length=50_000), WORK, KNOWN["qwen3-4b"])
    assert len(str(caught.value).splitlines()) == 2


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path is .*: no weights \(\*\.safetensors\) in it$"):
        check_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"\*\.bin files are pickles, which are not loaded"):
        check_weights(tmp_path)
    (tmp_path / "model-1.safetensors").touch()
    check_weights(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weights are missing: model-2\.safetensors"):
        check_weights(tmp_path)
