"""Greedy continuations of one sequence from many of its positions, by one pass over the sequence itself.

The keys and values of that pass serve all continuations: each takes the part before its own position, and
runs the model on its forced token and on what follows, many continuations at a time.

Shape suffixes: N tokens of the sequence, K positions, V vocabulary, R continuations at a time, L longest prefix
among them, H key heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


@dataclass(frozen=True)
class Branch:
    """A continuation asked for: the sequence before `position`, `token` in its place, then up to `limit` ≥ 1 tokens."""

    position: int
    token: int
    limit: int


@dataclass(frozen=True)
class Prefill:
    """What the pass over the sequence left behind."""

    cache: DynamicCache  # one row: keys and values of the tokens before the last position asked for
    logits_KV: Tensor  # fp32; of the token at each position asked for


@torch.no_grad()
def prefill(model: Any, ids_N: Tensor, positions: Sequence[int]) -> Prefill:
    """Run the sequence up to the last of `positions` (rising, from 1 on), keeping the logits that predict each.

    Raises ValueError as `check_cache` does.
    """
    check_cache(model)
    cache = DynamicCache()  # not given the model's configuration, it keeps what slid out of a window too
    with evaluating(model):
        output = model(
            input_ids=ids_N[None, : positions[-1]].to(model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(positions, device=model.device) - 1,
        )
    return Prefill(cache, output.logits[0].float())


@torch.no_grad()
def continue_greedily(
    model: Any, prefilled: Prefill, branches: Sequence[Branch], *, end_ids: Collection[int], rows_at_once: int
) -> list[list[int]]:
    """What follows each branch's token: the likeliest token at every step, to the first of `end_ids` or the limit.

    In the order of `branches`; nothing follows a token that is itself one of `end_ids`. `rows_at_once` branches
    share a forward pass, and those that have ended leave it.
    """
    continuations: list[list[int]] = [[] for _ in branches]
    going = [index for index, branch in enumerate(branches) if branch.token not in end_ids]
    going.sort(key=lambda index: branches[index].position)  # prefixes of about one length together
    with evaluating(model):
        for start in range(0, len(going), rows_at_once):
            rows = going[start : start + rows_at_once]
            found = _continue_batch(model, prefilled.cache, [branches[row] for row in rows], end_ids)
            for row, continuation in zip(rows, found, strict=True):
                continuations[row] = continuation
    return continuations


def check_cache(model: Any) -> None:
    """Raise ValueError unless the model generates from a cache of keys and values, one for each position."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"model: {type(model).__name__} is no causal language model; it can't continue a sequence")
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"model: {type(model).__name__} keeps a {type(layer).__name__} in its cache; a prefix can be reused "
                "only where every layer keeps keys and values of every position"
            )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in eval mode, and back in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _continue_batch(
    model: Any, cache: DynamicCache, branches: Sequence[Branch], end_ids: Collection[int]
) -> list[list[int]]:
    position_R = torch.tensor([branch.position for branch in branches], device=model.device)
    token_R = torch.tensor([branch.token for branch in branches], device=model.device)
    cache, mask_RL = _prefixes(cache, position_R)
    # As transformers' generate does: a model without positions of its own takes them from the mask.
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    continuations: list[list[int]] = [[] for _ in branches]
    rows = list(range(len(branches)))
    while True:
        mask_RL = pad(mask_RL, (0, 1), value=1)
        logits_R1V = model(
            input_ids=token_R[:, None],
            attention_mask=mask_RL,
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": position_R[:, None]} if takes_positions else {}),
        ).logits
        token_R, position_R = logits_R1V[:, -1].argmax(dim=-1), position_R + 1
        kept = []
        for index, (row, token) in enumerate(zip(rows, token_R.tolist(), strict=True)):
            continuations[row].append(token)
            if token not in end_ids and len(continuations[row]) < branches[row].limit:
                kept.append(index)
        if not kept:
            return continuations
        if len(kept) < len(rows):
            kept_R = torch.tensor(kept, device=model.device)
            rows = [rows[index] for index in kept]
            token_R, position_R, mask_RL = token_R[kept_R], position_R[kept_R], mask_RL[kept_R]
            cache.batch_select_indices(kept_R)


def _prefixes(cache: DynamicCache, position_R: Tensor) -> tuple[DynamicCache, Tensor]:
    """The cache before each position, one a row, padded on the left; and the mask [R, L] int64, 0 on the padding.

    On the left, so that distances in the cache are those in the sequence, which a sliding window counts.
    """
    length = int(position_R.max())
    source_RL = torch.arange(length, device=position_R.device) - (length - position_R[:, None])
    mask_RL = (source_RL >= 0).long()
    source_RL = source_RL.clamp(min=0)

    def taken(x_1HND: Tensor) -> Tensor:
        return x_1HND[0][:, source_RL].transpose(0, 1)

    return DynamicCache([(taken(layer.keys), taken(layer.values)) for layer in cache.layers]), mask_RL
