"""Log-probs and entropies from logits whose vocabulary is divided among tensor ranks, a few tokens at a time.

Shape suffixes: N tokens, D width, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rhythm.engines.megatron.model import PolicyModel


def head_logprobs(
    model: PolicyModel, hidden_ND: Tensor, token_N: Tensor, *, temperature: float, chunk: int, group: Any
) -> tuple[Tensor, Tensor]:
    """(log-probs of `token_N`, entropies), fp32 [N], nats, at `temperature`; differentiable.

    Only `chunk` tokens have logits at a time, in the backward pass too, where they are computed again: memory is
    O(chunk × V), not O(N × V).
    """

    def compute(hidden_ND: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = model.logits(hidden_ND).float() / temperature
        found: tuple[Tensor, Tensor] = _VocabParallel.apply(logits_NV, token_N, group)  # type: ignore[no-untyped-call]
        return found

    parts = []
    for hidden, token in zip(torch.split(hidden_ND, chunk), torch.split(token_N, chunk), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(compute, hidden, token, use_reentrant=False))
        else:
            parts.append(compute(hidden, token))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


class _VocabParallel(torch.autograd.Function):
    """log p and entropy H of softmax over all ranks' logits z, every rank with the same result.

    With p = softmax(z): ∂ log p_y / ∂z = 1[y] − p, and ∂H / ∂z = −p · (log p + H). The backward pass needs no other
    rank: each has the gradient of its own logits.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, token_N: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        V = logits_NV.shape[1]
        highest_N = logits_NV.amax(dim=1)
        distributed.all_reduce(highest_N, distributed.ReduceOp.MAX, group=group)
        shifted_NV = logits_NV - highest_N[:, None]
        place_N = token_N - group.rank() * V
        mine_N = (place_N >= 0) & (place_N < V)
        place_N = place_N.clamp(0, V - 1)
        exp_NV = shifted_NV.exp()
        picked_N = shifted_NV.gather(1, place_N[:, None])[:, 0].masked_fill(~mine_N, 0.0)
        # One collective for Σ exp z, Σ z·exp z and the token's own logit. A logit of −inf adds nothing to either sum.
        weighted_N = torch.where(exp_NV > 0, shifted_NV * exp_NV, 0.0).sum(dim=1)
        sums_3N = torch.stack([exp_NV.sum(dim=1), weighted_N, picked_N])
        distributed.all_reduce(sums_3N, group=group)
        total_N, weighted_N, picked_N = sums_3N
        log_total_N = total_N.log()
        entropy_N = log_total_N - weighted_N / total_N
        log_p_NV = shifted_NV - log_total_N[:, None]
        ctx.save_for_backward(log_p_NV, entropy_N, place_N, mine_N)
        return picked_N - log_total_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logprob_grad_N, entropy_grad_N = grads
        log_p_NV, entropy_N, place_N, mine_N = ctx.saved_tensors
        p_NV = log_p_NV.exp()
        from_entropy_NV = torch.where(p_NV > 0, log_p_NV + entropy_N[:, None], 0.0)
        grad_NV = -p_NV * (logprob_grad_N[:, None] + entropy_grad_N[:, None] * from_entropy_NV)
        grad_NV.scatter_add_(1, place_N[:, None], (logprob_grad_N * mine_N)[:, None])
        return grad_NV, None, None
