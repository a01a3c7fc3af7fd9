"""Computes greedy continuations of sequences from many of their positions, with one forward pass over each sequence.

All continuations reuse the keys and values of that pass: each takes those before its position, and runs the model
only on its replaced token and the tokens after it. Many continuations, also of several sequences, run in one batch.

Shape suffixes: N tokens of a sequence, K positions, V vocabulary, R continuations at a time, L longest prefix
among them, H key heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rhythm.analysis.decoding import RowsLayer, compacted
from rhythm.engines.eval_mode import evaluating
from rhythm.engines.local.short_attention import short_attention


@dataclass(frozen=True)
class Branch:
    """A requested continuation: the sequence before `position`, then `token`, then up to `limit` ≥ 1 greedy tokens.

    sequence: index of its `Prefill`.
    """

    position: int
    token: int
    limit: int
    sequence: int = 0


@dataclass(frozen=True)
class Prefill:
    """The results of the pass over the sequence."""

    cache: DynamicCache  # one row: keys and values of the tokens before the last requested position
    logits_KV: Tensor  # fp32; logits that predict the token at each requested position


@torch.no_grad()
def prefill(model: Any, ids_N: Tensor, positions: Sequence[int]) -> Prefill:
    """Run the model on the sequence up to the last of `positions` (ascending, ≥ 1); keeps the logits that predict each.

    Raises ValueError from `check_cache`.
    """
    check_cache(model)
    cache = DynamicCache()  # without the model's configuration it also keeps tokens outside a sliding window
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
    model: Any, prefilled: Sequence[Prefill], branches: Sequence[Branch], *, end_ids: Collection[int], rows_at_once: int
) -> list[list[int]]:
    """The greedy tokens after each branch's token, up to the first of `end_ids` or the limit, in the order of
    `branches`.

    A token that is itself one of `end_ids` is not continued. `rows_at_once` branches run in one batch; finished ones
    are removed from it.
    """
    continuations: list[list[int]] = [[] for _ in branches]
    going = [index for index, branch in enumerate(branches) if branch.token not in end_ids]
    going.sort(key=lambda index: branches[index].position)  # batch prefixes of similar length
    caches = [each.cache for each in prefilled]
    with evaluating(model), short_attention(model):
        for start in range(0, len(going), rows_at_once):
            rows = going[start : start + rows_at_once]
            batch = _continue_batch(model, caches, [branches[row] for row in rows], end_ids)
            for row, continuation in zip(rows, batch, strict=True):
                continuations[row] = continuation
    return continuations


def check_cache(model: Any) -> None:
    """Raise ValueError unless the model generates from a cache of the keys and values of every position."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"model: {type(model).__name__} is not a causal language model, so it can't continue text")
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"model: {type(model).__name__} keeps a {type(layer).__name__} in its cache; a prefix can be reused "
                "only where every layer keeps keys and values of every position"
            )


def _continue_batch(
    model: Any, caches: Sequence[DynamicCache], branches: Sequence[Branch], end_ids: Collection[int]
) -> list[list[int]]:
    position_R = torch.tensor([branch.position for branch in branches], device=model.device)
    token_R = torch.tensor([branch.token for branch in branches], device=model.device)
    cache, mask_RL = _prefixes(caches, branches, position_R)
    # Like transformers' generate: a model without a position_ids argument derives positions from the mask.
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
            order = compacted(kept)
            rows = [rows[index] for index in order]
            token_R, position_R, mask_RL = token_R[order], position_R[order], mask_RL[order]
            for layer in cache.layers:
                layer.keep(order)


def _prefixes(
    caches: Sequence[DynamicCache], branches: Sequence[Branch], position_R: Tensor
) -> tuple[DynamicCache, Tensor]:
    """The cache before each branch's position, one per row and left-padded, and the mask [R, L] int64, 0 on padding.

    Left padding keeps the distances between tokens, which matter for sliding windows.
    """
    length = int(position_R.max())
    mask_RL = (torch.arange(length, device=position_R.device) >= length - position_R[:, None]).long()

    def rows_of_caches(layers_1HND: Sequence[Tensor]) -> Tensor:
        prefixes = (layers_1HND[branch.sequence][0, :, : branch.position] for branch in branches)
        return torch.stack([pad(prefix_HLD, (0, 0, length - prefix_HLD.shape[1], 0)) for prefix_HLD in prefixes])

    rows = DynamicCache()
    rows.layers = [
        RowsLayer(rows_of_caches([each.keys for each in layer]), rows_of_caches([each.values for each in layer]))
        for layer in zip(*(cache.layers for cache in caches), strict=True)
    ]
    return rows, mask_RL
