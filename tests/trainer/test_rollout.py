"""Rollouts are scored part by part, while the engine generates the next part."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from rhythm.engines.batches import concatenate, take_rows
from rhythm.engines.interfaces import Rollout, SamplingConfig
from rhythm.tasks import isolated
from rhythm.trainer.rollout import roll_out

TASK = """
from pathlib import Path
from pydantic import BaseModel
from rhythm.tasks import Reward

class Options(BaseModel):
    directory: Path

class Marks:
    config_class = Options

    def __init__(self, config):
        self.config, self.train, self.test = config, ["p", "q"], ["r"]

    def prompt(self, instance):
        return instance

    def solution(self, instance):
        return instance

    def reward(self, instance, response):
        (self.config.directory / f"{instance}{response}").touch()
        return Reward(score=float(int(response)), correct=instance == "q", format_ok=True)
"""


class Letters:
    """A tokenizer of characters."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


class Parts:
    """Generates the digits 0, 1, 2 …, handing over these parts of the rows; before it goes on after a part, it waits
    until all of that is scored.
    """

    def __init__(self, parts: Sequence[Sequence[int]], directory: Path) -> None:
        self._parts, self._directory = parts, directory

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingConfig,
        seed: int,
        done: Callable[[Rollout], None] | None = None,
    ) -> Rollout:
        rows = [(group, prompt) for group, prompt in enumerate(prompts) for _ in range(n)]
        whole = concatenate([row(group, prompt, ord(str(at))) for at, (group, prompt) in enumerate(rows)], pad_id=0)
        handed = 0
        for part in self._parts:
            assert done is not None
            done(take_rows(whole, torch.tensor(part)))
            handed += len(part)
            end = time.monotonic() + 60
            while len(list(self._directory.iterdir())) < handed:
                assert time.monotonic() < end, "not scored while the engine is at work"
                time.sleep(0.01)
        return whole


def row(group: int, prompt: Sequence[int], token: int) -> Rollout:
    ids = torch.tensor([[*prompt, token]])
    inside = torch.arange(ids.shape[1]) >= len(prompt)
    return Rollout(
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        response_mask=inside[None],
        prompt_lens=torch.tensor([len(prompt)]),
        group=torch.tensor([group]),
        logprobs=torch.zeros(1, ids.shape[1]),
        finished=torch.tensor([True]),
    )


@pytest.fixture(scope="module", autouse=True)
def _module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    directory = tmp_path_factory.mktemp("task")
    (directory / "marks.py").write_text(TASK)
    sys.path.insert(0, str(directory))
    yield
    sys.path.remove(str(directory))


@pytest.mark.parametrize(
    "parts",
    [
        ((0, 1), (2, 3, 4), (5,)),
        ((0, 1), (2, 3, 4)),  # the rest is in the result alone
        ((3, 4, 5), (0, 1, 2)),  # the second prompt's first
        ((3, 4), (0, 5)),
        (),
        (range(6),),
    ],
)
def test_parts_are_scored_while_others_are_generated(parts: Sequence[Sequence[int]], tmp_path: Path) -> None:
    with isolated("marks:Marks", {"directory": tmp_path}, workers=2) as task:
        scored = roll_out(
            Parts(parts, tmp_path),
            task,
            Letters(),
            ["p", "q"],
            responses_per_prompt=3,
            sampling=SamplingConfig(),
            seed=0,
        )
    assert scored.responses == ["0", "1", "2", "3", "4", "5"]
    assert scored.prompts == ["p", "p", "p", "q", "q", "q"]
    assert scored.scores.tolist() == [0, 1, 2, 3, 4, 5]
    assert [reward.correct for reward in scored.rewards] == [False] * 3 + [True] * 3
    assert {path.name for path in tmp_path.iterdir()} == {"p0", "p1", "p2", "q3", "q4", "q5"}, "each once"
