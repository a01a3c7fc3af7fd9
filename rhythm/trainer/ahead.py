"""One step off: the rollout of the next step is drawn while this step trains, with the weights before it.

It is there before the step's weights are pushed, so that between two steps nothing is in flight. A checkpoint holds it,
as the weights that drew it are in no process then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch

from rhythm.engines.interfaces import Infer, Rollout
from rhythm.tasks import Reward
from rhythm.trainer.drawing import Drawn
from rhythm.trainer.rollout import ScoredRollout

FILE = "rollout_ahead.pt"


class InferAhead(Infer, Protocol):
    """An Infer engine that generates while the trainer works."""

    def abandon(self) -> None:
        """Let a running `generate` raise soon. The engine can't be used any more."""


@contextmanager
def drawing(infer: InferAhead, draw: Callable[[InferAhead], Drawn]) -> Iterator[Callable[[], Drawn]]:
    """Meanwhile `draw(infer)` runs in a thread; yields what waits for its result, and raises what it raises.

    Where the block raises, `infer` is abandoned and the thread has ended.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="rollout") as thread:
        result = thread.submit(draw, infer)
        try:
            yield result.result
        except BaseException:
            infer.abandon()
            raise


def save_drawn(drawn: Drawn, checkpoint: Path) -> None:
    """Write a step's responses into a checkpoint's directory, as tensors and plain data."""
    scored = drawn.scored
    plain = {
        "rollout": asdict(scored.rollout),
        "prompts": scored.prompts,
        "responses": scored.responses,
        "rewards": [asdict(reward) for reward in scored.rewards],
        "shaped": drawn.rewards,
        "metrics": drawn.metrics,
    }
    torch.save(plain, checkpoint / FILE)


def load_drawn(checkpoint: Path) -> Drawn | None:
    """What `save_drawn` wrote; None where the checkpoint holds none."""
    if not (checkpoint / FILE).exists():
        return None
    plain = torch.load(checkpoint / FILE, weights_only=True)
    scored = ScoredRollout(
        rollout=Rollout(**plain["rollout"]),
        prompts=plain["prompts"],
        responses=plain["responses"],
        rewards=[Reward(**reward) for reward in plain["rewards"]],
    )
    return Drawn(scored, plain["shaped"], plain["metrics"])
