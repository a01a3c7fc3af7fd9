"""The paper's sets as presets of the jsonl task: where each is published, its columns, its prompt and its grader.

`path` may name a copy on disk, with the same columns; where the set has a test split, give `held_out` or `test_path`
then.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rhythm.tasks.graders import GraderName
from rhythm.tasks.jsonl import Jsonl, JsonlConfig

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
"""The system prompt of the paper (appendix A.1 and B.1)."""

_TEST_SET = ("test_path", "test_split", "held_out")


def _default(value: Any, of: str) -> Any:
    return Field(default=value, description=JsonlConfig.model_fields[of].description)


class PresetConfig(JsonlConfig, frozen=True):
    """A jsonl task whose options have other defaults."""

    system: str | None = _default(BOXED, "system")

    @model_validator(mode="before")
    @classmethod
    def _the_given_test_set(cls, values: object) -> object:
        """One of its three options, where it is given, replaces the preset's."""
        if isinstance(values, dict) and any(values.get(name) is not None for name in _TEST_SET):
            return {**dict.fromkeys(_TEST_SET), **values}
        return values


class Gsm8kConfig(PresetConfig, frozen=True):
    """openai/gsm8k: the answer column is a worked solution, the number after its ####."""

    path: str = _default("openai/gsm8k", "path")
    subset: str | None = _default("main", "subset")
    test_split: str | None = _default("test", "test_split")
    prompt: str = _default("question", "prompt")
    answer_after: str | None = _default("####", "answer_after")
    solution: str | None = _default("answer", "solution")
    grader: GraderName = _default("numeric", "grader")


class DapoMathConfig(PresetConfig, frozen=True):
    """BytedTsinghua-SIA/DAPO-Math-17k: 17,000 problems, each a hundred times; prompts ask for a line `Answer: …`."""

    path: str = _default("BytedTsinghua-SIA/DAPO-Math-17k", "path")
    held_out: float | None = _default(0.01, "held_out")
    answer: str = _default("reward_model.ground_truth", "answer")
    id: str | None = _default("extra_info.index", "id")
    system: str | None = _default(None, "system")
    unusable: Literal["refuse", "drop"] = _default("drop", "unusable")


class CrossThinkConfig(PresetConfig, frozen=True):
    """nvidia/Nemotron-CrossThink, its questions of many domains: answered by a letter or a short text."""

    path: str = _default("nvidia/Nemotron-CrossThink", "path")
    split: str = _default("train_qa", "split")
    held_out: float | None = _default(0.01, "held_out")
    answer: str = _default("reward_model.ground_truth", "answer")
    grader: GraderName = _default("choice", "grader")
    unusable: Literal["refuse", "drop"] = _default("drop", "unusable")


class _EvaluationConfig(PresetConfig, frozen=True):
    """A set to evaluate on: all of it is held out."""

    held_out: float | None = _default(1.0, "held_out")
    prompt: str = _default("problem", "prompt")


class Aime24Config(_EvaluationConfig, frozen=True):
    """HuggingFaceH4/aime_2024: 30 problems, whole numbers from 0 to 999."""

    path: str = _default("HuggingFaceH4/aime_2024", "path")
    id: str | None = _default("id", "id")


class Aime25Config(_EvaluationConfig, frozen=True):
    """math-ai/aime25: 30 problems."""

    path: str = _default("math-ai/aime25", "path")
    split: str = _default("test", "split")
    id: str | None = _default("id", "id")


class Amc23Config(_EvaluationConfig, frozen=True):
    """math-ai/amc23: 40 problems, their choices left out and their answers numbers."""

    path: str = _default("math-ai/amc23", "path")
    split: str = _default("test", "split")
    prompt: str = _default("question", "prompt")
    id: str | None = _default("id", "id")


class Math500Config(_EvaluationConfig, frozen=True):
    """HuggingFaceH4/MATH-500: 500 problems of MATH."""

    path: str = _default("HuggingFaceH4/MATH-500", "path")
    split: str = _default("test", "split")
    id: str | None = _default("unique_id", "id")
    solution: str | None = _default("solution", "solution")


class OlympiadBenchConfig(_EvaluationConfig, frozen=True):
    """Hothan/OlympiadBench: its English mathematics with an answer, without pictures; the answer is a list of one."""

    path: str = _default("Hothan/OlympiadBench", "path")
    subset: str | None = _default("OE_TO_maths_en_COMP", "subset")
    prompt: str = _default("question", "prompt")
    answer: str = _default("final_answer", "answer")
    id: str | None = _default("id", "id")
    unusable: Literal["refuse", "drop"] = _default("drop", "unusable")


class Gsm8k(Jsonl):
    """Gsm8kConfig as a task."""

    config_class: ClassVar[type[JsonlConfig]] = Gsm8kConfig


class DapoMath(Jsonl):
    """DapoMathConfig as a task."""

    config_class: ClassVar[type[JsonlConfig]] = DapoMathConfig


class CrossThink(Jsonl):
    """CrossThinkConfig as a task."""

    config_class: ClassVar[type[JsonlConfig]] = CrossThinkConfig


class Aime24(Jsonl):
    """Aime24Config as a task."""

    config_class: ClassVar[type[JsonlConfig]] = Aime24Config


class Aime25(Jsonl):
    """Aime25Config as a task."""

    config_class: ClassVar[type[JsonlConfig]] = Aime25Config


class Amc23(Jsonl):
    """Amc23Config as a task."""

    config_class: ClassVar[type[JsonlConfig]] = Amc23Config


class Math500(Jsonl):
    """Math500Config as a task."""

    config_class: ClassVar[type[JsonlConfig]] = Math500Config


class OlympiadBench(Jsonl):
    """OlympiadBenchConfig as a task."""

    config_class: ClassVar[type[JsonlConfig]] = OlympiadBenchConfig
