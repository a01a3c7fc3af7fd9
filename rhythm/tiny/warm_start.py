"""Supervised warm start: trains a tiny model on worked solutions before reinforcement learning.

The result is an ordinary transformers checkpoint. It is cached under a key computed from everything it depends on: the
configuration, the text of every training example, the source of this module and of the model's, and torch's version.

Shapes: B rows of a batch, T tokens (right-padded).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from rhythm.system.directory_lock import lock_directory
from rhythm.system.progress import Heartbeat, Rate, duration
from rhythm.system.writing import naming
from rhythm.tasks.base import Task
from rhythm.tiny import model as tiny_model
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint

log = logging.getLogger(__name__)

_RECORD = "warm_start.json"


class WarmStartConfig(BaseModel, extra="forbid", frozen=True):
    """How the tiny model is trained before reinforcement learning."""

    steps: int = Field(default=400, ge=1, description="gradient steps")
    batch_size: int = Field(default=128, ge=1, description="worked solutions per gradient step")
    examples: int | None = Field(
        default=None, ge=1, description="train on the first so many training instances; null: all"
    )
    learning_rate: float = Field(default=2e-3, gt=0, allow_inf_nan=False, description="peak learning rate of AdamW")
    final_learning_rate: float = Field(
        default=0.1, ge=0, le=1, description="learning rate at the end, as a fraction of the peak"
    )
    warmup_steps: int = Field(default=50, ge=0, description="steps over which the learning rate rises to its peak")
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False, description="AdamW's weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients with a larger norm are scaled down to it")
    seed: int = Field(default=0, ge=0, description="seed of the order of the examples")
    cache_dir: Path = Field(default=Path("runs/cache"), description="directory of finished warm starts")
    model: TinyModelConfig = Field(default=TinyModelConfig(), description="shape of the tiny model")


@dataclass(frozen=True)
class WarmStart:
    """A finished warm start: its checkpoint, loss and training time."""

    directory: Path
    cached: bool
    loss: float  # nats per response token, mean over the last tenth of the steps
    seconds: float  # time spent training, also if this one was loaded from the cache


@dataclass(frozen=True)
class Example:
    """A worked solution as token ids; the response ends in EOS."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


def warm_start(task: Task[Any], config: WarmStartConfig, console: Console | None = None) -> WarmStart:
    """The warm-started checkpoint for `task`: from the cache, or trained now, with a progress bar.

    The same seed, number of threads and machine give bitwise equal weights. Raises ValueError if `examples` exceeds the
    task's training set, and FloatingPointError if the loss becomes NaN or infinite.
    """
    texts = worked_solutions(task, config)
    directory = config.cache_dir / f"warm-start-{cache_key(texts, config)}"
    if finished := _finished(directory):
        return finished
    # Another process may train the same now, such as another method of a sweep.
    with lock_directory(config.cache_dir, f".{directory.name}.lock", waiting=log.info):
        return _finished(directory) or _trained(texts, directory, config, console)


def worked_solutions(task: Task[Any], config: WarmStartConfig) -> list[tuple[str, str]]:
    """The prompts and solutions that `warm_start` trains on. Raises ValueError as it does."""
    instances = task.train
    if config.examples is not None:
        if config.examples > len(instances):
            raise ValueError(f"examples is {config.examples}: the training set has {len(instances)}")
        instances = instances[: config.examples]
    return [(task.prompt(instance), task.solution(instance)) for instance in instances]


def tokenizer_of(texts: Sequence[tuple[str, str]], config: WarmStartConfig) -> Any:
    """The tokenizer of the model that `warm_start` trains on these prompts and solutions."""
    return build_tokenizer(config.model.vocabulary, (text for pair in texts for text in pair))


def _finished(directory: Path) -> WarmStart | None:
    """The warm start in the cache, if it is there."""
    if not directory.is_dir():
        return None
    record = json.loads((directory / _RECORD).read_bytes())
    return WarmStart(directory, cached=True, loss=record["loss"], seconds=record["seconds"])


def _trained(
    texts: Sequence[tuple[str, str]], directory: Path, config: WarmStartConfig, console: Console | None
) -> WarmStart:
    """Trained now, and saved in `directory`."""
    tokenizer = tokenizer_of(texts, config)
    model = build_model(config.model, tokenizer)
    start = time.perf_counter()
    losses = train(model, encode(tokenizer, texts), config, pad=tokenizer.pad_token_id, console=console)
    last = losses[-max(1, len(losses) // 10) :]
    result = WarmStart(directory, False, sum(last) / len(last), time.perf_counter() - start)

    aside = Path(tempfile.mkdtemp(prefix=".warm-start-", dir=config.cache_dir))
    try:
        with naming(aside):
            save_checkpoint(model, tokenizer, aside)
            record = {"loss": result.loss, "seconds": result.seconds, "losses": losses}
            (aside / _RECORD).write_text(json.dumps(record), encoding="utf-8")
        aside.chmod(0o755)
        _publish(aside, directory)
    finally:
        if aside.exists():
            shutil.rmtree(aside)
    return result


def cache_key(texts: Sequence[tuple[str, str]], config: WarmStartConfig) -> str:
    """A hash (16 hexadecimal digits) of everything the trained weights depend on, except the number of threads."""
    parts = {
        "config": config.model_dump(exclude={"cache_dir"}),
        "texts": texts,
        "code": [Path(file).read_text(encoding="utf-8") for file in (__file__, tiny_model.__file__)],
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[tuple[str, str]]) -> list[Example]:
    """Tokenize (prompt, solution) pairs, with BOS before the prompt and EOS after the solution."""
    prompts = tokenizer([prompt for prompt, _ in texts]).input_ids
    responses = tokenizer([solution for _, solution in texts], add_special_tokens=False).input_ids
    return [
        Example(tuple(prompt), (*response, tokenizer.eos_token_id))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def train(
    model: torch.nn.Module,
    examples: Sequence[Example],
    config: WarmStartConfig,
    pad: int,
    console: Console | None = None,
) -> list[float]:
    """Train `model` in place on the response tokens; returns each step's loss."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    model.train()
    losses: list[float] = []
    start, rate = time.perf_counter(), Rate("step")

    def status() -> str:
        done, seconds = len(losses), time.perf_counter() - start
        if not done:
            return f"warm start: 0/{config.steps} steps"
        left = duration((config.steps - done) * seconds / done)
        return (
            f"warm start: {done}/{config.steps} steps, {rate.text(seconds / done)}, loss {losses[-1]:.3f}, {left} left"
        )

    # On a terminal the progress bar shows the same.
    signs = nullcontext() if console is None or console.is_terminal else Heartbeat(status, log.info)
    with _progress(console) as progress, signs:
        bar = progress.add_task("warm start", total=config.steps, rate=0.0, loss=math.nan)
        batches = _batches(examples, config)
        for step in range(config.steps):
            input_ids_BT, response_mask_BT = collate(next(batches), pad)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            loss = response_loss(model, input_ids_BT, response_mask_BT)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"loss is {losses[-1]} at step {step}: lower learning_rate")
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            progress.update(bar, advance=1, rate=len(losses) / (time.perf_counter() - start), loss=losses[-1])
    return losses


def collate(examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded `input_ids` [B, T] int64 and the mask [B, T] bool of the response tokens."""
    longest = max(len(example.prompt) + len(example.response) for example in examples)
    input_ids_BT = torch.full((len(examples), longest), pad)
    response_mask_BT = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example.prompt) + len(example.response)
        input_ids_BT[row, :end] = torch.tensor(example.prompt + example.response)
        response_mask_BT[row, start:end] = True
    return input_ids_BT, response_mask_BT


def response_loss(model: torch.nn.Module, input_ids_BT: Tensor, response_mask_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the response tokens, in nats. No mask is needed: padding is on the right."""
    logits_BTV = model(input_ids=input_ids_BT, use_cache=False).logits
    targets_BT = input_ids_BT.masked_fill(~response_mask_BT, -100)  # cross_entropy's ignore_index
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), targets_BT[:, 1:].flatten())


def learning_rate(step: int, config: WarmStartConfig) -> float:
    """The learning rate at `step`: half a cosine from the peak to `final_learning_rate` × the peak, times the linear
    warm-up.
    """
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    floor = config.final_learning_rate
    return config.learning_rate * rise * (floor + (1 - floor) * cosine)


def _batches(examples: Sequence[Example], config: WarmStartConfig) -> Iterator[list[Example]]:
    """Endless batches. Each epoch is a new random order of the examples; epochs may end within a batch."""
    generator = torch.Generator().manual_seed(config.seed)
    order: list[int] = []
    while True:
        while len(order) < config.batch_size:
            order += torch.randperm(len(examples), generator=generator).tolist()
        yield [examples[index] for index in order[: config.batch_size]]
        del order[: config.batch_size]


def _publish(aside: Path, directory: Path) -> None:
    """Rename atomically. If another run finished first, its result, which is equal, is kept."""
    try:
        os.rename(aside, directory)
    except OSError:
        if not directory.is_dir():
            raise


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} steps/s, loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
