"""The training loop: evaluates, steps, logs and writes checkpoints; stops when asked and on NaN."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rhythm.cluster.errors import TrainLostError
from rhythm.credit.heads import HeadGroups
from rhythm.engines.interfaces import NonFiniteError
from rhythm.evaluation.scores import as_metrics
from rhythm.reports.run import write_report
from rhythm.seeds import generator
from rhythm.system.directory_lock import lock_directory
from rhythm.system.progress import Heartbeat, duration
from rhythm.system.writing import naming
from rhythm.tasks import Task
from rhythm.tasks.scoring import FAULTS
from rhythm.trainer.ahead import load_drawn, save_drawn
from rhythm.trainer.checkpoint import RunState, latest_checkpoint, save_checkpoint
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.drawing import Drawn
from rhythm.trainer.evaluation import FurtherTask, evaluate, evaluate_further, isolated_rewards
from rhythm.trainer.interrupts import Interrupts
from rhythm.trainer.metrics import MetricsLog, Record, Stopwatch, read_metrics
from rhythm.trainer.notices import Notices
from rhythm.trainer.progress import RunProgress
from rhythm.trainer.run_dir import CHECKPOINTS, SAMPLES, open_run_dir
from rhythm.trainer.samples import first_rows, sample_lines, write_samples
from rhythm.trainer.setup import (
    RunTasks,
    build_tasks,
    check_machine,
    initial_checkpoint,
    load_vocabulary,
    open_engines,
    open_reward_worker,
)
from rhythm.trainer.step import Engines, StepAbandonedError, train_step
from rhythm.trainer.tracking import profiled
from rhythm.trainer.watch import watch_rhythm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    step: training steps done. start_accuracy, final_accuracy: held-out accuracy before the first and after the last
    step; best_accuracy: the best one, measured after best_step. NaN where not measured. stopped_by: the signal that
    ended the run early. report: path of report.html.
    """

    run_dir: Path
    step: int
    start_accuracy: float
    final_accuracy: float
    best_accuracy: float
    best_step: int
    stopped_by: signal.Signals | None
    report: Path


class NonFiniteRunError(RuntimeError):
    """The run stopped because a loss or gradient is not finite; the message names the file with the batch."""


def run(config: TrainConfig, *, resume: bool = False, console: Console | None = None) -> RunSummary:
    """Train as `config` says; with `resume`, continue the run in its directory, or start it if there is none.

    The first SIGINT or SIGTERM saves a checkpoint and returns early; a second one ends the process.

    Raises:
        SetupError, RunDirectoryError, DirectoryLockedError: the run can't start with this configuration or in this
            directory, or another process is using the directory; nothing has been written.
        OSError: a file can't be written, for example because the disk is full; finished files are kept.
        DamagedCheckpointError: on resume, all checkpoints are damaged.
        NonFiniteRunError: a loss or gradient is NaN or infinite.
        LostError, RemoteError, ParityError: in a cluster, processes were lost too often, a process raised, or the
            engines don't hold the same weights.
    """
    console = console or Console(stderr=True)
    check_machine(config)
    tasks = build_tasks(config)
    with lock_directory(config.run_dir):
        return _run(config, tasks, resume, console)


def _run(config: TrainConfig, tasks: RunTasks, resume: bool, console: Console) -> RunSummary:
    """`run`, with the directory locked."""
    resumed = open_run_dir(config, resume=resume)
    # Lost processes restart from the checkpoint that the engines were built with, and the KL reference is the model
    # that the run began with. The run's own checkpoints can't serve: old ones are deleted as it goes on.
    keeps_start = config.cluster is not None or config.loss.kl_coef > 0
    start = resumed[0] if resumed and not keeps_start else initial_checkpoint(config, tasks.whole, console)
    vocabulary = load_vocabulary(start, config.model)
    restarts = 0
    with (
        open_reward_worker(config, tasks.fitted) as isolated,
        isolated_rewards(tasks.further, config.reward) as further,
        open_engines(config, tasks.fitted, vocabulary) as build,
    ):
        while True:
            try:
                with _saying("building engines"):
                    engines = build(start, restarts)
                state, stopped_by = _train(config, engines, isolated, further, vocabulary.tokenizer, console, resumed)
                break
            except TrainLostError as error:
                restarts += 1
                resumed = _go_back(config, error, restarts)
    return _summary(config, state, stopped_by)


def _saying(what: str) -> Heartbeat:
    """Logs that `what` is still going on: building engines takes minutes for a large model."""
    began = time.monotonic()
    return Heartbeat(lambda: f"{what} for {duration(time.monotonic() - began)}", log.info)


def _train(
    config: TrainConfig,
    engines: Engines,
    task: Task[Any],
    further: Sequence[FurtherTask],
    tokenizer: Any,
    console: Console,
    resumed: tuple[Path, RunState] | None,
) -> tuple[RunState, signal.Signals | None]:
    """Train to the end from `resumed`, a checkpoint and its state, or from the beginning. Returns the last state, and
    the signal that ended the run early.
    """
    state, drawn = RunState(step=0), None
    if resumed is not None:
        checkpoint, state = resumed
        drawn = load_drawn(checkpoint) if config.draws_ahead(state.step + 1) else None
        engines.train.load(checkpoint)
        engines.weight_sync.sync(state.step)
        log.info("continuing after step %d, from %s", state.step, checkpoint)
    metrics = MetricsLog(
        config.run_dir,
        tensorboard=config.tensorboard,
        after_step=state.step if resumed else None,
        wandb=config.wandb,
        config=config.model_dump(mode="json"),
    )
    progress = RunProgress(console, steps=config.steps, done=state.step)
    with closing(metrics), Interrupts() as interrupts, progress:
        trainer = _Trainer(config, engines, task, further, tokenizer, metrics, progress, interrupts.asked)
        return trainer.train(state, drawn, measured=resumed is not None), interrupts.received


def _go_back(config: TrainConfig, error: TrainLostError, restarts: int) -> tuple[Path, RunState] | None:
    """The latest undamaged checkpoint, if there is one. Raises `error` after cluster.max_restarts restarts."""
    assert config.cluster is not None  # only a cluster raises TrainLostError
    if restarts > config.cluster.max_restarts:
        raise error
    latest = latest_checkpoint(config.run_dir / CHECKPOINTS)
    step = latest[1].step if latest else 0
    log.warning("%s", error)
    log.warning("going back to step %d: restart %d of at most %d", step, restarts, config.cluster.max_restarts)
    return latest


@dataclass(frozen=True)
class _Trainer:
    config: TrainConfig
    engines: Engines
    task: Task[Any]
    further: Sequence[FurtherTask]
    tokenizer: Any
    metrics: MetricsLog
    progress: RunProgress
    stop_asked: Callable[[], bool]

    def train(self, state: RunState, drawn: Drawn | None, *, measured: bool) -> RunState:
        """Run the remaining steps, or until asked to stop. `drawn`: what was drawn ahead for the first of them.
        `measured`: `state` is from a checkpoint, so it has been evaluated and saved already.
        """
        saved = state.step if measured else -1
        if not measured:
            state = self._measure_start(state)
        notices = Notices(self.config.steps - state.step)
        self.progress.begin_steps()
        while state.step < self.config.steps and not self.stop_asked():
            watch = Stopwatch()
            try:
                with self._profiled(state.step + 1):
                    record, groups, drawn = train_step(
                        self.engines,
                        self.task,
                        self.tokenizer,
                        self.config,
                        step=state.step + 1,
                        groups=_groups(state),
                        drawn=drawn,
                        stop_asked=self.stop_asked,
                        phase=self.progress.phase,
                    )
            except StepAbandonedError:
                break
            except NonFiniteError as error:
                raise self._stopped_by(error, state.step + 1) from error
            state = _with_groups(state.model_copy(update={"step": state.step + 1}), groups)
            record["tokens_per_second"] = record["response_tokens"] / watch.total
            if state.step == self.config.steps or state.step % self.config.evaluation.every_steps == 0:
                state = self._measure(state, record)
            record["seconds_total"] = watch.total
            self.metrics.write(record)
            self.progress.step(state.step, record)
            notices.look(record)
            if self._saves(state):
                saved = self._save(state, drawn)
        if saved != state.step:
            self._save(state, drawn)
        return state

    def _profiled(self, step: int) -> AbstractContextManager[None]:
        path = self.config.run_dir / "profile" / f"step_{step:06d}.json"
        return profiled(path) if step in self.config.profile_steps else nullcontext()

    def _measure_start(self, state: RunState) -> RunState:
        watch = Stopwatch()
        record: Record = {"step": 0.0}
        state = self._measure(state, record)
        record["seconds_total"] = watch.total
        self.metrics.write(record)
        log.info("held-out accuracy before training: %.1f%%", 100 * record["accuracy"])
        return state

    def _measure(self, state: RunState, record: Record) -> RunState:
        """Evaluate, write samples, add accuracy and time to the record; returns the state with the best accuracy."""
        self.progress.phase("evaluation")
        config, watch = self.config, Stopwatch()
        scored = evaluate(
            self.engines.infer,
            self.task,
            self.tokenizer,
            config.evaluation,
            config.sampling,
            seed=config.seed,
            step=state.step,
        )
        record["accuracy"] = scored.accuracy
        record["accuracy_instances"] = float(len(scored.rewards))
        for kind in FAULTS:
            record[f"accuracy_rewards_{kind}"] = float(sum(reward.fault == kind for reward in scored.rewards))
        for scores in evaluate_further(
            self.engines.infer, self.further, self.tokenizer, seed=config.seed, step=state.step
        ):
            record.update(as_metrics(scores))
        if config.evaluation.samples:
            lines = sample_lines(
                self.engines,
                self.tokenizer,
                first_rows(scored, config.evaluation.samples),
                config.signals,
                config.credit,
                groups=_groups(state),
                generator=generator(config.seed, "samples", state.step),
                step=state.step,
            )
            with naming(config.run_dir / SAMPLES):
                write_samples(config.run_dir / SAMPLES, state.step, lines)
        if config.evaluation.rhythm_responses:
            watched, now = watch_rhythm(
                self.engines,
                self.tokenizer,
                first_rows(scored, config.evaluation.rhythm_responses),
                config.signals,
                config.credit,
                groups=_groups(state),
                before=_fixed(state.watched_local, state.watched_global),
            )
            record.update(watched)
            heads = {"watched_local": now.local[0].tolist(), "watched_global": now.global_[0].tolist()}
            state = state.model_copy(update=heads)
        record["seconds_evaluation"] = watch.total
        if state.best_accuracy is None or scored.accuracy > state.best_accuracy:
            state = state.model_copy(update={"best_accuracy": scored.accuracy, "best_step": state.step})
        return state

    def _saves(self, state: RunState) -> bool:
        """Whether a checkpoint is due after this step."""
        config = self.config.checkpoint
        best = config.keep_best and state.best_step == state.step
        return best or state.step == self.config.steps or state.step % config.every_steps == 0

    def _save(self, state: RunState, drawn: Drawn | None) -> int:
        """Write a checkpoint, with what was drawn ahead for the next step; returns its step."""

        def write(checkpoint: Path) -> None:
            self.engines.train.save(checkpoint)
            if drawn is not None:
                save_drawn(drawn, checkpoint)

        self.progress.phase("checkpoint")
        config = self.config.checkpoint
        save_checkpoint(self.config.run_dir / CHECKPOINTS, state, write, config.keep, config.keep_best)
        return state.step

    def _stopped_by(self, error: NonFiniteError, step: int) -> NonFiniteRunError:
        path = self.config.run_dir / f"failed_batch_step_{step:06d}.pt"
        with naming(path):
            torch.save({"step": step, "what": error.what, "batch": asdict(error.batch)}, path)
        return NonFiniteRunError(
            f"step {step}: {error}. The mini-batch that caused it changed no weight and is saved in {path} "
            f"(torch.load); the checkpoints in {self.config.run_dir / CHECKPOINTS} are from before it"
        )


def _groups(state: RunState) -> HeadGroups | None:
    """The calibrated head groups, one row; None before calibration and for other groupings."""
    return _fixed(state.local_heads, state.global_heads)


def _fixed(local: list[bool] | None, global_: list[bool] | None) -> HeadGroups | None:
    """Groups of one row; None where they are not known."""
    if local is None or global_ is None:
        return None
    return HeadGroups(local=torch.tensor([local]), global_=torch.tensor([global_]))


def _with_groups(state: RunState, groups: HeadGroups | None) -> RunState:
    if groups is None:
        return state
    update = {"local_heads": groups.local[0].tolist(), "global_heads": groups.global_[0].tolist()}
    return state.model_copy(update=update)


def _summary(config: TrainConfig, state: RunState, stopped_by: signal.Signals | None) -> RunSummary:
    accuracy = {row["step"]: row.get("accuracy") for row in read_metrics(config.run_dir / "metrics.jsonl")}
    start, final = accuracy.get(0), accuracy.get(state.step)
    return RunSummary(
        run_dir=config.run_dir,
        step=state.step,
        start_accuracy=math.nan if start is None else start,
        final_accuracy=math.nan if final is None else final,
        best_accuracy=math.nan if state.best_accuracy is None else state.best_accuracy,
        best_step=state.best_step or 0,
        stopped_by=stopped_by,
        report=write_report(config.run_dir),
    )
