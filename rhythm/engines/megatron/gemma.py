"""What Gemma 3's layers have that Megatron's don't: norms after a sublayer, too, norm weights stored as their distance
from 1, scaled embeddings, and layers with a sliding window, whose RoPE is another.

Shape suffixes: S positions, D head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn
from torch.nn import functional

from rhythm.engines.megatron.core_attention import window_of
from rhythm.engines.megatron.norm import RMSNorm

_UNSUPPORTED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


def is_gemma(config: Any) -> bool:
    """Whether it is the configuration of a Gemma 3 of text."""
    return bool(config.model_type == "gemma3_text")


def unsupported(config: Any) -> dict[str, bool]:
    """Of a Gemma 3's options whether each is one that this engine doesn't compute."""
    ropes = config.rope_parameters
    windowed, full = ropes["sliding_attention"], ropes["full_attention"]
    return {
        **{name: bool(getattr(config, name, None)) for name in _UNSUPPORTED},
        "hidden_activation": config.hidden_activation != "gelu_pytorch_tanh",
        "rope_parameters": windowed["rope_type"] != "default" or full["rope_type"] not in ("default", "linear"),
    }


def transformer_options(config: Any) -> dict[str, Any]:
    """Of a TransformerConfig what differs from the other families."""
    return {
        "activation_func": partial(functional.gelu, approximate="tanh"),
        "softmax_scale": config.query_pre_attn_scalar**-0.5,
        "window_size": (config.sliding_window - 1, 0),  # keys before a token's own
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in config.layer_types],
    }


def rope_options(config: Any) -> dict[str, Any]:
    """Of a GPTModel, for the layers without a window."""
    rope = config.rope_parameters["full_attention"]
    return {"rotary_base": rope["rope_theta"], "seq_len_interpolation_factor": rope.get("factor")}


def adapt_layer(spec: Any) -> None:
    """Give the spec of a layer Gemma 3's modules."""
    layer, attention = spec.submodules, spec.submodules.self_attention
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNormAround1
    attention.module = WindowedSelfAttention
    attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNormAround1
    attention.submodules.linear_proj = NormedRowParallelLinear
    # Megatron 0.16 has a ModuleSpec here, later releases a partial.
    mlp = layer.mlp.keywords["submodules"] if isinstance(layer.mlp, partial) else layer.mlp.submodules
    mlp.linear_fc2 = NormedRowParallelLinear


def adapt_model(model: Any, config: Any) -> None:
    """Give a built model the scale of its embeddings and both ropes."""
    if model.pre_process:
        weight = model.embedding.word_embeddings.weight
        # Rounded, as transformers rounds it, to the embeddings' type.
        scale = float(torch.tensor(config.hidden_size**0.5).to(model.config.params_dtype))
        assert weight.shape[1] == config.hidden_size
        model.embedding.register_forward_hook(lambda _module, _args, embedded: embedded * scale)
    model.rotary_pos_emb = BothRopes(model.rotary_pos_emb, config.rope_parameters["sliding_attention"]["rope_theta"])


class RMSNormAround1(RMSNorm):
    """RMSNorm times 1 + weight, in fp32, rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps)
        return normed.type_as(x)


class NormedRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """The last matrix of a sublayer and a norm of its output, before the residual is added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.post_norm = RMSNormAround1(self.config, self.output_size, self.config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """What RowParallelLinear returns: the output, all-reduced or split by tokens, and no bias."""
        output, bias = super().forward(input_)
        return self.post_norm(output), bias


class BothRopes(RotaryEmbedding):  # type: ignore[misc]
    """Angles of the layers without and with a window, [2, S, 1, 1, D]."""

    def __init__(self, full: RotaryEmbedding, windowed_base: float) -> None:
        nn.Module.__init__(self)
        self.full = full
        self.windowed = RotaryEmbedding(
            2 * len(full.inv_freq),
            rotary_percent=1.0,
            rotary_base=windowed_base,
            use_cpu_initialization=full.inv_freq.device.type == "cpu",
            cp_group=full.cp_group,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Of so many positions, as RotaryEmbedding takes them."""
        return torch.stack([self.full(*args, **kwargs), self.windowed(*args, **kwargs)])


class WindowedSelfAttention(SelfAttention):  # type: ignore[misc]
    """SelfAttention with the rope of its layer, out of both."""

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:
        """As SelfAttention, with rotary_pos_emb [2, S, 1, 1, D]."""
        windowed = window_of(self.config, self.layer_number) is not None
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb[int(windowed)], **kwargs)
