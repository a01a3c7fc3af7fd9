"""What is evaluated: tasks, how many responses to each problem, and how they are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from rhythm.engines.interfaces import SamplingConfig
from rhythm.engines.vllm.config import VllmConfig
from rhythm.evaluation.estimators import usual_k
from rhythm.tasks import Task, load_task
from rhythm.tasks.config import TaskConfig
from rhythm.tasks.isolation import RewardConfig

LABEL = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Of a task: it names a file and metrics."""


class EvalTask(TaskConfig, extra="forbid", frozen=True):
    """A task to evaluate. For keys that are null, the settings for all tasks hold."""

    name: str = Field(description="a task of rhythm's own, or module:Class")
    label: str = Field(
        default="", pattern=rf"{LABEL}|^$", max_length=100, description="the task's name in results; empty: from `name`"
    )
    samples: int | None = Field(default=None, ge=1, description="responses to each problem")
    k: tuple[int, ...] | None = Field(default=None, description="pass@k for these k")
    problems: int | None = Field(default=None, ge=1, description="problems used, from the first test instance on")
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="of the responses")
    top_p: float | None = Field(default=None, gt=0, le=1, description="sample within this probability mass")
    max_new_tokens: int | None = Field(default=None, ge=1, description="longest response, in tokens")

    @property
    def title(self) -> str:
        """The label, or what it is made of: `a.b:Own` is Own."""
        return self.label or "".join(c if c.isalnum() or c in "._-" else "-" for c in self.name.rpartition(":")[2])

    def resolved(self, samples: int, k: Sequence[int] | None, problems: int | None, sampling: SamplingConfig) -> Plan:
        """With what holds for all tasks in place of what is null.

        Raises ValueError naming the key: k outside 1 … samples; several samples at temperature 0, all of them equal.
        """
        n = samples if self.samples is None else self.samples
        given = self.k if self.k is not None else k
        ks = usual_k(n) if given is None else tuple(sorted(set(given)))
        if wrong := [value for value in ks if not 1 <= value <= n]:
            raise ValueError(f"k is {wrong[0]} for task {self.title}: must be from 1 to samples = {n}")
        own = {key: getattr(self, key) for key in ("temperature", "top_p", "max_new_tokens")}
        drawn = sampling.model_copy(update={key: value for key, value in own.items() if value is not None})
        if n > 1 and drawn.temperature == 0:
            raise ValueError(
                f"samples is {n} for task {self.title}: must be 1 at temperature 0, where all responses to a problem "
                "are equal"
            )
        return Plan(self, n, ks, self.problems if self.problems is not None else problems, drawn)


@dataclass(frozen=True)
class Plan:
    """A task with its number of samples, its k, its number of problems (None: all) and its sampling."""

    task: EvalTask
    samples: int
    ks: tuple[int, ...]
    problems: int | None
    sampling: SamplingConfig

    @property
    def title(self) -> str:
        """The task's name in results."""
        return self.task.title

    def load_task(self, where: str = "task ") -> Task[Any]:
        """The task.

        Raises ValueError, beginning with `where` and the title, for options that it refuses and without test instances.
        """
        try:
            task = load_task(self.task.name, self.task.options.model_dump())
        except ValueError as error:
            raise ValueError(f"{where}{self.title}: {error}") from error
        if not task.test:
            raise ValueError(f"{where}{self.title}: the task has no test instances")
        return task


def _each_by_itself(value: object) -> object:
    """Names become mappings; a fault names its task: `tasks[1].samples is 0: …`."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list of names or of mappings with name, options, samples …, got {value!r:.80}")
    tasks = []
    for place, item in enumerate(value):
        if isinstance(item, EvalTask):
            tasks.append(item)
            continue
        if not isinstance(item, str | Mapping):
            raise ValueError(f"tasks[{place}] is {item!r:.80}: must be a name, or a mapping with name, options …")
        try:
            tasks.append(EvalTask.model_validate({"name": item} if isinstance(item, str) else item))
        except ValidationError as error:
            raise ValueError("; ".join(_faults(place, error))) from error
    titles = [task.title for task in tasks]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise ValueError(f"two tasks are called {twice[0]}: give each a label of its own, {{name: …, label: …}}")
    return tasks


def _faults(place: int, error: ValidationError) -> list[str]:
    faults = []
    for fault in error.errors(include_url=False, include_context=False):
        key = ".".join([f"tasks[{place}]", *map(str, fault["loc"])])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            faults.append(f"{key}: unknown key")
        elif fault["type"] in ("missing", "value_error"):
            faults.append(f"{key}: {message}")
        else:
            faults.append(f"{key} is {fault['input']!r:.80}: {message[0].lower()}{message[1:]}")
    return faults


EvalTasks = Annotated[tuple[EvalTask, ...], BeforeValidator(_each_by_itself)]
"""A list of names, or of mappings with `name`, `options`, `label`, `samples`, `k`, `problems`, `temperature` …"""

TASKS_ARE = (
    "tasks: names, or mappings with name, options, label, samples, k, problems, temperature, top_p, max_new_tokens"
)


class EvaluationConfig(BaseModel, extra="forbid", frozen=True):
    """The settings that determine the responses. A directory can only be continued with the same ones."""

    model: Path = Field(description="needed: directory of a causal transformers checkpoint with its tokenizer")
    tasks: EvalTasks = Field(description=f"needed: {TASKS_ARE}")
    samples: int = Field(
        default=1, ge=1, description="responses to each problem, where a task has no number of its own"
    )
    k: tuple[int, ...] | None = Field(
        default=None, description="pass@k for these k; null: 1, 2, 4, … and the number of samples"
    )
    problems: int | None = Field(
        default=None, ge=1, description="problems of each task, from the first test instance on; null: all"
    )
    seed: int = Field(default=0, ge=0, description="of the responses, with the task, the problem and the sample")
    sampling: SamplingConfig = Field(default=SamplingConfig())
    engine: Literal["transformers", "vllm"] = Field(default="transformers", description="generates the responses")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the model's weights; auto: float32 on a CPU, elsewhere bfloat16"
    )

    @field_validator("tasks")
    @classmethod
    def _some(cls, tasks: tuple[EvalTask, ...]) -> tuple[EvalTask, ...]:
        if not tasks:
            raise ValueError("must name at least one task")
        return tasks

    @model_validator(mode="after")
    def _can_be_done(self) -> EvaluationConfig:
        self.plans()
        return self

    def plans(self) -> list[Plan]:
        """The plan of every task, in order."""
        return [task.resolved(self.samples, self.k, self.problems, self.sampling) for task in self.tasks]


class MachineConfig(BaseModel, extra="forbid", frozen=True):
    """Where an evaluation is computed and written."""

    out: Path | None = Field(
        default=None, description="directory of the results; null: evaluations/ and the model's name"
    )
    device: str = Field(default="auto", description="auto (CUDA where there is one), cpu, cuda, cuda:1 …")
    trust_remote_code: bool = Field(default=False, description="run Python code that the checkpoint brings along")
    reward: RewardConfig = RewardConfig()
    vllm: VllmConfig = Field(default=VllmConfig(), description="with engine=vllm: its engine")


def settings(config: EvaluationConfig) -> dict[str, Any]:
    """The settings that settings.json keeps, to compare when the evaluation is continued."""
    return config.model_dump(mode="json", include=set(EvaluationConfig.model_fields))
