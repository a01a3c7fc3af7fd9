"""Computes log-probs and entropies of response tokens in fp32, a chunk of tokens at a time.

Shape suffixes: B responses, T positions, D width, N response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rhythm.engines.head import logprobs_and_entropies, output_head
from rhythm.engines.interfaces import LogProbs, Rollout

# Settings by which a model changes its logits after the output embedding → the value that means no change.
_LOGIT_FUNCTIONS: dict[str, float | None] = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
}


def check_output_head(model: Any) -> None:
    """Raise ValueError unless the model's logits are the product of its last hidden state and its output embedding.

    `response_logprobs` assumes this; for scaled or capped logits it would silently give wrong log-probs.
    """
    for name, none in _LOGIT_FUNCTIONS.items():
        value = getattr(model.config.get_text_config(), name, none)
        if value not in (None, none):
            raise ValueError(f"model: {type(model).__name__} has {name}={value}, which log-probs don't support")
    if model.base_model is model:
        raise ValueError(f"model: {type(model).__name__} names no base model, which would give its last hidden state")
    device = model.device
    ids = torch.arange(2, 6, device=device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        logits = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state)
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-4):
        raise ValueError(f"model: the logits of {type(model).__name__} are not its output embedding of the last layer")


def padded_states(model: Any, rollout: Rollout) -> Tensor:
    """Last hidden states [N, D] at the positions that predict the response tokens, row after row; differentiable."""
    hidden_BTD: Tensor = model.base_model(
        input_ids=rollout.input_ids, attention_mask=rollout.attention_mask.long(), use_cache=False
    ).last_hidden_state
    # The token at t was sampled from the model's output at t − 1.
    return hidden_BTD[:, :-1][rollout.response_mask[:, 1:]]


def response_logprobs(
    model: Any,
    rollout: Rollout,
    *,
    temperature: float,
    chunk: int,
    states: Callable[[Any, Rollout], Tensor] = padded_states,
) -> LogProbs:
    """Log-probs and entropies at `temperature`, NaN outside the responses; differentiable.

    Logits are computed in fp32, whatever the model's dtype; see `rhythm.engines.head` for the memory they need.
    `states`: of the forward pass, as `padded_states`. Raises ValueError if the output embedding is not a plain linear
    layer.
    """
    weight_VD, bias_V = output_head(model)
    hidden_ND = states(model, rollout)
    target_BT = rollout.response_mask
    token_N = rollout.input_ids[:, 1:][target_BT[:, 1:]]
    logprob_N, entropy_N = logprobs_and_entropies(
        hidden_ND, weight_VD, token_N, temperature=temperature, chunk=chunk, bias_V=bias_V
    )
    undefined_BT = torch.full(target_BT.shape, torch.nan, dtype=logprob_N.dtype, device=target_BT.device)
    return LogProbs(
        logprobs=undefined_BT.masked_scatter(target_BT, logprob_N),
        entropy=undefined_BT.masked_scatter(target_BT, entropy_N),
    )
