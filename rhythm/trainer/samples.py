"""Writes a few scored responses with each token's signals, for the report and for reading."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rhythm.credit.config import CreditConfig
from rhythm.credit.heads import HeadGroups
from rhythm.engines.batches import take_rows, trim
from rhythm.system.writing import replace_file
from rhythm.tap.signals_config import SignalsConfig
from rhythm.trainer.metrics import Stopwatch
from rhythm.trainer.rollout import ScoredRollout
from rhythm.trainer.step import Engines, credit_tokens


def first_rows(scored: ScoredRollout, count: int) -> ScoredRollout:
    """The first `count` responses, or all if there are fewer."""
    index = torch.arange(min(count, len(scored.responses)))
    rollout = take_rows(scored.rollout, index)
    return ScoredRollout(
        rollout=trim(rollout, int(rollout.attention_mask.sum(dim=1).max())),
        prompts=scored.prompts[:count],
        responses=scored.responses[:count],
        rewards=scored.rewards[:count],
    )


def sample_lines(
    engines: Engines,
    tokenizer: Any,
    scored: ScoredRollout,
    tap: SignalsConfig,
    credit: CreditConfig,
    *,
    groups: HeadGroups | None,
    generator: torch.Generator,
    step: int,
) -> list[dict[str, object]]:
    """One dictionary per response: its text and reward, and per response token the text, WAAD, FAI, γ and entropy.

    γ is given even where it would not multiply the response's advantage because that is negative. Undefined values
    are None.
    """
    rollout = scored.rollout
    credited = credit_tokens(
        engines,
        rollout,
        tap,
        credit,
        groups=groups,
        generator=generator,
        watch=Stopwatch(),
        always_signals=True,
    )
    if credited.signals is None:
        raise RuntimeError("the engines returned no signals although they were requested")
    lines: list[dict[str, object]] = []
    for row, reward in enumerate(scored.rewards):
        mask_T = rollout.response_mask[row]
        lines.append(
            {
                "step": step,
                "prompt": scored.prompts[row],
                "response": scored.responses[row],
                "reward": reward.score,
                "correct": reward.correct,
                "tokens": [tokenizer.decode([token]) for token in rollout.input_ids[row][mask_T].tolist()],
                "waad": _numbers(credited.signals.waad[row][mask_T]),
                "fai": _numbers(credited.signals.fai[row][mask_T]),
                "gamma": _numbers(credited.gamma[row][mask_T]),
                "entropy": _numbers(credited.log_probs.entropy[row][mask_T]),
            }
        )
    return lines


def write_samples(directory: Path, step: int, lines: list[dict[str, object]]) -> None:
    """Write samples/step_N.jsonl, replacing an existing one atomically. Raises OSError naming it."""
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    replace_file(directory / f"step_{step:06d}.jsonl", text)


def _numbers(x_n: Tensor) -> list[float | None]:
    return [round(value, 6) if math.isfinite(value) else None for value in x_n.tolist()]
