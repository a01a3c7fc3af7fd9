"""Computes logits, log-probs and entropies in fp32 from hidden states and the output embedding.

With bfloat16 operands the product is kept in fp32, in which it is accumulated. Rounded to bfloat16, logits up to 15
would be off by 0.03, which changes log-probs more than a step at learning rate 1e-6 does.

Shape suffixes: N tokens, D width, V vocabulary (this rank's part, if tensor ranks split it), n tokens of a chunk,
v vocabulary entries of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

SLICE = 8192
"""Vocabulary entries whose logits are in memory at a time."""

_UNLIKELY = -200.0  # log-prob of a token whose probability is 0 in fp32; with −inf, entropies would contain 0 · −inf
_LOWEST = -1e30  # below any logit


def output_head(model: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias of a transformers model's output embedding.

    Raises ValueError if it is not a plain linear layer, for example a quantized one.
    """
    head = model.get_output_embeddings()
    if not _is_plain(head):
        raise ValueError(f"model: its output embedding is a {type(head).__name__}: log-probs support torch.nn.Linear")
    return head.weight, head.bias


def logprobs_and_entropies(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    token_N: Tensor,
    *,
    temperature: float,
    chunk: int,
    bias_V: Tensor | None = None,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs of `token_N`, entropies), each [N], in nats, at `temperature`; differentiable once.

    Both are fp32 (fp64 for fp64 inputs). `group`: the tensor ranks that split the vocabulary into equal parts, in rank
    order; each must call this with the same hidden states and gets the same results. Under autocast, hidden states and
    head are rounded to its dtype, but their product is not.

    Two copies of the logits of `chunk` tokens × SLICE entries are in memory at a time, also in the backward pass, so
    memory is O(chunk × SLICE), not O(N × V). On CUDA the gradients of the logits are rounded to the operands' dtype.
    """
    results: tuple[Tensor, Tensor] = _HeadLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, token_N, temperature, chunk, _compute_type(hidden_ND), group
    )
    return results


def exact_logits(hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """Logits […, V] in fp32 of hidden states […, D], all at once and without gradients. On a CPU weight_VD may also be
    in fp32 already, which spares its conversion.
    """
    with torch.no_grad():
        operand_ND = _operand(hidden.flatten(0, -2), hidden.dtype)
        logits_NV = _product(operand_ND, _operand(weight_VD, weight_VD.dtype).T)
        if bias_V is not None:
            logits_NV += bias_V
    return logits_NV.view(*hidden.shape[:-1], len(weight_VD))


@contextmanager
def exact_head(model: Any) -> Iterator[None]:
    """Context in which a transformers model of lower precision returns `exact_logits`. Its weights must not change
    meanwhile: on a CPU the head is converted to fp32 once, on entering, in V · D · 4 bytes.
    """
    head = model.get_output_embeddings()
    if not _is_plain(head) or head.weight.dtype == _wide(head.weight.dtype):
        yield
        return
    weight_VD = _operand(head.weight.detach(), head.weight.dtype)
    head.forward = lambda hidden: exact_logits(hidden, weight_VD, head.bias)
    try:
        yield
    finally:
        del head.forward


@contextmanager
def own_head(model: Any) -> Iterator[None]:
    """Context within `exact_head` in which the model returns logits of its own precision again."""
    attributes = vars(model.get_output_embeddings())
    exact = attributes.pop("forward", None)
    try:
        yield
    finally:
        if exact is not None:
            attributes["forward"] = exact


def _is_plain(head: Any) -> bool:
    return type(head) is nn.Linear


class _HeadLogProbs(torch.autograd.Function):
    """log p of a token y and entropy H of p = softmax(z), for logits z = (W h + b) / temperature.

    ∂ log p_y / ∂z = 1[y] − p, and ∂H / ∂z = −p · (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        token_N: Tensor,
        temperature: float,
        chunk: int,
        dtype: torch.dtype,
        group: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        place_N = token_N if group is None else token_N - group.rank() * len(weight_VD)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            sums = _Sums.over(hidden_ND, weight_VD, bias_V, place_N, temperature, chunk, dtype)
        if group is not None:
            sums.add_up(group)
        log_total_N = sums.total_N.log()
        lse_N = sums.highest_N + log_total_N
        entropy_N = log_total_N - sums.weighted_N / sums.total_N
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, place_N, lse_N, entropy_N)
        ctx.options = (temperature, chunk, dtype, group)
        return sums.picked_N - sums.highest_N - log_total_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprob_grad_N: Tensor | None, entropy_grad_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, place_N, lse_N, entropy_N = ctx.saved_tensors
        temperature, chunk, dtype, group = ctx.options
        with torch.autocast(hidden_ND.device.type, enabled=False):
            operand_ND = _operand(hidden_ND, dtype)
            grad_hidden_ND = lse_N.new_zeros(hidden_ND.shape)
            grad_weight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
            grad_bias_V = None if bias_V is None else torch.empty_like(bias_V)
            for here, weight_vD in _slices(weight_VD, dtype):
                grad_weight_vD = lse_N.new_zeros(weight_vD.shape)
                grad_bias_v = lse_N.new_zeros(len(weight_vD))
                for tokens in _chunks(len(hidden_ND), chunk):
                    z_nv = _scaled_logits(operand_ND[tokens], weight_vD, bias_V, here, temperature)
                    z_nv.sub_(lse_N[tokens, None]).clamp_(min=_UNLIKELY)  # log p
                    grad_nv = _logit_gradients(
                        z_nv,
                        entropy_N[tokens],
                        place_N[tokens] - here.start,
                        None if logprob_grad_N is None else logprob_grad_N[tokens],
                        None if entropy_grad_N is None else entropy_grad_N[tokens],
                    )
                    grad_nv.div_(temperature)
                    grad_bias_v += grad_nv.sum(dim=0)
                    rounded_nv = grad_nv.to(operand_ND.dtype)
                    grad_hidden_ND[tokens] += _product(rounded_nv, weight_vD)
                    grad_weight_vD += _product(rounded_nv.T, operand_ND[tokens])
                    del z_nv, grad_nv, rounded_nv  # free them before the next ones are allocated
                if grad_weight_VD is not None:
                    grad_weight_VD[here] = grad_weight_vD
                if grad_bias_V is not None:
                    grad_bias_V[here] = grad_bias_v
            if group is not None:  # each rank has the contribution of its part of the vocabulary
                distributed.all_reduce(grad_hidden_ND, group=group)
        return grad_hidden_ND.to(hidden_ND.dtype), grad_weight_VD, grad_bias_V, *[None] * 5


@dataclass
class _Sums:
    """Over the vocabulary, with z' = z − max z: max z, Σ exp z' and Σ z' · exp z'; and the token's own z. All [N]."""

    highest_N: Tensor
    total_N: Tensor
    weighted_N: Tensor
    picked_N: Tensor

    @staticmethod
    def over(
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        place_N: Tensor,
        temperature: float,
        chunk: int,
        dtype: torch.dtype,
    ) -> _Sums:
        """Compute the sums over this rank's part by online softmax. place_N: row of weight_VD of the token; an index
        outside weight_VD means that the token is on another rank.
        """
        operand_ND = _operand(hidden_ND, dtype)
        none_N = operand_ND.new_zeros(len(operand_ND), dtype=_wide(dtype))
        sums = _Sums(none_N + _LOWEST, none_N.clone(), none_N.clone(), none_N.clone())
        for here, weight_vD in _slices(weight_VD, dtype):
            for tokens in _chunks(len(operand_ND), chunk):
                z_nv = _scaled_logits(operand_ND[tokens], weight_vD, bias_V, here, temperature)
                sums._add(tokens, z_nv, place_N[tokens] - here.start)
                del z_nv  # free it before the next one is allocated
        return sums

    def _add(self, tokens: slice, z_nv: Tensor, place_n: Tensor) -> None:
        """Add one slice of the logits of some tokens; overwrites z_nv."""
        inside_n, mine_n = _inside(place_n, z_nv.shape[1])
        self.picked_N[tokens] += z_nv.gather(1, inside_n[:, None])[:, 0].masked_fill(~mine_n, 0.0)
        self._raise(tokens, torch.maximum(self.highest_N[tokens], z_nv.amax(dim=1)))
        exp_nv = z_nv.sub_(self.highest_N[tokens, None]).clamp_(min=_UNLIKELY).exp()
        self.total_N[tokens] += exp_nv.sum(dim=1)
        self.weighted_N[tokens] += z_nv.mul_(exp_nv).sum(dim=1)

    def _raise(self, tokens: slice, highest_n: Tensor) -> None:
        """Rescale both sums to another maximum."""
        fall_n = self.highest_N[tokens] - highest_n
        scale_n = fall_n.exp()
        self.weighted_N[tokens] += fall_n * self.total_N[tokens]
        self.weighted_N[tokens] *= scale_n
        self.total_N[tokens] *= scale_n
        self.highest_N[tokens] = highest_n

    def add_up(self, group: Any) -> None:
        """All-reduce over the ranks of `group`."""
        highest_N = self.highest_N.clone()
        distributed.all_reduce(highest_N, distributed.ReduceOp.MAX, group=group)
        self._raise(slice(None), highest_N)
        sums_3N = torch.stack([self.total_N, self.weighted_N, self.picked_N])
        distributed.all_reduce(sums_3N, group=group)
        self.total_N, self.weighted_N, self.picked_N = sums_3N


def _logit_gradients(
    log_p_nv: Tensor, entropy_n: Tensor, place_n: Tensor, logprob_grad_n: Tensor | None, entropy_grad_n: Tensor | None
) -> Tensor:
    """∂ loss / ∂ z. Overwrites log_p_nv; allocates a second tensor of its size only for entropy gradients."""
    if entropy_grad_n is None:
        grad_nv = log_p_nv.exp_()
        factor_n = torch.zeros_like(entropy_n) if logprob_grad_n is None else -logprob_grad_n
        grad_nv.mul_(factor_n[:, None])
    else:
        p_nv = log_p_nv.exp()
        grad_nv = log_p_nv.add_(entropy_n[:, None]).mul_(-entropy_grad_n[:, None])
        if logprob_grad_n is not None:
            grad_nv.sub_(logprob_grad_n[:, None])
        grad_nv.mul_(p_nv)
    if logprob_grad_n is not None:
        inside_n, mine_n = _inside(place_n, grad_nv.shape[1])
        grad_nv.scatter_add_(1, inside_n[:, None], logprob_grad_n.masked_fill(~mine_n, 0.0)[:, None])
    return grad_nv


def _scaled_logits(
    operand_nD: Tensor, weight_vD: Tensor, bias_V: Tensor | None, here: slice, temperature: float
) -> Tensor:
    z_nv = _product(operand_nD, weight_vD.T)
    if bias_V is not None:
        z_nv += bias_V[here]
    return z_nv.div_(temperature)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in fp32 or higher, whatever the operands' dtype."""
    return torch.mm(a, b) if a.dtype == _wide(a.dtype) else torch.mm(a, b, out_dtype=torch.float32)


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to `dtype`. On a CPU it is converted back to fp32, since only CUDA has bfloat16 products in fp32."""
    rounded = x.to(dtype)
    return rounded if rounded.is_cuda else rounded.to(_wide(dtype))


def _slices(weight_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(slice of the vocabulary, that part of the head as an operand), SLICE entries at a time."""
    for here in _chunks(len(weight_VD), SLICE):
        yield here, _operand(weight_VD[here], dtype)


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _inside(place_n: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(place clamped to [0, width), whether it was inside)."""
    return place_n.clamp(0, width - 1), (place_n >= 0) & (place_n < width)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of `dtype` are kept."""
    return torch.promote_types(dtype, torch.float32)


def _compute_type(hidden_ND: Tensor) -> torch.dtype:
    """Autocast's dtype if it is enabled, else the dtype of the hidden states."""
    device = hidden_ND.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
