"""Builds a Megatron GPTModel for a transformers checkpoint of Qwen3 (dense, or with experts), Qwen2, 2.5, Llama or
Gemma 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor
from torch.nn.functional import silu
from transformers import AutoConfig

from rhythm.checkpoints import loading_options
from rhythm.engines.megatron import gemma
from rhythm.engines.megatron.core_attention import PackedAttention
from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.engines.megatron.norm import RMSNorm
from rhythm.engines.megatron.parallel import Groups

# Constants in Megatron's scaled RoPE; checkpoints with other values are not supported.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_config(checkpoint: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a transformers checkpoint. Raises ValueError for a model that this engine can't train."""
    config = AutoConfig.from_pretrained(checkpoint, **loading_options(trust_remote_code))
    if config.model_type not in ("qwen3", "qwen3_moe", "qwen2", "llama", "gemma3_text"):
        raise ValueError(
            f"model_type is {config.model_type!r}: Megatron is set up for qwen3, qwen3_moe, qwen2, llama and "
            "gemma3_text"
        )
    family = gemma.unsupported(config) if gemma.is_gemma(config) else _unsupported(config)
    unsupported = {
        **family,
        "attention_bias": bool(getattr(config, "attention_bias", False)),
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "attention_dropout": bool(getattr(config, "attention_dropout", 0.0)),
    }
    for name, wrong in unsupported.items():
        if wrong:
            raise ValueError(
                f"the checkpoint's {name} is {getattr(config, name)!r}, which Megatron's layers don't have"
            )
    return config


def _unsupported(config: Any) -> dict[str, bool]:
    return {
        "hidden_act": config.hidden_act != "silu",
        "use_sliding_window": bool(getattr(config, "use_sliding_window", False)),
        "rope_parameters": not _rope_is_known(config.rope_parameters),
        # Of a model with experts: layers without them.
        "mlp_only_layers": bool(getattr(config, "mlp_only_layers", None)),
        "decoder_sparse_step": getattr(config, "decoder_sparse_step", 1) != 1,
    }


def head_size(config: Any) -> int:
    """Size of an attention head: not all configurations name it."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class PolicyModel(GPTModel):  # type: ignore[misc]
    """A GPTModel whose last stage returns hidden states [T, 1, D]; the caller computes the logits, in chunks."""

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        if not (self.post_process and self.config.sequence_parallel):
            return hidden_states
        # The head has summed their gradient over the tensor ranks: each takes that of its own tokens.
        whole: Tensor = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        return whole

    def head_weight(self) -> Tensor:
        """This rank's part of the output embedding, [V / tensor ranks, D]; on the last stage only.

        The output layer itself is not used, because it rounds logits to the dtype of its weights.
        """
        weight: Tensor = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return weight


def build_model(config: Any, groups: Groups, parallel: ParallelConfig, dtype: torch.dtype) -> PolicyModel:
    """This rank's part of the model, with parameters in `dtype` on the rank's device. Its weights are not loaded
    yet.

    Raises ValueError for a Gemma 3 of TransformerEngine's layers.
    """
    if gemma.is_gemma(config) and parallel.layer_spec != "local":
        raise ValueError(f"layer_spec is {parallel.layer_spec}: must be local for gemma3_text")
    transformer = _transformer_config(config, groups, parallel, dtype)
    model = PolicyModel(
        config=transformer,
        transformer_layer_spec=_layers(config, transformer, parallel),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        pre_process=groups.first_stage,
        post_process=groups.last_stage,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        position_embedding_type="rope",
        **(gemma.rope_options(config) if gemma.is_gemma(config) else _rope_options(config)),
    )
    if gemma.is_gemma(config):
        gemma.adapt_model(model, config)
    placed: PolicyModel = model.to(groups.device, dtype)
    return placed


def _transformer_config(config: Any, groups: Groups, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    on_gpu = groups.device.type == "cuda"
    family = gemma.transformer_options(config) if gemma.is_gemma(config) else {"activation_func": silu}
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=head_size(config),
        layernorm_epsilon=config.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=_has_qk_norm(config),
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=config.model_type == "qwen2",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.splits_tokens,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Packed micro-batches differ in length, and the losses of the micro-batches add up to the step's loss.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default raises with variable lengths, even without experts
        calculate_per_token_loss=True,
        batch_p2p_comm=False,
        use_cpu_initialization=groups.device.type == "cpu",
        # SwiGLU (if the activation is SiLU) and the sum of a residual, each as one kernel that torch.compile makes.
        bias_activation_fusion=on_gpu and not gemma.is_gemma(config),
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=parallel.layer_spec == "transformer_engine",
        # Fusions that need Apex.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **family,
        **(recompute if parallel.recompute else {}),
        **(_expert_options(config) if has_experts(config) else {}),
    )


def _expert_options(config: Any) -> dict[str, Any]:
    """As transformers routes: by a softmax over all experts, or over those chosen alone, in fp32. No loss that balances
    experts: the policy's is the step's.
    """
    if not hasattr(moe_utils, "te_general_gemm"):  # Megatron reads the name without TransformerEngine, too
        moe_utils.te_general_gemm = None
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_pre_softmax": not config.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _layers(config: Any, transformer: TransformerConfig, parallel: ParallelConfig) -> Any:
    """What this stage is made of: the spec of a layer, or of each of its layers and the norm after the last one."""
    spec = _layer_spec(config, parallel)
    if parallel.layer_spec == "transformer_engine":
        return spec
    norm = gemma.RMSNormAround1 if gemma.is_gemma(config) else RMSNorm
    return TransformerBlockSubmodules([spec] * get_num_layers_to_build(transformer), norm)


def _layer_spec(config: Any, parallel: ParallelConfig) -> Any:
    parts = {
        "qk_layernorm": _has_qk_norm(config),
        "num_experts": config.num_experts if has_experts(config) else None,
    }
    if parallel.layer_spec == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(**parts)
    else:
        spec = get_gpt_layer_local_spec(**parts, normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    if parallel.layer_spec == "local" and _has_qk_norm(config):
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = PackedAttention
    if gemma.is_gemma(config):
        gemma.adapt_layer(spec)
    return spec


def has_experts(config: Any) -> bool:
    """Whether the layers' MLPs are mixtures of experts."""
    return bool(config.model_type == "qwen3_moe")


def _has_qk_norm(config: Any) -> bool:
    return config.model_type in ("qwen3", "qwen3_moe", "gemma3_text")


def _rope_options(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return {
        "rotary_base": rope["rope_theta"],
        "rope_scaling": rope["rope_type"] == "llama3",
        "rope_scaling_factor": rope.get("factor", 1.0),
    }


def _rope_is_known(rope: Any) -> bool:
    kind = rope.get("rope_type", "default")
    return kind == "default" or (kind == "llama3" and all(rope.get(k) == v for k, v in _LLAMA3_ROPE.items()))
