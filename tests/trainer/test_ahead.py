"""Drawing the next step's responses in a thread, and keeping them in a checkpoint."""

from __future__ import annotations

import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from rhythm.engines.interfaces import Rollout
from rhythm.tasks import Reward
from rhythm.trainer.ahead import drawing, load_drawn, save_drawn
from rhythm.trainer.drawing import Drawn
from rhythm.trainer.rollout import ScoredRollout

SECONDS = 20.0


class FakeInfer:
    """Can be waited for until it is abandoned."""

    def __init__(self) -> None:
        self.abandoned = threading.Event()

    def abandon(self) -> None:
        self.abandoned.set()


def made() -> Drawn:
    mask = torch.tensor([[False, True, True], [False, True, False]])
    rollout = Rollout(
        input_ids=torch.tensor([[1, 2, 3], [1, 4, 0]]),
        attention_mask=torch.tensor([[True, True, True], [True, True, False]]),
        response_mask=mask,
        prompt_lens=torch.tensor([1, 1]),
        group=torch.tensor([0, 0]),
        logprobs=torch.tensor([[0.0, -0.1, -0.7], [0.0, -2.5, 0.0]]),
        finished=torch.tensor([True, False]),
    )
    rewards = [Reward(0.2, correct=False, format_ok=True), Reward(0.0, correct=False, format_ok=False, fault="late")]
    scored = ScoredRollout(rollout=rollout, prompts=["é", "é"], responses=["<b>", ""], rewards=rewards)
    return Drawn(scored, torch.tensor([0.2, -0.5]), {"extra_rounds": 1.0})


def test_it_is_drawn_while_the_block_runs() -> None:
    drawn, began, trained = made(), threading.Event(), threading.Event()

    def draw(infer: Any) -> Drawn:
        began.set()
        assert trained.wait(SECONDS)
        return drawn

    infer: Any = FakeInfer()
    with drawing(infer, draw) as result:
        assert began.wait(SECONDS)
        trained.set()
        assert result() is drawn
    assert not infer.abandoned.is_set()


def test_an_error_in_the_thread_is_raised_where_it_is_waited_for() -> None:
    def draw(infer: Any) -> Drawn:
        raise KeyError("lost")

    infer: Any = FakeInfer()
    with pytest.raises(KeyError, match="lost"), drawing(infer, draw) as result:
        result()


def test_an_error_in_the_block_ends_the_thread() -> None:
    ended: list[bool] = []

    def draw(infer: Any) -> Drawn:
        ended.append(infer.abandoned.wait(SECONDS))
        raise RuntimeError("its processes are gone")

    infer: Any = FakeInfer()
    with pytest.raises(ZeroDivisionError), drawing(infer, draw):
        raise ZeroDivisionError
    assert ended == [True]


def test_a_checkpoint_keeps_it_bit_for_bit(tmp_path: Path) -> None:
    assert load_drawn(tmp_path) is None
    before = made()
    save_drawn(before, tmp_path)
    after = load_drawn(tmp_path)
    assert after is not None
    for field in fields(Rollout):
        old, new = (getattr(drawn.scored.rollout, field.name) for drawn in (before, after))
        assert old.dtype == new.dtype
        assert torch.equal(old, new), field.name
    assert torch.equal(before.rewards, after.rewards)
    for name in ("prompts", "responses", "rewards"):
        assert getattr(after.scored, name) == getattr(before.scored, name)
    assert after.metrics == before.metrics
