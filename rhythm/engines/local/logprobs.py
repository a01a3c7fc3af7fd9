"""Log-probs and entropies of response tokens, from logits in fp32 of a few tokens at a time.

Shape suffixes: B responses, T positions, D width, N response tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from rhythm.engines.head import logprobs_and_entropies, output_head
from rhythm.engines.interfaces import LogProbs, Rollout

# Names of what a model may do to its logits after the output embedding, and the value that does nothing.
_LOGIT_FUNCTIONS: dict[str, float | None] = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
}


def check_output_head(model: Any) -> None:
    """Raise ValueError unless the model's logits are its output embedding of the last hidden state.

    `response_logprobs` takes them for that: scaled or capped logits would give silently wrong log-probs.
    """
    for name, none in _LOGIT_FUNCTIONS.items():
        value = getattr(model.config.get_text_config(), name, none)
        if value not in (None, none):
            raise ValueError(f"model: {type(model).__name__} has {name}={value}; log-probs support no such logits")
    device = model.device
    ids = torch.arange(2, 6, device=device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        raise ValueError(f"model: the logits of {type(model).__name__} are not its output embedding of the last layer")


def response_logprobs(model: Any, rollout: Rollout, *, temperature: float, chunk: int) -> LogProbs:
    """Log-probs and entropies at `temperature`, NaN outside the responses; differentiable.

    Logits are the fp32 product of hidden states and output embedding, whatever the model's type; see
    `rhythm.engines.head` for what exists of them at a time. Raises ValueError where that embedding is no plain linear
    layer.
    """
    weight_VD, bias_V = output_head(model)
    hidden_BTD = model.base_model(
        input_ids=rollout.input_ids, attention_mask=rollout.attention_mask.long(), use_cache=False
    ).last_hidden_state
    target_BT = rollout.response_mask
    # The token at t was drawn from what the model said at t − 1.
    hidden_ND = hidden_BTD[:, :-1][target_BT[:, 1:]]
    token_N = rollout.input_ids[:, 1:][target_BT[:, 1:]]
    logprob_N, entropy_N = logprobs_and_entropies(
        hidden_ND, weight_VD, token_N, temperature=temperature, chunk=chunk, bias_V=bias_V
    )
    undefined_BT = torch.full(target_BT.shape, torch.nan, dtype=logprob_N.dtype, device=target_BT.device)
    return LogProbs(
        logprobs=undefined_BT.masked_scatter(target_BT, logprob_N),
        entropy=undefined_BT.masked_scatter(target_BT, entropy_N),
    )
