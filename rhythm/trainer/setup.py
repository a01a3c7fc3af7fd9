"""From a configuration to engines that are ready to work."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from rhythm.backends import choose
from rhythm.engines.attention import ObserveAttn
from rhythm.engines.generate import GenerateInfer
from rhythm.engines.torch_train import TorchTrain
from rhythm.tasks import Task, load_task
from rhythm.trainer.config import ModelConfig, TrainConfig
from rhythm.trainer.step import Engines
from rhythm.warm_start import warm_start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """A transformers model in float32 on its device, and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a response: the tokenizer's and the checkpoint's own."""
        own = self.model.generation_config.eos_token_id
        listed = own if isinstance(own, list) else [own]
        return sorted({i for i in [*listed, self.tokenizer.eos_token_id] if i is not None})

    @property
    def pad_id(self) -> int:
        """The padding token, or an end token where the tokenizer has none."""
        pad = self.tokenizer.pad_token_id
        return self.end_ids[0] if pad is None else int(pad)


class SetupError(ValueError):
    """The configuration asks for something that isn't there; the message names the key."""


def check_machine(config: TrainConfig) -> None:
    """Raise SetupError for what is missing on this machine, before anything is built or written."""
    device = pick_device(config.model.device)
    try:
        choose(config.signals.backend, torch.empty(0, device=device))
    except (ValueError, RuntimeError) as error:
        raise SetupError(f"signals.backend: {error}") from error
    if config.model.path is not None and not config.model.path.is_dir():
        raise SetupError(f"model.path is {config.model.path}: no such directory")


def build_task(config: TrainConfig) -> Task[Any]:
    """The task. Raises SetupError where its options or the sizes asked of it don't go together."""
    try:
        task = load_task(config.task.name, config.task.options.model_dump())
    except ValueError as error:
        raise SetupError(f"task.options: {error}") from error
    wanted = config.warm_start.examples
    if config.model.path is None and wanted is not None and wanted > len(task.train):
        raise SetupError(f"warm_start.examples is {wanted}: the task has {len(task.train)} training instances")
    return task


def initial_checkpoint(config: TrainConfig, task: Task[Any], console: Console) -> Path:
    """Where the policy starts: the checkpoint given, or the tiny model warm-started on the task (cached)."""
    if config.model.path is not None:
        return config.model.path
    start = warm_start(task, config.warm_start, console)
    how = "from the cache" if start.cached else f"trained in {start.seconds:.0f} s"
    log.info("warm start: %s, loss %.3f nats a token, in %s", how, start.loss, start.directory)
    return start.directory


def load_policy(checkpoint: Path, config: ModelConfig) -> Policy:
    """The model and tokenizer of a transformers checkpoint. Raises SetupError if nothing ends a response."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    # Memory of torch's own: tensors mapped from a file may be aligned differently, and sums then ordered
    # differently.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    policy = Policy(
        model=model.to(pick_device(config.device)),
        tokenizer=AutoTokenizer.from_pretrained(checkpoint, local_files_only=True),
    )
    if not policy.end_ids:
        raise SetupError(f"model.path: the tokenizer of {checkpoint} has no end token; a response needs one")
    return policy


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA where there is one. Raises SetupError for a device that this machine hasn't got."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA answers with an assertion
        raise SetupError(f"model.device is {name!r}: {error}") from error


def build_engines(config: TrainConfig, policy: Policy, reference: Policy | None) -> Engines:
    """Engines of one process. In float32 rollouts come from the trainer's own model; bfloat16 takes a copy in
    bfloat16.

    `reference`: the initial policy, for the KL term; None where there is none.
    """
    precision = getattr(torch, config.model.precision)
    shared = precision == torch.float32
    return Engines(
        infer=GenerateInfer(
            policy.model if shared else copy.deepcopy(policy.model).to(precision),
            end_ids=policy.end_ids,
            pad_id=policy.pad_id,
        ),
        train=TorchTrain(
            policy.model,
            policy.tokenizer,
            optimizer=config.optimizer,
            loss=config.loss,
            temperature=config.sampling.temperature,
            micro_batch_size=config.batch.micro_batch_size,
            precision=precision,
            reference=None if reference is None else reference.model,
        ),
        attn=None
        if config.attn == "inline"
        else ObserveAttn(
            copy.deepcopy(policy.model),
            config.signals,
            micro_batch_size=config.batch.micro_batch_size,
            precision=precision,
        ),
    )
