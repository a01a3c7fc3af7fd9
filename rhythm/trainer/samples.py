"""A few judged responses with the signals of every token, for the report and for reading."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rhythm.credit.gamma import CreditConfig
from rhythm.credit.heads import HeadGroups
from rhythm.engines.batches import take_rows, trim
from rhythm.engines.interfaces import TapConfig
from rhythm.trainer.metrics import Stopwatch
from rhythm.trainer.rollout import JudgedRollout
from rhythm.trainer.step import Engines, score


def first_rows(judged: JudgedRollout, count: int) -> JudgedRollout:
    """The first `count` responses, or all if there are fewer."""
    index = torch.arange(min(count, len(judged.responses)))
    rollout = take_rows(judged.rollout, index)
    return JudgedRollout(
        rollout=trim(rollout, int(rollout.attention_mask.sum(dim=1).max())),
        prompts=judged.prompts[:count],
        responses=judged.responses[:count],
        rewards=judged.rewards[:count],
    )


def sample_lines(
    engines: Engines,
    tokenizer: Any,
    judged: JudgedRollout,
    tap: TapConfig,
    credit: CreditConfig,
    *,
    groups: HeadGroups | None,
    generator: torch.Generator,
    step: int,
) -> list[dict[str, object]]:
    """One dictionary a response: its text and reward; of each response token text, WAAD, FAI, γ and entropy.

    γ is that of the strategy in use, whether or not the response's advantage would have let it count.
    Undefined is None.
    """
    rollout = judged.rollout
    scored = score(
        engines,
        rollout,
        tap,
        credit,
        groups=groups,
        generator=generator,
        watch=Stopwatch(),
        always_signals=True,
    )
    if scored.signals is None:
        raise RuntimeError("the engines gave no signals although they were asked for")
    lines: list[dict[str, object]] = []
    for row, reward in enumerate(judged.rewards):
        mask_T = rollout.response_mask[row]
        lines.append(
            {
                "step": step,
                "prompt": judged.prompts[row],
                "response": judged.responses[row],
                "reward": reward.score,
                "correct": reward.correct,
                "tokens": [tokenizer.decode([token]) for token in rollout.input_ids[row][mask_T].tolist()],
                "waad": _numbers(scored.signals.waad[row][mask_T]),
                "fai": _numbers(scored.signals.fai[row][mask_T]),
                "gamma": _numbers(scored.gamma[row][mask_T]),
                "entropy": _numbers(scored.log_probs.entropy[row][mask_T]),
            }
        )
    return lines


def write_samples(directory: Path, step: int, lines: list[dict[str, object]]) -> None:
    """samples/step_N.jsonl, replaced in one go if it was there."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step_{step:06d}.jsonl"
    aside = path.with_suffix(".part")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _numbers(x_n: Tensor) -> list[float | None]:
    return [round(value, 6) if math.isfinite(value) else None for value in x_n.tolist()]
