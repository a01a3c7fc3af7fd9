"""python -m benchmarks.trainer_workers rhythm|trl CONFIG THREADS KEY=VALUE …: a trainer of benchmarks.trainer.

Writes `{}` when it is ready. Takes one training step for each line that it reads, and writes its seconds by part as a
line of JSON:

    generation   prompts to tokens of the responses (TRL: with tokenizing and decoding)
    reward       texts to scores
    log_probs    the pass over the batch that gives the old log-probs
    gamma        attention statistics and γ
    training     forward and backward passes, optimizer
    other        what is left: batches, advantages, metrics
    total        of these
    cpu          processor seconds of the trainer's process, which other processes hardly change
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from rhythm.cli.config_file import load_config
from rhythm.trainer.config import TrainConfig

PARTS = ("generation", "reward", "log_probs", "gamma", "training", "other", "total", "cpu")

Seconds = dict[str, float]


def main() -> None:
    name, config, threads, *overrides = sys.argv[1:]
    torch.set_num_threads(int(threads))
    link = Link()
    WORKERS[name](link, load_config(Path(config), overrides))


class Link:
    """The orders on stdin and the answers on stdout; what else is printed goes to stderr."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, seconds: Seconds) -> None:
        self._answers.write(json.dumps(seconds) + "\n")
        self._answers.flush()

    def told(self) -> bool:
        """Waits for the word to take a step; False when there will be none."""
        return bool(sys.stdin.readline())


def rhythm_worker(link: Link, run: TrainConfig) -> None:
    """Steps of rhythm-train."""
    from rhythm.trainer import setup
    from rhythm.trainer.step import train_step

    task = setup.build_task(run)
    assert run.model.path is not None
    vocabulary = setup.load_vocabulary(run.model.path, run.model)
    clock = _Clock()
    with ExitStack() as stack:
        isolated = stack.enter_context(setup.open_reward_worker(run, task))
        engines = stack.enter_context(setup.open_engines(run, task, vocabulary))(run.model.path, 0)
        clock.measure(engines.infer, "generate", "generation")
        clock.measure(engines.train, "log_probs", "log_probs")
        clock.measure(engines.train, "step", "training")
        if engines.tapped is not None:
            clock.measure(engines.train, "tapped_step", "training")
        link.send({})
        step = 0
        while link.told():
            step += 1
            clock.start()
            record, *_ = train_step(engines, isolated, vocabulary.tokenizer, run, step=step, groups=None)
            seconds = clock.stop()
            statistics = record["seconds_attention"] or 0.0
            seconds["reward"] = (record["seconds_rollout"] or 0.0) - seconds["generation"]
            seconds["gamma"] = statistics
            source = "training" if engines.tapped is not None else "log_probs"
            # γ itself is made outside that pass; what it takes is below a millisecond.
            seconds[source] -= statistics
            link.send(_with_rest(seconds))


def trl_worker(link: Link, run: TrainConfig) -> None:
    """Steps of TRL's GRPOTrainer on the same prompts, with the same batch sizes, sampling and optimizer settings.
    Gradient checkpointing, TRL's default, is off: rhythm-train has none.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]  # exported lazily

    from rhythm.trainer.rollout import batch_instances
    from rhythm.trainer.setup import build_task

    task, batch, optimizer = build_task(run), run.batch, run.optimizer
    instances = [
        instance
        for step in range(1, run.steps + 1)
        for instance in batch_instances(task.train, batch.prompts_per_batch, seed=run.seed, step=step)
    ]
    clock = _Clock()

    def reward(completions: list[str], row: list[int], **_: Any) -> list[float]:
        return [task.reward(instances[i], text).score for i, text in zip(row, completions, strict=True)]

    class OneStepAtATime(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        """Waits before each generation, and sends the seconds after the last gradient step on its responses."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % batch.gradient_steps == 0:
                if not link.told():
                    raise _EndedError
                clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % batch.gradient_steps == 0:
                seconds = clock.stop()
                drawn = seconds.pop("drawn")
                seconds["training"] = seconds["total"] - drawn
                link.send(_with_rest(seconds))

    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(run.model.path, dtype=torch.float32),
            reward,
            GRPOConfig(
                output_dir=scratch,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=batch.mini_batch_size,
                steps_per_generation=batch.gradient_steps,
                num_generations=batch.responses_per_prompt,
                max_completion_length=run.sampling.max_new_tokens,
                temperature=run.sampling.temperature,
                learning_rate=optimizer.lr,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=optimizer.warmup_steps,
                max_grad_norm=optimizer.max_grad_norm,
                shuffle_dataset=False,
                max_steps=run.steps * batch.gradient_steps,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            Dataset.from_list([{"prompt": task.prompt(one), "row": row} for row, one in enumerate(instances)]),
            processing_class=AutoTokenizer.from_pretrained(run.model.path),
            callbacks=[OneStepAtATime()],
        )
        clock.measure(trainer, "_generate_and_score_completions", "drawn")
        clock.measure(trainer, "_generate", "generation")
        clock.measure(trainer, "_calculate_rewards", "reward")
        clock.measure(trainer, "_get_per_token_logps_and_entropies", "log_probs", within="drawn")
        link.send({})
        with suppress(_EndedError):
            trainer.train()


class _EndedError(Exception):
    """No further step is wanted."""


class _Clock:
    """Seconds spent in methods of objects, by part, between `start` and `stop`."""

    def __init__(self) -> None:
        self._seconds: Seconds = {}
        self._running: list[str] = []
        self._began = self._cpu = 0.0

    def start(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> Seconds:
        self._seconds["total"] = time.perf_counter() - self._began
        self._seconds["cpu"] = time.process_time() - self._cpu
        return self._seconds

    def measure(self, owner: Any, method: str, part: str, within: str | None = None) -> None:
        """From here on the time in this method counts for `part`; with `within`, calls inside that part alone."""
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            self._running.append(part)
            try:
                return call(*args, **options)
            finally:
                self._running.pop()
                if within is None or within in self._running:
                    spent = time.perf_counter() - began
                    self._seconds[part] = self._seconds.get(part, 0.0) + spent

        setattr(owner, method, timed)


def _with_rest(seconds: Seconds) -> Seconds:
    known = sum(seconds[part] for part in PARTS if part not in ("other", "total", "cpu"))
    return {**seconds, "other": seconds["total"] - known}


WORKERS = {"rhythm": rhythm_worker, "trl": trl_worker}

if __name__ == "__main__":
    main()
