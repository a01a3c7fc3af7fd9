"""Builds a run's task, model and engines from its configuration."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer

from rhythm import checkpoints
from rhythm.checkpoints import checkpoint_end_tokens, loading_options, refusal_names
from rhythm.engines.local.attn import ObserveAttn
from rhythm.engines.local.infer import GenerateInfer, max_positions
from rhythm.engines.local.train import TorchTrain
from rhythm.engines.local.weights import LocalWeightSync
from rhythm.ops.backends import check_backend
from rhythm.system.allocator import keep_freed_memory
from rhythm.tasks import Task, load_task
from rhythm.tasks.isolation import IsolatedTask
from rhythm.tasks.prompts import ChatPrompt, NoChatTemplateError, PromptLimit
from rhythm.tiny.warm_start import tokenizer_of, warm_start, worked_solutions
from rhythm.trainer.cluster_engines import check_cluster, open_cluster
from rhythm.trainer.config import ModelConfig, TrainConfig
from rhythm.trainer.evaluation import FurtherTask, load_further_tasks
from rhythm.trainer.prompts import fit_held_out, fit_prompts
from rhythm.trainer.step import Engines

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with the token ids that engines need. end_ids: tokens that end a response; pad_id: padding."""

    tokenizer: Any
    end_ids: tuple[int, ...]
    pad_id: int


BuildEngines = Callable[[Path, int], Engines]
"""Builds engines with the weights of a checkpoint. Second argument: how often the training ranks were restarted."""


class SetupError(ValueError):
    """The configuration names something that is missing or can't be used; the message names the key."""


def check_machine(config: TrainConfig) -> None:
    """Raise SetupError for anything missing on this machine. Builds and writes nothing."""
    if config.model.path is not None and not config.model.path.is_dir():
        raise SetupError(f"model.path is {config.model.path}: no such directory")
    if config.cluster is not None:
        try:
            check_cluster(config, config.cluster)
        except ValueError as error:
            raise SetupError(str(error)) from error
    if config.model.path is not None:
        _check_code(config.model.path, config.model)
    if config.cluster is not None and config.cluster.gpus:
        return  # the statistics run on the cluster's GPUs, not in this process
    device = pick_device("cpu" if config.cluster is not None else config.model.device)
    try:
        check_backend(config.signals.backend, device)
    except (ValueError, RuntimeError) as error:
        raise SetupError(f"signals.backend: {error}") from error


def _check_code(checkpoint: Path, config: ModelConfig) -> None:
    """Raise SetupError where the checkpoint's configuration or tokenizer can't be read, has no end token, or needs code
    that model.trust_remote_code doesn't allow.
    """
    try:
        with _refused(checkpoint):
            AutoConfig.from_pretrained(checkpoint, **loading_options(config.trust_remote_code))
        load_vocabulary(checkpoint, config)
    except SetupError:
        raise
    except (OSError, ValueError) as error:
        raise SetupError(f"model.path is {checkpoint}: {str(error).strip().splitlines()[0]}") from error


@dataclass(frozen=True)
class RunTasks:
    """What a run asks.

    whole: the run's own task, on all of which the tiny model is warm-started; fitted: the same without prompts that are
    too long; further: the tasks of `evaluation.tasks`, without such prompts.
    """

    whole: Task[Any]
    fitted: Task[Any]
    further: list[FurtherTask]


def build_tasks(config: TrainConfig) -> RunTasks:
    """The run's tasks, with the prompts that leave room for a response in the model's context. Reads no weights and
    writes nothing: the tiny model's tokenizer is built as its warm start will build it.

    Raises SetupError where a task can't be had, where no prompt is left, where a chat template is asked for and the
    tokenizer has none, and where batch.max_tokens has no room for the longest prompt and its response.
    """
    task, further = build_task(config), _build_further_tasks(config)
    tokenizer, limit, context = _prompts(config, task)
    return RunTasks(
        task,
        _fit_task(config, task, tokenizer, limit, context),
        [_fit_further(item, tokenizer, limit) for item in further],
    )


def build_task(config: TrainConfig) -> Task[Any]:
    """The task. Raises SetupError where its options don't fit together or it has too few instances."""
    try:
        task = load_task(config.task.name, config.task.options.model_dump())
    except ValueError as error:
        raise SetupError(f"task.options: {error}") from error
    if config.steps and not task.train:
        raise SetupError(
            "task.options: all instances are held out, so there is nothing to train on; with steps=0 they count"
        )
    if config.model.path is None and any(isinstance(task.prompt(one), ChatPrompt) for one in task.test[:1]):
        raise SetupError("task.options.chat is true: the tiny model has no chat template; give model.path")
    wanted = config.warm_start.examples
    if config.model.path is None and wanted is not None and wanted > len(task.train):
        raise SetupError(f"warm_start.examples is {wanted}: the task has {len(task.train)} training instances")
    return task


def _build_further_tasks(config: TrainConfig) -> list[FurtherTask]:
    """The tasks of `evaluation.tasks`. Raises SetupError where one can't be had."""
    try:
        further = load_further_tasks(config.evaluation, config.sampling)
    except ValueError as error:
        raise SetupError(str(error)) from error
    for item in further:
        if config.model.path is None and any(
            isinstance(item.task.prompt(one), ChatPrompt) for one in item.task.test[:1]
        ):
            raise SetupError(
                f"evaluation.tasks, {item.plan.title}: options.chat is true: the tiny model has no chat template; give "
                "model.path"
            )
    return further


def _prompts(config: TrainConfig, task: Task[Any]) -> tuple[Any, PromptLimit, int]:
    """The tokenizer, how long prompts may be, and the longest prompt and response together, in tokens."""
    checkpoint, trust = config.model.path, config.model.trust_remote_code
    if checkpoint is None:
        start = config.warm_start
        tokenizer: Any = tokenizer_of(worked_solutions(task, start), start)
        context, named = start.model.max_positions, "warm_start.model.max_positions"
    else:
        with _refused(checkpoint):
            model = AutoConfig.from_pretrained(checkpoint, **loading_options(trust))
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, **loading_options(trust))
        context, named = max_positions(model), "the model's context"
    if config.cluster is not None and config.cluster.max_length < context:
        context, named = config.cluster.max_length, "cluster.max_length"
    return tokenizer, PromptLimit.of(context, named, config.sampling.max_prompt_tokens), context


def _fit_task(config: TrainConfig, task: Task[Any], tokenizer: Any, limit: PromptLimit, context: int) -> Task[Any]:
    """The run's own task with the prompts that fit. Raises SetupError as `build_tasks` says."""
    try:
        fitted, prompt = fit_prompts(task, tokenizer, limit)
    except NoChatTemplateError as error:
        raise SetupError(f"task.options.{error}") from error
    except ValueError as error:
        raise SetupError(str(error)) from error
    row = min(context, prompt + config.sampling.max_new_tokens)
    if config.batch.max_tokens is not None and row > config.batch.max_tokens:
        raise SetupError(
            f"batch.max_tokens is {config.batch.max_tokens}: must be at least {row}, the tokens of the longest prompt "
            f"and response, {prompt} + {row - prompt}"
        )
    return fitted


def _fit_further(item: FurtherTask, tokenizer: Any, limit: PromptLimit) -> FurtherTask:
    """A task of `evaluation.tasks` with the prompts that fit. Raises SetupError as `build_tasks` says."""
    title, where = item.plan.title, f"evaluation.tasks, {item.plan.title}: "
    try:
        return FurtherTask(
            item.plan, fit_held_out(item.task, tokenizer, limit, title=title, problems=item.plan.problems)
        )
    except NoChatTemplateError as error:
        raise SetupError(f"{where}options.{error}") from error
    except ValueError as error:
        raise SetupError(f"{where}{error}") from error


def initial_checkpoint(config: TrainConfig, task: Task[Any], console: Console) -> Path:
    """The checkpoint that training starts from: model.path, or the tiny model warm-started on the task (cached)."""
    if config.model.path is not None:
        return config.model.path
    start = warm_start(task, config.warm_start, console)
    how = "from the cache" if start.cached else f"trained in {start.seconds:.0f} s"
    log.info("warm start: %s, loss %.3f nats per token, in %s", how, start.loss, start.directory)
    return start.directory


def load_vocabulary(checkpoint: Path, config: ModelConfig) -> Vocabulary:
    """The tokenizer of a transformers checkpoint, with the end tokens of tokenizer and generation config.

    Raises SetupError if there is no end token, or the checkpoint needs code that model.trust_remote_code doesn't allow.
    """
    with _refused(checkpoint):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **loading_options(config.trust_remote_code))
        end_ids = checkpoint_end_tokens(checkpoint, tokenizer, trust_remote_code=config.trust_remote_code)
    if not end_ids:
        raise SetupError(f"model.path: the tokenizer of {checkpoint} has no end token; a response needs one")
    pad = tokenizer.pad_token_id
    return Vocabulary(tokenizer, end_ids, end_ids[0] if pad is None else int(pad))


def load_model(checkpoint: Path, config: ModelConfig) -> Any:
    """The model of a transformers checkpoint, in float32 on its device.

    Raises SetupError if the checkpoint needs code that model.trust_remote_code doesn't allow.
    """
    with _refused(checkpoint):
        return checkpoints.load_model(
            checkpoint,
            dtype=torch.float32,
            device=pick_device(config.device),
            trust_remote_code=config.trust_remote_code,
        )


def _refused(checkpoint: Path) -> AbstractContextManager[None]:
    """Turns the refusal to run the checkpoint's code into a SetupError that names model.trust_remote_code."""
    return refusal_names("set model.trust_remote_code=true", checkpoint, SetupError)


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA if available, else the CPU. Raises SetupError for a missing device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises an AssertionError
        raise SetupError(f"model.device is {name!r}: {error}") from error


@contextmanager
def open_reward_worker(config: TrainConfig, task: Task[Any]) -> Iterator[Task[Any]]:
    """The task, its rewards computed in separate processes with a deadline, until the block is left."""
    name, options = config.task.name, config.task.options.model_dump()
    with IsolatedTask(task, name, options, **config.reward.model_dump()) as isolated:
        yield isolated


@contextmanager
def open_engines(config: TrainConfig, task: Task[Any], vocabulary: Vocabulary) -> Iterator[BuildEngines]:
    """Start the cluster of `config.cluster`, if there is one, until the block is left; yields what builds engines.

    Raises SetupError where the cluster can't be started as configured.
    """
    if config.cluster is None:
        yield partial(_local_engines, config, vocabulary)
        return
    with ExitStack() as stack:
        try:
            build = stack.enter_context(open_cluster(config, config.cluster))
        except ValueError as error:
            raise SetupError(str(error)) from error
        yield partial(build, vocabulary.end_ids, vocabulary.pad_id)


def _local_engines(config: TrainConfig, vocabulary: Vocabulary, checkpoint: Path, restarts: int) -> Engines:
    """Engines in this process. In float32, rollouts use the trainer's own model; in bfloat16, a bfloat16 copy of it.
    With a KL term the checkpoint's weights are the reference. On a CPU, memory that a step frees is kept for the next.
    """
    precision = getattr(torch, config.model.precision)
    shared = precision == torch.float32
    model = load_model(checkpoint, config.model)
    if model.device.type == "cpu":
        keep_freed_memory()
    infer = GenerateInfer(
        model if shared else copy.deepcopy(model).to(precision),
        end_ids=vocabulary.end_ids,
        pad_id=vocabulary.pad_id,
        tokenizer=vocabulary.tokenizer,
    )
    train = TorchTrain(
        model,
        vocabulary.tokenizer,
        optimizer=config.optimizer,
        loss=config.loss,
        temperature=config.sampling.temperature,
        micro_batch_size=config.batch.micro_batch_size,
        max_tokens=config.batch.max_tokens,
        log_prob_micro_batch_size=config.batch.log_prob_micro_batch_size,
        share_prompts=config.batch.share_prompts,
        precision=precision,
        reference=load_model(checkpoint, config.model) if config.loss.kl_coef else None,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    if config.signals.source != "separate":
        tapped = train if config.signals.source == "training" else None
        return Engines(infer=infer, train=train, attn=None, weight_sync=LocalWeightSync(train, infer), tapped=tapped)
    attn = ObserveAttn(
        copy.deepcopy(model),
        config.signals,
        micro_batch_size=config.batch.micro_batch_size,
        max_tokens=config.batch.max_tokens,
        precision=precision,
    )
    return Engines(infer=infer, train=train, attn=attn, weight_sync=LocalWeightSync(train, infer, attn))
