"""Dimensions of a model, from its config.json or a table of known models, and of a run's workload."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Dimensions:
    """A decoder with grouped-query attention and a gated MLP, or several of them as experts.

    mlp_size: columns of one MLP.
    experts, experts_per_token: MLPs in a layer, and those that a token goes through.
    tied: input and output embedding are the same weights.
    qk_norm: RMSNorm on queries and keys (Qwen3).
    qkv_bias: queries, keys and values have biases (Qwen2).
    post_norms: a layer has norms after attention and MLP, too, and all its norms are computed in fp32 (Gemma 3).
    max_positions: longest sequence that the model supports, in tokens.
    """

    layers: int
    hidden_size: int
    mlp_size: int
    query_heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    max_positions: int
    tied: bool
    qk_norm: bool = True
    qkv_bias: bool = False
    experts: int = 1
    experts_per_token: int = 1
    post_norms: bool = False

    @property
    def layer_parameters(self) -> int:
        """Parameters per layer."""
        attention = self.head_size * (2 * self.query_heads + 2 * self.key_heads) * self.hidden_size
        norms = 2 * self.hidden_size * (1 + self.post_norms) + 2 * self.head_size * self.qk_norm
        biases = self.head_size * (self.query_heads + 2 * self.key_heads) * self.qkv_bias
        router = self.hidden_size * self.experts * (self.experts > 1)
        return attention + biases + 3 * self.hidden_size * self.mlp_size * self.experts + router + norms

    @property
    def embedding_parameters(self) -> int:
        """Parameters of one embedding (input or output)."""
        return self.vocabulary * self.hidden_size

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden_size

    def kv_values(self, tensor: int) -> int:
        """Values per token in the KV cache of each of `tensor` GPUs."""
        return 2 * self.layers * max(1, self.key_heads // tensor) * self.head_size


@dataclass(frozen=True)
class Workload:
    """The run settings that checks and plan depend on, other than the cluster section.

    value_bytes: bytes per weight in the forward pass, 2 or 4; reference: whether a frozen copy is kept for the KL term;
    separate_attn: whether signals come from actor_attn; max_tokens: of a micro-batch, instead of micro_batch_size
        responses; tapped: whether signals come from actor_train's gradient steps; sampled_layers: layers from which
        actor_train reads signals, in its steps or in the pass over log-probs.
    """

    prompts_per_batch: int
    responses_per_prompt: int
    mini_batch_size: int
    micro_batch_size: int
    max_new_tokens: int
    token_chunk: int
    value_bytes: int
    steps: int
    reference: bool
    separate_attn: bool
    max_tokens: int | None = None
    tapped: bool = False
    sampled_layers: int = 0

    @property
    def batch_size(self) -> int:
        """Responses per training step."""
        return self.prompts_per_batch * self.responses_per_prompt


def _qwen3(layers: int, hidden: int, mlp: int, query_heads: int, *, tied: bool) -> Dimensions:
    return Dimensions(layers, hidden, mlp, query_heads, 8, 128, 151_936, 32_768, tied)


KNOWN: dict[str, Dimensions] = {
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 12_288, 32, tied=False),
    "qwen3-14b": _qwen3(40, 5120, 17_408, 40, tied=False),
    "qwen3-32b": _qwen3(64, 5120, 25_600, 64, tied=False),
}
"""Dense Qwen3 base models, for planning on a machine without the checkpoint."""


def read_dimensions(checkpoint: Path) -> Dimensions:
    """Read the dimensions from the config.json of a transformers checkpoint.

    Raises ValueError if the file is missing, lacks a number, or names a model type that the cluster's engines don't
    support.
    """
    path = checkpoint / "config.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: not a transformers checkpoint") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON") from error
    kind = values.get("model_type")
    if kind not in ("qwen3", "qwen3_moe", "qwen2", "llama", "gemma3_text"):
        raise ValueError(
            f"{path}: model_type is {kind!r}: the cluster's engines support qwen3, qwen3_moe, qwen2, llama and "
            "gemma3_text"
        )
    mixture = kind == "qwen3_moe"
    try:
        heads = int(values["num_attention_heads"])
        return Dimensions(
            layers=int(values["num_hidden_layers"]),
            hidden_size=int(values["hidden_size"]),
            mlp_size=int(values["moe_intermediate_size" if mixture else "intermediate_size"]),
            query_heads=heads,
            key_heads=int(values.get("num_key_value_heads") or heads),
            head_size=int(values.get("head_dim") or values["hidden_size"] // heads),
            vocabulary=int(values["vocab_size"]),
            max_positions=int(values["max_position_embeddings"]),
            tied=bool(values.get("tie_word_embeddings", kind in ("qwen3", "gemma3_text"))),
            qk_norm=kind in ("qwen3", "qwen3_moe", "gemma3_text"),
            qkv_bias=kind == "qwen2",
            experts=_experts(values) if mixture else 1,
            experts_per_token=int(values["num_experts_per_tok"]) if mixture else 1,
            post_norms=kind == "gemma3_text",
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]}") from error


def _experts(values: dict[str, Any]) -> int:
    """Under one of the names that transformers has written. Raises KeyError."""
    return int(values["num_experts"] if "num_experts" in values else values["num_local_experts"])
