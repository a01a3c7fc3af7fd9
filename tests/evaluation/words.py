"""A task of which a random model gets some right: the response has to begin with a digit."""

from __future__ import annotations

from pydantic import BaseModel, Field

from rhythm.tasks import Reward


class WordsConfig(BaseModel, extra="forbid", frozen=True):
    count: int = Field(default=12, ge=0, description="test instances")
    longest: int = Field(default=3, description="letters of the longest prompt")


class Words:
    config_class = WordsConfig

    def __init__(self, config: WordsConfig) -> None:
        self.train: list[str] = []
        self.test = [str(1 + i) * (1 + i % config.longest) for i in range(config.count)]

    def prompt(self, instance: str) -> str:
        return f"{instance}>"

    def solution(self, instance: str) -> str:
        return "1"

    def reward(self, instance: str, response: str) -> Reward:
        correct = response[:1].isdigit()
        return Reward(float(correct), correct, format_ok=bool(response))


class Long(Words):
    """The first prompt is as long as the option says, the others have a letter."""

    def __init__(self, config: WordsConfig) -> None:
        super().__init__(config)
        self.test = ["1" * config.longest, *"23456789"[: config.count - 1]]
