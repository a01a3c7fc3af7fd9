"""Evaluates a checkpoint on tasks and writes responses and results; a stopped evaluation continues from its files.

The directory holds settings.json, responses/<task>.jsonl, and once all are done results.json and report.html.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rhythm.engines.interfaces import SeededInfer
from rhythm.engines.stopping import cut_at_stop, response_texts
from rhythm.evaluation.config import EvaluationConfig, MachineConfig, Plan, settings
from rhythm.evaluation.engine import Checkpoint, fingerprint, open_infer, read_checkpoint
from rhythm.evaluation.estimators import INTERVAL
from rhythm.evaluation.page import write_page
from rhythm.evaluation.progress import EvaluationProgress
from rhythm.evaluation.responses import ResponseRow, append_rows, keep_rows, read_rows
from rhythm.evaluation.scores import TaskScores, score
from rhythm.seeds import derive_seed
from rhythm.system.directory_lock import content, lock_directory
from rhythm.system.version import __version__
from rhythm.system.writing import replace_file
from rhythm.tasks import Task
from rhythm.tasks.isolation import IsolatedTask, RewardConfig
from rhythm.tasks.prompts import NoChatTemplateError, PromptLimit, encode_prompt

log = logging.getLogger(__name__)

VERSION = 1  # of the files; another version's are not continued
SETTINGS, RESULTS, REPORT, RESPONSES = "settings.json", "results.json", "report.html", "responses"


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: the directory, and the scores of every task in the order asked."""

    directory: Path
    scores: tuple[TaskScores, ...]


@dataclass(frozen=True)
class Asked:
    """A response to generate: the problem, the number of the sample, and the prompt as text and as tokens."""

    problem: int
    sample: int
    prompt: str
    ids: Sequence[int]


Batch = Sequence[Asked]
"""Responses that are generated together."""


@dataclass(frozen=True)
class AskedTask:
    """What is asked of a task. left_out: problems whose prompts are too long."""

    plan: Plan
    task: Task[Any]
    batches: list[Batch]
    left_out: int

    @property
    def responses(self) -> int:
        """The number of responses of the finished task."""
        return sum(map(len, self.batches))


def default_directory(model: Path) -> Path:
    """evaluations/<name>: of the checkpoint, with its run's in front where it is one of a run's checkpoints."""
    path = model.resolve()
    name = f"{path.parent.parent.name}-{path.name}" if path.parent.name == "checkpoints" else path.name
    return Path("evaluations") / name


def evaluate_checkpoint(
    config: EvaluationConfig, machine: MachineConfig | None = None, console: Console | None = None
) -> Evaluation:
    """Generate responses and score them; responses that are in the directory already are kept.

    A response is drawn by a seed of (seed, task, problem, sample), and generated in the same batch whenever it is:
    an evaluation that was killed and went on has the same results as one that never was, on the same machine.

    Raises:
        ValueError: no such checkpoint, a task that can't be loaded, prompts that the model can't be asked
            (`ask_tasks`), a directory of another evaluation; nothing has been written, no weights have been loaded.
        DirectoryLockedError (a ValueError): another process works there.
        OSError: a file can't be read or written. What was finished stays.
    """
    machine = machine or MachineConfig()
    checkpoint = read_checkpoint(config, machine)
    limit, asked = ask_tasks(config, checkpoint)
    directory = machine.out or default_directory(config.model)
    with lock_directory(directory):
        _check_settings(directory, config)
        (directory / RESPONSES).mkdir(exist_ok=True)
        with open_infer(config, machine, checkpoint) as infer:
            work = [
                _Work(
                    item, directory / RESPONSES / f"{item.plan.title}.jsonl", config.seed, infer, checkpoint.tokenizer
                )
                for item in asked
            ]
            total = sum(item.responses for item in asked)
            with EvaluationProgress(console, responses=total, kept=sum(len(item.kept) for item in work)) as progress:
                for item in work:
                    progress.task(item.plan.title)
                    item.finish(machine.reward, progress)
        scores = tuple(item.scores() for item in work)
        replace_file(directory / RESULTS, results_json(config, scores))
        write_page(directory / REPORT, config, scores, {item.plan.title: item.kept for item in work}, limit)
    return Evaluation(directory, scores)


class _Work:
    """The responses of one task: those on the disk, and those still to be generated."""

    def __init__(self, item: AskedTask, path: Path, seed: int, infer: SeededInfer, tokenizer: Any) -> None:
        self.plan, self._item = item.plan, item
        self._path, self._seed, self._infer, self._tokenizer = path, seed, infer, tokenizer
        there = read_rows(path)
        self.kept: list[ResponseRow] = []
        self._open: list[Batch] = []
        for batch in item.batches:  # part of a batch is generated again with the rest of it, to be the same
            rows = [there[key] for asked in batch if (key := (asked.problem, asked.sample)) in there]
            if len(rows) == len(batch):
                self.kept += rows
            else:
                self._open.append(batch)
        if path.is_file():
            keep_rows(path, self.kept)

    def finish(self, reward: RewardConfig, progress: EvaluationProgress) -> None:
        """Generate and score the missing responses, batch by batch: one is scored while the next is generated."""
        if not self._open:
            return
        name, options = self.plan.task.name, self.plan.task.options.model_dump()
        with IsolatedTask(self._item.task, name, options, **reward.model_dump()) as isolated:
            scored: Callable[[], list[ResponseRow]] = list
            for batch in self._open:
                following = self._answer(batch, isolated)
                self._keep(scored(), progress)
                scored = following
            self._keep(scored(), progress)

    def _keep(self, rows: list[ResponseRow], progress: EvaluationProgress) -> None:
        append_rows(self._path, rows)
        self.kept += rows
        progress.add(len(rows))

    def _answer(self, batch: Batch, task: IsolatedTask) -> Callable[[], list[ResponseRow]]:
        """Generate a batch and begin to score it; what this returns waits for the scores."""
        seeds = [derive_seed(self._seed, "evaluation", self.plan.title, asked.problem, asked.sample) for asked in batch]
        sampling, tokenizer = self.plan.sampling, self._tokenizer
        generated = self._infer.generate_each([asked.ids for asked in batch], sampling, seeds)
        rollout = cut_at_stop(generated, tokenizer, sampling.stop)
        texts = response_texts(rollout, tokenizer)
        rewards = task.start_rewards([task.test[asked.problem] for asked in batch], texts)
        lens, ends = rollout.response_lens.tolist(), rollout.finished.tolist()
        return lambda: [
            ResponseRow(
                problem=asked.problem,
                sample=asked.sample,
                seed=seed,
                prompt=asked.prompt,
                response=text,
                tokens=tokens,
                finished=finished,
                score=reward.score,
                correct=reward.correct,
                format_ok=reward.format_ok,
                fault=reward.fault,
            )
            for asked, seed, text, reward, tokens, finished in zip(
                batch, seeds, texts, rewards(), lens, ends, strict=True
            )
        ]

    def scores(self) -> TaskScores:
        """The scores of the finished task."""
        plan = self.plan
        return score(plan.title, [row.scored for row in self.kept], plan.samples, plan.ks, self._item.left_out)


def ask_tasks(config: EvaluationConfig, checkpoint: Checkpoint) -> tuple[PromptLimit, list[AskedTask]]:
    """How long prompts may be: they leave room for a response in the model's context, and have at most
    sampling.max_prompt_tokens; what is asked of every task, in the order of `config.tasks`. What is left out is logged.

    Raises ValueError naming the task where it can't be loaded, where none of its prompts is left, and where it asks for
    a chat template and the tokenizer has none.
    """
    limit = PromptLimit.of(checkpoint.context, "the model's context", config.sampling.max_prompt_tokens)
    plans = config.plans()
    tasks = [plan.load_task() for plan in plans]
    return limit, [_ask(plan, task, checkpoint.tokenizer, limit) for plan, task in zip(plans, tasks, strict=True)]


def _ask(plan: Plan, task: Task[Any], tokenizer: Any, limit: PromptLimit) -> AskedTask:
    """Batches depend on nothing but the configuration and the checkpoint."""
    problems = task.test[: plan.problems]
    try:
        encoded = [encode_prompt(tokenizer, task.prompt(instance)) for instance in problems]
    except NoChatTemplateError as error:
        raise ValueError(f"task {plan.title}: options.{error}") from error
    asked = [
        Asked(problem, sample, prompt, ids)
        for problem, (prompt, ids) in enumerate(encoded)
        if len(ids) <= limit.longest
        for sample in range(plan.samples)
    ]
    if not asked:
        shortest = min(len(ids) for _, ids in encoded)
        raise ValueError(
            f"task {plan.title}: {limit.why}: no prompt has at most {limit.longest} tokens; the shortest has {shortest}"
        )
    if left_out := sum(len(ids) > limit.longest for _, ids in encoded):
        log.warning(
            "%s: left out %d problems whose prompts have more than %d tokens (%s)",
            plan.title, left_out, limit.longest, limit.why,
        )  # fmt: skip
    at_once = plan.sampling.rows_at_once
    batches: list[Batch] = [asked[i : i + at_once] for i in range(0, len(asked), at_once)]
    return AskedTask(plan, task, batches, left_out)


def results_json(config: EvaluationConfig, scores: Sequence[TaskScores]) -> str:
    """results.json: settings; for every task estimates with intervals, and each problem's number of right responses."""
    tasks = [asdict(task) for task in scores]
    results = {
        "version": VERSION,
        "rhythm": __version__,
        "interval": f"95 %, over problems: {INTERVAL}",
        "settings": settings(config),
        "tasks": tasks,
    }
    return json.dumps(results, indent=1, ensure_ascii=False) + "\n"


def _check_settings(directory: Path, config: EvaluationConfig) -> None:
    """Write settings.json. Raises ValueError where the directory holds something else than this evaluation."""
    path = directory / SETTINGS
    wanted = {"version": VERSION, "weights": fingerprint(config.model), **settings(config)}
    if not content(directory):
        replace_file(path, json.dumps(wanted, indent=1, ensure_ascii=False) + "\n")
        return
    if not path.is_file():
        raise ValueError(f"{directory} holds something else than an evaluation: choose another out=…")
    try:
        recorded = json.loads(path.read_bytes())
        changed = [key for key in wanted if recorded[key] != wanted[key]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or of another version: choose another out=…, or delete {directory}"
        ) from error
    if changed:
        listed = ", ".join(f"{key} was {_short(recorded[key])}, is {_short(wanted[key])}" for key in changed[:5])
        raise ValueError(f"{directory} holds another evaluation ({listed}): choose another out=…, or delete it")


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]} …"
