"""Generates token by token with as little as possible beside the model's forward passes.

transformers' generate concatenates the whole cache at each token, computes each prompt as often as it has responses,
and goes on with rows that have ended. Here the cache has room from the start, each prompt is computed once, and rows
are dropped once they have ended.

Shape suffixes: B responses, b those that go on, U different prompts, P positions of the prompts (padded on the left), G
generated positions, V vocabulary, H key heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rhythm.engines.local.draws import Draw
from rhythm.engines.local.short_attention import short_attention
from rhythm.engines.stopping import StopStrings

_DROPPED_AT = 8  # rows are dropped once one in so many has ended: dropping copies the cache of the others


@dataclass(frozen=True)
class Decoded:
    """Responses as they were generated, each up to its end token, stop string or room.

    tokens: int64 [B, G], `pad_id` after the end. logprobs: fp32 [B, G], of these tokens at the temperature, before
    top-k and top-p; 0 after the end. lens: int64 [B], tokens of each response. finished: bool [B], whether it ended
    before its room did.
    """

    tokens: Tensor
    logprobs: Tensor
    lens: Tensor
    finished: Tensor


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    room_B: Tensor,
    draw: Draw,
    *,
    temperature: float,
    end_ids: Sequence[int],
    pad_id: int,
    stops: StopStrings | None = None,
    progress: Callable[[int], None] = lambda sampled: None,
    ended: Callable[[int, Decoded], None] | None = None,
) -> Decoded:
    """One response to each of `prompts`, none empty, of at most room_B tokens.

    temperature: of the log-probs. stops: end a response with the token that completes one of them. progress: called
    after each token with the number of tokens so far. ended: called with each row once it has ended, its number and
    its response alone, while the others go on; the result contains it, too.

    Raises RuntimeError if logits are NaN.
    """
    device = model.device
    different, prompt_B = _different(prompts, device)
    width, room = max(map(len, prompts)), int(room_B.max())
    lens_U = torch.tensor([len(prompt) for prompt in different], device=device)
    ids_UP = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in different], device=device)
    mask_UG = torch.arange(width + room, device=device) >= width - lens_U[:, None]  # of prompts and responses
    step = _Step(model, _cache(model, width + room))
    places_UP = (torch.arange(width, device=device) - (width - lens_U[:, None])).clamp(min=0)
    logits_bV = step(ids_UP, mask_UG[:, :width].long(), places_UP)[prompt_B]
    step.cache.reorder_cache(prompt_B)
    mask_bG, len_b = mask_UG[prompt_B].long(), lens_U[prompt_B]

    tokens_BG = torch.full((len(prompts), room), pad_id, device=device)
    logprobs_BG = torch.zeros(tokens_BG.shape, device=device)
    ends = torch.tensor(end_ids, device=device)
    lens_B = torch.zeros_like(room_B)
    finished_B = torch.zeros_like(room_B, dtype=torch.bool)
    row_b = torch.arange(len(prompts), device=device)
    going_b = torch.ones_like(row_b, dtype=torch.bool)
    for position in range(room):
        token_b = draw(logits_bV, row_b, position)
        picked_b = (logits_bV / temperature).log_softmax(dim=-1).gather(1, token_b[:, None])[:, 0]
        tokens_BG[row_b, position] = token_b.where(going_b, pad_id)
        logprobs_BG[row_b, position] = picked_b.where(going_b, 0.0)
        lens_B[row_b] += going_b
        progress(position + 1)
        ended_b = torch.isin(token_b, ends)
        if stops is not None:
            ended_b |= stops.reached(tokens_BG[row_b, : position + 1])
        finished_B[row_b] |= ended_b & going_b
        over_b = going_b & (ended_b | (room_B[row_b] <= position + 1))
        if ended is not None:
            for row in row_b[over_b].tolist():
                tokens, logprobs, lens, finished = (
                    x[row : row + 1].clone() for x in (tokens_BG, logprobs_BG, lens_B, finished_B)
                )
                ended(row, _checked(tokens, logprobs, lens, finished, position + 1))
        going_b &= ~over_b
        going = int(going_b.sum())
        if not going:
            break
        if (len(row_b) - going) * _DROPPED_AT >= len(row_b):
            kept = going_b.nonzero()[:, 0]
            step.cache.reorder_cache(kept)
            row_b, token_b, mask_bG, len_b, going_b = (x[kept] for x in (row_b, token_b, mask_bG, len_b, going_b))
        end = width + position + 1
        logits_bV = step(token_b[:, None], mask_bG[:, :end], len_b[:, None] + position)
    return _checked(tokens_BG, logprobs_BG, lens_B, finished_B, position + 1)


def _checked(tokens_BG: Tensor, logprobs_BG: Tensor, lens_B: Tensor, finished_B: Tensor, width: int) -> Decoded:
    """The first `width` generated positions. Raises RuntimeError if a log-prob is NaN."""
    if logprobs_BG.isnan().any():
        raise RuntimeError("the model's logits are NaN")
    return Decoded(tokens_BG[:, :width], logprobs_BG[:, :width], lens_B, finished_B)


class _Step:
    """Forward passes of the model with a cache: the logits after the last position of each, fp32 [b, V]."""

    def __init__(self, model: Any, cache: DynamicCache) -> None:
        self._model = model
        self.cache = cache
        parameters = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def __call__(self, ids_bT: Tensor, mask_bT: Tensor, place_bT: Tensor) -> Tensor:
        """`ids_bT`: the tokens after those in the cache, at positions `place_bT`. `mask_bT`: of the cache and them."""
        places = {"position_ids": place_bT} if self._positions else {}
        with short_attention(self._model):
            logits_bTV: Tensor = self._model(
                input_ids=ids_bT,
                attention_mask=mask_bT,
                past_key_values=self.cache,
                use_cache=True,
                **places,
                **self._last_only,
            ).logits
        return logits_bTV[:, -1].float()


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """A cache of one layer that has room for all positions from the start."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room, self._length = room, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [b, H, T, D]; returns all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._keys, self._values = (
                x.new_empty(*x.shape[:2], self._room, x.shape[3]) for x in (key_states, value_states)
            )
        end = self._length + key_states.shape[2]
        self._keys[:, :, self._length : end] = key_states
        self._values[:, :, self._length : end] = value_states
        self._length = end
        return self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, each as often as it is named."""
        self._keys, self._values = self._keys.index_select(0, beam_idx), self._values.index_select(0, beam_idx)
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._keys[:, :, : self._length], self._values[:, :, : self._length]
        return self.keys, self.values


def _cache(model: Any, room: int) -> DynamicCache:
    """An empty cache for `room` positions; layers other than those of full attention are transformers' own."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _different(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[list[tuple[int, ...]], Tensor]:
    """(the different prompts, in order; int64 [B], which of them each is)."""
    number: dict[tuple[int, ...], int] = {}
    places = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
    return list(number), torch.tensor(places, device=device)
