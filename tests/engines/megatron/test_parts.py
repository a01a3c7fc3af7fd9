"""Parts of the Megatron engine that need no other ranks: weight recipes, shares of a batch, refusals."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rhythm.engines.interfaces import Rollout
from rhythm.engines.megatron.checkpoint import check_metadata, read_companions, write_weights
from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.engines.megatron.model import _transformer_config, read_config
from rhythm.engines.megatron.packing import pack
from rhythm.engines.megatron.parallel import Rendezvous, join
from rhythm.engines.megatron.weights import part_of, recipe, to_megatron, to_transformers
from rhythm.tap.megatron_layers import MicroBatch
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint

pytestmark = pytest.mark.cluster

LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
KEY_HEADS, GROUP, HEAD_SIZE, WIDTH = 4, 2, 3, 5
SHAPES = {
    "decoder.layers.7.self_attention.linear_qkv.weight": [
        (KEY_HEADS * GROUP * HEAD_SIZE, WIDTH),
        (KEY_HEADS * HEAD_SIZE, WIDTH),
        (KEY_HEADS * HEAD_SIZE, WIDTH),
    ],
    "decoder.layers.7.self_attention.linear_proj.weight": [(WIDTH, KEY_HEADS * GROUP * HEAD_SIZE)],
    "decoder.layers.7.mlp.linear_fc1.weight": [(8, WIDTH), (8, WIDTH)],
    "decoder.layers.7.mlp.linear_fc2.weight": [(WIDTH, 8)],
    "decoder.layers.7.input_layernorm.weight": [(WIDTH,)],
    "decoder.layers.7.self_attention.linear_qkv.bias": [
        (KEY_HEADS * GROUP * HEAD_SIZE,),
        (KEY_HEADS * HEAD_SIZE,),
        (KEY_HEADS * HEAD_SIZE,),
    ],
    "embedding.word_embeddings.weight": [(12, WIDTH)],
}


class Counted:
    """A slice of a safetensors file, and the values that were read of it."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.read = inner, 0

    def get_shape(self) -> list[int]:
        shape: list[int] = self.inner.get_shape()
        return shape

    def __getitem__(self, what: Any) -> torch.Tensor:
        part: torch.Tensor = self.inner[what]
        self.read += part.numel()
        return part


def of_rank(name: str, whole: list[torch.Tensor], ranks: int, rank: int) -> torch.Tensor:
    made = recipe(name)
    return to_megatron(made, [part_of(made, x, ranks, rank) for x in whole], KEY_HEADS // ranks)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_weights_come_back_as_they_went(name: str, ranks: int, tmp_path: Path) -> None:
    """A rank reads no more of the checkpoint than its parameter holds."""
    made = recipe(name)
    whole = [torch.randn(shape) for shape in SHAPES[name]]
    assert len(made.names) == len(whole)
    save_file(dict(zip(made.names, whole, strict=True)), tmp_path / "model.safetensors")
    parts = []
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        for rank in range(ranks):
            slices = [Counted(file.get_slice(name)) for name in made.names]
            read = [part_of(made, x, ranks, rank) for x in slices]
            parts.append(to_megatron(made, read, KEY_HEADS // ranks))
            assert sum(x.read for x in slices) == parts[-1].numel()
    assert sum(part.numel() for part in parts) == sum(x.numel() for x in whole) * (ranks if made.split == "none" else 1)
    back = to_transformers(made, parts, KEY_HEADS, HEAD_SIZE)
    assert all(torch.equal(x, y) for x, y in zip(whole, back, strict=True))


def test_a_rank_gets_whole_heads_and_the_same_columns_of_gate_and_up() -> None:
    q = torch.arange(KEY_HEADS * GROUP * HEAD_SIZE).float()[:, None]
    k, v = 100 + torch.arange(12.0)[:, None], 200 + torch.arange(12.0)[:, None]
    second = of_rank("decoder.layers.0.self_attention.linear_qkv.weight", [q, k, v], 4, 1)
    assert second[:, 0].tolist() == [6, 7, 8, 9, 10, 11, 103, 104, 105, 203, 204, 205]
    gate, up = torch.arange(4.0)[:, None], 10 + torch.arange(4.0)[:, None]
    second = of_rank("decoder.layers.0.mlp.linear_fc1.weight", [gate, up], 2, 1)
    assert second[:, 0].tolist() == [2, 3, 12, 13]


def test_names_are_those_of_the_checkpoint() -> None:
    assert recipe("decoder.layers.12.mlp.linear_fc1.weight").names == (
        "model.layers.12.mlp.gate_proj.weight",
        "model.layers.12.mlp.up_proj.weight",
    )
    # TransformerEngine's layers hold a norm with the matrix after it.
    fused = recipe("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight")
    assert fused == recipe("decoder.layers.3.input_layernorm.weight")
    assert recipe("decoder.layers.0.mlp.experts.local_experts.7.linear_fc1.weight").names == (
        "model.layers.0.mlp.experts.7.gate_proj.weight",
        "model.layers.0.mlp.experts.7.up_proj.weight",
    )
    assert recipe("decoder.layers.5.pre_mlp_layernorm.weight", post_norms=True).names == (
        "model.layers.5.pre_feedforward_layernorm.weight",
    )
    with pytest.raises(KeyError):
        recipe("decoder.layers.0.mlp.router.expert_bias")


def test_packed_rows_stand_one_after_the_other() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    mask = ids > 0
    rollout = Rollout(
        input_ids=ids,
        attention_mask=mask,
        response_mask=mask & (torch.arange(4) >= torch.tensor([[1], [3]])),
        prompt_lens=torch.tensor([1, 3]),
        group=torch.zeros(2, dtype=torch.long),
        logprobs=torch.zeros(2, 4),
        finished=torch.ones(2, dtype=torch.bool),
    )
    packed = pack(rollout, torch.tensor([1, 0]), torch.device("cpu"))
    assert packed.input_ids.tolist() == [8, 9, 10, 11, 5, 6, 7]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert packed.sequences.bounds.tolist() == [0, 4, 7]
    meta = torch.device("meta")
    plain, fused = (pack(rollout, torch.tensor([1, 0]), meta, fused_rope=fused).sequences for fused in (False, True))
    assert plain.cu_seqlens_q.tolist() == plain.cu_seqlens_kv.tolist() == [0, 4, 7]  # read in each layer: on the host
    assert {x.device for x in (plain.bounds, fused.bounds, fused.cu_seqlens_q, fused.cu_seqlens_kv)} == {meta}
    assert packed.predicts.tolist() == [2, 4, 5]
    assert packed.tokens.tolist() == [11, 6, 7]
    assert packed.micro == MicroBatch(rows=[1, 0], lens=[4, 3], prompt_lens=[3, 1])
    # Tensor ranks that split the tokens: the last row has padding, which nothing is read from.
    split = pack(rollout, torch.tensor([1, 0]), torch.device("cpu"), multiple=2)
    assert split.input_ids.tolist() == [8, 9, 10, 11, 5, 6, 7, 0]
    assert split.sequences.bounds.tolist() == [0, 4, 8]
    assert (split.predicts.tolist(), split.tokens.tolist()) == (packed.predicts.tolist(), packed.tokens.tolist())
    assert split.micro == MicroBatch(rows=[1, 0], lens=[4, 3], prompt_lens=[3, 1], first=[0, 4])
    assert pack(rollout, torch.tensor([1]), torch.device("cpu"), multiple=2).micro.first is None  # none needed


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_are_fused_where_torch_compile_has_a_gpu(device: str) -> None:
    groups = SimpleNamespace(device=torch.device(device))
    made = _transformer_config(Qwen3Config(head_dim=128), groups, ParallelConfig(), torch.bfloat16)  # type: ignore[arg-type]
    assert made.bias_activation_fusion == made.bias_dropout_fusion == (device == "cuda")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Qwen3Config(attention_bias=True), "attention_bias"),
        (Qwen3Config(hidden_act="gelu"), "hidden_act"),
        (LlamaConfig(mlp_bias=True), "mlp_bias"),
        (Qwen3MoeConfig(mlp_only_layers=[1]), "mlp_only_layers"),
        (Qwen3MoeConfig(decoder_sparse_step=2), "decoder_sparse_step"),
        (Gemma3TextConfig(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (Gemma3TextConfig(hidden_activation="gelu"), "hidden_activation"),
        (Gemma3TextConfig(rope_parameters={"sliding_attention": LINEAR_ROPE}), "rope_parameters"),
        (LlamaConfig(rope_parameters=LINEAR_ROPE), "rope_parameters"),
    ],
)
def test_models_it_cannot_train_are_refused(config: Any, named: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named):
        read_config(tmp_path)


def test_too_few_ranks_are_refused_before_they_meet() -> None:
    with pytest.raises(ValueError, match="tensor × pipeline × data × context is 1 × 1 × 2 × 3 = 6"):
        join(Rendezvous(0, 2, "127.0.0.1", 1), ParallelConfig(data=2, context=3))
    with pytest.raises(ValueError, match="tensor × pipeline × data is 2 × 2 × 1 = 4"):
        join(Rendezvous(0, 2, "127.0.0.1", 1), ParallelConfig(tensor=2, pipeline=2))


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize("what", [_Evil(), Metadata({"x": BytesStorageMetadata()})])
def test_metadata_that_would_run_code_is_refused(what: Any, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(what))
    with pytest.raises(pickle.UnpicklingError, match="which is not loaded"):
        check_metadata(tmp_path)


def test_the_pickled_object_that_a_file_replaces_is_named_in_metadata_only(tmp_path: Path) -> None:
    """Megatron 0.19 writes it; without the file it would be loaded, by torch's unpickler without checks."""
    described = Metadata({"common_state/shard_0_1": BytesStorageMetadata()})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(described))
    with pytest.raises(pickle.UnpicklingError, match="common_state/shard_0_1, which is not loaded"):
        check_metadata(tmp_path)
    (tmp_path / "common.pt").touch()
    check_metadata(tmp_path)


def test_weights_are_written_in_shards_that_load_again_though_their_source_is_gone(tmp_path: Path) -> None:
    source, directory = tmp_path / "source", tmp_path / "out"
    directory.mkdir()
    model = build_model(TinyModelConfig(layers=2, hidden_size=32, mlp_size=32), build_tokenizer())
    save_checkpoint(model, build_tokenizer(), source)
    (source / "state.json").write_text("{}")
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(source)
    companions = read_companions(source)
    shutil.rmtree(source)
    weights = {name: tensor + 1 for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    write_weights(directory, iter(weights.items()), companions, write=True, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    assert not (directory / "state.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in weights.items())
    assert AutoTokenizer.from_pretrained(directory, local_files_only=True)("1+1").input_ids
    assert GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id == [2, 7]
