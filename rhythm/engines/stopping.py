"""Where stop strings end a response.

Shape suffixes: B responses, G generated positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rhythm.engines.interfaces import Rollout


def response_texts(rollout: Rollout, tokenizer: Any) -> list[str]:
    """The responses as text, without special tokens."""
    rows = zip(rollout.input_ids.tolist(), rollout.response_mask.tolist(), strict=True)
    return [
        tokenizer.decode([i for i, inside in zip(ids, mask, strict=True) if inside], skip_special_tokens=True)
        for ids, mask in rows
    ]


def cut_at_stop(rollout: Rollout, tokenizer: Any, stop: Sequence[str]) -> Rollout:
    """Each response without what follows the token that completes the first of the `stop` strings; it ends there by
    itself.
    """
    if not stop:
        return rollout
    lens = rollout.lens.tolist()
    finished = rollout.finished.clone()
    for row, (start, end) in enumerate(zip(rollout.prompt_lens.tolist(), lens, strict=True)):
        response = rollout.input_ids[row, start:end].tolist()
        kept = tokens_to_stop(tokenizer, response, stop)
        if kept is not None:
            lens[row], finished[row] = start + kept, True
    inside = torch.arange(rollout.input_ids.shape[1], device=rollout.input_ids.device)
    inside_BT = inside < torch.tensor(lens, device=inside.device)[:, None]
    return replace(
        rollout,
        attention_mask=rollout.attention_mask & inside_BT,
        response_mask=rollout.response_mask & inside_BT,
        logprobs=rollout.logprobs.masked_fill(~inside_BT, 0.0),
        finished=finished,
    )


class StopStrings:
    """Tells which responses hold a stop string, while they are generated."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        """`stop`: at least one string, none empty."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # A token is a byte at least, if it is text at all; the rest is for those that are not.
        self._tail = max(len(string.encode()) for string in stop) + 8

    def reached(self, response_BG: Tensor) -> Tensor:
        """bool [B]: whether one of the strings is in what the last tokens of each row say. Asked after every token, it
        sees each string as soon as it is complete.
        """
        texts = self._tokenizer.batch_decode(response_BG[:, -self._tail :].tolist(), skip_special_tokens=True)
        held = [any(string in text for string in self._stop) for text in texts]
        return torch.tensor(held, dtype=torch.bool, device=response_BG.device)


def tokens_to_stop(tokenizer: Any, response: Sequence[int], stop: Sequence[str]) -> int | None:
    """How many tokens of the response it takes until its text holds one of the strings; None: it holds none."""

    def holds(count: int) -> bool:
        text = tokenizer.decode(response[:count], skip_special_tokens=True)
        return any(string in text for string in stop)

    if not holds(len(response)):
        return None
    few, enough = 0, len(response)
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if holds(middle) else (middle, enough)
    return enough
