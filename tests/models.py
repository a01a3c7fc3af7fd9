"""Shapes of the transformers models that tests build, and signals from attention maps. `import models` works from every
test (conftest.py).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from rhythm.credit.heads import select_heads
from rhythm.credit.signals import RhythmSignals, aggregate
from rhythm.ops import reference
from rhythm.tap.signals_config import SignalsConfig
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer

# Of any of transformers' configurations. Weights are drawn ten times wider than by default: a fresh model's attention
# is nearly uniform, and wider weights tell right from wrong.
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
GQA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}


def widened(model: Any) -> Any:
    """The model with weights large enough for attention far from uniform, and responses that differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
    return model


def tiny_model() -> Any:
    """A Qwen3 of three layers with such weights, the same each time, for the tests of trainers' adapters."""
    torch.manual_seed(0)
    shape = TinyModelConfig(layers=3, hidden_size=32, mlp_size=32, query_heads=4, key_heads=2, head_size=8)
    return widened(build_model(shape, build_tokenizer()))


def signals_by_maps(model: Any, row_T: Tensor, prompt_len: int, signals: SignalsConfig, **inputs: Any) -> RhythmSignals:
    """The signals of one row alone, from the attention maps that transformers returns under eager attention."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        output = eager(row_T[None], output_attentions=True, use_cache=False, **inputs)
    maps_nTT = torch.cat([output.attentions[layer][0] for layer in signals.layers_of(len(output.attentions))])
    span_n, waad_nT, fai_nT = reference.sequence_statistics(
        maps_nTT, prompt_len=prompt_len, window=signals.window, horizon=signals.horizon
    )
    log_p = output.logits[0].double().log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1).roll(1)
    entropy[0] = torch.nan
    response = (torch.arange(len(row_T)) >= prompt_len)[None]
    groups = select_heads(span_n[None], signals.quantile)
    return aggregate(waad_nT[None], fai_nT[None], span_n[None], groups, response, entropy[None])
