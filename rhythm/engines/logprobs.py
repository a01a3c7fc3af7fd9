"""Log-probs and entropies of response tokens, the logits of a few tokens at a time.

Shape suffixes: B responses, T positions, D width, N response tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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

    Only `chunk` tokens have logits at a time, in the backward pass too, where they are computed again: memory
    is O(chunk × V), not O(B × T × V).
    """
    hidden_BTD = model.base_model(
        input_ids=rollout.input_ids, attention_mask=rollout.attention_mask.long(), use_cache=False
    ).last_hidden_state
    target_BT = rollout.response_mask
    # The token at t was drawn from what the model said at t − 1.
    hidden_ND = hidden_BTD[:, :-1][target_BT[:, 1:]]
    token_N = rollout.input_ids[:, 1:][target_BT[:, 1:]]
    head = model.get_output_embeddings()
    parts = [
        _head_logprobs(head, hidden, token, temperature)
        for hidden, token in zip(torch.split(hidden_ND, chunk), torch.split(token_N, chunk), strict=True)
    ]
    undefined_BT = torch.full(target_BT.shape, torch.nan, device=target_BT.device)
    return LogProbs(
        logprobs=undefined_BT.masked_scatter(target_BT, torch.cat([logprob for logprob, _ in parts])),
        entropy=undefined_BT.masked_scatter(target_BT, torch.cat([entropy for _, entropy in parts])),
    )


def _head_logprobs(head: nn.Module, hidden_ND: Tensor, token_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    def compute(hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = head(hidden_ND).float() / temperature
        log_softmax_NV = torch.log_softmax(logits_NV, dim=-1)
        entropy_N = torch.special.entr(log_softmax_NV.exp()).sum(dim=-1)
        return log_softmax_NV.gather(1, token_N[:, None])[:, 0], entropy_N

    if not torch.is_grad_enabled():
        return compute(hidden_ND)
    again: tuple[Tensor, Tensor] = checkpoint(compute, hidden_ND, use_reentrant=False)
    return again
